"""Trains a small 3D U-Net to segment grey and white matter, with dice_op's fused Dice loss.

    python examples/brain_segmentation.py
    KERAS_BACKEND=jax python examples/brain_segmentation.py    # or torch

The data is the MNI152 T1 brain at 1 mm with its tissue maps, which nilearn provides. The network
learns from the back of the brain, and its scores are for the front, which it never saw. The program
also draws a picture, and measures what the loss costs on the whole volume, beside plain operations
of the framework.
"""

import argparse
import contextlib
import json
import os
import sys
import time
from pathlib import Path

import numpy as np
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from nilearn import datasets

sys.path.append(str(Path(__file__).parent.parent))
from benchmarks import cpu, report  # noqa: E402
from benchmarks.cases import Case  # noqa: E402


@contextlib.contextmanager
def native_logs_off():
    """Discards what native code writes to stderr. Python's exceptions still work."""
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


# TensorFlow prints its first lines before it reads its own log level.
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
with native_logs_off():
    import keras
    from keras import layers

    import dice_op

CLASSES = ("background", "grey matter", "white matter")
TISSUES = (1, 2)
FILTERS = (8, 16, 32)
SIZE_MULTIPLE = 2 ** (len(FILTERS) - 1)  # each level of the U-Net halves the volume

PATCH = 48
BATCH = 2
LEARNING_RATE = 1e-2

# What the loss is measured beside, by Keras' backend.
CONTENDERS = {
    "tensorflow": ("dice_op", "dice_op, XLA", "vectorised", "vectorised, XLA"),
    "jax": ("dice_op.jax", "vectorised, JAX"),
    "torch": ("dice_op.torch", "dice_op.torch, in place", "vectorised, PyTorch"),
}

# The front is held out. A left or right half would not do, because the brain is nearly symmetric.
HELD_OUT = 56
MARGIN = 8
# The network sees this many voxels around each voxel. Tiles that overlap by as many show no seams.
HALO = 24
TILE = 48

MIN_LEAD = 0.2

INK = "#e8eaed"
TISSUE_COLOURS = {1: "#f2726f", 2: "#58b8f0"}
FRAME = {"fill": False, "edgecolor": "#ffd166", "linewidth": 1.2, "linestyle": (0, (5, 3))}
CENTRED = {"ha": "center", "va": "center"}


def say(text):
    """Prints one line of progress."""
    print(f"\n> {text}", flush=True)


def load_brain():
    """Returns the T1 volume, float32 in 0..1, and its class indices, uint8.

    The axes point right, to the front, and up.
    """
    t1, grey, white = (
        load(resolution=1).get_fdata(dtype=np.float32)
        for load in (
            datasets.load_mni152_template,
            datasets.load_mni152_gm_template,
            datasets.load_mni152_wm_template,
        )
    )
    labels = np.where(grey > white, np.uint8(1), np.uint8(2))
    labels[np.maximum(grey, white) < 0.3] = 0
    return t1, labels


def brain_box(labels):
    """Returns slices around the brain, of a size that the U-Net can halve at every level."""
    box = []
    for axis, size in enumerate(labels.shape):
        others = tuple(other for other in range(labels.ndim) if other != axis)
        inside = np.flatnonzero(labels.any(axis=others))
        length = inside[-1] + 1 - inside[0]
        length += -length % SIZE_MULTIPLE
        start = min(inside[0], size - length)
        box.append(slice(start, start + length))
    return tuple(box)


class RandomPatches(keras.utils.PyDataset):
    """Batches of T1 `[N, D, H, W, 1]` and uint8 labels `[N, D, H, W]`, others in each epoch."""

    def __init__(self, t1, labels, steps, seed):
        super().__init__()
        self.t1, self.labels, self.steps, self.seed = t1, labels, steps, seed
        self.centres = np.argwhere(labels > 0)
        self.epoch = 0

    def __len__(self):
        return self.steps

    def on_epoch_end(self):
        self.epoch += 1

    def __getitem__(self, step):
        rng = np.random.default_rng((self.seed, self.epoch, step))
        patches = [self.draw(rng) for _ in range(BATCH)]
        return tuple(np.stack(arrays) for arrays in zip(*patches, strict=True))

    def draw(self, rng):
        centre = self.centres[rng.integers(len(self.centres))]
        corner = np.clip(centre - PATCH // 2, 0, np.array(self.t1.shape) - PATCH)
        patch = tuple(slice(start, start + PATCH) for start in corner)
        # Another contrast, another gain and some noise imitate another scanner.
        gain, contrast, noise = rng.random(3)
        image = (0.9 + 0.2 * gain) * self.t1[patch] ** np.exp(0.5 * contrast - 0.25)
        image += 0.06 * noise * rng.standard_normal(image.shape, np.float32)
        return image[..., np.newaxis].astype(np.float32), self.labels[patch]


def conv_block(x, filters):
    """Adds convolution, normalisation and ReLU, twice."""
    for _ in range(2):
        x = layers.Conv3D(filters, 3, padding="same", use_bias=False)(x)
        x = layers.BatchNormalization(momentum=0.9)(x)
        x = layers.ReLU()(x)
    return x


def build_unet():
    """Builds a 3D U-Net for volumes of any size.

    It returns raw logits, because the loss computes the softmax.
    """
    inputs = x = keras.Input((None, None, None, 1))
    skips = []
    for filters in FILTERS[:-1]:
        x = conv_block(x, filters)
        skips.append(x)
        x = layers.MaxPooling3D(2)(x)
    x = conv_block(x, FILTERS[-1])
    for filters, skip in zip(reversed(FILTERS[:-1]), reversed(skips), strict=True):
        x = layers.Conv3DTranspose(filters, 2, strides=2)(x)
        x = conv_block(layers.Concatenate()([x, skip]), filters)
    return keras.Model(inputs, layers.Conv3D(len(CLASSES), 1)(x), name="unet")


def train(model, patches, epochs):
    """Trains the model with the fused loss."""
    schedule = keras.optimizers.schedules.CosineDecay(LEARNING_RATE, epochs * len(patches))
    model.compile(keras.optimizers.Adam(schedule), loss=dice_op.losses.DiceLoss())
    model.fit(
        patches,
        epochs=epochs,
        verbose=1 if sys.stdout.isatty() else 2,  # A file gets one line for each epoch.
    )


def predict(model, t1):
    """Predicts class indices of the whole volume, in tiles from back to front."""
    tiles = []
    for start in range(0, t1.shape[1], TILE):
        first = max(start - HALO, 0)
        tile = t1[np.newaxis, :, first : start + TILE + HALO, :, np.newaxis]
        logits = model.predict_on_batch(tile)
        classes = np.argmax(logits[0], axis=-1).astype(np.uint8)
        tiles.append(classes[:, start - first : start - first + TILE])
    return np.concatenate(tiles, axis=1)


def tissue_dice(prediction, truth):
    """Returns the Dice coefficient of each tissue between two volumes of class indices."""
    scores = {}
    for tissue in TISSUES:
        ours, theirs = prediction == tissue, truth == tissue
        scores[CLASSES[tissue]] = 2 * np.sum(ours & theirs) / (np.sum(ours) + np.sum(theirs))
    return scores


def score(untrained, trained, truth):
    """Returns the held-out Dice before and after training, and if all voxels were one tissue."""
    constant = {
        CLASSES[tissue]: tissue_dice(np.full_like(truth, tissue), truth)[CLASSES[tissue]]
        for tissue in TISSUES
    }
    rows = {
        "untrained network": tissue_dice(untrained, truth),
        "one tissue everywhere": constant,
        "trained network": tissue_dice(trained, truth),
    }
    return {title: {name: float(dice) for name, dice in row.items()} for title, row in rows.items()}


def print_scores(scores):
    """Prints the held-out Dice as a table."""
    names = [CLASSES[tissue] for tissue in TISSUES]
    print(f"{'held-out Dice':24}" + "".join(f"{name:>15}" for name in names))
    for title, row in scores.items():
        print(f"{title:24}" + "".join(f"{row[name]:>15.3f}" for name in names))


def require_learning(scores):
    """Stops the program unless the trained network is clearly better than an untrained one."""
    for name, dice in scores["trained network"].items():
        baseline = max(scores["untrained network"][name], scores["one tissue everywhere"][name])
        if not dice > baseline + MIN_LEAD:
            raise SystemExit(
                f"The network did not learn {name}: its held-out Dice is {dice:.3f}. Without "
                f"learning it is {baseline:.3f}, and at least {MIN_LEAD} more is expected."
            )


def show_plane(axes, t1, labels):
    """Draws one plane of the T1, and over it the tissues in colour if there are labels."""
    axes.imshow(t1.T, cmap="gray", vmin=0.2, vmax=0.92, origin="lower", interpolation="bilinear")
    if labels is not None:
        colours = np.zeros((*labels.shape, 4))
        for tissue, colour in TISSUE_COLOURS.items():
            colours[labels == tissue] = to_rgba(colour, alpha=0.8)
        axes.imshow(colours.transpose(1, 0, 2), origin="lower", interpolation="nearest")
    axes.set_axis_off()


def frame_held_out(axes, plane, shape, start):
    """Draws a frame around what the network never saw. The whole coronal plane is a part of it."""
    left, bottom = {"axial": (0, start), "coronal": (0, 0), "sagittal": (start, 0)}[plane]
    width, height = shape[0] - left, shape[1] - bottom
    frame = Rectangle((left - 0.5, bottom - 0.5), width, height, clip_on=False, **FRAME)
    axes.add_patch(frame)


def name_sides(axes, letters):
    """Writes the letters of the sides to the left and right of a plane."""
    for letter, x in zip(letters, (-0.03, 1.03), strict=True):
        axes.text(x, 0.5, letter, transform=axes.transAxes, color=INK, alpha=0.6, **CENTRED)


def draw_picture(path, t1, truth, prediction, dice):
    """Draws T1, truth and prediction in three planes, with a frame around the held-out front."""
    right, front, up = t1.shape
    start = front - HELD_OUT
    planes = {  # the index of each plane, and the letters of its two sides
        "axial": (np.s_[:, :, round(0.57 * up)], "LR"),
        "coronal": (np.s_[:, start + MARGIN, :], "LR"),
        "sagittal": (np.s_[round(0.31 * right), :, :], "PA"),
    }
    columns = {"T1": None, "truth": truth, "prediction": prediction}

    figure = Figure(figsize=(10, 10.4), facecolor="black")
    layout = {"left": 0.06, "right": 0.98, "bottom": 0.06, "top": 0.875}
    spacing = {"wspace": 0.04, "hspace": 0.1, "height_ratios": [front, up, up]}
    grid = figure.subplots(3, 3, gridspec_kw=layout | spacing)
    for row, (plane, (index, letters)) in zip(grid, planes.items(), strict=True):
        for axes, labels in zip(row, columns.values(), strict=True):
            show_plane(axes, t1[index], None if labels is None else labels[index])
            frame_held_out(axes, plane, t1[index].shape, start)
        name_sides(row[0], letters)
        box = row[0].get_position()
        middle = (box.y0 + box.y1) / 2
        figure.text(0.025, middle, plane, color=INK, size=14, rotation=90, **CENTRED)
    for axes, title in zip(grid[0], columns, strict=True):
        axes.set_title(title, color=INK, size=14, pad=8)

    title = "Grey and white matter by a 3D U-Net trained with dice_op"
    figure.text(0.52, 0.965, title, color=INK, size=17, **CENTRED)
    subtitle = ", ".join(f"{name} {value:.3f}" for name, value in dice.items())
    figure.text(0.52, 0.935, f"held-out Dice: {subtitle}", color=INK, size=12.5, **CENTRED)
    keys = [Patch(color=TISSUE_COLOURS[tissue], label=CLASSES[tissue]) for tissue in TISSUES]
    keys.append(Patch(**FRAME, label="held out of training"))
    figure.legend(handles=keys, loc="lower center", ncols=3, frameon=False, labelcolor=INK)
    figure.savefig(path, dpi=130)


def parse_arguments():
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("demo_output"), metavar="DIR")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--steps", type=int, default=50, help="steps per epoch")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--quick", action="store_true", help="only test that all parts run, with a few steps"
    )
    return parser.parse_args()


def compare_losses(labels, seconds):
    """Measures time, memory and error of the loss and its gradient, beside plain operations."""
    results = {}
    names = CONTENDERS[keras.config.backend()]
    for result in cpu.compare(Case(labels.shape, 3), names, seconds, labels[None]):
        print("  " + report.line(result), flush=True)
        if result.get("wrong", True):
            raise SystemExit("This result differs from the loss in double precision.")
        results[result["contender"]] = result
    return results


def main():
    """Loads the data, trains, scores, draws and measures."""
    arguments = parse_arguments()
    arguments.output.mkdir(parents=True, exist_ok=True)
    keras.utils.set_random_seed(arguments.seed)
    began = time.perf_counter()

    say("Loading the MNI152 brain")
    whole_t1, whole_labels = load_brain()
    box = brain_box(whole_labels)
    t1, labels = whole_t1[box], whole_labels[box]
    held_out = np.s_[:, t1.shape[1] - HELD_OUT :]
    seen = np.s_[:, : t1.shape[1] - HELD_OUT - MARGIN]
    print(f"{whole_t1.shape} voxels, brain {t1.shape}, the front {HELD_OUT} mm held out")

    epochs, steps = (1, 4) if arguments.quick else (arguments.epochs, arguments.steps)
    model = build_unet()
    untrained = predict(model, t1)
    say(f"Training a 3D U-Net of {model.count_params():,} weights on {BATCH} x {PATCH}^3 patches")
    train(model, RandomPatches(t1[seen], labels[seen], steps, arguments.seed), epochs)

    say("Predicting the whole brain")
    trained = predict(model, t1)
    scores = score(untrained[held_out], trained[held_out], labels[held_out])
    print_scores(scores)

    picture = arguments.output / "brain.png"
    draw_picture(picture, t1, labels, trained, scores["trained network"])
    say(f"Picture: {picture}")
    if not arguments.quick:
        require_learning(scores)

    measured = np.ascontiguousarray(labels[:64, :64, :64]) if arguments.quick else whole_labels
    say(f"Loss and gradient on {measured.shape} voxels, 3 classes, float32 logits, uint8 labels")
    costs = compare_losses(measured, seconds=0.1 if arguments.quick else 2.0)

    summary = {
        "quick": arguments.quick,
        "backend": keras.config.backend(),
        "held_out_dice": scores,
        "volume": measured.shape,
        "loss_and_gradient": costs,
        "seconds": time.perf_counter() - began,
    }
    path = arguments.output / "summary.json"
    path.write_text(json.dumps(summary, indent=2) + "\n")
    say(f"Summary: {path}, {summary['seconds']:.0f} s in all")


if __name__ == "__main__":
    main()
