"""The NVIDIA driver and GPUs of this machine, and whether a build has kernels for them.

Asked of NVML, the driver's library for management: that starts no CUDA in this process.
"""

import ctypes
import os

# The first driver that runs a major version of CUDA.
DRIVERS = {12: 525, 13: 580}


def driver_and_gpus():
    """The driver's version, and (name, compute capability) of each GPU: "580.65", [("H200", "9.0")].

    None and an empty list where there is no driver, or none that answers.
    """
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None, []
    if nvml.nvmlInit_v2():
        return None, []
    try:
        text = ctypes.create_string_buffer(96)
        driver = None if nvml.nvmlSystemGetDriverVersion(text, 96) else text.value.decode()
        count, gpus = ctypes.c_uint(0), []
        nvml.nvmlDeviceGetCount_v2(ctypes.byref(count))
        for index in range(count.value):
            device, major, minor = ctypes.c_void_p(), ctypes.c_int(), ctypes.c_int()
            if (
                nvml.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(device))
                or nvml.nvmlDeviceGetName(device, text, 96)
                or nvml.nvmlDeviceGetCudaComputeCapability(
                    device, ctypes.byref(major), ctypes.byref(minor)
                )
            ):
                continue  # such as one that belongs to another container
            gpus.append((text.value.decode(), f"{major.value}.{minor.value}"))
        return driver, gpus
    finally:
        nvml.nvmlShutdown()


def covers(archs, capability):
    """Whether code for `archs` ("80", "90") runs on a GPU of that compute capability ("8.6").

    Machine code runs on the same major version's later minors, and the last architecture is there as
    portable code as well, which the driver compiles for all that came after.
    """
    major, minor = map(int, capability.split("."))
    known = [divmod(int(arch), 10) for arch in archs]
    same_major = any(a == major and b <= minor for a, b in known)
    return same_major or (major, minor) >= max(known)


def problem(cuda, archs, driver, gpus):
    """Why a build (its CUDA, "13.0" or None, and architectures) cannot use these GPUs, and what to do.

    None if it can use them all, or there is none.
    """
    if not gpus or os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return None
    names = ", ".join(sorted({f"{name} (compute capability {c})" for name, c in gpus}))
    if cuda is None:
        return (
            f"there is {names}, but this build of dice_op has no kernels for GPUs: the loss is computed "
            "on the CPU. Install a wheel for CUDA (its version ends in .cu12 or .cu13), or build one "
            "from source: DICE_OP_CUDA=on pip install ."
        )
    major = int(cuda.split(".")[0])
    needed = DRIVERS.get(major)
    if driver and needed and int(driver.split(".")[0]) < needed:
        older = [f".cu{m}" for m, d in DRIVERS.items() if d <= int(driver.split(".")[0])]
        other = f" Install a wheel whose version ends in {older[-1]}, or a" if older else " Install a"
        return (
            f"the driver {driver} of {names} is too old for this build of dice_op, whose CUDA {cuda} "
            f"needs {needed} or later.{other} newer driver"
        )
    left_out = sorted({f"{name} ({c})" for name, c in gpus if not covers(archs, c)})
    if not left_out:
        return None
    built = ", ".join(f"{arch[:-1]}.{arch[-1]}" for arch in archs)
    return (
        f"this build of dice_op has kernels for the compute capabilities {built} and later, "
        f"none for {', '.join(left_out)}. Build it from source on this machine: DICE_OP_CUDA=on "
        "DICE_OP_CUDA_ARCHS= pip install ."
    )
