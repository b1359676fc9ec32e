"""Uses a GPU without a framework, through the library that is compiled from gpu_device.cu.

It makes arrays that `dice_op.core` takes through DLPack, times calls, and measures how fast the GPU
copies and reads. All work goes to one stream, `Device.stream`.
"""

import ctypes
import functools
import math
import time
from pathlib import Path

import numpy as np

SOURCE = Path(__file__).with_suffix(".cu")
REPEATS = 50  # how often a call is timed after the warm-up
LONGEST = 4.0  # how many seconds one measurement may take; slow calls are repeated less often
# Each dtype has a type code and bits of DLPack, and a type in which NumPy stores it. NumPy has no
# bfloat16, and stores its bits.
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
    """How often to repeat a call that takes this long."""
    return max(5, min(REPEATS, int(LONGEST / max(seconds, 1e-9))))


def itemsize(dtype):
    """The bytes of one element."""
    return np.dtype(DTYPES[dtype][2]).itemsize


def encode(values, dtype):
    """Converts values to the form in which `dtype` is stored."""
    if dtype != "bfloat16":
        return np.ascontiguousarray(values, DTYPES[dtype][2])
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)  # round to nearest even


def decode(stored, dtype):
    """Converts what `encode` returned to float64."""
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
        ("context", ctypes.c_void_p),  # This and the next field make it a DLManagedTensor.
        ("deleter", ctypes.c_void_p),
    ]


_CAPSULE_NAME = b"dltensor"
_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype = ctypes.py_object
_new_capsule.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]


class Array:
    """An array on the GPU. `owner` is the array whose memory it shares, or None for its own."""

    def __init__(self, device, shape, dtype, pointer, owner):
        self.device, self.shape, self.dtype = device, tuple(map(int, shape)), dtype
        self.pointer, self.owner = pointer, owner
        self.nbytes = math.prod(self.shape) * itemsize(dtype)
        code, bits, _ = DTYPES[dtype]
        dims = (ctypes.c_int64 * len(self.shape))(*self.shape)
        self._tensor = _Tensor(pointer, 2, 0, len(self.shape), code, bits, 1, dims, None, 0)

    def __dlpack__(self, **_):
        # There is no deleter, because this object owns the memory and outlives the call.
        return _new_capsule(ctypes.addressof(self._tensor), _CAPSULE_NAME, None)

    def __dlpack_device__(self):
        return 2, 0

    def __del__(self):
        if self.owner is None:
            self.device.call("release", ctypes.c_void_p(self.pointer))

    def reshape(self, *shape):
        """Returns an array of another shape that shares this memory."""
        return Array(self.device, shape, self.dtype, self.pointer, self)

    def numpy(self, start=0, count=None):
        """Copies to the host, as stored. `start` and `count` are rows of the first axis."""
        shape = (self.shape[0] - start if count is None else count, *self.shape[1:])
        result = np.empty(shape, DTYPES[self.dtype][2])
        offset = start * math.prod(self.shape[1:]) * itemsize(self.dtype)
        address = ctypes.c_void_p(result.ctypes.data)
        source = ctypes.c_void_p(self.pointer + offset)
        self.device.call("copy_bytes", address, source, ctypes.c_uint64(result.nbytes))
        return result

    def fill(self, byte):
        """Sets every byte. 0xFF makes floats NaN."""
        self.device.call("fill", ctypes.c_void_p(self.pointer), byte, ctypes.c_uint64(self.nbytes))


class DeviceError(RuntimeError):
    """A call of CUDA failed."""


class Device:
    """The first GPU that CUDA reports."""

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
        """Calls a function of gpu_device.cu, and raises DeviceError with CUDA's message."""
        error = getattr(self._library, f"gpu_{name}")(*arguments)
        if error:
            raise DeviceError(f"{name}: {self._library.gpu_error(error).decode()}")

    def synchronize(self):
        """Waits until the stream has finished."""
        self.call("synchronize")

    def memory(self):
        """Returns the free bytes and all bytes of the GPU's memory."""
        about = (ctypes.c_uint64 * 2)()
        self.call("memory", about)
        return about[0], about[1]

    def pool_peak(self, reset=False):
        """Returns the peak use of CUDA's memory pool, from which dice_op.core allocates."""
        peak = ctypes.c_uint64()
        self.call("pool_peak", ctypes.byref(peak), int(reset))
        return peak.value

    def empty(self, shape, dtype, misalign=0):
        """Makes an uninitialised array, which starts `misalign` bytes after an aligned address."""
        pointer = ctypes.c_void_p()
        bytes_ = math.prod(shape) * itemsize(dtype) + misalign
        self.call("allocate", ctypes.c_uint64(max(bytes_, 1)), ctypes.byref(pointer))
        array = Array(self, shape, dtype, pointer.value, None)
        return Array(self, shape, dtype, pointer.value + misalign, array) if misalign else array

    def array(self, stored, dtype, misalign=0):
        """Copies what `encode` returned to the GPU."""
        stored = np.ascontiguousarray(stored)
        array = self.empty(stored.shape, dtype, misalign)
        source, bytes_ = ctypes.c_void_p(stored.ctypes.data), ctypes.c_uint64(stored.nbytes)
        self.call("copy_bytes", ctypes.c_void_p(array.pointer), source, bytes_)
        return array

    def periodic(self, stored, rows, dtype):
        """Makes `[rows, ...]` by repeating the rows of `stored`.

        Large data then has a small reference.
        """
        array = self.empty((rows, *stored.shape[1:]), dtype)
        stored = np.ascontiguousarray(stored[:rows])
        pointer, period = ctypes.c_void_p(array.pointer), ctypes.c_uint64(stored.nbytes)
        self.call("copy_bytes", pointer, ctypes.c_void_p(stored.ctypes.data), period)
        self.call("repeat", pointer, period, ctypes.c_uint64(array.nbytes))
        return array

    def mismatches(self, array, period_rows):
        """Counts the bytes that differ from those `period_rows` rows before."""
        period = array.nbytes // array.shape[0] * period_rows
        count = ctypes.c_uint64()
        self.call(
            "mismatches", ctypes.c_void_p(array.pointer), ctypes.c_uint64(period),
            ctypes.c_uint64(array.nbytes), ctypes.byref(count),
        )  # fmt: skip
        return count.value

    def rotation(self, bytes_of_a_set):
        """How many sets of buffers are needed so that the L2 cache cannot hold them."""
        return max(1, math.ceil(4 * self.l2_bytes / bytes_of_a_set))

    def _events_for(self, count):
        """Returns at least this many events. They are made once and used again."""
        while len(self._events) < count:
            event = ctypes.c_void_p()
            self.call("event", ctypes.byref(event))
            self._events.append(event)
        return self._events

    def _samples(self, runs, repeats):
        """Returns the milliseconds between the events before and after each run."""
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
        """Times calls that are launched one by one. `runs` has a call for each buffer set."""
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
        """Times calls in one CUDA graph that uses all buffer sets in turn. A sample is a replay."""
        for run in runs[:3]:
            run()
        self.synchronize()
        calls = max(len(runs), 8)
        graph = ctypes.c_void_p()
        self.call("capture")
        try:
            for i in range(calls):
                runs[i % len(runs)]()
        finally:  # After an error too, the capture must end.
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
        """Measures the bytes per second of copying (read and written) and of reading."""
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
    """Returns the median and spread of times in milliseconds."""
    p10, median, p90 = np.percentile(samples, (10, 50, 90))
    return {
        "median_ms": float(median),
        "p10_ms": float(p10),
        "p90_ms": float(p90),
        "repeats": len(samples),
    }
