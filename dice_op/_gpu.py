"""The NVIDIA driver and GPUs of this machine, and whether a build has kernels for them.

The answers come from NVML, the driver's library for management, because asking it does not start
CUDA in this process.
"""

from __future__ import annotations

import ctypes
import os
import re
import typing
from collections.abc import Iterable, Sequence

DRIVERS = {12: 525, 13: 580}  # the first driver for each major version of CUDA
FIRST_OF_13 = (10, 0)  # From this compute capability on, only the wheels of CUDA 13 have kernels.
FIRST = (7, 5)  # The kernels need this compute capability.


class Gpu(typing.NamedTuple):
    name: str
    capability: tuple[int, int]
    """The compute capability, such as (9, 0)."""

    def __str__(self) -> str:
        return f"{self.name} (compute capability {_dotted(self.capability)})"


class Machine(typing.NamedTuple):
    driver: str | None = None
    """The version of the driver."""
    cuda: tuple[int, int] = (0, 0)
    """The newest CUDA that the driver runs, such as (13, 0)."""
    gpus: tuple[Gpu, ...] = ()


def _dotted(version: Iterable[int]) -> str:
    return ".".join(map(str, version))


def _named(gpus: Iterable[Gpu]) -> str:
    return ", ".join(sorted(set(map(str, gpus))))


def machine() -> Machine:
    """This machine. It has no GPUs where there is no driver, or the driver does not answer."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
        if nvml.nvmlInit_v2():
            return Machine()
    except (OSError, AttributeError):
        return Machine()
    text, number = ctypes.create_string_buffer(96), ctypes.c_int(0)
    try:
        nvml.nvmlSystemGetDriverVersion(text, 96)
        driver = text.value.decode()
        nvml.nvmlSystemGetCudaDriverVersion_v2(ctypes.byref(number))
        cuda = (number.value // 1000, number.value % 1000 // 10)
        count, gpus = ctypes.c_uint(0), []
        nvml.nvmlDeviceGetCount_v2(ctypes.byref(count))
        for index in range(count.value):
            device, major, minor = ctypes.c_void_p(), ctypes.c_int(), ctypes.c_int()
            failed = (
                nvml.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(device))
                or nvml.nvmlDeviceGetName(device, text, 96)
                or nvml.nvmlDeviceGetCudaComputeCapability(
                    device, ctypes.byref(major), ctypes.byref(minor)
                )
            )
            if not failed:  # It fails for a GPU that belongs to another container.
                gpus.append(Gpu(text.value.decode(), (major.value, minor.value)))
        return Machine(driver, cuda, tuple(gpus))
    except AttributeError:  # It is another library with the same name.
        return Machine()
    finally:
        nvml.nvmlShutdown()


def covers(archs: Iterable[str], capability: tuple[int, int], portable: bool = True) -> bool:
    """Whether code for `archs` ("80", "90a", "100f", "120+PTX") runs on a GPU of this compute
    capability, such as (8, 6).

    Machine code also runs on later minor versions of the same major version. Portable code (PTX)
    runs on all later versions.

    portable: whether the driver can compile portable code.
    """
    for arch in archs:
        ((digits, kind, has_portable),) = re.findall(r"^(\d+)([af]?)(\+PTX)?$", arch)
        known = divmod(int(digits), 10)
        if capability == known:
            return True
        if kind != "a" and capability[0] == known[0] and capability[1] > known[1]:
            return True
        if portable and has_portable and not kind and capability > known:
            return True
    return False


def problem(cuda: str | None, archs: Sequence[str], found: Machine) -> str | None:
    """Why a build cannot use the GPUs of a machine, and what to do about it.

    It is None if the build can use them all, or there are none.

    cuda, archs: what the build was made with, CUDA such as "13.0" (or None) and architectures.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if not found.gpus or visible in ("", "-1"):
        return None
    build = "DICE_OP_CUDA=on pip install --no-build-isolation --force-reinstall --no-deps ."
    names = _named(found.gpus)
    if cuda is None:
        return (
            f"there is {names}, but this build of dice_op has no kernels for GPUs: the loss is "
            "computed on the CPU. Install a wheel whose version ends in .cu12 or .cu13, or build "
            f"from source, in dice_op's source folder: {build}"
        )
    version = tuple(map(int, cuda.split(".")))
    if found.cuda[0] < version[0]:
        newer = DRIVERS.get(version[0], "the latest")
        runs_older = found.cuda[0] in DRIVERS and all(
            g.capability < FIRST_OF_13 for g in found.gpus
        )
        older = f" or dice_op's wheel that ends in .cu{found.cuda[0]}" * runs_older
        return (
            f"the driver {found.driver} of {names} runs CUDA up to {_dotted(found.cuda)}, but this "
            f"build of dice_op has {cuda}: install a newer driver ({newer} or later){older}"
        )
    portable = found.cuda >= version
    left_out = [gpu for gpu in found.gpus if not covers(archs, gpu.capability, portable)]
    # CUDA_VISIBLE_DEVICES may hide the GPUs that are left out. Only CUDA knows, as it may count
    # the GPUs in another order than NVML.
    if not left_out or (visible and len(left_out) < len(found.gpus)):
        return None
    names = _named(left_out)
    if max(gpu.capability for gpu in left_out) < FIRST:
        first = _dotted(FIRST)
        return f"dice_op's kernels are for compute capability {first} and later, not for {names}"
    wheel = ".cu12"
    if found.cuda[0] >= 13:
        wheel = ".cu13"
    elif any(gpu.capability >= FIRST_OF_13 for gpu in left_out):
        wheel = f".cu13 (with driver {DRIVERS[13]} or later)"
    return (
        f"this build of dice_op (CUDA {cuda}) is for {', '.join(archs)}, not for {names}. Install "
        f"dice_op's wheel that ends in {wheel}, or build from source on this machine, in dice_op's "
        f"source folder: {build}"
    )
