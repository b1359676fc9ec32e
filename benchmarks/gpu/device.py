"""Uses a GPU without a framework, through the library that is compiled from device.cu.

It makes arrays that `dice_op.core` takes through DLPack, reads the GPU's clock, and measures how
fast the GPU copies and reads. All work goes to one stream, `Device.stream`.
"""

import contextlib
import ctypes
import functools
import math

import numpy as np

from benchmarks.cases import STORED, itemsize
from benchmarks.measuring import ROOT, Framework, time_calls

LIBRARY = ROOT / "build" / "gpu" / "libgpu_device.so"
CUDA = 2  # as DLPack numbers the kinds of memory
# The code and the bits of each dtype in DLPack.
DLPACK = {
    "float16": (2, 16),
    "bfloat16": (4, 16),
    "float32": (2, 32),
    "float64": (2, 64),
    "uint8": (1, 8),
    "int16": (0, 16),
    "int32": (0, 32),
    "int64": (0, 64),
}


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
        code, bits = DLPACK[dtype]
        dims = (ctypes.c_int64 * len(self.shape))(*self.shape)
        self._tensor = _Tensor(
            pointer, device.memory_kind, 0, len(self.shape), code, bits, 1, dims, None, 0
        )  # fmt: skip

    def __dlpack__(self, **_):
        # There is no deleter, because this object owns the memory and outlives the call.
        return _new_capsule(ctypes.addressof(self._tensor), _CAPSULE_NAME, None)

    def __dlpack_device__(self):
        return self.device.memory_kind, 0

    def __del__(self):
        if self.owner is None:
            self.device.call("release", ctypes.c_void_p(self.pointer))

    def reshape(self, *shape):
        """Returns an array of another shape that shares this memory."""
        return Array(self.device, shape, self.dtype, self.pointer, self)

    def numpy(self, start=0, count=None):
        """Copies to the host, as stored. `start` and `count` are rows of the first axis."""
        shape = (self.shape[0] - start if count is None else count, *self.shape[1:])
        result = np.empty(shape, STORED[self.dtype])
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


def load_library():
    """Loads the library that gpu_check.py has compiled."""
    library = ctypes.CDLL(str(LIBRARY))
    library.gpu_error.restype = ctypes.c_char_p
    library.gpu_stream.restype = ctypes.c_uint64
    return library


class Device(Framework):
    """The first GPU that CUDA reports.

    The harness reads its clock and records its graphs. Its arrays are made here, one by one,
    because the kernels alone take other arguments than a contender.
    """

    memory_kind = CUDA
    has_graphs = True

    def __init__(self, library=None):
        self._library = library or load_library()
        about = (ctypes.c_int * 5)()
        self.call("open", about)
        self.multiprocessors, self.l2_bytes, self.arch, self.driver, self.runtime = about
        self.stream = self._library.gpu_stream()
        self._events = []

    def call(self, name, *arguments):
        """Calls a function of device.cu, and raises DeviceError with CUDA's message."""
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

    def sets_of(self, case):
        """How many logits, labels and gradients are needed so that the L2 cache cannot hold them.

        The calls use them in turn.
        """
        return max(1, math.ceil(4 * self.l2_bytes / (2 * case.logits_bytes + case.labels_bytes)))

    def _events_for(self, count):
        """Returns at least this many events. They are made once and used again."""
        while len(self._events) < count:
            event = ctypes.c_void_p()
            self.call("event", ctypes.byref(event))
            self._events.append(event)
        return self._events

    def samples(self, runs, repeats):
        """Returns the seconds between the events before and after each run."""
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
            samples.append(elapsed.value / 1e3)
        return samples

    @contextlib.contextmanager
    def graph(self, runs):
        """Records calls in a CUDA graph, and gives a function that launches it."""
        for run in runs[:3]:
            run()
        self.synchronize()
        graph = ctypes.c_void_p()
        self.call("capture")
        try:
            for run in runs:
                run()
        finally:  # After an error too, the capture must end.
            self.call("end_capture", ctypes.byref(graph))
        try:
            yield functools.partial(self.call, "replay", graph)
        finally:
            self.synchronize()
            self.call("drop_graph", graph)

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
                copy_or_read = functools.partial(self.call, f"{name}_words", *arguments)
                result = time_calls(self, [copy_or_read])
                rate = moved / result["seconds"]
                if name not in best or rate > best[name]["bytes_per_second"]:
                    best[name] = {
                        "bytes_per_second": rate,
                        "bytes": moved,
                        "blocks": blocks,
                        **result,
                    }
        return best
