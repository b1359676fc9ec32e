#!/bin/sh
# Says in one line why no C++17 program can be built here, or nothing if one can. CXX names the compiler.

fail() {
  echo "dice_op: $1 (Debian, Ubuntu: apt install g++; or name one: make ... CXX=/path/to/g++)" >&2
  exit 1
}

if [ -z "${CXX:-}" ]; then
  for CXX in c++ g++ clang++ none; do # CMake tries them in this order
    command -v $CXX >/dev/null && break
  done
  [ $CXX != none ] || fail "no C++ compiler found"
fi
command -v ${CXX%% *} >/dev/null || fail "the C++ compiler CXX=$CXX does not exist"

program=$(mktemp) || exit 1
trap 'rm -f "$program"' EXIT
if ! $CXX -x c++ -std=c++17 -o "$program" - 2>/dev/null <<'END'
#include <optional>
int main() {
  if constexpr (__cplusplus >= 201703L) return std::optional<int>(0).value();
}
END
then
  fail "$CXX cannot build a C++17 program: it is too old, or has no C++ library"
fi
