"""Shows where Dice losses break: prints a table of dice_op, MONAI and Keras on hard cases.

    python -m benchmarks.stability

It needs MONAI and PyTorch. The table shows the norm of each gradient divided by the norm of the
exact gradient, which is computed in double precision. 1 is right; with 0 the network does not
learn; NaN destroys the weights.
"""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras  # noqa: E402
import numpy as np  # noqa: E402
import tensorflow as tf  # noqa: E402
import torch  # noqa: E402
from monai.losses import DiceLoss as MonaiDiceLoss  # noqa: E402
from monai.losses import GeneralizedDiceLoss as MonaiGeneralizedDiceLoss  # noqa: E402

from dice_op.losses import DiceLoss, GeneralizedDiceLoss  # noqa: E402

CLASSES = 3


def volume(edge, kind="random", dtype="float32"):
    """Makes logits `[1, edge, edge, edge, C]` and class indices."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1, edge, edge, edge, CLASSES)).astype(dtype)
    y = rng.integers(0, CLASSES, size=x.shape[:-1]).astype(np.uint8)
    if kind == "absent":
        y[y == 2] = 0
    elif kind == "background":
        y[:] = 0
    elif kind == "lesion":
        y[:] = 0
        y[0, edge // 2, edge // 2, edge // 2] = 1
    return x, y


def by_dice_op(x, y, background):
    loss = DiceLoss(include_background=background)
    x = tf.constant(x)
    with tf.GradientTape() as tape:
        tape.watch(x)
        value = loss(y, x)
    return float(value), tape.gradient(value, x).numpy()


def by_monai(x, y, background):
    x = torch.tensor(np.moveaxis(x, -1, 1)).requires_grad_()
    loss = MonaiDiceLoss(softmax=True, to_onehot_y=True, include_background=background)
    value = loss(x, torch.tensor(y[:, None]))
    value.backward()
    return float(value), np.moveaxis(x.grad.numpy(), 1, -1)


def by_keras(x, y, background):
    """keras.losses.Dice of each class, in the precision of the logits."""
    loss = keras.losses.Dice(axis=(1, 2, 3), reduction="none", dtype=x.dtype.name)
    x = tf.constant(x)
    with tf.GradientTape() as tape:
        tape.watch(x)
        losses = loss(tf.one_hot(y, CLASSES, dtype=x.dtype), tf.nn.softmax(x))
        value = tf.reduce_mean(losses if background else losses[:, 1:])
    return float(value), tape.gradient(value, x).numpy()


CASES = {
    "float32, 96³": (96, "random", "float32", True),
    "float16, 96³": (96, "random", "float16", True),
    "float16, 160³": (160, "random", "float16", True),
    "a class absent from the patch": (64, "absent", "float32", True),
    "all background, background left out": (64, "background", "float32", False),
    "a lesion of one voxel": (64, "lesion", "float32", False),
    "a lesion of one voxel, float16": (64, "lesion", "float16", False),
}
CONTENDERS = {"dice_op": by_dice_op, "MONAI": by_monai, "keras.losses.Dice": by_keras}


def generalized_dice(edge):
    """The losses of dice_op and MONAI for two classes of equal size, if every voxel is wrong."""
    y = np.zeros((1, edge, edge, edge), np.uint8)
    y[:, : edge // 2] = 1
    x = np.where(y[..., None] == np.arange(2), -9, 9).astype(np.float32)
    theirs = MonaiGeneralizedDiceLoss(softmax=True, to_onehot_y=True)
    return (
        float(GeneralizedDiceLoss()(y, x)),
        float(theirs(torch.tensor(np.moveaxis(x, -1, 1)), torch.tensor(y[:, None]))),
    )


def main():
    print("| case | exact loss |" + "".join(f" {name} | gradient |" for name in CONTENDERS))
    print("|---|---|" + "---|---|" * len(CONTENDERS))
    for case, (edge, kind, dtype, background) in CASES.items():
        x, y = volume(edge, kind, dtype)
        exact, gradient = by_monai(x.astype(np.float64), y, background)
        cells = []
        for compute in CONTENDERS.values():
            value, got = compute(x, y, background)
            share = np.linalg.norm(got.astype(np.float64)) / np.linalg.norm(gradient)
            cells += [f"{value:.6f}", f"{share:.3f}"]
        print(f"| {case} | {exact:.6f} | " + " | ".join(cells) + " |", flush=True)
    print("\n| voxels | dice_op | MONAI |\n|---|---|---|")
    for edge in (10, 46, 100, 216):
        print(f"| {edge}³ | " + " | ".join(f"{v:.3f}" for v in generalized_dice(edge)) + " |")


if __name__ == "__main__":
    main()
