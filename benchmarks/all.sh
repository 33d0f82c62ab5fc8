#!/usr/bin/env bash
# One slot of GPU time for the speeds that are missing; the same command goes on in the next slot.
#
#   BUDGET=560 benchmarks/all.sh /tmp/speeds                  # the parts below, in this order
#   PARTS=candidates benchmarks/all.sh /tmp/speeds            # or only some
#
# The folder gets every JSON as it grows, party by party, and logs/. What results/benchmarks has of this GPU is copied
# there first; of it, step.py and others go on with what is of the same commit (SAM_REPRO_COMMIT where the checkout came
# without its history: keep it the same from slot to slot). So after a slot: copy the JSON to results/benchmarks.
#
#   step        warm: everything that is missing is compiled, four processes per GPU, nothing is timed; then each model
#               alone on a GPU: the price of Table 1
#   jax         the official JAX code next to ours, ViT-B/32 and ViT-B/16 (BIG_VISION=checkout, jax, flax, optax, einops)
#   eigen       Eigen-SAM over SAM
#   curvature   eigenvalues, compared with curvlinops (WHEELS=folder of what is to be installed, without a network)
#   start       the first and the second start of train.py
#   memory      the recipe's batch under caps of 40, 80 and 141 GB
#   rehearsal   ImageNet's shape (IMAGES=folder of JPEGs)
#   candidates  faster layers that are being tried
#   scaling     one GPU and several
#   loader      (PHOTOGRAPHS=photographs.zip)
#
# BUDGET is in seconds (default: no end). Nothing is begun that cannot end in it, and a part that fails or outruns LIMIT
# (default: BUDGET) does not stop the next. GPUS, MODELS, PARTIES and ROUNDS (of step.py) choose. TOY=1 tries all of it on
# a CPU, in two minutes.
set -u
cd "$(dirname "$0")/.." || exit
out=$(realpath -m "${1:?folder for the results}"); peers="${2:+--peers $2}"
end=$((SECONDS + ${BUDGET:-1000000}))
python=${PYTHON:-python3}
models=${MODELS:-mixer_s8 resnet152 mixer_b16 resnet101 mixer_s16 vit_s32 mixer_s32 vit_s16 mixer_b32 resnet50 vit_b16 vit_b32}
# Every fourth goes to the same lane: what fits into the memory of one GPU side by side.
lanes=${MODELS:-mixer_s8 mixer_b16 vit_s16 mixer_b32 resnet152 vit_b16 resnet50 vit_b32 resnet101 mixer_s16 vit_s32 mixer_s32}
parties=${PARTIES:-vanilla floor sam-m64 gsam-m64 gsam-m512}
parts=${PARTS:-step jax eigen curvature start memory rehearsal candidates scaling loader}
rounds=${ROUNDS:-3} device=() toy_step=() toy_try=() tries=${TRY:-vit_b32 mixer_b32 resnet50 vit_s16 vit_b16}
eigen=(--rounds 2 --kinds reverse-compiled reverse-compiled-tf32) nets=(resnet18_cifar vit_s16) curve=(--images 128 --batch 128 --rounds 2) begin=(model=vit_b32 optim=gsam) trial=()
if [ -n "${TOY:-}" ]; then
  gpus=1 name=cpu tries=${TRY:-mixer_s32} toy_try=(--size 64 --batch 8 --m 4 --steps 1 --rounds 1) models=${MODELS:-vit_digits} parties=${PARTIES:-vanilla floor gsam-m4} rounds=1
  device=(--device cpu) toy_step=(--size 32 --batch 8 --m 8 4 --steps 1)
  eigen=(--tiny --batch 8 --m 4 --p 2 --rounds 1 --steps 1 --whole 2 --kinds reverse) nets=(vit_digits)
  curve=(--images 16 --batch 16 --rounds 1 --train-steps 2 --parties reverse curvlinops) trial=(--toy)
  begin=(model=vit_b32 optim=gsam model.tiny=true data.image_size=64 data.eval_resize=64 recipe.batch_size=8 optim.m=4)
else
  gpus=${GPUS:-$(nvidia-smi -L | wc -l)}
  name=$(nvidia-smi --query-gpu=name --format=csv,noheader | head -1 | tr 'A-Z' 'a-z' | grep -o '[abh][0-9]\+' | head -1)
fi
export PYTHONPATH=$PWD/.site:$PWD${PYTHONPATH:+:$PYTHONPATH} TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$PWD/.inductor}
export TORCHINDUCTOR_COMPILE_THREADS=${TORCHINDUCTOR_COMPILE_THREADS:-8}
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$PWD/.inductor/jax}
mkdir -p "$out/logs"
for file in results/benchmarks/"$name"-*.json; do
  if [ -e "$file" ] && [ ! -e "$out/${file##*/}" ]; then cp "$file" "$out"; fi
done
if [ -n "${WHEELS:-}" ]; then
  $python -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target .site "$WHEELS"/*.whl
fi
wanted() { [[ " $parts " == *" $1 "* ]] && [ "$(left)" -gt 0 ]; }
left() { echo $((end - SECONDS - 10)); }

# run LOG COMMAND...: one part, its output in a log, its last lines here
run() {
  local log=$out/logs/$1.log seconds; shift
  seconds=$(left)
  if [ "$seconds" -gt "${LIMIT:-$seconds}" ]; then seconds=$LIMIT; fi
  if [ "$seconds" -le 0 ]; then return; fi
  local code=0
  timeout -k 5 "$seconds" "$@" > "$log" 2>&1 || { code=$?; echo "exit code $code from: $*"; }
  grep -E ' ms |^\||^\{"| failed|not run| floors;' "$log" | cut -c1-200
  return $code
}
# on_gpus LANES FUNCTION WORDS...: FUNCTION WORD for every word, on each GPU in so many lanes, the GPUs side by side
on_gpus() {
  local count=$(($1 * gpus)) function=$2 lane; shift 2; local words=("$@")
  for ((lane = 0; lane < count; lane++)); do
    (for ((i = lane; i < ${#words[@]}; i += count)); do CUDA_VISIBLE_DEVICES=$((lane % gpus)) $function "${words[i]}"; done) &
  done
  wait
}
steps() { # LOG MODEL WORDS...: one process of step.py, which goes on with the model's file
  local log=$1 model=$2; shift 2
  run "$log-$model" "$python" benchmarks/step.py --models "$model" $peers "${device[@]}" "${toy_step[@]}" --rounds "$rounds" \
    --resume --seconds "$(left)" --output "$out/$name-step-$model.json" "$@"
}
# floor runs what vanilla compiles, and SAM what GSAM does
warm() {
  local mark=$TORCHINDUCTOR_CACHE_DIR/$1.warm
  if [ -e "$mark" ]; then return; fi
  steps warm "$1" --warm --parties $(printf '%s\n' $parties | grep -vE '^(floor|sam-m)') || return
  if ! grep -q 'not run' "$out/logs/warm-$1.log"; then touch "$mark"; fi
}
step() { steps step "$1" --parties $parties; }
jax() { steps jax "$1" --big-vision "$BIG_VISION" --parties floor ours-vanilla ours-floor gsam-m512 gsam-m64 jax; }
eigen() { run "eigen-$1" "$python" benchmarks/eigen_cost.py --models "$1" "${device[@]}" "${eigen[@]}" --resume \
  --seconds "$(left)" --output "$out/$name-eigen-$1.json"; }
curvature() { run "curvature-$1" "$python" benchmarks/curvature.py --nets "$1" "${device[@]}" "${curve[@]}" --resume \
  --budget "$(left)" --output "$out/$name-curvature-$1.json"; }
try() { run "candidates-$1" "$python" benchmarks/candidates.py --models "$1" "${device[@]}" "${toy_try[@]}" --resume \
  --seconds "$(left)" --output "$out/$name-candidates-$1.json"; }

if wanted step; then
  if [ "${#device[@]}" = 0 ]; then on_gpus 4 warm $lanes > /dev/null; fi
  on_gpus 1 step $models
fi
if wanted jax && [ -n "${BIG_VISION:-}" ]; then on_gpus 1 jax vit_b32 vit_b16; fi
if wanted eigen; then on_gpus 1 eigen vit_b32 resnet50; fi
if wanted curvature; then on_gpus 1 curvature "${nets[@]}"; fi
if wanted start && [ ! -e "$out/$name-start.json" ]; then
  run start "$python" benchmarks/start.py --output "$out/$name-start.json" "${begin[@]}"
fi
if wanted memory && [ "${#device[@]}" = 0 ]; then
  run memory "$python" benchmarks/memory.py --caps 40 80 141 --seconds "$(left)" --output "$out/$name-memory.json"
fi
if wanted rehearsal && [ -n "${IMAGES:-}" ]; then
  run rehearsal "$python" benchmarks/rehearsal_gpu.py --images "$IMAGES" --budget "$(left)" "${trial[@]}" --output "$out/$name-rehearsal.json"
fi
if wanted candidates; then on_gpus 1 try $tries; fi
if wanted scaling && [ "$gpus" -gt 1 ]; then
  worlds=$(for n in 1 2 4 8; do [ $n -le "$gpus" ] && echo $n; done)
  run scaling "$python" benchmarks/scaling.py --gpus $worlds --parties vanilla gsam gsam-m64 --output "$out/$name-scaling.json"
fi
if wanted loader && [ -n "${PHOTOGRAPHS:-}" ]; then
  run loader "$python" benchmarks/loader.py --images "$PHOTOGRAPHS" --end-to-end gsam-m512 gsam-m64 vanilla --output "$out/$name-loader.json"
fi
