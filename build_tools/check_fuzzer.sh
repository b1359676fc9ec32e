#!/bin/sh
# Says in one line that libFuzzer is missing, or nothing if it is there. CLANG names the compiler.

CLANG=${CLANG:-clang++}
if ! printf 'extern "C" int LLVMFuzzerTestOneInput(const char*, long) { return 0; }' |
  $CLANG -x c++ - -fsanitize=fuzzer -o /dev/null 2>/dev/null
then
  echo "dice_op: $CLANG cannot build a program with libFuzzer (Debian, Ubuntu: apt install clang;" \
    "or name one: make fuzz CLANG=/path/to/clang++)" >&2
  exit 1
fi
