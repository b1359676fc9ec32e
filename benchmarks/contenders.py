"""The contenders: dice_op and other ways to compute a Dice loss and its gradient.

`Contender` is the type of all of them. The others in this file run on a CPU; those that run on a
GPU are in gpu/contenders.py. A contender makes, for a `Case`, a function from logits and labels to
loss and gradient. It is written as its users would write it, with softmax (or sigmoid for one
class), one-hot labels where it needs them, and the mean over the classes.
"""

import dataclasses
import functools
import importlib.util
from collections.abc import Callable

from benchmarks.cases import SMOOTH

IN_PLACE = "dice_op.core, in place"
LEVELS = ("portable", "x86-64-v3", "x86-64-v4")
EPSILON = 1e-6  # The snippets use this value.


def _every(case):
    return True


@dataclasses.dataclass(frozen=True)
class Contender:
    """One way to compute the loss, and what the harness and the reports must know about it."""

    title: str
    make_step: Callable  # takes a `Case`, and returns the function from logits and labels
    applies: Callable = _every  # takes a `Case`, and says whether it is worth the time
    framework: str = "tensorflow"  # whose arrays it takes; or "numpy", "torch", "jax"
    same_loss: bool = True  # whether it computes the mean of 1 - dice over the classes
    ours: bool = False
    snippet: bool = False  # whether it is code as people copy it into their programs
    simd_level: str | None = None  # the level of the CPU kernels that it forces
    needs: tuple = ()  # the modules that must be installed besides the framework
    most_classes: int | None = None
    later: int = 0  # how many volumes of a plan come before it, because it takes long to compile

    def why_not(self, case):
        """Says why it cannot compute this case. An empty string means that it can."""
        for module in self.needs:
            if importlib.util.find_spec(module) is None:
                return f"{module} is not installed"
        if self.most_classes is not None and case.classes > self.most_classes:
            return f"written for at most {self.most_classes} classes"
        return ""

    def environment(self):
        """The variables that its process has besides the usual ones."""
        return {"DICE_OP_SIMD": self.simd_level} if self.simd_level else {}

    def facts(self):
        """What a record says about the contender. The reports know no contender by its title."""
        facts = ("ours", "same_loss", "snippet", "simd_level")
        return {"contender": self.title} | {fact: getattr(self, fact) for fact in facts}


def by_title(*contenders):
    """Maps titles to contenders."""
    return {contender.title: contender for contender in contenders}


# --- which cases ----------------------------------------------------------------------------------


def _plain(case):
    return case.plain


def _in_place_cases(case):
    return case.plain and (case.shape in ((160,) * 3, (128,) * 3) or case.classes == 104)


def _other_frameworks_cases(case):
    return case.plain and (case.shape[0], case.classes) in ((160, 4), (128, 14))


def _snippet_cases(case):
    return case.plain and case.logits_bytes < 1 << 27 and 1 < case.classes < 20


def _binary_snippet_cases(case):
    return case.plain and case.logits_bytes < 1 << 27 and case.classes == 1


def _compiled_monai_cases(case):
    return case.plain and case.classes in (4, 14)  # It takes long to compile.


# --- dice_op --------------------------------------------------------------------------------------


def _dice_op(case):
    import dice_op

    activation = "softmax" if case.classes > 1 else "sigmoid"
    return dice_op.losses.DiceLoss(activation=activation, data_format=case.data_format)


def _kernels(case, in_place=False, simd_level=None):
    """The kernels without TensorFlow. In place, the gradient replaces the logits."""
    import numpy as np

    from dice_op import core

    if simd_level and core.build_info()["simd_level"] != simd_level:
        raise RuntimeError(f"this processor, or this build, has no {simd_level}")

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


def _monai(case):
    from monai.losses import DiceLoss

    many = case.classes > 1
    return DiceLoss(softmax=many, sigmoid=not many, to_onehot_y=many)


def _dice_op_torch(case, **options):
    from dice_op.torch import DiceLoss

    return DiceLoss(smooth_nr=SMOOTH, smooth_dr=SMOOTH, **options)


def _torch(case):
    import torch

    def loss(logits, labels):
        p = torch.softmax(logits, 1)
        t = torch.nn.functional.one_hot(labels[:, 0].long(), case.classes).movedim(-1, 1)
        intersection, pred_sum, label_sum = (v.sum((2, 3, 4)) for v in (p * t, p, t))
        return (1 - (2 * intersection + SMOOTH) / (pred_sum + label_sum + SMOOTH)).mean()

    return loss


def _in_torch(make_loss, compiled=False):
    def make_step(case):
        import torch

        loss = make_loss(case)
        function = torch.compile(loss) if compiled else loss

        def step(logits, labels):
            logits.grad = None
            value = function(logits, labels)
            value.backward()
            return value.detach(), logits.grad

        return step

    return make_step


# --- JAX ------------------------------------------------------------------------------------------


def _dice_op_jax(case):
    from dice_op.jax import DiceLoss

    return DiceLoss(smooth_nr=SMOOTH, smooth_dr=SMOOTH)


def _jax(case):
    import jax

    def loss(logits, labels):
        p, t = jax.nn.softmax(logits), jax.nn.one_hot(labels, case.classes)
        intersection, pred_sum, label_sum = (v.sum((1, 2, 3)) for v in (p * t, p, t))
        return (1 - (2 * intersection + SMOOTH) / (pred_sum + label_sum + SMOOTH)).mean()

    return loss


def _in_jax(make_loss):
    def make_step(case):
        import jax

        return jax.jit(jax.value_and_grad(make_loss(case)))

    return make_step


# --- all of them ----------------------------------------------------------------------------------


def _equal(case):
    return [1 / case.classes] * case.classes


def _ordered(case):
    weights = range(1, case.classes + 1)
    return [w / sum(weights) for w in weights]


def _ours(title, make_step, applies=_plain, **about):
    return Contender(title, make_step, applies, ours=True, **about)


def _kernels_in_place(title, level=None):
    make_step = functools.partial(_kernels, in_place=True, simd_level=level)
    return _ours(title, make_step, _in_place_cases, framework="numpy", simd_level=level)


def _snippets(title, make_loss, applies=_snippet_cases, same_loss=True):
    for words, eager in (("", False), (", eager", True)):
        make_step = _in_tensorflow(make_loss, eager=eager)
        yield Contender(title + words, make_step, applies, same_loss=same_loss, snippet=True)


def _weighted_loss(case):
    return _by_class(case, _ordered(case))


def _mean_loss(case):
    return _by_class(case, _equal(case))


def _monai_contender(title, applies, compiled):
    needs = ("monai", "torch")
    step = _in_torch(_monai, compiled)
    return Contender(title, step, applies, framework="torch", needs=needs)


def _front_end(title, framework, make_step, **about):
    needs = (framework,)
    return Contender(title, make_step, _other_frameworks_cases, framework, needs=needs, **about)


CONTENDERS = by_title(
    _ours("dice_op", _in_tensorflow(_dice_op), _every),
    _ours("dice_op, XLA", _in_tensorflow(_dice_op, jit_compile=True), _every),
    _ours("dice_op, eager", _in_tensorflow(_dice_op, eager=True)),
    _ours("dice_op.core", _kernels, framework="numpy"),
    _kernels_in_place(IN_PLACE),
    *(_kernels_in_place(f"dice_op.core, {level}", level) for level in LEVELS),
    Contender("vectorised", _in_tensorflow(_vectorised), _plain),
    Contender("vectorised, XLA", _in_tensorflow(_vectorised, jit_compile=True)),
    Contender("keras.losses.Dice", _in_tensorflow(_keras), _plain),
    *_snippets("binary snippet", _binary, _binary_snippet_cases),
    *_snippets("weighted snippet", _weighted_loss, same_loss=False),
    *_snippets("multi-class snippet", _mean_loss),
    # MONAI always gets channels first, so a case with another layout would measure the same.
    _monai_contender("monai", _plain, compiled=False),
    _monai_contender("monai, torch.compile", _compiled_monai_cases, compiled=True),
    _front_end("dice_op.torch", "torch", _in_torch(_dice_op_torch), ours=True),
    _front_end(
        "dice_op.torch, in place",
        "torch",
        _in_torch(functools.partial(_dice_op_torch, overwrite_logits=True)),
        ours=True,
    ),
    _front_end("dice_op.jax", "jax", _in_jax(_dice_op_jax), ours=True),
    _front_end("vectorised, PyTorch", "torch", _in_torch(_torch)),
    _front_end("vectorised, JAX", "jax", _in_jax(_jax)),
)
