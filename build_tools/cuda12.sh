#!/bin/sh
# Makes build/cuda12, a toolkit of CUDA 12 to compile the wheels with, or says in one line what is
# missing. It installs nothing. pip has no nvcc of CUDA 12, but Debian trixie has one, which also runs
# on Debian 12. The headers and the runtime come from pip, because Debian packs them together with a
# gigabyte of other libraries.

set -u
cd "$(dirname "$0")/.." || exit 1
[ ! -x build/cuda12/bin/nvcc ] || exit 0
part=$PWD/build/cuda12.part
made=$part/made
log=build/cuda12.log # what the commands say

fail() {
  echo "dice_op: $*. Another toolkit of CUDA 12 will do: CUDACXX_12=/path/to/nvcc" >&2
  exit 1
}

pip() { # folder, requirements
  .venv/bin/python -m pip install --no-input --disable-pip-version-check --no-deps --target "$@" >>$log 2>&1 ||
    fail "pip cannot fetch CUDA's headers and runtime: is there a network? (pip's words: $log)"
}

command -v apt-get >/dev/null && command -v dpkg-deb >/dev/null ||
  fail "this is no Debian: apt-get and dpkg-deb are missing"
echo "Making build/cuda12 (120 MB to download)"
trap 'rm -rf "$part"' EXIT
rm -rf "$part" && mkdir -p "$part/apt" "$made/bin" "$made/nvvm" "$made/lib64" "$part/deb" || exit 1

# apt gets a configuration of its own here: this system's mirrors, but trixie's packages.
keys=/usr/share/keyrings/debian-archive-keyring.gpg
apt-get update --print-uris 2>$log |
  sed -n "s#^'\(.*\)/dists/[a-z]*/InRelease'.*#deb [signed-by=$keys] \1 trixie non-free#p" |
  sort -u >"$part/sources"
cat >"$part/apt.conf" <<END
Dir::State "$part/apt";
Dir::Cache "$part/apt";
Dir::Etc::SourceList "$part/sources";
Dir::Etc::SourceParts "/dev/null";
END
(
  cd "$part/deb" || exit 1
  export APT_CONFIG="$part/apt.conf"
  apt-get update # this fails if one mirror fails, but another may have it
  apt-get download nvidia-cuda-toolkit
) >>$log 2>&1 && dpkg-deb -x "$part"/deb/*.deb "$part/deb" 2>>$log ||
  fail "apt cannot fetch Debian trixie's nvidia-cuda-toolkit: is this Debian, is there a network? (its words: $log)"

# The headers must have nvcc's version. The runtime need not, and pip has a static one since 12.9.
pip "$part/pip" 'nvidia-cuda-runtime-cu12==12.4.*' 'nvidia-cuda-nvcc-cu12==12.4.*' 'nvidia-cuda-cccl-cu12==12.4.*'
pip "$part/static" 'nvidia-cuda-runtime-cu12==12.9.*'

(
  cd "$part/deb/usr" && rm lib/nvidia-cuda-toolkit/bin/nvcc.profile && # a link to /etc
    mv lib/nvidia-cuda-toolkit/bin/* bin/cudafe++ bin/fatbinary bin/nvlink bin/ptxas "$made/bin" &&
    mv lib/nvidia-cuda-toolkit/libdevice "$made/nvvm" &&
    cp -r "$part"/pip/nvidia/*/include "$made" &&
    mv "$part/static/nvidia/cuda_runtime/lib/libcudart_static.a" "$made/lib64" || exit 1
  printf '!<arch>\n' >"$made/lib64/libcudadevrt.a" # nvcc wants this library, but no kernel needs it
  cat >"$made/bin/nvcc.profile" <<'END'
TOP = $(_HERE_)/..
NVVMIR_LIBRARY_DIR = $(TOP)/nvvm/libdevice
PATH += $(_HERE_):
INCLUDES += "-I$(TOP)/include" $(_SPACE_)
LIBRARIES =+ $(_SPACE_) "-L$(TOP)/lib64"
END
  echo '__global__ void kernel() {} int main() { kernel<<<1, 1>>>(); }' >"$part/try.cu"
  "$made/bin/nvcc" -o "$part/try" "$part/try.cu"
) >>$log 2>&1 || fail "Debian trixie's nvcc compiles nothing here: it needs glibc 2.34 and g++ 13 or older (its words: $log)"

rm -rf build/cuda12 && mv "$made" build/cuda12
echo "build/cuda12/bin/nvcc is ready; make wheels finds it"
