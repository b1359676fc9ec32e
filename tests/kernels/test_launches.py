"""Every launch is legal on every GPU that the wheels have machine code for.

The emulator records what the launch code asks of CUDA, over problems of every sort, and runs no
kernel. The machine code says how many registers a kernel takes.
"""

import collections
import re
from typing import NamedTuple

import pytest

from dice_op import _gpu
from helpers import emulation
from helpers.machine_code import ARCHS, LIBRARY, budget, dump, needs_cuda, tool
from helpers.paths import BUILD_TOOLS
from helpers.processes import output_of

KB = 1 << 10


class Device(NamedTuple):
    """The limits of a compute capability: those that not all of them share."""

    warps: int  # on a multiprocessor at once
    blocks: int  # the same
    most_shared: int  # KB of shared memory that a block may have, if the launch code asks for it
    carveouts: tuple[int, ...]  # KB of shared memory that a multiprocessor may have
    unit: int = 128  # bytes; a block's shared memory is a multiple

    @property
    def reserved(self):
        """KB of a block's shared memory that are CUDA's."""
        return self.carveouts[-1] - self.most_shared


# From the tables of technical specifications and of shared memory capacities in the CUDA C++
# Programming Guide (appendix "Compute Capabilities"). The units in which registers and shared
# memory are allocated are those of CUDA's cuda_occupancy.h.
SMALL, MIDDLE = (0, 8, 16, 32, 64, 100), (0, 8, 16, 32, 64, 100, 132, 164)
LARGE = (*MIDDLE, 196, 228)
DEVICES = {
    (7, 5): Device(32, 16, 64, (32, 64), unit=256),
    (8, 0): Device(64, 32, 163, MIDDLE),
    (8, 6): Device(48, 16, 99, SMALL),
    (8, 7): Device(48, 16, 163, MIDDLE),
    (8, 9): Device(48, 24, 99, SMALL),
    (9, 0): Device(64, 32, 227, LARGE),
    (10, 0): Device(64, 32, 227, LARGE),
    (10, 3): Device(64, 32, 227, LARGE),
    (12, 0): Device(48, 24, 99, SMALL),
    (12, 1): Device(48, 24, 99, SMALL),
}
# These are the same for all of them.
MOST_THREADS = 1024  # of a block
MOST_BLOCKS = (2**31 - 1, 65535, 65535)
REGISTERS, MOST_REGISTERS = 65536, 255  # of a multiprocessor and of a block; of a thread
REGISTER_UNIT = 256  # a warp's registers are a multiple
PARTS = 4  # of a multiprocessor; each has its share of the registers
MOST_SHARED_UNASKED = 48 * KB  # also the most static shared memory


class Usage(NamedTuple):
    """What a kernel takes on one architecture."""

    registers: int
    shared: int  # bytes of static shared memory
    most_threads: int  # as its __launch_bounds__ say
    least_blocks: int  # that a multiprocessor has registers for, as these say too


def up(number, unit):
    return -(-number // unit) * unit


def complaints(device, launch, usage):
    """What is wrong with a launch on a device."""
    warps = up(launch.threads, 32) // 32
    if not 0 < launch.threads <= min(MOST_THREADS, usage.most_threads):
        yield f"{launch.threads} threads, where the kernel allows {usage.most_threads}"
    for size, most in zip((launch.x, launch.y, launch.z), MOST_BLOCKS, strict=True):
        if not 0 < size <= most:
            yield f"a grid of {launch.x} x {launch.y} x {launch.z} blocks"
    if "SumsKernel" in launch.kernel and launch.x * launch.y * launch.row > launch.workspace:
        yield f"{launch.x * launch.y} rows do not fit the workspace of {launch.workspace} bytes"

    # When CUDA checks a block's registers, it takes the warps for a multiple of the parts.
    registers = up(usage.registers * 32, REGISTER_UNIT)  # of a warp
    if usage.registers > MOST_REGISTERS or registers * up(warps, PARTS) > REGISTERS:
        yield f"{usage.registers} registers for each of {launch.threads} threads"
    by_registers = REGISTERS // PARTS // registers * PARTS // warps
    if by_registers < usage.least_blocks:
        yield f"registers for {by_registers} blocks, not for {usage.least_blocks}"

    shared = usage.shared + launch.shared
    if usage.shared > MOST_SHARED_UNASKED:
        yield f"{usage.shared} bytes of static shared memory"
    if shared > max(MOST_SHARED_UNASKED, usage.shared + launch.most_shared):
        yield f"{shared} bytes of shared memory, more than CUDA was asked for"
    if max(shared, usage.shared + launch.most_shared) > device.most_shared * KB:
        yield f"{max(launch.shared, launch.most_shared)} bytes of shared memory"
    taken = up(shared + device.reserved * KB, device.unit)
    percent = device.carveouts[-1] * (100 if launch.carveout < 0 else launch.carveout)
    carveout = next((kb for kb in device.carveouts if kb * 100 >= percent), None)
    if carveout is None or carveout * KB < taken:
        yield f"{launch.carveout} % of the shared memory, where a block takes {taken} bytes"
    by_shared = (carveout or 0) * KB // taken if taken else device.blocks
    if min(by_registers, by_shared, device.warps // warps, device.blocks) < 1:
        yield "no block fits a multiprocessor"


def as_gcc_names(kernel):
    """The symbol with GCC's unnamed namespace; nvcc's has the source file in its name."""
    while match := re.search(r"(\d+)_GLOBAL__N__", kernel):
        kernel = f"{kernel[: match.start()]}12_GLOBAL__N_1{kernel[match.end(1) + int(match[1]) :]}"
    return kernel


def most_threads():
    """The threads that a block of each kernel may have, the same on all architectures."""
    text = output_of(tool("cuobjdump"), "-elf", "-arch", f"sm_{ARCHS[0]}", LIBRARY)
    found = {}
    for part in text.split("\n.nv.info.")[1:]:
        bound = re.search(r"EIATTR_MAX_THREADS\s+Format:\s*\w+\s+Value:\s*(\w+) 0x1 0x1\s", part)
        found[as_gcc_names(part.split()[0])] = int(bound[1], 16) if bound else MOST_THREADS
    return found


def usages():
    """What each kernel takes on each architecture: {arch: {kernel: Usage}}."""
    bounds, found = most_threads(), {arch: {} for arch in ARCHS}
    for (arch, function), usage in dump("-res-usage", LIBRARY).items():
        arch, kernel = arch.removeprefix("sm_"), as_gcc_names(function)
        registers, shared = (int(re.search(rf"{k}:(\d+)", usage)[1]) for k in ("REG", "SHARED"))
        if int(arch) >= 90 and shared:
            shared -= KB  # ptxas counts what is reserved, if the kernel has any shared memory
        least = 1
        if "SumsKernel" in kernel or "GradKernel" in kernel:
            least = REGISTERS // (budget(function) * bounds[kernel])
        found[arch][kernel] = Usage(registers, shared, bounds[kernel], least)
    return found


def served(archs):
    """The devices that machine code for these architectures runs on, each with its code."""
    for capability in DEVICES:
        fitting = [arch for arch in archs if _gpu.covers([arch], capability, portable=False)]
        if fitting:
            yield capability, max(fitting, key=int)


def without_launch(kernels, launches):
    """The kernels that no problem reaches, and what is launched but is none of them."""
    return sorted({launch.kernel for launch in launches} ^ set(kernels))


def test_the_table_has_every_architecture_of_the_wheels():
    wheels = (BUILD_TOOLS / "wheels.toml").read_text()
    archs = set(re.findall(r"\d+", " ".join(re.findall(r"^archs = (.*)$", wheels, re.MULTILINE))))
    assert {divmod(int(arch), 10) for arch in archs} <= set(DEVICES)
    assert {capability for capability, _ in served(archs)} == set(DEVICES)


@pytest.fixture(scope="module")
def launches():
    return emulation.plans(multiprocessors=200, held=32)  # No GPU holds as many blocks.


@needs_cuda
def test_every_kernel_has_a_launch_and_every_launch_is_legal(launches):
    usage_on, found = usages(), {}
    for arch in ARCHS:
        assert without_launch(usage_on[arch], launches) == [], arch
    for capability, arch in served(ARCHS):
        for launch in launches:
            whats = list(complaints(DEVICES[capability], launch, usage_on[arch][launch.kernel]))
            if whats:
                found.setdefault((capability, launch.kernel), [launch.problem, *whats])
    assert found == {}


@needs_cuda
def test_threads_that_launch_a_kernel_allow_it_the_same_shared_memory(launches):
    """What a kernel is allowed holds for all threads: between the question of one and its launch,
    another that launches the kernel for another problem must not lower it."""
    allowed = collections.defaultdict(set)
    for launch in launches:
        if launch.most_shared >= 0:
            allowed[launch.kernel].add(launch.most_shared)
    assert {kernel: sizes for kernel, sizes in allowed.items() if len(sizes) > 1} == {}


# --- these checks can fail ------------------------------------------------------------------------

LAUNCH = emulation.Launch(
    "SumsKernel", 2, 100, 1, threads=128, shared=40 * KB, most_shared=-1, carveout=100,
    workspace=200 * 64, row=64, problem="",
)  # fmt: skip
USAGE = Usage(registers=128, shared=0, most_threads=128, least_blocks=4)


def test_a_legal_launch_is_legal_everywhere():
    for device in DEVICES.values():
        assert list(complaints(device, LAUNCH, USAGE)) == []
        most = device.most_shared * KB
        assert list(complaints(device, LAUNCH._replace(shared=most, most_shared=most), USAGE)) == []


@pytest.mark.parametrize(
    ("launch", "usage", "complaint"),
    [
        ({"threads": 160}, {}, "160 threads, where the kernel allows 128"),
        ({"threads": 1056}, {"most_threads": 2048}, "1056 threads"),
        ({"x": 0}, {}, "a grid of 0 x 100 x 1"),
        ({"y": 65536, "workspace": 1 << 40}, {}, "a grid of 2 x 65536 x 1"),
        ({"workspace": 200 * 64 - 1}, {}, "200 rows do not fit"),
        ({}, {"registers": 256}, "256 registers"),
        (
            {"threads": 512},
            {"registers": 136, "most_threads": 512},
            "136 registers for each of 512",
        ),
        ({}, {"registers": 129}, "registers for 3 blocks, not for 4"),
        ({"shared": 49 * KB}, {}, "more than CUDA was asked for"),
        ({"shared": 47 * KB}, {"shared": 2 * KB}, "more than CUDA was asked for"),
        ({"shared": 50 * KB, "most_shared": 49 * KB}, {}, "more than CUDA was asked for"),
        ({"shared": 65 * KB, "most_shared": 65 * KB}, {}, f"{65 * KB} bytes of shared memory"),
        ({"most_shared": 65 * KB}, {}, f"{65 * KB} bytes of shared memory"),
        ({"shared": 0}, {"shared": 49 * KB}, "static shared memory"),
        ({"carveout": 101}, {}, "101 % of the shared memory"),
        ({"carveout": 0}, {}, "0 % of the shared memory"),
    ],
)
def test_a_launch_that_is_not_legal_is_named(launch, usage, complaint):
    found = list(complaints(DEVICES[7, 5], LAUNCH._replace(**launch), USAGE._replace(**usage)))
    assert any(complaint in what for what in found), found


def test_a_kernel_without_launch_is_named():
    assert without_launch(["SumsKernel"], [LAUNCH]) == []
    assert without_launch(["SumsKernel", "another"], [LAUNCH]) == ["another"]
    assert without_launch([], [LAUNCH]) == ["SumsKernel"]
