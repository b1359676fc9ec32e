"""Measures on a GPU: the kernels alone, and contenders in PyTorch and in JAX.

`python build_tools/gpu_check.py` builds what these modules need, and starts them one after the
other. Each is a process of its own, which has until a deadline:

    python -m benchmarks.gpu.kernels             the kernels alone, through dice_op.core
    python -m benchmarks.gpu.contenders torch    contenders in one framework; or jax
    python -m benchmarks.gpu.report FILE         writes the table and the plot of a record

comparison.py compares the kernels' rates with those that were calculated.
"""
