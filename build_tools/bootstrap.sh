#!/bin/sh
# Makes .venv ready to build, test and run the demo, or says in one line what is missing. Does
# nothing where it is ready: the file .venv/ready, written last, tells for what.
#
#   PYTHON      the interpreter to make it with
#   TENSORFLOW  the TensorFlow to put into it, such as "tensorflow==2.21.*" for GPUs; without it
#               what is there stays, or pyproject.toml's default goes in

set -u
cd "$(dirname "$0")/.." || exit 1
unset PYTHONPATH PYTHONHOME
log=.venv/pip.log # of its errors; the rest is on the screen

fail() {
  echo "dice_op: $*" >&2
  exit 1
}

version() {
  "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null
}

suits() { # TensorFlow 2.21 has wheels for these
  case $(version "$1") in 3.10 | 3.11 | 3.12 | 3.13) ;; *) false ;; esac
}

# --- is there anything to do? -----------------------------------------------------------------------

has=$(cat .venv/tensorflow 2>/dev/null)
TENSORFLOW=${TENSORFLOW:-$has}
toolkit= # pip's, where CUDA kernels are asked for and there is no nvcc
if [ "${DICE_OP_CUDA:-}" = on ] && ! command -v nvcc >/dev/null && [ ! -x "${CUDA_HOME:-}/bin/nvcc" ]; then
  toolkit=--group=cuda
fi
ready="$PWD $(cksum <pyproject.toml) $toolkit"
keep=
# Another TensorFlow needs another .venv: its two packages share files, and would overwrite them.
if suits .venv/bin/python && [ "$TENSORFLOW" = "$has" ] &&
  { [ -z "${PYTHON:-}" ] || [ "$(version "$PYTHON")" = "$(version .venv/bin/python)" ]; }; then
  case $(cat .venv/ready 2>/dev/null) in
    "$ready") exit 0 ;;
    "" | "$PWD "*) .venv/bin/python -m pip --version >/dev/null 2>&1 && keep=yes ;;
    *) ;; # made elsewhere: its scripts point there
  esac
fi

# --- what the machine must have ---------------------------------------------------------------------

sh build_tools/check_compiler.sh || exit 1

if [ "$keep" ]; then
  echo "Completing .venv"
else
  if [ "${PYTHON:-}" ]; then set -- "$PYTHON"; else set -- python3 python3.13 python3.12 python3.11 python3.10; fi
  for python; do
    suits "$python" && break
  done
  if ! suits "$python"; then
    found=$(version "$1")
    fail "Python 3.10 to 3.13 is needed, but $1 is ${found:-missing or does not run};" \
      "install one, and name it if it is not on PATH: make ... PYTHON=/path/to/python3.12"
  fi
  name=python$(version "$python")
  "$python" -c 'import ensurepip, venv' 2>/dev/null ||
    fail "$python has no venv module; install it (Debian, Ubuntu: apt install $name-venv $name-dev)"
  "$python" -c 'import os, sysconfig; os.stat(sysconfig.get_path("include") + "/Python.h")' 2>/dev/null ||
    fail "$python has no C headers (Python.h); install them (Debian, Ubuntu: apt install $name-dev)"
  [ "$(df -Pk . | awk 'NR == 2 { print $4 }')" -gt 3500000 ] ||
    fail "the disk is too full: .venv and the build need 3.5 GB in $PWD"

  echo "Making .venv with $python ($(version "$python"))"
  # A build is for one Python, TensorFlow and place.
  rm -rf build .venv/ready
  "$python" -m venv --clear .venv >/dev/null 2>&1 || fail "'$python -m venv .venv' fails in $PWD; run it to see why"
  echo "$TENSORFLOW" >.venv/tensorflow
fi

# --- the packages -----------------------------------------------------------------------------------

install() {
  .venv/bin/python -m pip install --no-input --disable-pip-version-check "$@" 2>$log && return
  if grep -q 'No space left on device' $log; then
    fail "the disk is full (pip's words: $log)"
  elif grep -qE 'Connection|NameResolution|Timeout|Proxy|SSL|IncompleteRead|distribution found for pip' $log; then
    fail "pip cannot reach its package index: is there a network, is a proxy needed? (pip's words: $log)"
  fi
  fail "pip fails with Python $(version .venv/bin/python) on $(uname -m):" \
    "$(grep '^ERROR' $log | tail -n 1) (all of pip's words: $log)"
}

install --quiet 'pip>=25.1' # the one that venv brings may know no dependency groups
[ "$TENSORFLOW" ] || TENSORFLOW=--group=tensorflow
install ${keep:+--quiet} "$TENSORFLOW" --group=dev $toolkit

# An editable install of our own, for `make build` needs no pip: dice_op/ is found where it is.
echo "$PWD" >"$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/dice_op.pth"
echo "$ready" >.venv/ready
