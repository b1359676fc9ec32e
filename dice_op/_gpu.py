"""The NVIDIA driver and GPUs of this machine, and whether a build has kernels for them.

Asked of NVML, the driver's library for management: that starts no CUDA in this process.
"""

import ctypes
import os
import re
import typing

DRIVERS = {12: 525, 13: 580}  # the first one for a major version of CUDA
FIRST_OF_13 = (10, 0)  # from this compute capability on, the wheels of CUDA 13 alone have code
FIRST = (7, 5)  # compute capability that the kernels are written for


class Machine(typing.NamedTuple):
    """driver: its version, or None; cuda: the newest that it runs, (13, 0); gpus: see `Gpu`."""

    driver: str | None = None
    cuda: tuple = (0, 0)
    gpus: tuple = ()


class Gpu(typing.NamedTuple):
    """capability: compute capability, (9, 0)."""

    name: str
    capability: tuple

    def __str__(self):
        return f"{self.name} (compute capability {_dotted(self.capability)})"


def _dotted(version):
    return ".".join(map(str, version))


def _named(gpus):
    return ", ".join(sorted(set(map(str, gpus))))


def machine():
    """The `Machine`; one without GPUs where there is no driver, or none that answers."""
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
            if not failed:  # as for one that belongs to another container
                gpus.append(Gpu(text.value.decode(), (major.value, minor.value)))
        return Machine(driver, cuda, tuple(gpus))
    except AttributeError:  # another library of that name
        return Machine()
    finally:
        nvml.nvmlShutdown()


def covers(archs, capability, portable=True):
    """Whether code for `archs` ("80", "90a", "100f", "120+PTX") runs on a GPU of a compute
    capability (8, 6).

    Machine code runs on the same major version's later minors, portable code (PTX) on all that came
    later. portable: whether the driver can compile that.
    """
    for arch in archs:
        digits, kind, has_portable = re.fullmatch(r"(\d+)([af]?)(\+PTX)?", arch).groups()
        known = divmod(int(digits), 10)
        if capability == known:
            return True
        if kind != "a" and capability[0] == known[0] and capability[1] > known[1]:
            return True
        if portable and has_portable and not kind and capability > known:
            return True
    return False


def problem(cuda, archs, found):
    """Why a build (its CUDA, "13.0" or None, and architectures) cannot use the GPUs of a `Machine`.

    With what to do. None if it can use them all, or there is none.
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
    # Which ones a list makes visible is CUDA's to say: it may count them in another order.
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
