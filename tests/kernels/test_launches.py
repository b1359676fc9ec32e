"""Every launch is legal on every GPU that the wheels have machine code for.

The emulator records what the launch code asks of CUDA, over problems of every sort, and runs no
kernel. The machine code says how many registers a kernel takes.
"""

import collections
import re

import pytest

from helpers import emulation
from helpers.launches import (
    DEVICES,
    KB,
    MOST_BLOCKS,
    MOST_REGISTERS,
    MOST_SHARED_UNASKED,
    MOST_THREADS,
    PARTS,
    REGISTER_UNIT,
    REGISTERS,
    Usage,
    room,
    served,
    up,
    usages,
)
from helpers.machine_code import ARCHS, needs_cuda
from helpers.paths import BUILD_TOOLS


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
    found = room(device, launch, usage)
    if found.by_registers < usage.least_blocks:
        yield f"registers for {found.by_registers} blocks, not for {usage.least_blocks}"

    shared = usage.shared + launch.shared
    if usage.shared > MOST_SHARED_UNASKED:
        yield f"{usage.shared} bytes of static shared memory"
    if shared > max(MOST_SHARED_UNASKED, usage.shared + launch.most_shared):
        yield f"{shared} bytes of shared memory, more than CUDA was asked for"
    if max(shared, usage.shared + launch.most_shared) > device.most_shared * KB:
        yield f"{max(launch.shared, launch.most_shared)} bytes of shared memory"
    if found.carveout is None or found.carveout * KB < found.taken:
        yield f"{launch.carveout} % of the shared memory, where a block takes {found.taken} bytes"
    if found.blocks < 1:
        yield "no block fits a multiprocessor"


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
    return emulation.plans()


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
