"""A recipe for the fused Dice loss in JAX, whose compiler calls the same kernels.

    python examples/jax_dice.py

It needs JAX and `dice_op.core`, but not TensorFlow. csrc/core/dice_op.h describes the arguments and
results of the two calls.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from dice_op import core

for platform, handlers in core.ffi_targets().items():
    for name, handler in handlers.items():
        jax.ffi.register_ffi_target(name, handler, platform=platform)


def attributes_of(**options):
    """Returns the options of `core.sums` as attributes of a call, with defaults for those left out.

    The calls take each number as float64.
    """
    attributes = core.op_attributes(**options)
    return {k: np.float64(v) if isinstance(v, float) else v for k, v in attributes.items()}


def dice_sums(logits, labels, *voxel_weight, **options):
    """Returns the sums in the order of `dice_op.DiceSums`. One not asked for has no classes."""
    attributes = attributes_of(**options)
    last = attributes["data_format"] == "channels_last"
    n, c = logits.shape[0], logits.shape[-1 if last else 1]
    voxels = math.prod(logits.shape[1:-1] if last else logits.shape[2:])
    platform = "cpu" if jax.default_backend() == "cpu" else "CUDA"
    # Counts are float64, which needs jax_enable_x64.
    counts = attributes["activation"] in ("argmax", "threshold")
    dtype = jnp.promote_types(logits.dtype, jnp.float64 if counts else jnp.float32)
    cross_entropy = attributes["with_cross_entropy"]
    binary = cross_entropy and attributes["activation"] == "sigmoid"
    of_tables = [len(attributes[table]) > 0 for table in ("label_sets", "dist_matrix")]
    asked = [True, True, True, cross_entropy, binary, *of_tables]
    shapes = [(n, c if sum_is_asked else 0) for sum_is_asked in asked] + [(n,)]
    results = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
    workspace = jax.ShapeDtypeStruct((core.ffi_workspace(platform, n, voxels, c),), jnp.uint8)
    call = jax.ffi.ffi_call("dice_op_sums", [*results, workspace], vmap_method="sequential")
    return call(logits, labels, *voxel_weight, **attributes)[:-1]


def dice_sums_grad(logits, labels, *rest, **options):
    """Returns d_logits.

    rest: voxel_weight if there is one, d_intersection, d_pred_sum, d_cross_entropy,
      d_negative_cross_entropy, d_distance_sum.
    """
    result = jax.ShapeDtypeStruct(logits.shape, logits.dtype)
    call = jax.ffi.ffi_call("dice_op_sums_grad", result, vmap_method="sequential")
    return call(logits, labels, *rest, **attributes_of(**options))


def formula(intersection, pred_sum, label_sum, smooth=1e-5):
    """Returns the mean of 1 - (2 I + smooth) / (P + T + smooth) over samples and classes."""
    return jnp.mean(1 - (2 * intersection + smooth) / (pred_sum + label_sum + smooth))


@jax.custom_vjp
def dice_loss(logits, labels):
    """The soft Dice loss of logits `[N, spatial..., C]` and class indices `[N, spatial...]`.

    It can be differentiated once, in reverse mode, which is what training needs.
    """
    return _forward(logits, labels)[0]


def _forward(logits, labels):
    sums = dice_sums(logits, labels)[:3]
    loss, d_sums = jax.value_and_grad(formula, (0, 1))(*sums)
    return loss, (logits, labels, *d_sums)


def _backward(kept, d_loss):
    logits, labels, d_intersection, d_pred_sum = kept
    none = jnp.zeros((len(logits), 0), d_pred_sum.dtype)  # The other sums are not asked for.
    coefficients = d_loss * d_intersection, d_loss * d_pred_sum, none, none, none
    return dice_sums_grad(logits, labels, *coefficients), None


dice_loss.defvjp(_forward, _backward)


def main():
    """Fits the logits themselves to labels, and prints how the loss falls."""
    labels = jax.random.randint(jax.random.key(0), (2, 32, 32, 32), 0, 4)
    logits = jax.random.normal(jax.random.key(1), (*labels.shape, 4))
    step = jax.jit(jax.value_and_grad(dice_loss))
    for i in range(101):
        loss, gradient = step(logits, labels)
        if i % 20 == 0:
            print(f"step {i:3d}  loss {loss:.4f}")
        logits -= 3e5 * gradient


if __name__ == "__main__":
    main()
