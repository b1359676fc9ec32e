"""A GPU without a framework: arrays that `dice_op.core` takes through DLPack, timing, yardsticks.

Loads the library made of gpu_device.cu. Everything goes to one stream, `Device.stream`.
"""

import ctypes
import functools
import math
import time
from pathlib import Path

import numpy as np

SOURCE = Path(__file__).with_suffix(".cu")
REPEATS = 50  # of every measurement, after the warm-up
LONGEST = 4.0  # seconds that one measurement may take: a slow one is repeated less
# Type code and bits of DLPack, and how NumPy stores it: bfloat16, which NumPy lacks, as its bits.
DTYPES = {
    "float16": (2, 16, np.float16),
    "bfloat16": (4, 16, np.uint16),
    "float32": (2, 32, np.float32),
    "float64": (2, 64, np.float64),
    "uint8": (1, 8, np.uint8),
    "int16": (0, 16, np.int16),
    "int32": (0, 32, np.int32),
    "int64": (0, 64, np.int64),
}


def repeats_of(seconds):
    """How often to repeat what takes so long."""
    return max(5, min(REPEATS, int(LONGEST / max(seconds, 1e-9))))


def itemsize(dtype):
    """Bytes of one element."""
    return np.dtype(DTYPES[dtype][2]).itemsize


def encode(values, dtype):
    """Values as they are stored in `dtype`."""
    if dtype != "bfloat16":
        return np.ascontiguousarray(values, DTYPES[dtype][2])
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)  # to the nearest, or even


def decode(stored, dtype):
    """What `encode` stored, as float64."""
    if dtype == "bfloat16":
        stored = (stored.astype(np.uint32) << 16).view(np.float32)
    return stored.astype(np.float64)


class _Tensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
        ("context", ctypes.c_void_p),  # from here on: DLManagedTensor's
        ("deleter", ctypes.c_void_p),
    ]


_CAPSULE_NAME = b"dltensor"
_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype = ctypes.py_object
_new_capsule.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]


class Array:
    """An array on the GPU. `owner`: the array whose memory it shares, or None if it has its own."""

    def __init__(self, device, shape, dtype, pointer, owner):
        self.device, self.shape, self.dtype = device, tuple(map(int, shape)), dtype
        self.pointer, self.owner = pointer, owner
        self.nbytes = math.prod(self.shape) * itemsize(dtype)
        code, bits, _ = DTYPES[dtype]
        dims = (ctypes.c_int64 * len(self.shape))(*self.shape)
        self._tensor = _Tensor(pointer, 2, 0, len(self.shape), code, bits, 1, dims, None, 0)

    def __dlpack__(self, **_):
        # No deleter: the memory is this object's, which outlives the call it is passed to.
        return _new_capsule(ctypes.addressof(self._tensor), _CAPSULE_NAME, None)

    def __dlpack_device__(self):
        return 2, 0

    def __del__(self):
        if self.owner is None:
            self.device.call("release", ctypes.c_void_p(self.pointer))

    def reshape(self, *shape):
        """The same memory in another shape."""
        return Array(self.device, shape, self.dtype, self.pointer, self)

    def numpy(self, start=0, count=None):
        """A copy on the host, as stored; `start` and `count` in rows of the first axis."""
        shape = (self.shape[0] - start if count is None else count, *self.shape[1:])
        result = np.empty(shape, DTYPES[self.dtype][2])
        offset = start * math.prod(self.shape[1:]) * itemsize(self.dtype)
        address = ctypes.c_void_p(result.ctypes.data)
        source = ctypes.c_void_p(self.pointer + offset)
        self.device.call("copy_bytes", address, source, ctypes.c_uint64(result.nbytes))
        return result

    def fill(self, byte):
        """Set every byte: 0xFF makes floats NaN."""
        self.device.call("fill", ctypes.c_void_p(self.pointer), byte, ctypes.c_uint64(self.nbytes))


class DeviceError(RuntimeError):
    """A CUDA call that failed."""


class Device:
    """The first GPU that CUDA shows."""

    def __init__(self, library):
        self._library = ctypes.CDLL(str(library))
        self._library.gpu_error.restype = ctypes.c_char_p
        self._library.gpu_stream.restype = ctypes.c_uint64
        about = (ctypes.c_int * 5)()
        self.call("open", about)
        self.multiprocessors, self.l2_bytes, self.arch, self.driver, self.runtime = about
        self.stream = self._library.gpu_stream()
        self._events = []

    def call(self, name, *arguments):
        """Call a function of gpu_device.cu; raises DeviceError with CUDA's words."""
        error = getattr(self._library, f"gpu_{name}")(*arguments)
        if error:
            raise DeviceError(f"{name}: {self._library.gpu_error(error).decode()}")

    def synchronize(self):
        """Wait for the stream."""
        self.call("synchronize")

    def memory(self):
        """Bytes free, bytes in all."""
        about = (ctypes.c_uint64 * 2)()
        self.call("memory", about)
        return about[0], about[1]

    def pool_peak(self, reset=False):
        """The most bytes in use at once of CUDA's own pool, which dice_op.core takes from."""
        peak = ctypes.c_uint64()
        self.call("pool_peak", ctypes.byref(peak), int(reset))
        return peak.value

    def empty(self, shape, dtype, misalign=0):
        """Uninitialised. `misalign`: bytes that its start lies past an aligned address."""
        pointer = ctypes.c_void_p()
        bytes_ = math.prod(shape) * itemsize(dtype) + misalign
        self.call("allocate", ctypes.c_uint64(max(bytes_, 1)), ctypes.byref(pointer))
        array = Array(self, shape, dtype, pointer.value, None)
        return Array(self, shape, dtype, pointer.value + misalign, array) if misalign else array

    def array(self, stored, dtype, misalign=0):
        """A copy on the GPU of what `encode` gave."""
        stored = np.ascontiguousarray(stored)
        array = self.empty(stored.shape, dtype, misalign)
        source, bytes_ = ctypes.c_void_p(stored.ctypes.data), ctypes.c_uint64(stored.nbytes)
        self.call("copy_bytes", ctypes.c_void_p(array.pointer), source, bytes_)
        return array

    def periodic(self, stored, rows, dtype):
        """`[rows, ...]`: the rows of `stored`, over and over. Big data with a small reference."""
        array = self.empty((rows, *stored.shape[1:]), dtype)
        stored = np.ascontiguousarray(stored[:rows])
        pointer, period = ctypes.c_void_p(array.pointer), ctypes.c_uint64(stored.nbytes)
        self.call("copy_bytes", pointer, ctypes.c_void_p(stored.ctypes.data), period)
        self.call("repeat", pointer, period, ctypes.c_uint64(array.nbytes))
        return array

    def mismatches(self, array, period_rows):
        """How many bytes differ from those `period_rows` rows before."""
        period = array.nbytes // array.shape[0] * period_rows
        count = ctypes.c_uint64()
        self.call(
            "mismatches", ctypes.c_void_p(array.pointer), ctypes.c_uint64(period),
            ctypes.c_uint64(array.nbytes), ctypes.byref(count),
        )  # fmt: skip
        return count.value

    def rotation(self, bytes_of_a_set):
        """How many sets of buffers keep the L2 cache from answering for the memory."""
        return max(1, math.ceil(4 * self.l2_bytes / bytes_of_a_set))

    def _events_for(self, count):
        """Events, made once and used again."""
        while len(self._events) < count:
            event = ctypes.c_void_p()
            self.call("event", ctypes.byref(event))
            self._events.append(event)
        return self._events

    def _samples(self, runs, repeats):
        """Milliseconds between the events around each run."""
        events = self._events_for(repeats + 1)
        self.synchronize()
        for i in range(repeats):
            self.call("record", events[i])
            runs[i % len(runs)]()
        self.call("record", events[repeats])
        self.synchronize()
        elapsed, samples = ctypes.c_float(), []
        for a, b in zip(events[:repeats], events[1 : repeats + 1], strict=True):
            self.call("elapsed", a, b, ctypes.byref(elapsed))
            samples.append(elapsed.value)
        return samples

    def time(self, runs):
        """Time calls as launched one by one: a dict of medians. `runs`: a call per buffer set."""
        for run in runs[:3]:
            run()
        start = time.perf_counter()
        warm = max(5, min(len(runs), REPEATS))
        once = sum(self._samples(runs, warm)) / warm / 1e3
        repeats = repeats_of(once)
        result = summary(self._samples(runs, repeats))
        self.synchronize()
        result["seconds_spent"] = round(time.perf_counter() - start, 3)
        return result

    def time_graph(self, runs):
        """The same as one CUDA graph that walks over all buffer sets; a sample is a replay."""
        for run in runs[:3]:
            run()
        self.synchronize()
        calls = max(len(runs), 8)
        graph = ctypes.c_void_p()
        self.call("capture")
        try:
            for i in range(calls):
                runs[i % len(runs)]()
        finally:  # the stream must leave the capture whatever happens
            self.call("end_capture", ctypes.byref(graph))
        try:

            def replay():
                self.call("replay", graph)

            once = sum(self._samples([replay], 3)) / 3e3
            repeats = repeats_of(once)
            samples = [s / calls for s in self._samples([replay], repeats)]
        finally:
            self.synchronize()
            self.call("drop_graph", graph)
        return {**summary(samples), "calls_per_sample": calls}

    def yardsticks(self):
        """Bytes per second that this GPU can copy (read and written) and that it can read."""
        size = min(1 << 30, self.memory()[0] // 8) // 4096 * 4096
        noise = np.random.default_rng(0).integers(0, 2**31, (1 << 20,), np.int32)
        a = self.periodic(noise, size // 4, "int32")
        b = self.empty(a.shape, "int32")
        source, target = ctypes.c_void_p(a.pointer), ctypes.c_void_p(b.pointer)
        words = ctypes.c_uint64(size // 16)
        best = {}
        for blocks in (n * self.multiprocessors for n in (8, 16, 64)):
            for name, moved, arguments in (
                ("copy", 2 * size, (target, source, words, blocks)),
                ("read", size, (source, words, blocks)),
            ):
                result = self.time([functools.partial(self.call, f"{name}_words", *arguments)])
                rate = moved / result["median_ms"] * 1e3
                if name not in best or rate > best[name]["bytes_per_second"]:
                    best[name] = {
                        "bytes_per_second": rate,
                        "bytes": moved,
                        "blocks": blocks,
                        **result,
                    }
        return best


def summary(samples):
    """Median and spread of times in milliseconds."""
    p10, median, p90 = np.percentile(samples, (10, 50, 90))
    return {
        "median_ms": float(median),
        "p10_ms": float(p10),
        "p90_ms": float(p90),
        "repeats": len(samples),
    }
