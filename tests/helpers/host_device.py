"""A stand-in for a GPU whose memory is the host's, so that what runs on a GPU can be tried without.

`HostDevice` is the `Device` of the benchmarks over a library that is written in Python here, in
place of the one that nvcc compiles. `HostCore` computes with the CPU's kernels what those of a GPU
would. What is timed on it means nothing. It needs nothing compiled; gpu/rehearsal.py uses the CUDA
kernels on the emulator instead.
"""

import contextlib
import ctypes
import time
from unittest import mock

import numpy as np

from benchmarks.gpu.device import Array, Device
from benchmarks.gpu.frameworks import Jax, OnGpu, PyTorch
from dice_op import core

HOST = 1  # as DLPack numbers the kinds of memory
NO_MEMORY = 2  # cudaErrorMemoryAllocation


class HostLibrary:
    """The functions of benchmarks/gpu/device.cu over the host's memory. Work is never delayed."""

    def __init__(self):
        self.blocks, self.times = {}, [0.0]
        self.free = 1 << 30
        self.capturing = False

    def gpu_error(self, error):
        return b"out of memory" if error == NO_MEMORY else b"another error"

    def gpu_open(self, about):
        about[:] = [2, 1 << 14, 90, 13000, 13000]

    def gpu_stream(self):
        return 0

    def gpu_synchronize(self):
        assert not self.capturing, "a capture ends by this on a GPU"

    def gpu_memory(self, about):
        about[0] = about[1] = self.free

    def gpu_allocate(self, count, pointer):
        if count.value > self.free:
            return NO_MEMORY
        block = np.empty(count.value, np.uint8)
        self.blocks[block.ctypes.data] = block
        pointer._obj.value = block.ctypes.data
        return 0

    def gpu_release(self, pointer):
        del self.blocks[pointer.value]

    def gpu_copy_bytes(self, to, source, count):
        ctypes.memmove(to, source, count.value)

    def gpu_fill(self, to, byte, count):
        ctypes.memset(to, byte, count.value)

    def gpu_repeat(self, data, period, count):
        whole = _bytes(data, count)
        whole[:] = np.resize(whole[: period.value].copy(), count.value)

    def gpu_mismatches(self, data, period, count, result):
        whole = _bytes(data, count)
        result._obj.value = np.count_nonzero(whole[period.value :] != whole[: -period.value])

    def gpu_pool_peak(self, result, reset):
        result._obj.value = 0

    def gpu_event(self, event):
        self.times.append(0.0)
        event._obj.value = len(self.times) - 1

    def gpu_record(self, event):
        self.times[event.value] = time.perf_counter()

    def gpu_elapsed(self, start, end, milliseconds):
        elapsed = 1e3 * (self.times[end.value] - self.times[start.value])
        assert elapsed >= 0
        milliseconds._obj.value = max(elapsed, 1e-6)

    def gpu_capture(self):
        self.capturing = True

    def gpu_end_capture(self, graph):
        self.capturing, graph._obj.value = False, 1

    def gpu_replay(self, graph):
        assert graph.value == 1

    def gpu_drop_graph(self, graph):
        assert graph.value == 1

    def gpu_copy_words(self, to, source, words, blocks):
        ctypes.memmove(to, source, 16 * words.value)

    def gpu_read_words(self, source, words, blocks):
        pass


def _bytes(pointer, count):
    return np.ctypeslib.as_array((ctypes.c_uint8 * count.value).from_address(pointer.value))


class HostDevice(Device):
    """A `Device` whose arrays are in the host's memory."""

    memory_kind = HOST
    most = 5

    def __init__(self):
        self.host = HostLibrary()
        super().__init__(self.host)


class Result:
    """Sums as dice_op.core returns them for arrays on a GPU."""

    def __init__(self, values):
        self.values = values

    def numpy(self):
        return self.values


class HostCore:
    """dice_op.core, but with what it does only on a GPU: NaN for bad values, and refusals."""

    build_info = staticmethod(core.build_info)
    gradient = staticmethod(core.gradient)

    def sums(self, logits, labels, *, voxel_weight=None, **options):
        if not isinstance(labels, Array):
            raise ValueError("labels are in host memory")
        if options.get("data_format") != "channels_first" and logits.shape[-1] > 256:
            raise ValueError("at most 256 classes")
        of_samples = []
        for n in range(logits.shape[0]):
            x, y, m = (a and sample(a, n) for a in (logits, labels, voxel_weight))
            try:
                of_samples.append(core.sums(x, y, voxel_weight=m, **options))
            except ValueError:
                of_samples.append(None)
        good = next(sums for sums in of_samples if sums)
        nan = {name: np.full_like(values, np.nan) for name, values in good.items()}
        of_samples = [sums or nan for sums in of_samples]
        return {name: Result(np.concatenate([s[name] for s in of_samples])) for name in good}


class WrongCore(HostCore):
    """Its sums are a little too large, and its gradient is 0 at the last voxel."""

    def sums(self, *args, **options):
        sums = super().sums(*args, **options)
        return {name: Result(1.0001 * value.values) for name, value in sums.items()}

    def gradient(self, logits, labels, *, out, **options):
        core.gradient(logits, labels, out=out, **options)
        of_a_voxel = out.nbytes // out.shape[1]
        voxel = Array(
            out.device, (1, of_a_voxel), "uint8", out.pointer + out.nbytes - of_a_voxel, out
        )
        voxel.fill(0)


def sample(array, n):
    """One sample of an array `[N, ...]`, without a copy."""
    start = array.pointer + n * (array.nbytes // array.shape[0])
    return Array(array.device, (1, *array.shape[1:]), array.dtype, start, array)


class NumpyOnHost(OnGpu):
    """NumPy as a framework, where neither PyTorch nor JAX is installed."""

    most = 5

    def arguments(self, volume):
        repeats = np.arange(volume.case.voxels) % volume.period
        return volume.stored[repeats][None], volume.labels[repeats][None]

    def ready(self, step, case, arguments):
        return step

    def peak(self, step, arguments):
        return step(*arguments), 1

    def rows(self, gradient, start, count):
        return gradient[0, start : start + count]

    def samples(self, runs, repeats):
        samples = []
        for i in range(repeats):
            start = time.perf_counter()
            runs[i % len(runs)]()
            samples.append(time.perf_counter() - start)
        return samples


class HostCuda:
    """What the harness calls of torch.cuda. Work is never delayed."""

    Stream = mock.Mock

    def __init__(self):
        self.capturing = False

    def is_available(self):
        return True

    def synchronize(self):
        assert not self.capturing, "a capture ends by this on a GPU"

    def current_stream(self):
        return mock.Mock()

    def stream(self, stream):
        return contextlib.nullcontext()

    def reset_peak_memory_stats(self):
        pass

    def memory_allocated(self):
        return 5

    def max_memory_allocated(self):
        return 6

    def empty_cache(self):
        pass

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = time.perf_counter()

        def elapsed_time(self, end):
            return 1e3 * (end.at - self.at)

    class CUDAGraph:
        def replay(self):
            time.sleep(1e-6)

    @contextlib.contextmanager
    def graph(self, graph):
        self.capturing = True
        yield
        self.capturing = False


class PyTorchOnHost(PyTorch):
    """PyTorch as the harness sees it on a GPU, but on the CPU."""

    place = "cpu"
    most = 5

    def __init__(self, device):
        super().__init__(device, HostCuda())


class JaxOnHost(Jax):
    """JAX as the harness sees it on a GPU, but on the CPU."""

    platform = "cpu"
    most = 5
