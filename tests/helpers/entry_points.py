"""Builds and runs reliability/fuzz_entry_points.cc, with the address and undefined sanitizers.

With libFuzzer, which comes with clang, the inputs are those that reach new code. With any other
compiler they are random.
"""

import concurrent.futures
import hashlib
import json
import os
import pathlib
import shlex

from dice_op import core
from helpers.emulation import CXX
from helpers.paths import BUILD, BUILD_TOOLS, CSRC, TESTS
from helpers.processes import alone_in, output_of, run

SOURCE = TESTS / "reliability" / "fuzz_entry_points.cc"
FOLDER = BUILD / "fuzz"
CLANG = os.environ.get("CLANG", "clang++")
SANITIZERS = "address,undefined,float-cast-overflow"
COMMON = ["-std=c++17", "-g1", "-O1", "-fno-sanitize-recover=all", f"-I{CSRC}"]
COMMON += ["-Wno-psabi", "-Wno-ignored-attributes", "-DDICE_OP_X86_LEVELS"]
SMALL = ["core/options.cc", "core/problem.cc", "cpu/dice_op_cpu.cc", "cpu/label_maps.cc"]
SMALL += ["cpu/pool.cc"]


def has_libfuzzer():
    """Whether there is a clang that can link with libFuzzer."""
    return run("sh", BUILD_TOOLS / "check_fuzzer.sh", CLANG=CLANG).returncode == 0


def levels():
    """The instruction sets that this processor has, each with the flags that CMake gives it."""
    found = {}
    for command in json.loads((BUILD / "compile_commands.json").read_text()):
        if pathlib.Path(command["file"]) != CSRC / "cpu" / "kernels.cc":
            continue
        words = shlex.split(command["command"])
        flags = [w for w in words if w.startswith(("-m", "-DDICE_OP"))]
        (level,) = (w.split('"')[1] for w in flags if w.startswith("-DDICE_OP_LEVEL"))
        found[level] = flags
    assert sorted(found) == sorted(core.build_info()["simd_levels"])
    return found


def build(libfuzzer):
    """The program, compiled if anything has changed."""
    compiler = CLANG if libfuzzer else CXX
    flags = [*COMMON, f"-fsanitize={SANITIZERS}"]
    if libfuzzer:
        flags += ["-fsanitize=fuzzer-no-link", "-DDICE_OP_LIBFUZZER"]
        flags += ["-mllvm", "-asan-instrumentation-with-call-threshold=0"]
    else:
        flags += ["--param=asan-instrumentation-with-call-threshold=0"]
    sources = [(CSRC / name, []) for name in SMALL] + [(SOURCE, [])]
    sources += [(CSRC / "cpu" / "kernels.cc", of_level) for of_level in levels().values()]
    folder = FOLDER / ("libfuzzer" if libfuzzer else "random")
    key = hashlib.sha256(str([compiler, flags, sources]).encode())
    for file in sorted([SOURCE, *CSRC.glob("core/*"), *CSRC.glob("cpu/*")]):
        key.update(file.read_bytes())
    program = folder / "fuzz_entry_points"
    with alone_in(folder):
        stamp = folder / "key"
        if not stamp.exists() or stamp.read_text() != key.hexdigest():
            stamp.unlink(missing_ok=True)
            objects = [folder / f"{n}_{source.stem}.o" for n, (source, _) in enumerate(sources)]
            with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
                tasks = [
                    pool.submit(output_of, compiler, *flags, *more, "-c", source, "-o", made)
                    for made, (source, more) in zip(objects, sources, strict=True)
                ]
                for done in tasks:
                    done.result()
            link = [f"-fsanitize={SANITIZERS}{',fuzzer' if libfuzzer else ''}", "-pthread"]
            output_of(compiler, *link, *objects, "-o", program)
            stamp.write_text(key.hexdigest())
    return program


def run_program(program, level, *arguments, timeout=None):
    """What the program says, and whether it found nothing wrong."""
    done = run(
        program,
        *arguments,
        cwd=FOLDER,
        timeout=timeout,
        DICE_OP_SIMD=level,
        ASAN_OPTIONS="detect_leaks=0",
        UBSAN_OPTIONS="print_stacktrace=1",
    )
    return done.returncode == 0, done.stdout + done.stderr
