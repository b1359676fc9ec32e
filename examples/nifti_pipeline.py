# %% [markdown]
# # The pipeline as a program
#
# This program trains a 3D U-Net on NIfTI files and writes its predictions as NIfTI files. It has
# the parts that make nnU-Net (Isensee et al., 2021) work: patches of which a third hold foreground,
# deep supervision, Dice with cross-entropy, a polynomial learning rate, a sliding window with
# Gaussian weights, and scores for each held-out case.
#
# ```sh
# python examples/nifti_pipeline.py --images 'imagesTr/*.nii.gz' --labels 'labelsTr/*.nii.gz'
# python examples/nifti_pipeline.py    # makes its own files, from the MNI152 brain inside nilearn
# ```
#
# Without `--images` it first writes eight cases, which are deformed copies of one brain with other
# contrasts and noise. Nothing is downloaded. The scores then say that the pipeline works. They say
# nothing about other brains.

# %%
import argparse
import itertools
import json
import os
import re
import sys
import time
from glob import glob
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # Before TensorFlow is imported.

import keras
import matplotlib.pyplot as plt
import nibabel as nib
import numpy as np
import tensorflow as tf
from keras import layers
from nibabel.processing import resample_from_to, resample_to_output
from nilearn import datasets
from scipy import ndimage
from scipy.spatial.transform import Rotation

import dice_op

# %% [markdown]
# ## Options
#
# The same file runs as a program and as a notebook. A notebook has no command line, and takes the
# defaults.

# %%
parser = argparse.ArgumentParser(description="Trains a 3D U-Net on NIfTI files.")
parser.add_argument("--images", help="a pattern such as 'folder/*_img.nii.gz'")
parser.add_argument("--labels", help="a pattern such as 'folder/*_seg.nii.gz'")
parser.add_argument("--names", nargs="+", help="of the classes, with the background first")
parser.add_argument("--spacing", type=float, nargs=3, help="resample to this, in mm")
parser.add_argument(
    "--window", type=float, nargs=2, metavar=("LOW", "HIGH"), help="for CT: clip to this, in HU"
)
parser.add_argument("--held-out", type=int, default=2, help="cases that only give scores")
parser.add_argument("--output", type=Path, default=Path("demo_output/nifti_pipeline"))
parser.add_argument("--patch", type=int, nargs=3, default=(40, 40, 40))
parser.add_argument(
    "--foreground", type=float, default=1 / 3, help="share of the patches drawn around foreground"
)
parser.add_argument("--filters", type=int, nargs="+", default=(8, 16, 32, 64))
parser.add_argument("--batch", type=int, default=2)
parser.add_argument("--accumulate", type=int, default=1, help="batches for each update")
parser.add_argument("--epochs", type=int, default=8)
parser.add_argument("--steps", type=int, default=60, help="batches in each epoch")
parser.add_argument("--learning-rate", type=float, default=5e-3)
parser.add_argument(
    "--mixed-precision",
    choices=("auto", "off", "bfloat16", "float16"),
    default="auto",
    help="auto is bfloat16 on a GPU, and off on a CPU, where it is slow",
)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--quick", action="store_true", help="only try that all parts run")
options = parser.parse_args([] if "ipykernel" in sys.modules else None)

if bool(options.images) != bool(options.labels):
    parser.error("--images and --labels go together")
if options.window and not options.window[0] < options.window[1]:
    parser.error("--window takes the lower end first")
if not 0 <= options.foreground <= 1:
    parser.error("--foreground is a share, from 0 to 1")

if options.quick:
    options.epochs, options.steps, options.held_out = 2, 3, 1
    options.patch, options.filters = (16, 16, 16), (4, 8, 16)

multiple = 2 ** (len(options.filters) - 1)  # Each level of the U-Net halves the patch.
if any(size % multiple for size in options.patch):
    parser.error(f"the sizes of --patch must be multiples of {multiple}")

began = time.perf_counter()
options.output.mkdir(parents=True, exist_ok=True)
keras.utils.set_random_seed(options.seed)
verbose = 1 if sys.stdout.isatty() else 2  # A notebook or a file gets one line for each epoch.

# %% [markdown]
# ## Files, if you have none
#
# Each case is the brain of the MNI152 template, turned, scaled and bent, with another contrast, a
# bias field and noise. Its labels are 1 for grey matter and 2 for white matter.

# %%


def random_coordinates(shape, rng):
    """Returns where each voxel of a deformed volume comes from, `[3, D, H, W]`."""
    turn = Rotation.from_euler("xyz", rng.uniform(-0.15, 0.15, 3)).as_matrix()
    middle = (np.array(shape) - 1).reshape(3, 1, 1, 1) / 2
    coordinates = np.tensordot(turn * rng.uniform(0.9, 1.1, 3), np.indices(shape) - middle, 1)
    for axis in coordinates:  # A smooth shift of a few voxels bends the folds of the brain.
        shift = ndimage.gaussian_filter(rng.normal(size=shape), 8)
        axis += 2 * shift / shift.std()
    return coordinates + middle


def imitate_scanner(t1, rng):
    """Gives a brain in 0..1 another contrast, a bias field, noise and the unit of a scanner."""
    bias = ndimage.gaussian_filter(rng.normal(size=t1.shape), 16)
    image = t1 ** rng.uniform(0.7, 1.4) * (1 + 0.1 * bias / bias.std())
    image += rng.normal(0, rng.uniform(0.02, 0.06), t1.shape)
    image[t1 < 0.05] = 0  # The skull is gone, and the air with it.
    return np.clip(rng.uniform(600, 1200) * image, 0, 32767).astype(np.int16)


def write_cases(folder, count, resolution):
    """Writes `case_0_img.nii.gz` and `case_0_seg.nii.gz`, and so on."""
    folder.mkdir(exist_ok=True)
    load = {
        "t1": datasets.load_mni152_template,
        "grey": datasets.load_mni152_gm_template,
        "white": datasets.load_mni152_wm_template,
    }
    brain = {name: function(resolution=resolution) for name, function in load.items()}
    affine = brain["t1"].affine
    for number in range(count):
        rng = np.random.default_rng((options.seed, number))
        coordinates = random_coordinates(brain["t1"].shape, rng)
        t1, grey, white = (
            ndimage.map_coordinates(np.clip(volume.get_fdata(), 0, 1), coordinates, order=1)
            for volume in brain.values()
        )
        labels = np.where(grey > white, 1, 2).astype(np.uint8)
        labels[np.maximum(grey, white) < 0.3] = 0
        for name, volume in (("img", imitate_scanner(t1, rng)), ("seg", labels)):
            nib.save(nib.Nifti1Image(volume, affine), folder / f"case_{number}_{name}.nii.gz")


if not options.images:
    folder = options.output / "cases"
    write_cases(folder, *((3, 4) if options.quick else (8, 2)))
    options.images, options.labels = f"{folder}/*_img.nii.gz", f"{folder}/*_seg.nii.gz"
    options.names = options.names or ["background", "grey matter", "white matter"]

# %% [markdown]
# ## Find the cases
#
# `liver_3_img.nii.gz` belongs to `liver_3_seg.nii.gz`. In nnU-Net's folders, `liver_3_0000.nii.gz`
# belongs to `liver_3.nii.gz`, and `liver_3_0001.nii.gz` is its second channel.

# %%


def stem(path):
    """Returns the name of a NIfTI file without its folder and its ending."""
    return re.sub(r"\.nii(\.gz)?$", "", Path(path).name)


def find_cases(image_pattern, label_pattern):
    """Returns a dict: for each case the paths of its channels, and that of its labels."""
    labels = {re.sub("_(seg|labels?|mask)$", "", stem(p)): p for p in glob(label_pattern)}
    found = {name: ([], path) for name, path in sorted(labels.items())}
    for path in sorted(glob(image_pattern)):
        name = stem(path)
        if name not in found:
            name = re.sub(r"_(img|image|\d{4})$", "", name)
        if name in found:
            found[name][0].append(path)
    alone = [name for name, (images, _) in found.items() if not images]
    if alone or len(found) <= options.held_out:
        raise SystemExit(f"{len(found)} cases; no images for these labels: {alone}")
    return found


cases = find_cases(options.images, options.labels)
order = np.random.default_rng(options.seed).permutation(sorted(cases)).tolist()
training, held_out = order[options.held_out :], order[: options.held_out]
print(f"{len(training)} cases for training, {len(held_out)} held out")

# %% [markdown]
# ## Prepare them once
#
# Each case becomes two `.npy` files, which `np.load(mmap_mode="r")` opens without reading them. A
# patch is then read from the disk alone, and the data set may be larger than the memory. As in
# nnU-Net, up to 10,000 voxels of each class are noted, so that a patch with foreground is found at
# once.
#
# Also as in nnU-Net, a volume is first cropped to the box in which its images are not 0. Instance
# normalisation makes noise as large as anatomy where a patch holds nothing else, and a network that
# sees such patches predicts tissue in the air.
#
# This is for MR, where each image is then normalised by its own mean and deviation. CT has a unit,
# and its air is not 0. With `--window -160 240`, say, an image is clipped to this range of HU and
# cropped to the box above its lower end. All cases are then normalised by the same mean and
# deviation, those of the foreground of the training cases. nnU-Net does the same, but takes the
# window from percentiles of the foreground.
#
# Volumes that are smaller than a patch are padded. The label 255 says that these voxels do not
# count.

# %%
IGNORED = 255
OUTSIDE = options.window[0] if options.window else 0  # the value around the body
PREPARED = options.output / "prepared"


def read(path, order, outside=0):
    """Reads a NIfTI file, resampled if `--spacing` is given."""
    image = nib.load(path)
    if not options.spacing:
        return image
    return resample_to_output(image, options.spacing, order=order, cval=outside)


def normalise(image):
    """Gives an MR image mean 0 and deviation 1. CT waits for `normalise_together`."""
    return image if options.window else (image - image.mean()) / max(image.std(), 1e-6)


def read_labels(path):
    """Reads class indices as uint8."""
    labels = np.asarray(read(path, order=0).dataobj)
    if not np.isin(labels, np.arange(256)).all():
        raise SystemExit(f"{path} has labels that are no whole numbers in 0..255")
    return labels.astype(np.uint8)


def prepare(name):
    """Writes the arrays of a case. Returns its box in the volume, and the places of its classes."""
    paths, label_path = cases[name]
    channels = [read(path, 1, OUTSIDE).get_fdata(dtype=np.float32) for path in paths]
    if options.window:
        channels = [np.clip(channel, *options.window) for channel in channels]
    labels = read_labels(label_path)
    if any(channel.shape != labels.shape for channel in channels):
        raise SystemExit(f"The images of {name} have another shape than its labels, {labels.shape}")
    inside = np.any([channel != OUTSIDE for channel in channels], axis=0)
    if not inside.any():
        raise SystemExit(f"The images of {name} are {OUTSIDE} everywhere, or lie below --window")
    box = ndimage.find_objects(inside.astype(int))[0]
    channels, labels = [normalise(channel[box]) for channel in channels], labels[box]
    missing = [(0, max(0, p - size)) for p, size in zip(options.patch, labels.shape, strict=True)]
    image = np.pad(np.stack(channels, -1), [*missing, (0, 0)], constant_values=OUTSIDE)
    labels = np.pad(labels, missing, constant_values=IGNORED)
    np.save(PREPARED / f"{name}_image.npy", image)
    np.save(PREPARED / f"{name}_labels.npy", labels)
    rng = np.random.default_rng(options.seed)
    places = {}
    for label in np.setdiff1d(labels, [0, IGNORED]):
        voxels = np.argwhere(labels == label)
        places[int(label)] = voxels[rng.permutation(len(voxels))[:10_000]]
    return box, places


def load(name):
    """Opens the arrays of a case: the image `[D, H, W, channels]` and the labels `[D, H, W]`."""
    return tuple(
        np.load(PREPARED / f"{name}_{what}.npy", mmap_mode="r") for what in ("image", "labels")
    )


def normalise_together():
    """Gives the foreground of the training cases mean 0 and deviation 1, in each channel."""
    rng = np.random.default_rng(options.seed)
    foreground = []
    for name in training:
        image, labels = load(name)
        voxels = image[(labels > 0) & (labels != IGNORED)]
        foreground.append(rng.permutation(voxels)[:10_000])  # [voxels, channels]
    foreground = np.concatenate(foreground)
    for name in cases:
        image = np.load(PREPARED / f"{name}_image.npy", mmap_mode="r+")
        image[:] = (image - foreground.mean(0)) / np.maximum(foreground.std(0), 1e-6)


PREPARED.mkdir(exist_ok=True)
boxes, places = {}, {}
for name in cases:
    boxes[name], places[name] = prepare(name)
if options.window:
    normalise_together()
classes = 1 + max(label for of_case in places.values() for label in of_case)
names = options.names or ["background", *(f"class {label}" for label in range(1, classes))]
channels = len(cases[order[0]][0])
print(f"{channels} channel(s), {classes} classes: {', '.join(names)}")

# %% [markdown]
# ## Patches
#
# `tf.data` draws patches in parallel with the training. Each patch has a number, and a random
# generator made of it, so that the same seed gives the same patches however many threads draw them.
#
# A third of the patches (`--foreground`) have a voxel of foreground at their centre, of a class
# chosen first. So a class of a few voxels is seen as often as a large one.
#
# After each epoch there is a score of the same few patches of the held-out cases. It is a curve,
# not a result. These patches are drawn by foreground as well, and false alarms in the rest of the
# volumes do not count in them. So the score may be far above those of whole volumes, most of all
# for small lesions.

# %%


def window_at(corner):
    """Returns the slices of a patch."""
    return tuple(slice(c, c + size) for c, size in zip(corner, options.patch, strict=True))


def corner_of_patch(of_case, shape, rng):
    """Chooses where a patch begins."""
    room = np.array(shape) - options.patch
    if of_case and rng.random() < options.foreground:
        voxels = of_case[rng.choice(list(of_case))]
        return np.clip(voxels[rng.integers(len(voxels))] - np.array(options.patch) // 2, 0, room)
    return rng.integers(0, room + 1)


def augment(image, labels, rng):
    """Flips a patch, and changes its contrast, brightness and noise.

    Leave out the flip of the first axis if left and right are classes of their own.
    """
    axes = tuple(axis for axis in range(3) if rng.random() < 0.5)
    image, labels = np.flip(image, axes), np.flip(labels, axes)
    low, span = image.min(), max(np.ptp(image), 1e-6)
    image = low + span * ((image - low) / span) ** rng.uniform(0.8, 1.25)
    image = image * rng.uniform(0.9, 1.1) + rng.normal(0, 0.1)
    return image + rng.normal(0, rng.uniform(0, 0.1), image.shape), labels


def draw(seed, number, names, change):
    """Returns the patch of this number."""
    rng = np.random.default_rng((seed, number))
    name = names[rng.integers(len(names))]
    image, labels = load(name)
    window = window_at(corner_of_patch(places[name], labels.shape, rng))
    image, labels = image[window], labels[window]
    if change:
        image, labels = augment(image, labels, rng)
    return np.ascontiguousarray(image, np.float32), np.ascontiguousarray(labels)


def batches(names, seed, change):
    """Returns an endless data set of batches: images, and the labels of each output."""

    def patch(number):
        image, labels = tf.numpy_function(
            lambda n: draw(seed, n, names, change), [number], (tf.float32, tf.uint8), stateful=False
        )
        image.set_shape((*options.patch, channels))
        labels.set_shape(options.patch)
        return image, dict.fromkeys(OUTPUTS, labels)

    numbers = tf.data.Dataset.counter()
    return numbers.map(patch, tf.data.AUTOTUNE).batch(options.batch).prefetch(2)


OUTPUTS = ["full", "half", "quarter", "eighth", "sixteenth"][: len(options.filters) - 1]
patches = batches(training, options.seed, change=True)
checked = batches(held_out, options.seed + 1, change=False).take(2 if options.quick else 16).cache()

# %% [markdown]
# ## The network
#
# It is a U-Net with instance normalisation, which does not depend on the batch and suits batches of
# two patches. It predicts at each resolution of the decoder (deep supervision), and ends in logits:
# the loss computes the softmax.
#
# With mixed precision the logits stay in half precision as well. `dice_op` reads them as they are,
# and adds up its sums in double precision.

# %%


def convolutions(x, filters):
    """Adds convolution, instance normalisation and leaky ReLU, twice."""
    for _ in range(2):
        x = layers.Conv3D(filters, 3, padding="same", use_bias=False)(x)
        x = layers.GroupNormalization(groups=-1)(x)  # One group for each channel.
        x = layers.LeakyReLU(0.01)(x)
    return x


def build_unet():
    """Builds a U-Net with an output for each resolution, `full`, `half` and so on."""
    inputs = x = keras.Input((None, None, None, channels))
    skips = []
    for filters in options.filters[:-1]:
        x = convolutions(x, filters)
        skips.append(x)
        x = layers.MaxPooling3D(2)(x)
    x = convolutions(x, options.filters[-1])
    outputs = {}
    for name, filters in zip(reversed(OUTPUTS), reversed(options.filters[:-1]), strict=True):
        x = layers.Conv3DTranspose(filters, 2, strides=2)(x)
        x = convolutions(layers.Concatenate()([x, skips.pop()]), filters)
        outputs[name] = layers.Conv3D(classes, 1, name=name)(x)
    return keras.Model(inputs, {name: outputs[name] for name in OUTPUTS}, name="unet")


if options.mixed_precision == "auto":
    options.mixed_precision = "bfloat16" if tf.config.list_physical_devices("GPU") else "off"
if options.mixed_precision != "off":
    keras.mixed_precision.set_global_policy(f"mixed_{options.mixed_precision}")
model = build_unet()
print(f"{model.count_params():,} weights")

# %% [markdown]
# ## Predict with a sliding window
#
# Windows overlap by half. A network is less sure at the border of its window, where it lacks
# context, so that logits are weighted with a Gaussian around the centre, of a deviation of an
# eighth of the window. The class of a voxel is that of the largest sum. There is no need to divide
# by the sum of the weights, because it is the same for all classes.

# %%


def window_starts(size, window):
    """Returns where windows begin along one axis, so that they overlap by half or more."""
    count = int(np.ceil((size - window) / (window / 2))) + 1
    return np.linspace(0, size - window, count).round().astype(int)


def gaussian(shape):
    """Returns the weights of a window, `[D, H, W, 1]`, which are 1 at its centre."""
    axes = [np.exp(-0.5 * ((np.arange(n) - (n - 1) / 2) / (n / 8)) ** 2) for n in shape]
    weights = np.einsum("i,j,k->ijk", *axes)[..., np.newaxis]
    return np.maximum(weights, 1e-4).astype(np.float32)  # No voxel may have weight 0.


def predict(network, name):
    """Returns the class of each voxel of a case, uint8, on the grid of its prepared arrays."""
    image, labels = load(name)
    weights = gaussian(options.patch)
    logits = np.zeros((*labels.shape, classes), np.float32)
    corners = list(itertools.product(*map(window_starts, labels.shape, options.patch)))
    bar = keras.utils.Progbar(len(corners), unit_name="window", verbose=int(verbose == 1))
    for corner in corners:
        window = window_at(corner)
        logits[window] += weights * np.float32(
            network.predict_on_batch(image[window][np.newaxis])[0]
        )
        bar.add(1)
    return logits.argmax(-1).astype(np.uint8)


# %% [markdown]
# ## Scores and files
#
# A prediction goes back to the grid of the case's own labels before it is scored: out of its box,
# without padding, and with the spacing of the file. `dice_op.core.scores` counts voxels of label
# maps, and needs no TensorFlow. A class that is in neither map scores NaN, which JSON writes as
# null.

# %%


def on_grid_of_file(prediction, name):
    """Returns the prediction as an image with shape and affine of the labels' file."""
    target = nib.load(cases[name][1])
    grid = read(cases[name][1], order=0)
    box = boxes[name]
    whole = np.zeros(grid.shape, np.uint8)
    whole[box] = prediction[tuple(slice(side.stop - side.start) for side in box)]
    image = nib.Nifti1Image(whole, grid.affine)
    return resample_from_to(image, target, order=0) if options.spacing else image


def evaluate(network, folder=None):
    """Returns the Dice of each held-out case and class of the foreground; writes predictions."""
    dice = {}
    for name in held_out:
        prediction = on_grid_of_file(predict(network, name), name)
        if folder:
            nib.save(prediction, folder / f"{name}.nii.gz")
        maps = (np.asarray(i.dataobj, np.uint8) for i in (prediction, nib.load(cases[name][1])))
        # Arrays of a NIfTI file are in Fortran's order.
        ours, truth = (np.ascontiguousarray(labels)[np.newaxis] for labels in maps)
        scores = dice_op.core.scores(ours, truth, classes=classes, ignore_label=IGNORED)
        dice[name] = dict(zip(names[1:], scores["dice"][0, 1:].tolist(), strict=True))
    return dice


network = keras.Model(model.inputs, model.output["full"])  # It shares its weights with `model`.
untrained = evaluate(network)

# %% [markdown]
# ## Train
#
# The loss is that of nnU-Net: Dice of the foreground, over the whole batch, and cross-entropy.
# `batch=True` adds up the batch first, because a patch alone often lacks a class. What the whole
# batch lacks, `absent="skip"` leaves out. `deep_supervision` gives each output this loss, against
# labels that it samples itself, and halves the weight from one resolution to the next. As in
# nnU-Net the coarsest output has the weight 0, so that its loss in the log need not fall.
#
# With `--accumulate 4` four batches make one update, so that their gradients are those of a batch
# four times as large. Dice is then still that of each batch. The learning rate counts batches, not
# updates.

# %%


def optimizer():
    """Returns Adam with the learning rate of nnU-Net, which falls to 0 by a power of 0.9.

    nnU-Net itself uses SGD with Nesterov momentum 0.99, for 250,000 batches.
    """
    rate = keras.optimizers.schedules.PolynomialDecay(
        options.learning_rate, options.epochs * options.steps, end_learning_rate=0, power=0.9
    )
    accumulate = options.accumulate if options.accumulate > 1 else None
    return keras.optimizers.Adam(rate, clipnorm=12, gradient_accumulation_steps=accumulate)


loss = dice_op.losses.DiceCELoss(
    batch=True, include_background=False, absent="skip", ignore_label=IGNORED
)
score = dice_op.metrics.DiceScore(
    over="dataset", include_background=False, ignore_label=IGNORED, name="dice"
)
model.compile(
    optimizer(),
    **dice_op.losses.deep_supervision(loss, OUTPUTS),
    metrics={"full": [score]},
)
history = model.fit(
    patches,
    steps_per_epoch=options.steps,
    epochs=options.epochs,
    validation_data=checked,
    shuffle=False,  # Each patch is drawn at random already.
    verbose=verbose,
).history

# %% [markdown]
# ## What it learned

# %%
predictions = options.output / "predictions"
predictions.mkdir(exist_ok=True)
trained = evaluate(network, predictions)

print(f"{'held-out Dice':24}{'':>20}" + "".join(f"{name:>16}" for name in names[1:]))
for title, dice in (("untrained", untrained), ("trained", trained)):
    for name, row in dice.items():
        print(f"{title:24}{name:>20}" + "".join(f"{value:16.3f}" for value in row.values()))

# %%
curve, (left, right) = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
epochs = np.arange(1, options.epochs + 1)
left.plot(epochs, history["loss"], ".-", label="training")
left.plot(epochs, history["val_loss"], ".-", label="patches of held-out cases")
left.set(xlabel="epoch", ylabel="loss, Dice + CE at all resolutions", ylim=0)
left.legend()
right.plot(epochs, history["val_full_dice"], ".-C1")
right.set(xlabel="epoch", ylabel="Dice of held-out patches", ylim=(0, 1))
curve.savefig(options.output / "curve.png", dpi=100)

# %% [markdown]
# The first held-out case: the image, the truth, and the prediction.

# %%


def show(axes, image, labels, title):
    """Draws one slice, and over it the classes in colour."""
    low, high = options.window or (None, None)
    axes.imshow(image.T, cmap="gray", origin="lower", vmin=low, vmax=high)
    if labels is not None:
        shown = np.ma.masked_where((labels == 0) | (labels == IGNORED), labels)
        axes.imshow(
            shown.T, cmap="Set1", vmin=1, vmax=9, alpha=0.7, origin="lower", interpolation="nearest"
        )
    axes.set_title(title, size=10)
    axes.set_axis_off()


name = held_out[0]
volumes = [
    np.asarray(nib.load(path).dataobj)
    for path in (cases[name][0][0], cases[name][1], predictions / f"{name}.nii.gz")
]
slices, grid = plt.subplots(2, 3, figsize=(5, 3.8), layout="constrained")
for row, axis in zip(grid, (2, 1), strict=True):
    # From above and from the front, the slice in which there is most foreground.
    others = tuple(other for other in range(3) if other != axis)
    index = (volumes[1] > 0).sum(axis=others).argmax()
    image, truth, prediction = (volume.take(index, axis) for volume in volumes)
    show(row[0], image, None, "image")
    show(row[1], image, truth, "truth")
    show(row[2], image, prediction, "prediction")
slices.savefig(options.output / "slices.png", dpi=100)

# %%
model.save(options.output / "model.keras")
summary = {
    "training": training,
    "held_out": held_out,
    "classes": names,
    "weights": model.count_params(),
    "mixed_precision": options.mixed_precision,
    "untrained_dice": untrained,
    "held_out_dice": trained,
    # The mean over the cases, then over the classes: each class counts the same.
    "mean_dice": float(np.nanmean(np.nanmean([[*row.values()] for row in trained.values()], 0))),
    "history": history,
    "seconds": time.perf_counter() - began,
}
text = json.dumps(summary, indent=2).replace("NaN", "null")
(options.output / "summary.json").write_text(text + "\n")
print(f"mean Dice {summary['mean_dice']:.3f}, {summary['seconds']:.0f} s, all in {options.output}/")

# %% [markdown]
# The images show the MNI152 template (ICBM 2009a, nonlinear symmetric): Copyright (C) 1993-2004
# Louis Collins, McConnell Brain Imaging Centre, Montreal Neurological Institute, McGill University.
# Permission to use, copy, modify, and distribute this software and its documentation for any
# purpose and without fee is hereby granted, provided that the above copyright notice appear in all
# copies. The authors and McGill University make no representations about the suitability of this
# software for any purpose. It is provided "as is" without express or implied warranty. The authors
# are not responsible for any data loss, equipment damage, property loss, or injury to subjects or
# patients resulting from the use or misuse of this software package.
