#!/usr/bin/env bash
# One slot of GPU time for the studies; the same command goes on in the next slot.
#
#   benchmarks/evidence.sh 540 /tmp/studies                       # what is missing, in the order of QUEUE below
#   benchmarks/evidence.sh 540 /tmp/studies study_tiny_search2    # or the words of one `sam-repro run`
#
# Runs for that many seconds, with runs, compile cache and logs under the folder, and leaves there rows.tgz: the ledger
# rows that are new. They belong in results/runs, are the queue's only memory, and any machine with this checkout goes on
# from them; a run that was cut off goes on only where its folder still is. The machine needs no network:
#
#   DATA      folder with tin32/ and cifar10/, as `sam-repro write arrays` leaves them (default: <folder>/data);
#             what is missing there is written from NPZ, a folder with tinyimagenet32_jpeg.npz and cifar10_jpeg.npz
#   WHEELS    folder of wheels to put before the machine's own packages (hydra-core, omegaconf, antlr4-python3-runtime)
#   GPUS, PER_GPU, PYTHON     defaults: all that nvidia-smi lists, 3 (two runs of the ViT fill an H200: 37,000 images/s
#                             of SAM with two as with six, 30,000 with one), python3
#   SAM_REPRO_COMMIT          the commit that the rows name, where the checkout came without its history
#   EXTRA     more overrides, laid over every run
set -u
seconds=${1:?seconds} work=${2:?folder}; shift 2
start=$SECONDS
cd "$(dirname "$0")/.." || exit
python=${PYTHON:-python3}
mkdir -p "$work/runs" "$work/site"
export PYTHONPATH=$work/site:$PWD TORCHINDUCTOR_CACHE_DIR=$work/inductor PYTHONUNBUFFERED=1
if [ -n "${WHEELS:-}" ]; then
  $python -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$work/site" "$WHEELS"/*.whl || exit
fi
data=${DATA:-$work/data}
for pair in tin32:tinyimagenet32 cifar10:cifar10; do
  npz=${NPZ:-}/${pair#*:}_jpeg.npz
  if [ ! -d "$data/${pair%:*}" ] && [ -f "$npz" ]; then
    $python -m sam_repro.cli write arrays --src "$npz" --dst "$data/${pair%:*}" 2> "$work/write.log"
  fi
done
touch "$work/begun"
echo "$((SECONDS - start)) s to prepare"
# A search before what takes its winners; seed 0 belongs to the searches.
QUEUE=(
  "study_noise_search --only resnet18/[vs]*"
  "study_noise --only resnet18/[vs]*=0.4 --only *-s[1-3]-*"
  "study_noise_search"
  "study_noise --only *=0.4 --only *-s[1-3]-*"
  "study_noise --only *=0.4 --only *-s[1-5]-*"
  "study_noise --only *=0.8 --only *-s[1-3]-*"
  "study_tiny_search2"
  "study_tiny --only *-s[1-5]-*"
  "study_noise --only *-s[1-5]-*"
  "study_tiny_m_search"
  "study_tiny_m --only *-s[1-5]-*"
)
if [ $# -gt 0 ]; then QUEUE=("$*"); fi
set -f
code=0
for words in "${QUEUE[@]}"; do
  left=$((seconds - (SECONDS - start)))
  [ $left -lt 20 ] && break
  $python -m sam_repro.cli run $words --gpus "${GPUS:-$(nvidia-smi -L | wc -l)}" --per-gpu "${PER_GPU:-3}" --budget "${left}s" \
    "data.root=$data/\${data.name}" log.wandb=disabled "log.runs_dir=$work/runs" sharpness.batch=512 ${EXTRA:-} || code=$?
done
set +f
find results/runs -name '*.json' -newer "$work/begun" | tar -czf "$work/rows.tgz" -T -
echo "$(tar -tzf "$work/rows.tgz" | wc -l) new rows in $work/rows.tgz"
exit $code
