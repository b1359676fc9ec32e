"""The contenders: dice_op and other ways to compute a Dice loss and its gradient.

A contender makes, for a `Case`, a function from logits and labels to loss and gradient. It is
written as its users would write it, with softmax (or sigmoid for one class), one-hot labels where
it needs them, and the mean over the classes.
"""

import dataclasses
import functools
import importlib.util
from collections.abc import Callable

IN_PLACE = "dice_op.core, in place"
LEVELS = ("portable", "x86-64-v3", "x86-64-v4")
SMOOTH = 1e-5
EPSILON = 1e-6  # The snippets use this value.


@dataclasses.dataclass(frozen=True)
class Contender:
    """One way to compute the loss, and what the harness must know about it."""

    make_step: Callable  # takes a `Case`, and returns the function from logits and labels
    applies: Callable  # takes a `Case`, and says whether it can be computed and is worth the time
    arrays: str = "tensorflow"  # the type of its logits and labels; or "numpy", "torch"
    same_loss: bool = True  # whether it computes the mean of 1 - dice over the classes
    ours: bool = False
    simd_level: str | None = None  # the level of the CPU kernels that it forces


def same_loss(name):
    """Whether this contender computes the mean of 1 - dice over the classes.

    The name may come from a record that is older than the contenders here.
    """
    return name not in CONTENDERS or CONTENDERS[name].same_loss


# --- which cases ----------------------------------------------------------------------------------


def _every(case):
    return True


def _plain(case):
    return case.plain


def _in_place_cases(case):
    return case.plain and (case.shape in ((160,) * 3, (128,) * 3) or case.classes == 104)


def _snippet_cases(case):
    return case.plain and case.logits_bytes < 1 << 27 and 1 < case.classes < 20


def _binary_snippet_cases(case):
    return case.plain and case.logits_bytes < 1 << 27 and case.classes == 1


def _monai_cases(case):
    # MONAI always gets channels first, so a case with another layout would measure the same.
    return case.plain and all(importlib.util.find_spec(m) for m in ("monai", "torch"))


def _compiled_monai_cases(case):
    return _monai_cases(case) and case.classes in (4, 14)  # It takes long to compile.


# --- dice_op --------------------------------------------------------------------------------------


def _dice_op(case):
    import dice_op

    activation = "softmax" if case.classes > 1 else "sigmoid"
    return dice_op.losses.DiceLoss(activation=activation, data_format=case.data_format)


def _kernels(case, in_place=False):
    """The kernels without TensorFlow. In place, the gradient replaces the logits."""
    import numpy as np

    from dice_op import core

    options = {"activation": "softmax" if case.classes > 1 else "sigmoid"}
    options["data_format"] = case.data_format

    def step(logits, labels):
        sums = core.sums(logits, labels, **options)
        i, p, t = (sums[n].astype(np.float64) for n in ("intersection", "pred_sum", "label_sum"))
        numerator, denominator = 2 * i + SMOOTH, p + t + SMOOTH
        a = (-2 / denominator / i.size).astype(np.float32)
        b = (numerator / denominator**2 / i.size).astype(np.float32)
        out = logits if in_place else None
        gradient = core.gradient(logits, labels, d_intersection=a, d_pred_sum=b, out=out, **options)
        return np.mean(1 - numerator / denominator), gradient

    return step


# --- TensorFlow -----------------------------------------------------------------------------------


def _activate(case, logits, axis):
    import tensorflow as tf

    return tf.nn.softmax(logits, axis) if case.classes > 1 else tf.sigmoid(logits)


def _one_hot(case, labels, dtype):
    import tensorflow as tf

    axis = -1 if case.data_format == "channels_last" else 1
    if case.labels == "one-hot":
        return tf.cast(labels, dtype)
    if case.classes == 1:
        return tf.cast(tf.expand_dims(labels, axis), dtype)
    return tf.one_hot(labels, case.classes, axis=axis, dtype=dtype)


def _binary(case):
    """A snippet that treats all voxels and channels as one class."""
    import tensorflow as tf

    def loss(labels, logits):
        p, t = tf.sigmoid(logits), _one_hot(case, labels, logits.dtype)
        axes = list(range(1, logits.shape.rank))
        intersection = tf.reduce_sum(t * p, axes)
        union = tf.reduce_sum(t, axes) + tf.reduce_sum(p, axes)
        return 1 - tf.reduce_mean((2 * intersection + EPSILON) / (union + EPSILON))

    return loss


def _by_class(case, weights):
    """A snippet that computes class by class in a Python loop."""
    import tensorflow as tf

    def loss(labels, logits):
        p, t = tf.nn.softmax(logits), _one_hot(case, labels, logits.dtype)
        total = 0.0
        for c in range(case.classes):
            p_c, t_c = p[..., c], t[..., c]
            intersection = tf.reduce_sum(t_c * p_c, [1, 2, 3])
            union = tf.reduce_sum(t_c, [1, 2, 3]) + tf.reduce_sum(p_c, [1, 2, 3])
            dice = (2 * intersection + EPSILON) / (union + EPSILON)
            total += weights[c] * (1 - tf.reduce_mean(dice))
        return total

    return loss


def _vectorised(case):
    """All classes at once, which is the fastest way with TensorFlow's own operations."""
    import tensorflow as tf

    last = case.data_format == "channels_last"
    axes = [1, 2, 3] if last else [2, 3, 4]

    def loss(labels, logits):
        p = _activate(case, logits, -1 if last else 1)
        t = _one_hot(case, labels, logits.dtype)
        intersection = tf.reduce_sum(p * t, axes)
        union = tf.reduce_sum(p, axes) + tf.reduce_sum(t, axes)
        return tf.reduce_mean(1 - (2 * intersection + SMOOTH) / (union + SMOOTH))

    return loss


def _keras(case):
    import keras

    last = case.data_format == "channels_last"
    dice = keras.losses.Dice(axis=(1, 2, 3) if last else (2, 3, 4), dtype=case.dtype)

    def loss(labels, logits):
        p = _activate(case, logits, -1 if last else 1)
        return dice(_one_hot(case, labels, logits.dtype), p)

    return loss


def _in_tensorflow(make_loss, eager=False, jit_compile=False):
    def make_step(case):
        import tensorflow as tf

        loss = make_loss(case)

        def step(logits, labels):
            with tf.GradientTape() as tape:
                tape.watch(logits)
                value = loss(labels, logits)
            return value, tape.gradient(value, logits)

        return step if eager else tf.function(step, jit_compile=jit_compile)

    return make_step


# --- PyTorch --------------------------------------------------------------------------------------


def _monai(compiled):
    def make_step(case):
        import torch
        from monai.losses import DiceLoss

        many = case.classes > 1
        loss = DiceLoss(softmax=many, sigmoid=not many, to_onehot_y=many)
        function = torch.compile(loss) if compiled else loss

        def step(logits, labels):
            logits.grad = None
            value = function(logits, labels)
            value.backward()
            return value.detach(), logits.grad

        return step

    return make_step


def _equal(case):
    return [1 / case.classes] * case.classes


def _ordered(case):
    weights = range(1, case.classes + 1)
    return [w / sum(weights) for w in weights]


def _ours(make_step, applies=_plain, **about):
    return Contender(make_step, applies, ours=True, **about)


def _kernels_in_place(level=None):
    make_step = functools.partial(_kernels, in_place=True)
    return _ours(make_step, _in_place_cases, arrays="numpy", simd_level=level)


def _snippet(make_loss, applies=_snippet_cases, same_loss=True, **options):
    return Contender(_in_tensorflow(make_loss, **options), applies, same_loss=same_loss)


def _weighted_loss(case):
    return _by_class(case, _ordered(case))


def _mean_loss(case):
    return _by_class(case, _equal(case))


CONTENDERS = {
    "dice_op": _ours(_in_tensorflow(_dice_op), _every),
    "dice_op, XLA": _ours(_in_tensorflow(_dice_op, jit_compile=True), _every),
    "dice_op, eager": _ours(_in_tensorflow(_dice_op, eager=True)),
    "dice_op.core": _ours(_kernels, arrays="numpy"),
    IN_PLACE: _kernels_in_place(),
    **{f"dice_op.core, {level}": _kernels_in_place(level) for level in LEVELS},
    "vectorised": Contender(_in_tensorflow(_vectorised), _plain),
    "vectorised, XLA": Contender(_in_tensorflow(_vectorised, jit_compile=True), _every),
    "keras.losses.Dice": Contender(_in_tensorflow(_keras), _plain),
    "binary snippet": _snippet(_binary, _binary_snippet_cases),
    "binary snippet, eager": _snippet(_binary, _binary_snippet_cases, eager=True),
    "weighted snippet": _snippet(_weighted_loss, same_loss=False),
    "weighted snippet, eager": _snippet(_weighted_loss, same_loss=False, eager=True),
    "multi-class snippet": _snippet(_mean_loss),
    "multi-class snippet, eager": _snippet(_mean_loss, eager=True),
    "monai": Contender(_monai(compiled=False), _monai_cases, arrays="torch"),
    "monai, torch.compile": Contender(_monai(compiled=True), _compiled_monai_cases, arrays="torch"),
}
