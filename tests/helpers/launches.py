"""What a launch of a CUDA kernel takes of a GPU, and what the GPUs have."""

import re
from typing import NamedTuple

from dice_op import _gpu
from helpers.machine_code import ARCHS, LIBRARY, budget, dump, tool
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


class Room(NamedTuple):
    """How many blocks of a launch a multiprocessor has room for."""

    by_registers: int
    by_shared: int
    carveout: int | None  # KB of shared memory; None if what is asked for is impossible
    taken: int  # bytes of shared memory of a block
    blocks: int  # what all limits together allow


def room(device, launch, usage):
    """Where a multiprocessor of `device` has room for blocks of a launch."""
    warps = up(launch.threads, 32) // 32
    registers = up(usage.registers * 32, REGISTER_UNIT)  # of a warp
    by_registers = REGISTERS // PARTS // registers * PARTS // warps
    taken = up(usage.shared + launch.shared + device.reserved * KB, device.unit)
    percent = device.carveouts[-1] * (100 if launch.carveout < 0 else launch.carveout)
    carveout = next((kb for kb in device.carveouts if kb * 100 >= percent), None)
    by_shared = (carveout or 0) * KB // taken if taken else device.blocks
    blocks = min(by_registers, by_shared, device.warps // warps, device.blocks)
    return Room(by_registers, by_shared, carveout, taken, blocks)


def as_gcc_names(kernel):
    """The symbol with GCC's unnamed namespace; nvcc's has the source file in its name."""
    while match := re.search(r"(\d+)_GLOBAL__N__", kernel):
        kernel = f"{kernel[: match.start()]}12_GLOBAL__N_1{kernel[match.end(1) + int(match[1]) :]}"
    return kernel


def codes(archs):
    """The machine code of each kernel on some architectures: {(arch, kernel): text}."""
    return {
        (arch, as_gcc_names(function)): code
        for arch in archs
        for (_, function), code in dump("-sass", "-arch", f"sm_{arch}", LIBRARY).items()
    }


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
