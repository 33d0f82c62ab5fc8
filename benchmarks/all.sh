#!/usr/bin/env bash
# The GPU benchmarks of this folder but for peers.py and restart.py, in the order that wastes least of a short slot:
#
#   benchmarks/all.sh results/benchmarks [folder with the peers]        (IMAGES=photographs.zip adds the loaders,
#                                                                       BIG_VISION=checkout the official JAX code)
#
# First everything is compiled, four processes per GPU, side by side (nothing is timed). Then each model is timed alone on
# a GPU, then what needs all GPUs. Every JSON is written piece by piece, and a part that fails or outruns LIMIT (seconds,
# default 300) does not stop the next. step.py begins nothing after BUDGET seconds of a model, and goes on with the file
# that is there. MODELS, PARTIES and ROUNDS (of step.py) and PARTS choose: the price of Table 1 is
# MODELS=all PARTS="warm step" PARTIES="floor vanilla sam-m64 gsam-m64 gsam-m512".
set -u
cd "$(dirname "$0")/.."
out=${1:?folder for the results}; peers="${2:+--peers $2} ${BIG_VISION:+--big-vision $BIG_VISION}"
models=${MODELS:-vit_b32 resnet50 vit_b16 mixer_b16 mixer_b32 vit_s16}
if [ "$models" = all ]; then
  models="mixer_s8 resnet152 vit_b16 mixer_b16 resnet101 vit_s16 mixer_s16 resnet50 vit_b32 mixer_b32 vit_s32 mixer_s32"
fi
limit=${LIMIT:-300}
gpus=$(nvidia-smi -L | wc -l)
name=$(nvidia-smi --query-gpu=name --format=csv,noheader | head -1 | tr 'A-Z' 'a-z' | grep -o '[abh][0-9]\+' | head -1)
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$PWD/.inductor}
export TORCHINDUCTOR_COMPILE_THREADS=${TORCHINDUCTOR_COMPILE_THREADS:-8}
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$PWD/.inductor/jax}
mkdir -p "$out" "$out/logs"
parts=${PARTS:-warm step scaling eigen curvature start loader}
wanted() { [[ " $parts " == *" $1 "* ]]; }

# run LOG COMMAND...: one part, its output in a log, its last lines here
run() {
  local log=$out/logs/$1.log; shift
  timeout "$limit" "$@" > "$log" 2>&1 || echo "exit code $? from: $*"
  grep -E ' ms |^\|| failed' "$log" | cut -c1-200
}
# on_gpus LANES FUNCTION WORDS...: FUNCTION WORD for every word, on each GPU in so many lanes, the GPUs side by side
on_gpus() {
  local count=$(($1 * gpus)) function=$2 lane; shift 2; local words=("$@")
  for ((lane = 0; lane < count; lane++)); do
    (for ((i = lane; i < ${#words[@]}; i += count)); do CUDA_VISIBLE_DEVICES=$((lane % gpus)) $function "${words[i]}"; done) &
  done
  wait
}
# floor, davda54 and pytorch_optimizer run what vanilla compiles, GSAM with one group what ours-vanilla does
warm() {
  if [ -n "${PARTIES:-}" ]; then warm_some "$1" $PARTIES; return; fi
  warm_some "$1" timm vanilla gsam-m64 & warm_some "$1" ours-vanilla juntang jax
  wait
}
warm_some() {
  local model=$1; shift
  run "warm-$model-$1" python3 benchmarks/step.py --models "$model" --warm --rounds 1 $peers --parties "$@"
}
step() { run "step-$1" python3 benchmarks/step.py --models "$1" $peers ${PARTIES:+--parties $PARTIES} --rounds "${ROUNDS:-4}" \
  --resume --seconds "${BUDGET:-100000}" --output "$out/$name-step-$1.json"; }
eigen() { run "eigen-$1" python3 benchmarks/eigen_cost.py --models "$1" --rounds 2 \
  --kinds reverse-compiled reverse-compiled-tf32 --output "$out/$name-eigen-$1.json"; }
curvature() { run "curvature-$1" python3 benchmarks/curvature.py --nets "$1" --images 128 --batch 128 --rounds 2 \
  --output "$out/$name-curvature-$1.json"; }

if wanted warm; then on_gpus 4 warm $models > /dev/null; fi
if wanted step; then on_gpus 1 step $models; fi
if wanted scaling; then
  worlds=$(for n in 1 2 4 8; do [ $n -le "$gpus" ] && echo $n; done)
  run scaling python3 benchmarks/scaling.py --gpus $worlds --parties vanilla gsam gsam-m64 --output "$out/$name-scaling.json"
fi
if wanted eigen; then on_gpus 1 eigen vit_b32 resnet50; fi
if wanted curvature; then on_gpus 1 curvature resnet18_cifar vit_s16; fi
if wanted start; then  # twice: the second finds everything compiled
  for n in 1 2; do
    rm -rf runs/profile
    timeout "$limit" python3 train.py debug=profile model=vit_b32 optim=gsam recipe.batch_size=512 recipe.steps=2 log.progress=lines 2>&1 |
      grep 'first step' | tee -a "$out/logs/start.log"
  done
fi
if wanted loader && [ -n "${IMAGES:-}" ]; then
  run loader python3 benchmarks/loader.py --images "$IMAGES" --end-to-end gsam-m512 gsam-m64 vanilla --output "$out/$name-loader.json"
fi
