"""PyTorch and JAX on a GPU, as the harness sees them."""

import contextlib
import time

import numpy as np

from benchmarks.measuring import Framework

MOST_SETS = 16


class OnGpu(Framework):
    """A framework beside the `Device`, which knows the cache and the pool of dice_op.core."""

    def __init__(self, device):
        self.device = device

    def sets_of(self, case):
        return min(MOST_SETS, self.device.sets_of(case))


class PyTorch(OnGpu):
    """PyTorch. A set of arguments is logits, labels, and memory for the gradient."""

    has_graphs = True
    place = "cuda"

    def __init__(self, device, cuda=None):
        import torch

        super().__init__(device)
        self.torch, self.cuda = torch, cuda or torch.cuda
        if not self.cuda.is_available():
            raise SystemExit("PyTorch sees no GPU")

    def arguments(self, volume):
        torch = self.torch

        def repeated(stored, dtype):
            tile = torch.from_numpy(stored.copy()).to(self.place)
            if dtype == "bfloat16":  # NumPy has no bfloat16, and stores its bits.
                tile = tile.view(torch.int16).view(torch.bfloat16)
            index = torch.arange(volume.case.voxels, device=self.place) % len(stored)
            return tile.index_select(0, index)[None]

        x = repeated(volume.stored, volume.case.dtype)
        return x, repeated(volume.labels, "uint8"), torch.empty_like(x)

    def ready(self, step, case, arguments):
        step(*arguments)  # The first call compiles and tunes.
        return step

    def peak(self, step, arguments):
        out = arguments[2]
        out.view(self.torch.uint8).fill_(0xFF)  # These bytes are NaN.
        self.cuda.synchronize()
        self.cuda.reset_peak_memory_stats()
        self.device.pool_peak(reset=True)
        before = self.cuda.memory_allocated()
        loss, gradient = step(*arguments)
        self.cuda.synchronize()
        extra = self.cuda.max_memory_allocated() - before + self.device.pool_peak()
        if gradient is out:  # Its memory was allocated before the measurement.
            extra += out.numel() * out.element_size()
        return (loss, gradient), extra

    def rows(self, gradient, start, count):
        return gradient[0, start : start + count].double().cpu().numpy()

    def samples(self, runs, repeats):
        self.cuda.synchronize()
        events = [self.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
        for i in range(repeats):
            events[i].record()
            runs[i % len(runs)]()
        events[repeats].record()
        self.cuda.synchronize()
        return [a.elapsed_time(b) / 1e3 for a, b in zip(events, events[1:], strict=False)]

    @contextlib.contextmanager
    def graph(self, runs):
        side = self.cuda.Stream()
        side.wait_stream(self.cuda.current_stream())
        with self.cuda.stream(side):
            for run in runs[:3]:
                run()
        self.cuda.current_stream().wait_stream(side)
        self.cuda.synchronize()
        graph = self.cuda.CUDAGraph()
        with self.cuda.graph(graph):
            for run in runs:
                run()
        yield graph.replay

    def forget(self):
        self.cuda.empty_cache()


class Jax(OnGpu):
    """JAX. It has no events and no graphs of its own, so the processor's clock times it.

    Between two readings are ten calls, so that those on the GPU count and not those to it.
    """

    calls_per_sample = 10
    platform = "gpu"

    def __init__(self, device):
        import jax

        super().__init__(device)
        self.jax = jax
        if jax.default_backend() != self.platform:
            raise SystemExit("JAX sees no GPU")

    def arguments(self, volume):
        jax, jnp = self.jax, self.jax.numpy

        @jax.jit
        def repeated(tile):
            return jnp.take(tile, jnp.arange(volume.case.voxels) % volume.period, axis=0)[None]

        tile, labels = jnp.asarray(volume.stored), jnp.asarray(volume.labels)
        if volume.case.dtype == "bfloat16":  # NumPy has no bfloat16, and stores its bits.
            tile = jax.lax.bitcast_convert_type(tile, jnp.bfloat16)
        return repeated(tile), repeated(labels)

    def ready(self, step, case, arguments):
        return step.lower(*arguments).compile()

    def peak(self, step, arguments):
        memory = step.memory_analysis()
        return step(*arguments), memory.temp_size_in_bytes + memory.output_size_in_bytes

    def rows(self, gradient, start, count):
        return np.asarray(gradient[0, start : start + count], np.float64)

    def samples(self, runs, repeats):
        samples = []
        for _ in range(repeats):
            start = time.perf_counter()
            for i in range(self.calls_per_sample):
                result = runs[i % len(runs)]()
            self.jax.block_until_ready(result)
            samples.append((time.perf_counter() - start) / self.calls_per_sample)
        return samples
