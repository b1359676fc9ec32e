"""The CUDA path on the emulator: builds it, hands it calls, brings back what they give.

Three builds of the very kernel sources: plain, with the address and undefined-behaviour sanitizers,
with the thread sanitizer. No GPU and no CUDA toolkit is needed, only the C++ compiler.
"""

import collections
import concurrent.futures
import functools
import hashlib
import os
import subprocess
from typing import NamedTuple

import numpy as np

from dice_op import core
from helpers.ffi_header import finder
from helpers.paths import BUILD, CSRC, TESTS
from helpers.processes import alone_in, output_of
from helpers.processes import run as run_program

EMULATOR = TESTS / "kernels" / "cuda_emulator"
CXX = os.environ.get("CXX", "c++")
FLAGS = {
    "plain": ["-O2"],
    "address": [
        "-O1",
        "-fsanitize=address,undefined",
        "-fno-sanitize-recover=all",
        # Checks as calls, not as code at each place: compiled sooner.
        "--param=asan-instrumentation-with-call-threshold=0",
    ],
    "thread": ["-O1", "-fsanitize=thread"],
}
SANITIZER_OPTIONS = {
    "TSAN_OPTIONS": "halt_on_error=1:exitcode=66",
    "ASAN_OPTIONS": "detect_leaks=0",
}
# A GPU that holds more blocks than any there is.
DEVICE = {"CUDA_EMULATOR_SMS": "200", "CUDA_EMULATOR_HELD": "32"}
# These are in the order of the enumerations in csrc/core/dice_op.h and csrc/core/options.h.
DTYPES = "bool uint8 int8 uint16 int16 int32 int64 float16 bfloat16 float32 float64".split()
TABLES = ("regions", "label_sets", "focal_gammas", "dist_matrix")
ACTIVATIONS = "softmax sigmoid none argmax threshold".split()


def _flags(kind, csrc):
    include = [f"-I{csrc}", f"-I{EMULATOR}"]
    return [*FLAGS[kind], *include, "-DDICE_OP_WITH_PTX", "-Wno-unknown-pragmas", "-Wno-psabi"]


def _compile(source, output, flags):
    command = [CXX, "-x", "c++", "-std=c++17", "-g1", *flags, "-c", source, "-o", output]
    result = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]


def _link(kind, objects, program):
    subprocess.run([CXX, *FLAGS[kind], *objects, "-o", program], check=True)


def _key(kind, *folders):
    """Another one where the compiler, its flags or a file in these folders is another one."""
    key = hashlib.sha256(str([CXX, FLAGS[kind]]).encode())
    for source in sorted(path for folder in folders for path in folder.iterdir()):
        key.update(source.read_bytes())
    return key.hexdigest()


def _made(folder, key, make):
    """The folder, after `make` has compiled what it does there; anew where the key has changed."""
    with alone_in(folder):
        stamp = folder / "key"
        if not stamp.exists() or stamp.read_text() != key:
            stamp.unlink(missing_ok=True)
            make()
            stamp.write_text(key)
    return folder


def build(kind, few=False):
    """The program of one kind ("plain", "address", "thread"), compiled if anything has changed.

    few: one kernel of each sort instead of all, which takes seconds.
    """
    folder = BUILD / "cuda_emulator" / (f"few_{kind}" if few else kind)
    flags = _flags(kind, CSRC)
    tasks = [  # the engine speaks to the sanitizers and must not be compiled with them
        (EMULATOR / "few_kernels.cc" if few else CSRC / "cuda" / "kernels.cu", "kernels.o", flags),
        (EMULATOR / "cuda_emulator.cc", "engine.o", _flags("plain", CSRC)),
        (CSRC / "cuda" / "dice_op_cuda.cu", "dice_op_cuda.o", flags),
        (CSRC / "core" / "options.cc", "options.o", flags),
        (CSRC / "core" / "problem.cc", "problem.o", flags),
        (EMULATOR / "run_cases.cc", "run_cases.o", flags),
    ]

    def make():
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            for done in [pool.submit(_compile, s, folder / o, f) for s, o, f in tasks]:
                done.result()
        _link(kind, [folder / o for _, o, _ in tasks], folder / "run_cases")

    return _made(folder, _key(kind, CSRC / "core", CSRC / "cuda", EMULATOR), make) / "run_cases"


def rebuild(kind, csrc, folder):
    """The program of few kernels with those of another source tree; the rest is from `build`."""
    objects = build(kind, few=True).parent
    flags = _flags(kind, csrc)
    _compile(EMULATOR / "few_kernels.cc", folder / "kernels.o", flags)
    _compile(csrc / "cuda" / "dice_op_cuda.cu", folder / "dice_op_cuda.o", flags)
    others = [objects / f"{name}.o" for name in ("engine", "options", "problem", "run_cases")]
    program = folder / "run_cases"
    _link(kind, [folder / "kernels.o", folder / "dice_op_cuda.o", *others], program)
    return program


def plant(source, old, new):
    """Replaces a line of a source, which must stand there once."""
    text = source.read_text()
    assert text.count(old) == 1, f"{source.name}: {old!r} stands there {text.count(old)} times"
    source.write_text(text.replace(old, new))


def _build_plans():
    """run_plans.cc over all kernels, which it does not run."""
    kernels = build("plain").parent
    folder = BUILD / "cuda_emulator" / "plans"
    own = folder / "run_plans.o"
    others = ("engine", "options", "problem", "kernels", "dice_op_cuda")

    def make():
        _compile(EMULATOR / "run_plans.cc", own, _flags("plain", CSRC))
        _link("plain", [own, *(kernels / f"{o}.o" for o in others)], folder / "run_plans")

    folders = [CSRC / name for name in ("core", "cuda")]
    return _made(folder, _key("plain", *folders, EMULATOR), make) / "run_plans"


def build_extents(few=False, csrc=None, folder=None):
    """run_extents.cc over all kernels or few; or, in a folder, over the few of another source
    tree."""
    objects = build("plain", few=few).parent
    changed = csrc is not None
    folder = folder or BUILD / "cuda_emulator" / ("few_extents" if few else "extents")
    flags = _flags("plain", csrc or CSRC)
    own = [folder / "run_extents.o"] + [folder / "kernels.o"] * changed
    others = ("engine", "options", "problem", *([] if changed else ["kernels"]))

    def make():
        _compile(EMULATOR / "run_extents.cc", own[0], flags)
        if changed:
            _compile(EMULATOR / "few_kernels.cc", own[1], flags)
        _link("plain", [*own, *(objects / f"{o}.o" for o in others)], folder / "run_extents")

    key = _key("plain", *((csrc or CSRC) / name for name in ("core", "cuda")), EMULATOR)
    return _made(folder, key, make) / "run_extents"


def build_faults():
    """run_faults.cc over the same few kernels, and with what allocates device memory."""
    kernels = build("address", few=True).parent
    folder = BUILD / "cuda_emulator" / "faults"
    sources = CSRC / "cuda" / "dice_op_cuda.cu", EMULATOR / "run_faults.cc"
    own = [folder / f"{source.stem}.o" for source in sources]
    others = ("engine", "options", "problem", "kernels")

    def make():
        version = ['-DDICE_OP_CUDA_VERSION="0.0"', '-DDICE_OP_CUDA_ARCHS="emulated"']
        for source, output in zip(sources, own, strict=True):
            _compile(source, output, [*_flags("address", CSRC), *version])
        _link("address", [*own, *(kernels / f"{o}.o" for o in others)], folder / "run_faults")

    folders = [CSRC / name for name in ("core", "cuda")]
    return _made(folder, _key("address", *folders, EMULATOR), make) / "run_faults"


def build_handlers(kind="address"):
    """XLA's handlers over the same few kernels, called by an XLA that is a stand-in."""
    kernels = build(kind, few=True).parent
    folder = BUILD / "cuda_emulator" / f"handlers_{kind}"
    sources = CSRC / "xla" / "handlers.cc", CSRC / "cpu" / "pool.cc", EMULATOR / "run_handlers.cc"
    own = [folder / f"{source.stem}.o" for source in sources]
    others = ("engine", "options", "problem", "kernels", "dice_op_cuda")

    def make():
        _, include = finder.earliest()
        flags = [*_flags(kind, CSRC), "-isystem", include, "-DDICE_OP_WITH_CUDA"]
        for source, output in zip(sources, own, strict=True):
            _compile(source, output, flags)
        _link(kind, [*own, *(kernels / f"{o}.o" for o in others)], folder / "run_handlers")

    folders = [CSRC / name for name in ("core", "cpu", "cuda", "xla")]
    return _made(folder, _key(kind, *folders, EMULATOR), make) / "run_handlers"


def case(x, y, *, weight=None, coefficients, activation="softmax", data_format="channels_last",
         squared_pred=False, soft_label=False, cross_entropy=True, focal_gamma=0.0,
         focal_gammas=None, label_smoothing=0.0, threshold=0.0, ignore_label=None, regions=None,
         label_sets=None, dist_matrix=None, in_place=False, misalign=0):  # fmt: skip
    """One call. x: [N, V, C] or [N, C, V]; y: [N, V], or as x; coefficients: three to five of
    [N, C], those of the sums that have a gradient. Of three, the last is for both
    cross-entropies."""
    n, *rest = x.shape
    planar = data_format == "channels_first"
    v, c = rest[::-1] if planar else rest
    tables = core.op_attributes(
        regions=regions, label_sets=label_sets, focal_gammas=focal_gammas, dist_matrix=dist_matrix
    )
    header = np.array(
        [n, v, c, ACTIVATIONS.index(activation), planar, squared_pred, soft_label, cross_entropy]
        + [ignore_label is not None, ignore_label or 0, DTYPES.index(x.dtype.name)]
        + [DTYPES.index(y.dtype.name), y.ndim == 3]
        + [-1 if weight is None else DTYPES.index(weight.dtype.name), in_place, misalign]
        + [len(tables[name]) for name in TABLES],
        np.int64,
    )
    counts = activation in ("argmax", "threshold")
    number = np.float64 if counts or x.dtype == np.float64 else np.float32
    binary = cross_entropy and activation == "sigmoid"
    a, b, e, *others = coefficients
    asked = [a, b, *([e] if cross_entropy else []), *([*others, e][:1] if binary else [])]
    asked += [] if dist_matrix is None else others[1:]
    arrays = [x, y, *([] if weight is None else [weight])]
    arrays += [np.asarray(k, number) for k in asked]
    data = header.tobytes() + np.float64([focal_gamma, label_smoothing, threshold]).tobytes()
    data += b"".join(tables[name].tobytes() for name in TABLES)
    data += b"".join(np.ascontiguousarray(a).tobytes() for a in arrays)
    return {
        "data": data,
        "shape": (n, v, c),
        "like": x,
        "number": number,
        "sums": ["intersection", "pred_sum", "label_sum"]
        + ["cross_entropy"] * cross_entropy
        + ["negative_cross_entropy"] * binary
        + ["unknown_sum"] * bool(label_sets)
        + ["distance_sum"] * (dist_matrix is not None),
        "activation": ACTIVATIONS.index(activation),
    }


class Launch(NamedTuple):
    """A launch, and what was asked of CUDA for its kernel before; -1 where nothing was."""

    kernel: str  # its symbol
    x: int  # blocks
    y: int
    z: int
    threads: int  # of a block
    shared: int  # bytes of dynamic shared memory
    most_shared: int  # bytes of it that the kernel was to be allowed
    carveout: int  # percent of the most shared memory that a multiprocessor was to have
    workspace: int  # bytes that the caller provides
    row: int  # bytes of the workspace that a block of a kernel of sums writes
    problem: str  # the first with this launch


def _symbols(program):
    """The names of what a program holds, by their distance from its start."""
    symbols = [line.split() for line in output_of("nm", program).splitlines() if line[0] != " "]
    (start,) = (int(at, 16) for at, _, name in symbols if name == "__executable_start")
    return {int(at, 16) - start: name for at, _, name in symbols}


@functools.cache
def plans():
    """All different launches for problems of every sort (the table is in run_plans.cc), on a GPU
    that holds more blocks than any there is. No kernel runs."""
    program = _build_plans()
    names = _symbols(program)
    launches = []
    for line in output_of(program, **DEVICE).splitlines():
        kernel, *numbers, problem = line.split(" ", len(Launch._fields) - 1)
        launches.append(Launch(names[int(kernel)], *map(int, numbers), problem))
    return launches


def run_extents(program, *arguments):
    """The kernels that run_extents.cc has run, each with how often, and what was wrong."""
    done = run_program(program, *arguments, timeout=3000, **DEVICE)
    names = _symbols(program)
    lines = done.stdout.splitlines()
    wrong = [line for line in lines if line.startswith("WRONG")]
    if done.returncode not in (0, 1):  # A wrong index may end the program.
        wrong.append(f"exit {done.returncode} after {lines[-1:]} {done.stderr[-1000:]}")
    runs = (line.split(" ", 1)[0] for line in lines)
    return collections.Counter(names[int(run)] for run in runs if run.isdigit()), wrong


class Failed(Exception):  # noqa: N818
    """The program found a broken rule, or a sanitizer did."""


def run(program, cases, folder, order="forward", seed=1, **environment):
    """What each call gives: a dict of arrays, or the error as a string."""
    calls, results = folder / "calls", folder / "results"
    calls.write_bytes(b"".join(c["data"] for c in cases))
    done = subprocess.run(
        [program, calls, results],
        env={
            **os.environ,
            "CUDA_EMULATOR_ORDER": order,
            "CUDA_EMULATOR_SEED": str(seed),
            **SANITIZER_OPTIONS,
            **environment,
        },
        capture_output=True,
        text=True,
        errors="replace",
        timeout=1200,
    )
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if "makecontext" not in line]
        raise Failed(f"exit {done.returncode}\n" + "\n".join(lines[:60]))
    data = memoryview(results.read_bytes())

    def take(dtype, shape):
        nonlocal data
        dtype, count = np.dtype(dtype), int(np.prod(shape))
        array = np.frombuffer(data[: count * dtype.itemsize], dtype).reshape(shape)
        data = data[count * dtype.itemsize :]
        return array

    def text():
        return bytes(take(np.uint8, tuple(take(np.int64, (1,))))).decode()

    out = []
    for call in cases:
        specialised = take(np.int64, (2,))
        error, complaint = text(), text()
        if error:
            out.append(error)
            continue
        n, _, c = call["shape"]
        number = call["number"]
        result = {"bad_label": complaint, "specialised": tuple(specialised == 1)}
        for name in call["sums"]:
            result[name] = take(number, (n, c))
        result["weight_sum"] = take(number, (n,))
        result["gradient"] = take(call["like"].dtype, call["like"].shape)
        out.append(result)
    assert not data, "the results are longer than they should be"
    return out
