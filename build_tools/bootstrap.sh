#!/bin/sh
# Makes .venv ready to build, to test and to run the demo, or says in one line what is missing. Does
# nothing if it is ready. The file .venv/ready is written last and says what it is ready for.
#
#   PYTHON      the Python to make it with
#   TENSORFLOW  the TensorFlow to install in it, such as "tensorflow==2.21.*" for GPUs. If it is not
#               set, the TensorFlow in .venv stays; a new .venv gets the default of pyproject.toml

set -u
cd "$(dirname "$0")/.." || exit 1
unset PYTHONPATH PYTHONHOME
log=.venv/pip.log # pip's errors; the rest of its output goes to the screen
# TensorFlow has wheels for these Pythons, one per line, the oldest first.
pythons=$(grep -o '"3\.[0-9]*"' build_tools/wheels.toml | tr -d '"' | sort -u -t. -k2n)

fail() {
  echo "dice_op: $*" >&2
  exit 1
}

version() {
  "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null
}

suits() {
  echo "$pythons" | grep -qxF "$(version "$1")"
}

toolkit() { # prints pip's option that installs nvcc, if CUDA kernels are wanted and the machine has none
  [ "${DICE_OP_CUDA:-}" != on ] || .venv/bin/python build_tools/find_nvcc.py --no-pip >/dev/null || echo --group=cuda
}

state() { # prints what .venv is ready for, once everything is installed
  echo "$PWD $(cksum <pyproject.toml) $(toolkit)"
}

# --- is there anything to do? -----------------------------------------------------------------------

has=$(cat .venv/tensorflow 2>/dev/null)
TENSORFLOW=${TENSORFLOW:-$has}
keep=
# Another TensorFlow needs a new .venv: tensorflow and tensorflow-cpu would overwrite each other's files.
if suits .venv/bin/python && [ "$TENSORFLOW" = "$has" ] &&
  { [ -z "${PYTHON:-}" ] || [ "$(version "$PYTHON")" = "$(version .venv/bin/python)" ]; }; then
  case $(cat .venv/ready 2>/dev/null) in
    "$(state)") exit 0 ;;
    "" | "$PWD "*) .venv/bin/python -m pip --version >/dev/null 2>&1 && keep=yes ;;
    *) ;; # .venv was made in another folder, and its scripts point there
  esac
fi

# --- what the machine must have ---------------------------------------------------------------------

sh build_tools/check_compiler.sh || exit 1

if [ "$keep" ]; then
  echo "Completing .venv"
else
  if [ "${PYTHON:-}" ]; then set -- "$PYTHON"; else set -- python3 $(echo "$pythons" | sort -rt. -k2n | sed s/^/python/); fi
  for python; do
    suits "$python" && break
  done
  if ! suits "$python"; then
    found=$(version "$1")
    fail "Python $(echo "$pythons" | head -n 1) to $(echo "$pythons" | tail -n 1) is needed," \
      "but $1 is ${found:-missing or does not run};" \
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
  # A build fits one Python, one TensorFlow and one folder.
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

install --quiet 'pip>=25.1' # pip from the venv module may not know dependency groups
[ "$TENSORFLOW" ] || TENSORFLOW=--group=tensorflow
install ${keep:+--quiet} "$TENSORFLOW" --group=dev $(toolkit)
case $(.venv/bin/python build_tools/find_ffi_header.py tensorflow) in
  \;*) install --group=xla_header ;; # TensorFlow 2.19 lacks it
esac

# This makes Python find dice_op/ in this folder, as an editable install does. `make build` then needs no pip.
echo "$PWD" >"$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/dice_op.pth"
state >.venv/ready
