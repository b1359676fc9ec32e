"""Trains one network on two data sets, each of which is annotated for one organ only.

    python examples/partial_labels.py

The images are synthetic: noisy, with discs as organ 1 and rings as organ 2, which are equally
bright. In data set A only the discs are annotated. A voxel without annotation is background there,
or it belongs to a ring; nobody knows which. In data set B, which is four times as large, only the
rings are annotated.

The usual mistake is to call these voxels background. The remedy is a label value of its own for
them in each data set, and the option `label_sets`, which says what each value may stand for. The
program trains the same network both ways, and scores it on images with both annotations.
"""

import argparse
import sys
import time

import keras
import numpy as np
from keras import layers

from dice_op import losses, metrics

BACKGROUND, DISC, RING = range(3)
NOT_DISC, NOT_RING = 200, 201  # the label of A's voxels, and of B's, that are not annotated
LABEL_SETS = {NOT_DISC: (BACKGROUND, RING), NOT_RING: (BACKGROUND, DISC)}

SIZE = 64
NOISE = 0.4
HELD_OUT = 200

FILTERS = (8, 16, 32)
BATCH = 16
LEARNING_RATE = 1e-2


def draw(rng):
    """Draws an image with one or two discs and one or two rings, and its class indices."""
    labels = np.zeros((SIZE, SIZE), np.uint8)
    rows, columns = np.indices(labels.shape)
    quarter = SIZE // 2
    organs = rng.permutation([BACKGROUND, DISC, RING, rng.integers(3)])
    for corner, organ in zip(np.ndindex(2, 2), organs, strict=True):
        radius = rng.uniform(7, 12)
        row, column = quarter * np.array(corner) + rng.uniform(radius, quarter - radius, 2)
        distance = np.hypot(rows - row, columns - column)
        hole = radius / 2 if organ == RING else 0
        labels[(hole <= distance) & (distance < radius)] = organ
    brightness = rng.uniform(0.6, 1.4)
    return brightness * (labels != BACKGROUND) + rng.normal(0, NOISE, labels.shape), labels


def draw_images(count, rng):
    """Returns images `[N, H, W, 1]`, float32, and their complete labels `[N, H, W]`, uint8."""
    images, labels = zip(*(draw(rng) for _ in range(count)), strict=True)
    return np.stack(images)[..., np.newaxis].astype(np.float32), np.stack(labels)


def conv_block(x, filters):
    """Adds convolution, normalisation and ReLU, twice."""
    for _ in range(2):
        x = layers.Conv2D(filters, 3, padding="same", use_bias=False)(x)
        x = layers.BatchNormalization(momentum=0.9)(x)
        x = layers.ReLU()(x)
    return x


def build_unet():
    """Builds a small U-Net. It returns raw logits, because the loss computes the softmax."""
    inputs = x = keras.Input((SIZE, SIZE, 1))
    skips = []
    for filters in FILTERS[:-1]:
        x = conv_block(x, filters)
        skips.append(x)
        x = layers.MaxPooling2D(2)(x)
    x = conv_block(x, FILTERS[-1])
    for filters, skip in zip(reversed(FILTERS[:-1]), reversed(skips), strict=True):
        x = layers.Conv2DTranspose(filters, 2, strides=2)(x)
        x = conv_block(layers.Concatenate()([x, skip]), filters)
    return keras.Model(inputs, layers.Conv2D(3, 1)(x), name="unet")


def train(images, labels, label_sets, epochs, seed):
    """Returns a network that has learnt from these labels."""
    keras.utils.set_random_seed(seed)
    model = build_unet()
    steps = epochs * -(-len(images) // BATCH)
    model.compile(
        keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(LEARNING_RATE, steps)),
        # No voxel of A is labelled as ring, and none of B as disc. The Dice loss of such a class
        # would be near 1, however good the network is, so an image leaves it out of its mean.
        loss=losses.DiceCELoss(label_sets=label_sets, absent="skip"),
        metrics=[metrics.DiceScore(label_sets=label_sets, include_background=False)],
    )
    verbose = 1 if sys.stdout.isatty() else 2  # A file gets one line for each epoch.
    model.fit(images, labels, batch_size=BATCH, epochs=epochs, verbose=verbose)
    return model


def score(model, images, labels):
    """Returns the Dice coefficients of discs and of rings."""
    dice = metrics.DiceScore(average="none", include_background=False)
    dice.update_state(labels, model.predict(images, verbose=0))
    return [float(value) for value in dice.result()]


def main(argv=None):
    """Trains both ways. Prints and returns the held-out Dice of discs and of rings for each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--sizes", type=int, nargs=2, default=(200, 800), metavar=("A", "B"), help="images in each"
    )
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    began = time.perf_counter()

    rng = np.random.default_rng(arguments.seed)
    images_a, truth_a = draw_images(arguments.sizes[0], rng)
    images_b, truth_b = draw_images(arguments.sizes[1], rng)
    held_out = draw_images(HELD_OUT, rng)

    labels_a = np.where(truth_a == DISC, truth_a, NOT_DISC)
    labels_b = np.where(truth_b == RING, truth_b, NOT_RING)
    images, labels = np.concatenate([images_a, images_b]), np.concatenate([labels_a, labels_b])
    mistaken = np.where(np.isin(labels, list(LABEL_SETS)), BACKGROUND, labels)

    ways = {"unknown is background": (mistaken, None), "label_sets": (labels, LABEL_SETS)}
    scores = {}
    for way, (given, label_sets) in ways.items():
        print(f"\n> Training on {len(images_a)} + {len(images_b)} images, {way}", flush=True)
        model = train(images, given, label_sets, arguments.epochs, arguments.seed)
        scores[way] = score(model, *held_out)

    print(f"\n{'held-out Dice':24}{'discs':>8}{'rings':>8}")
    for way, (discs, rings) in scores.items():
        print(f"{way:24}{discs:8.3f}{rings:8.3f}")
    print(f"\n{time.perf_counter() - began:.0f} s in all")
    return scores


if __name__ == "__main__":
    main()
