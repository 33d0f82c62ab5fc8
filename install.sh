#!/usr/bin/env bash
# Make a virtual environment with the project in it: `./install.sh [--locked] [folder]`, by default .venv. With --locked the
# packages have the versions of constraints.txt; without it, the newest that pyproject.toml allows.
# FFCV compiles against OpenCV and libjpeg-turbo, our own decoder of crops (sam_repro/data/images/jpeg.c) against the latter. Where
# apt may be used (root, or sudo without a password) they are installed; where not, one line says what to run, and the
# project works with its torch loader and Pillow's decoder.
set -euo pipefail
cd "$(dirname "$0")"
locked=
if [ "${1:-}" = --locked ]; then
  locked='-c constraints.txt'
  shift
fi
venv=${1:-.venv}
case $venv in -*) echo "error: there is no option $venv; ./install.sh [--locked] [folder]" >&2; exit 2 ;; esac

python=${PYTHON:-}
for candidate in python3.12 python3.11 python3; do
  [ -n "$python" ] && break
  if command -v "$candidate" > /dev/null && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null; then
    python=$candidate
  fi
done
[ -n "$python" ] || { echo "error: Python 3.11 or newer is needed; set PYTHON to its path" >&2; exit 2; }

as_root=
if [ "$(id -u)" != 0 ]; then
  as_root='sudo -n'
  sudo -n true 2> /dev/null || as_root=no
fi
packages=(g++ pkg-config libturbojpeg0-dev libopencv-dev libjpeg-dev)
"$python" -c 'import ensurepip, venv' 2> /dev/null || packages+=("python$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')-venv")
libraries() { command -v g++ > /dev/null && pkg-config --exists opencv4 libturbojpeg 2> /dev/null; }

if ! libraries || [ "${#packages[@]}" -gt 5 ]; then
  if [ "$as_root" != no ] && command -v apt-get > /dev/null; then
    echo "Installing system libraries for FFCV: ${packages[*]}"
    export DEBIAN_FRONTEND=noninteractive
    { $as_root apt-get update -qq && $as_root apt-get install -y -qq --no-install-recommends "${packages[@]}" > /dev/null; } ||
      echo "apt-get failed; going on without" >&2
  fi
fi

[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
echo "Installing Python packages into $venv (PyTorch is large: a few minutes)"
"$venv/bin/python" -m pip install -q --upgrade pip
"$venv/bin/python" -m pip install -q $locked -e '.[test,dev]'

# --no-deps: FFCV asks for the OpenCV build with a GUI, which needs libGL; the headless one is installed already.
if libraries && "$venv/bin/python" -m pip install -q setuptools && "$venv/bin/python" -m pip install -q --no-deps ffcv==1.0.2; then
  echo "FFCV is installed."
else
  echo "FFCV is not installed, the torch loader serves instead. For FFCV: sudo apt-get install ${packages[*]} && rm -f $venv/ready && make install"
fi
