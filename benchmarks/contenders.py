"""Who computes a Dice loss and its gradient, and how people write it.

A contender makes of a `Case` a function from logits and labels to loss and gradient, as its users
would write it: softmax (sigmoid for one class), one-hot where it wants that, mean over classes.
"""

import functools
import importlib.util

IN_PLACE = "dice_op.core, in place"
LEVELS = {  # contender, in place too, to level, for DICE_OP_SIMD
    f"dice_op.core, {level}": level for level in ("portable", "x86-64-v3", "x86-64-v4")
}
SMOOTH = 1e-5
EPSILON = 1e-6  # of the snippets


def applies(name, case):
    """Whether the contender computes this case as it stands, and is worth the time of it."""
    if name.startswith("monai"):
        # it has its own layout, channels first: both of ours are the same to it
        installed = all(importlib.util.find_spec(m) for m in ("monai", "torch"))
        slow = name.endswith("torch.compile") and case.classes not in (4, 14)  # to compile
        return installed and case.plain and not slow
    if name in LEVELS or name == IN_PLACE:
        return case.plain and (case.shape in ((160,) * 3, (128,) * 3) or case.classes == 104)
    if "snippet" in name:
        some = case.plain and case.logits_bytes < 1 << 27 and case.classes < 20
        return some and (case.classes == 1) == name.startswith("binary")
    return case.plain or name in ("dice_op", "dice_op, XLA", "vectorised, XLA")


def same_loss(name):
    """Whether it computes the mean of 1 - dice over the classes, and can be held to that."""
    return not name.startswith("weighted")


# --- dice_op --------------------------------------------------------------------------------------


def _dice_op(case):
    import dice_op

    activation = "softmax" if case.classes > 1 else "sigmoid"
    return dice_op.losses.DiceLoss(activation=activation, data_format=case.data_format)


def _kernels(case, in_place=False):
    """dice_op.core: the kernels without TensorFlow. In place the gradient replaces the logits."""
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
    """All voxels and channels jointly."""
    import tensorflow as tf

    def loss(labels, logits):
        p, t = tf.sigmoid(logits), _one_hot(case, labels, logits.dtype)
        axes = list(range(1, logits.shape.rank))
        intersection = tf.reduce_sum(t * p, axes)
        union = tf.reduce_sum(t, axes) + tf.reduce_sum(p, axes)
        return 1 - tf.reduce_mean((2 * intersection + EPSILON) / (union + EPSILON))

    return loss


def _by_class(case, weights):
    """Class by class, in a Python loop."""
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
    """All classes at once: the way TensorFlow's own operations do it best."""
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


CONTENDERS = {
    "dice_op": _in_tensorflow(_dice_op),
    "dice_op, XLA": _in_tensorflow(_dice_op, jit_compile=True),
    "dice_op, eager": _in_tensorflow(_dice_op, eager=True),
    "dice_op.core": _kernels,
    IN_PLACE: functools.partial(_kernels, in_place=True),
    **dict.fromkeys(LEVELS, functools.partial(_kernels, in_place=True)),
    "vectorised": _in_tensorflow(_vectorised),
    "vectorised, XLA": _in_tensorflow(_vectorised, jit_compile=True),
    "keras.losses.Dice": _in_tensorflow(_keras),
    "binary snippet": _in_tensorflow(_binary),
    "binary snippet, eager": _in_tensorflow(_binary, eager=True),
    "weighted snippet": _in_tensorflow(lambda case: _by_class(case, _ordered(case))),
    "weighted snippet, eager": _in_tensorflow(
        lambda case: _by_class(case, _ordered(case)), eager=True
    ),
    "multi-class snippet": _in_tensorflow(lambda case: _by_class(case, _equal(case))),
    "multi-class snippet, eager": _in_tensorflow(
        lambda case: _by_class(case, _equal(case)), eager=True
    ),
    "monai": _monai(compiled=False),
    "monai, torch.compile": _monai(compiled=True),
}
