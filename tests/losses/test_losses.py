"""The Keras losses: values, gradients, training, saving, and errors about wrong arguments."""

import inspect
import json

import keras
import numpy as np
import pytest
import tensorflow as tf

from dice_op import _family, losses
from dice_op.losses import DiceLoss, GeneralizedDiceLoss, TverskyLoss
from helpers import reference
from helpers.kernel_inputs import read_label_sets
from helpers.reference import dice_losses, flat, mean_dice
from helpers.tape import value_and_gradient

SHAPE = (3, 6, 5, 4, 3)  # [N, D, H, W, C]
VOXELS = 6 * 5 * 4


def make(classes=3, dtype="float32", seed=0):
    """Logits and uint8 labels of a random volume. Its last class is absent from the last sample."""
    rng = np.random.default_rng(seed)
    x = 2 * rng.normal(size=(*SHAPE[:-1], classes))
    y = rng.integers(0, max(classes, 2), size=SHAPE[:-1]).astype(np.uint8)
    y[-1][y[-1] == max(classes, 2) - 1] = 0
    return x.astype(dtype), y


def jaccard(i, p, t, nr=1e-5, dr=1e-5):
    return 1 - (2 * i + nr) / (2 * (p + t - i) + dr)


def over_classes(*sums):
    return [s.sum(1, keepdims=True) for s in sums]


def over_batch(*sums):
    return [s.sum(0, keepdims=True) for s in sums]


W = np.array([0.1, 2.0, 5.0])
# The arguments of a loss, and what people write for it in NumPy, over I, P, T of shape [N, C].
FORMS = {
    "multi-class": ({}, mean_dice),
    "class-weighted": (
        dict(class_weight=list(W)),
        lambda *s: (W * dice_losses(*s)).sum(1).mean(),
    ),
    "binary, jointly": (
        dict(activation="sigmoid", average="micro"),
        lambda *s: dice_losses(*over_classes(*s)).mean(),
    ),
    "binary, one tensor": (
        dict(activation="sigmoid", average="micro", batch=True),
        lambda *s: dice_losses(*over_batch(*over_classes(*s))).mean(),
    ),
    "no background": (
        dict(include_background=False),
        lambda *s: dice_losses(*s)[:, 1:].mean(),
    ),
    "no background, weighted": (
        dict(include_background=False, class_weight=[1, 3]),
        lambda *s: (np.array([1, 3]) * dice_losses(*s)[:, 1:]).sum(1).mean(),
    ),
    "weighted sums": (
        dict(average="micro", class_weight=list(W)),
        lambda *s: dice_losses(*over_classes(*(W * v for v in s))).mean(),
    ),
    "squared": (dict(squared_pred=True), mean_dice),
    "jaccard": (dict(jaccard=True), lambda *s: jaccard(*s).mean()),
    "batch": (dict(batch=True), lambda *s: dice_losses(*over_batch(*s)).mean()),
    "smoothing": (
        dict(smooth_nr=1.0, smooth_dr=3.0),
        lambda *s: dice_losses(*s, smooth_nr=1.0, smooth_dr=3.0).mean(),
    ),
    "probabilities": (dict(activation="none"), mean_dice),
}


@pytest.mark.parametrize("labels", ["indices", "indices with a channel", "float", "one-hot"])
@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
@pytest.mark.parametrize("form", FORMS)
def test_each_form_is_what_people_write_in_numpy(form, data_format, labels):
    arguments, of_sums = FORMS[form]
    x, y = make()
    if arguments.get("activation") == "none":
        x = np.asarray(tf.nn.softmax(x))
    t = reference.one_hot(y, SHAPE[-1])
    options = dict(
        activation=arguments.get("activation", "softmax"), squared="squared_pred" in arguments
    )
    expected, gradient = reference.loss_and_gradient(flat(x), flat(t), of_sums, **options)
    gradient = gradient.reshape(x.shape)

    y = {
        "indices": y,
        "indices with a channel": y[..., None],
        "float": y.astype(np.float64),
        "one-hot": t.astype(np.float32),
    }[labels]
    if data_format == "channels_first":
        x, gradient = np.moveaxis(x, -1, 1), np.moveaxis(gradient, -1, 1)
        y = np.moveaxis(y, -1, 1) if y.ndim == x.ndim else y
    x = tf.constant(x)
    loss = DiceLoss(**arguments, data_format=data_format)
    value, found = value_and_gradient(lambda x: loss(y, x), x)
    assert abs(float(value) - expected) <= 1e-6
    reference.assert_gradient(found, gradient)

    @tf.function(input_signature=[tf.TensorSpec([None] * 5, x.dtype)])
    def compiled(x):
        return loss(y, x)

    np.testing.assert_allclose(compiled(x), value, rtol=1e-6)


SOFT = {
    "Dice": (DiceLoss(soft_label=True), mean_dice),
    "Jaccard": (DiceLoss(soft_label=True, jaccard=True), lambda *s: jaccard(*s).mean()),
    "Tversky": (
        losses.TverskyLoss(soft_label=True, alpha=0.3, beta=0.7),
        lambda *s: (1 - score(*s, 0.3, 0.7)).mean(),
    ),
    "generalized Dice": (
        losses.GeneralizedDiceLoss(soft_label=True),
        lambda *s: generalized(*s, 2).mean(),
    ),
}


@pytest.mark.parametrize("name", SOFT)
def test_losses_of_soft_labels_are_what_people_write_in_numpy(name):
    loss, of_sums = SOFT[name]
    x, _ = make()
    t = np.random.default_rng(1).dirichlet(np.ones(SHAPE[-1]), SHAPE[:-1]).astype(np.float32)
    options = {"activation": "softmax", "soft": True}
    expected, gradient = reference.loss_and_gradient(flat(x), flat(t), of_sums, **options)
    value, found = value_and_gradient(lambda x: loss(t, x), tf.constant(x))
    assert abs(float(value) - expected) <= 1e-6
    reference.assert_gradient(found, gradient.reshape(x.shape))


@pytest.mark.parametrize("options", [{"soft_label": True}, {"squared_pred": True}], ids=str)
def test_the_loss_of_soft_labels_is_smallest_where_they_are_predicted(options):
    """With neither option it is not: labels of 0 and 1 are then better than the right ones."""
    t = np.random.default_rng(2).random((1, 50, 1)).astype(np.float32)
    rounded = np.round(t)

    def loss(p, **options):
        return float(DiceLoss(activation="none", **options)(t, p))

    assert (round(loss(t), 2), round(loss(rounded), 2)) == (0.36, 0.27)  # docs/mathematics.md
    assert loss(t, **options) <= 1e-6
    assert loss(rounded, **options) > 0.05


@pytest.mark.parametrize("given", ["", "soft_label=True", "squared_pred=True"])
def test_soft_labels_without_an_option_for_them_warn_once(given, run_python):
    said = run_python(
        """
        import os, sys
        os.dup2(1, 2)  # TensorFlow logs to the standard error.
        import numpy as np
        import tensorflow as tf
        from dice_op.losses import DiceLoss

        loss = eval(sys.argv[1])
        x = np.zeros((1, 8, 8, 8, 3), np.float32)
        for t in (np.eye(3, dtype=np.float32)[np.zeros((1, 8, 8, 8), int)], x + 1 / 3):
            print("labels", t.max(), flush=True)
            for call in (loss, tf.function(loss)):
                call(t, x)
        """,
        f"DiceLoss({given})",
        TF_CPP_MIN_LOG_LEVEL="0",
    )
    hard, soft = said.split("labels 0.33")
    assert "are fractions" not in hard
    assert soft.count("are fractions") == (0 if given else 1)


def score(i, p, t, alpha=0.5, beta=0.5, smooth=1e-5):
    return (i + smooth) / (i + alpha * (p - i) + beta * (t - i) + smooth)


def matthews(i, p, t, voxels=VOXELS, nr=0.0, dr=1e-5):
    tp, fp, fn, tn = i, p - i, t - i, voxels - p - t + i
    root = np.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn) + dr)
    return (tp * tn - fp * fn + nr) / root


def generalized(i, p, t, power, smooth=0.0):
    t_real = np.real(t)
    w = np.where(t_real > 0, 1.0 / np.maximum(t_real, 1e-30) ** power, 0)
    w = np.where(t_real > 0, w, w.max(1, keepdims=True))
    return 1 - (2 * (w * i).sum(1) + smooth) / ((w * (p + t)).sum(1) + smooth)


def of_present(losses, t, counted):
    """The mean over the classes that are present. counted: absent ones count as well, with loss
    0."""
    present = np.real(t) > 0
    classes = losses.shape[1] if counted else np.maximum(present.sum(1), 1)
    return (np.where(present, losses, 0).sum(1) / classes).mean()


# A loss, and the same in NumPy. test_conformance.py compares them with other libraries as well.
FAMILY = {
    "Tversky": (
        TverskyLoss(alpha=0.3, beta=0.7),
        lambda *s: (1 - score(*s, 0.3, 0.7)).mean(),
    ),
    "focal Tversky": (
        TverskyLoss(alpha=0.3, beta=0.7, gamma=0.75),
        lambda *s: ((1 - score(*s, 0.3, 0.7)) ** 0.75).mean(),
    ),
    "log Dice": (
        DiceLoss(transform="log", absent="skip"),
        lambda i, p, t: of_present(-np.log(1 - dice_losses(i, p, t)), t, False),
    ),
    "log-cosh Dice": (
        DiceLoss(transform="log_cosh"),
        lambda *s: np.log(np.cosh(dice_losses(*s))).mean(),
    ),
    "absent skipped": (
        DiceLoss(absent="skip"),
        lambda i, p, t: of_present(dice_losses(i, p, t), t, False),
    ),
    "absent scores one": (
        DiceLoss(absent="one"),
        lambda i, p, t: of_present(dice_losses(i, p, t), t, True),
    ),
    "a loss per class": (DiceLoss(average="none"), mean_dice),
    "weighted by support": (
        DiceLoss(average="weighted"),
        lambda i, p, t: ((t * dice_losses(i, p, t)).sum(1) / t.sum(1)).mean(),
    ),
    "Matthews": (losses.MatthewsLoss(), lambda *s: (1 - matthews(*s)).mean()),
    "Matthews of all classes": (
        losses.MatthewsLoss(average="micro"),
        lambda *s: (1 - matthews(*over_classes(*s), voxels=SHAPE[-1] * VOXELS)).mean(),
    ),
    "Matthews of the batch, smoothed": (
        losses.MatthewsLoss(batch=True, smooth_nr=2.0, smooth_dr=5.0),
        lambda *s: (1 - matthews(*over_batch(*s), SHAPE[0] * VOXELS, 2.0, 5.0)).mean(),
    ),
    "the overlap of the unified focal loss": (
        losses.UnifiedFocalLoss(weight=1, delta=0.7, gamma=0.25),
        lambda *s: ((1 - score(*s, 0.3, 0.7, 1e-7)) ** [1, 0.75, 0.75]).mean(),
    ),
    "the overlap of the symmetric one": (
        losses.UnifiedFocalLoss(weight=1, delta=0.7, gamma=0.25, asymmetric=False, smooth=1.0),
        lambda *s: ((1 - score(*s, 0.3, 0.7, 1.0)) ** 0.75).mean(),
    ),
    "generalized": (GeneralizedDiceLoss(), lambda *s: generalized(*s, 2).mean()),
    "generalized, simple": (
        GeneralizedDiceLoss(weight_type="simple", smooth_nr=0.5, smooth_dr=0.5),
        lambda *s: generalized(*s, 1, 0.5).mean(),
    ),
    "generalized, uniform": (
        GeneralizedDiceLoss(weight_type="uniform"),
        lambda *s: generalized(*s, 0).mean(),
    ),
}


@pytest.mark.parametrize("name", FAMILY)
def test_each_loss_of_the_family_is_what_people_write_in_numpy(name):
    loss, of_sums = FAMILY[name]
    x, y = make()
    t = reference.one_hot(y, SHAPE[-1])
    expected, gradient = reference.loss_and_gradient(
        flat(x), flat(t), of_sums, activation="softmax"
    )
    x = tf.constant(x)
    value, found = value_and_gradient(lambda x: loss(y, x), x)
    assert abs(float(value) - expected) <= 1e-6
    reference.assert_gradient(found, gradient.reshape(x.shape))


DISTANCES = [[0, 1, 1], [1, 0, 0.5], [1, 0.5, 0]]
ALL = {
    "Dice": lambda: DiceLoss(class_weight=[1, 2, 3], absent="one"),
    "Tversky": lambda: TverskyLoss(alpha=0.3, beta=0.7, gamma=0.8),
    "generalized": lambda: GeneralizedDiceLoss(weight_type="simple", infinite_weight="zero"),
    "Dice + CE": lambda: losses.DiceCELoss(ce_class_weight=[1, 2, 3], label_smoothing=0.1),
    "Dice + focal": lambda: losses.DiceFocalLoss(batch=True, include_background=False),
    "generalized + focal": lambda: losses.GeneralizedDiceFocalLoss(lambda_ce=0.5),
    "Matthews": lambda: losses.MatthewsLoss(average="weighted"),
    "unified focal": lambda: losses.UnifiedFocalLoss(gamma=0.3),
    "generalized Wasserstein": lambda: losses.GeneralizedWassersteinDiceLoss(DISTANCES),
    "label sets": lambda: losses.DiceFocalLoss(label_sets={2: (1, 2)}, focal_gamma=[0, 1, 2]),
    "regions": lambda: losses.DiceCELoss(
        activation="sigmoid", regions=[(0,), (1, 2), (2,)], pos_weight=[1, 2, 3]
    ),
    "deep supervision": lambda: losses.DownsampledLabels(
        DiceLoss(transform="log", absent="skip", label_sets={1: (0, 1)})
    ),
}


@pytest.mark.parametrize("jit_compile", [False, True])
@pytest.mark.parametrize("policy", ["float32", "mixed_float16"])
@pytest.mark.parametrize("name", ALL)
def test_every_loss_trains(name, policy, jit_compile):
    model, images, labels = model_and_data(policy)
    model.compile(keras.optimizers.Adam(0.03), ALL[name](), jit_compile=jit_compile)
    history = model.fit(images, labels, batch_size=4, epochs=25, verbose=0).history["loss"]
    assert np.isfinite(history).all()
    assert history[-1] < 0.75 * history[0]


@pytest.mark.parametrize("name", ALL)
def test_every_loss_is_saved(name, tmp_path):
    model, images, labels = model_and_data()
    model.compile("adam", ALL[name]())
    expected = model.evaluate(images, labels, verbose=0)
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    assert type(again.loss) is type(model.loss)
    assert again.loss.get_config() == model.loss.get_config()
    np.testing.assert_allclose(again.evaluate(images, labels, verbose=0), expected, rtol=1e-6)


@pytest.mark.parametrize("weighting_mode", ["default", "GDL"])
@pytest.mark.parametrize("batch", [False, True])
def test_generalized_wasserstein_dice_is_what_people_write_in_numpy(batch, weighting_mode):
    """With voxel weights. The gradient is that of the whole formula, by the complex step."""
    x, y = make()
    t = flat(reference.one_hot(y, SHAPE[-1]))
    weight = np.random.default_rng(1).integers(0, 3, y.shape).astype(np.float32)
    m = weight.reshape(len(x), -1)

    def formula(x):
        wrong = np.einsum("nvl,lc,nvc->nv", t, DISTANCES, reference.softmax(flat(x)))
        count = (m[..., None] * t).sum(1)
        count = count.sum(0) if batch else count
        w = 1 / (1 + count) if weighting_mode == "GDL" else np.ones_like(count) * [0, 1, 1]
        w = (t * (w if batch else w[:, None])).sum(-1)  # of each voxel
        axes = (0, 1) if batch else 1
        right, error = (m * w * (1 - wrong)).sum(axes), m * wrong
        error = (w * error if weighting_mode == "GDL" else error).sum(axes)
        return np.mean(1 - (2 * right + 1e-5) / (2 * right + error + 1e-5))

    loss = losses.GeneralizedWassersteinDiceLoss(
        DISTANCES, weighting_mode=weighting_mode, batch=batch
    )
    value, found = value_and_gradient(lambda x: loss(y, x, weight), tf.constant(x))
    assert abs(float(value) - formula(x.astype(np.float64))) <= 1e-6
    at = list(map(tuple, np.random.default_rng(2).integers(0, SHAPE, (40, 5))))
    wanted = []
    for voxel in at:
        stepped = x.astype(complex)
        stepped[voxel] += 1j * reference.STEP
        wanted.append(formula(stepped).imag / reference.STEP)
    reference.assert_gradient([found.numpy()[voxel] for voxel in at], wanted)


def test_generalized_wasserstein_dice_of_two_classes_is_dice_of_the_foreground():
    x, y = make(2)
    found = value_and_gradient(
        lambda x: losses.GeneralizedWassersteinDiceLoss([[0, 3], [3, 0]])(y, x), tf.constant(x)
    )
    wanted = value_and_gradient(lambda x: DiceLoss(include_background=False)(y, x), tf.constant(x))
    np.testing.assert_allclose(found[0], wanted[0], rtol=1e-6)
    reference.assert_gradient(found[1], wanted[1])


def test_generalized_wasserstein_dice_says_what_labels_and_classes_it_takes():
    x, y = make()
    loss = losses.GeneralizedWassersteinDiceLoss(DISTANCES)
    with pytest.raises(tf.errors.InvalidArgumentError, match="class indices.* as tf.argmax gives"):
        loss(reference.one_hot(y, 3), x)
    with pytest.raises(tf.errors.InvalidArgumentError, match="has 3 rows, but logits .* 2 classes"):
        loss(y, x[..., :2])


@pytest.mark.parametrize("reduction", ["sum_over_batch_size", "sum", "none"])
@pytest.mark.parametrize("samples", [2, 3])
def test_weights_per_sample_apply_to_losses_per_class(samples, reduction):
    # There are three classes: once there are as many samples as classes.
    x, y = (v[:samples] for v in make())
    weight = np.float32([1, 0.5, 4][:samples])
    each = DiceLoss(average="none", reduction="none")(y, x).numpy()
    assert each.shape == (samples, 3)
    expected = each * weight[:, None]
    expected = {"none": expected, "sum": expected.sum(), "sum_over_batch_size": expected.mean()}
    loss = DiceLoss(average="none", reduction=reduction)
    np.testing.assert_allclose(loss(y, x, weight), expected[reduction], rtol=1e-6)
    np.testing.assert_allclose(loss(y, x, weight[:, None]), expected[reduction], rtol=1e-6)


@pytest.mark.parametrize("batch", [False, True])
def test_sample_weights_of_unknown_rank_count_as_those_of_known_rank(batch):
    """Keras traces a loss in this way after weights of both kinds."""
    x, y = make()
    for loss in (DiceLoss(batch=batch), losses.DiceCELoss(batch=batch)):
        traced = tf.function(lambda w, f=loss: f(y, x, w), input_signature=[tf.TensorSpec(None)])
        for shape in ((3,), (3, 1), y.shape, (*y.shape, 1)):
            weight = tf.constant(np.random.default_rng(1).random(shape), tf.float32)
            np.testing.assert_allclose(traced(weight), loss(y, x, weight), rtol=1e-6)


SETS = {200: (0, 2), 201: (0, 1, 2), 7: (1,)}
# Losses of the sums, with and without the cross-entropy, and what people write in NumPy for them.
# `c` is the cross-entropy of each sample, [N], and `m` is [N, C]: the voxels that tell about it.
OF_SETS = {
    "Dice": (DiceLoss, {}, lambda i, p, t, m, c: mean_dice(i, p, t)),
    "Dice of the labelled classes": (
        DiceLoss,
        {"absent": "skip"},
        lambda i, p, t, m, c: of_present(dice_losses(i, p, t), t, False),
    ),
    "weighted by support": (
        DiceLoss,
        {"average": "weighted"},
        lambda i, p, t, m, c: ((t * dice_losses(i, p, t)).sum(1) / t.sum(1)).mean(),
    ),
    "Dice of all classes together": (
        DiceLoss,
        {"average": "micro"},
        lambda i, p, t, m, c: mean_dice(*over_classes(i, p, t)),
    ),
    "Tversky": (
        TverskyLoss,
        {"alpha": 0.3, "beta": 0.7},
        lambda i, p, t, m, c: (1 - score(i, p, t, 0.3, 0.7)).mean(),
    ),
    "generalized Dice": (
        GeneralizedDiceLoss, {}, lambda i, p, t, m, c: generalized(i, p, t, 2).mean(),
    ),
    "Matthews": (
        losses.MatthewsLoss, {}, lambda i, p, t, m, c: (1 - matthews(i, p, t, m)).mean(),
    ),
    "Matthews of all classes": (
        losses.MatthewsLoss,
        {"average": "micro"},
        lambda i, p, t, m, c: (1 - matthews(*over_classes(i, p, t, m))).mean(),
    ),
    "generalized Dice and focal": (
        losses.GeneralizedDiceFocalLoss,
        {"focal_gamma": [0, 0.5, 2]},
        lambda i, p, t, m, c: (generalized(i, p, t, 2) + c).mean(),
    ),
}  # fmt: skip


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
@pytest.mark.parametrize("name", OF_SETS)
def test_each_loss_of_labels_that_name_sets_is_what_people_write_in_numpy(name, activation):
    """In the last sample no voxel is labelled as class 2, but some may belong to it."""
    kind, options, formula = OF_SETS[name]
    x, y = make()
    rng = np.random.default_rng(1)
    y = np.where(rng.random(y.shape) < 0.4, rng.choice(list(SETS), y.shape), y)
    t, unknown = read_label_sets(SETS, y, SHAPE[-1])
    m = VOXELS - flat(unknown).sum(1)

    def of_sums(i, p, t, *cross_entropy):
        total = m.sum(1) if activation == "sigmoid" else VOXELS
        return formula(i, p, t, m, sum(cross_entropy).sum(1) / total)

    expected, gradient = reference.loss_and_gradient(
        flat(x),
        flat(t),
        of_sums,
        with_cross_entropy=True,
        activation=activation,
        unknown=flat(unknown),
        gamma=options.get("focal_gamma", 0.0),
    )
    x = tf.constant(x)
    loss = kind(label_sets=SETS, activation=activation, **options)
    value, found = value_and_gradient(lambda x: loss(y, x), x)
    assert abs(float(value) - expected) <= 1e-6
    reference.assert_gradient(found, gradient.reshape(x.shape))


EACH = {
    "Dice": DiceLoss,
    "log Dice": lambda **o: DiceLoss(transform="log", **o),
    "Dice + focal": lambda **o: losses.DiceFocalLoss(focal_gamma=[0, 1, 2], **o),
    "unified focal": losses.UnifiedFocalLoss,
    "Matthews": losses.MatthewsLoss,
}


@pytest.mark.parametrize("name", EACH)
def test_a_set_of_one_class_is_another_name_of_the_class(name):
    """A value that is a class loses that meaning: 2 stands for class 1 here, and 100 for 2."""
    x, y = make()
    other_names = np.array([0, 2, 100], np.uint8)[y]
    sets = {2: (1,), 100: (2,)}
    x = tf.constant(x)
    value, found = value_and_gradient(lambda x: EACH[name](label_sets=sets)(other_names, x), x)
    expected, gradient = value_and_gradient(lambda x: EACH[name]()(y, x), x)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    reference.assert_gradient(found, gradient, 1e-6)


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_a_set_of_all_classes_says_nothing(activation):
    """To the overlap it is ignore_label, and so it is to a binary cross-entropy. To a categorical
    one, too, but for the mean, in which the voxel counts with a loss of 0."""
    x, y = make()
    y[np.random.default_rng(1).random(y.shape) < 0.4] = 255
    share = np.mean(y != 255, axis=(1, 2, 3))
    x = tf.constant(x)
    for ce in (0.0, 1.0):
        every, none = (
            losses.DiceCELoss(activation=activation, lambda_ce=ce, lambda_dice=1 - ce, **options)
            for options in ({"label_sets": {255: (0, 1, 2)}}, {"ignore_label": 255})
        )
        weight = share if ce and activation == "softmax" else np.ones(3)
        value, found = value_and_gradient(lambda x, loss=every: loss(y, x), x)
        expected, gradient = value_and_gradient(lambda x, loss=none, w=weight: loss(y, x, w), x)
        np.testing.assert_allclose(value, expected, rtol=1e-6)
        reference.assert_gradient(found, gradient, 1e-6)
        assert not found.numpy()[y == 255].any()


def test_a_class_that_surely_is_nowhere_in_a_sample_is_absent_from_it():
    """Voxels of other classes still say that it is not there, unless every voxel may be it."""
    x, y = make()
    y[0] = np.where(y[0] == 0, 0, 200)
    y[1] = 200
    options = {"label_sets": {200: (1, 2)}, "reduction": "none"}
    keep = DiceLoss(average="none", **options)(y, x).numpy()
    one = DiceLoss(average="none", absent="one", **options)(y, x).numpy()
    assert (keep[0, 1:] > 0.99).all() and not keep[1, 1:].any()
    wanted = np.where([[1, 0, 0], [0, 0, 0], [1, 1, 0]], keep, 0)
    np.testing.assert_array_equal(one, wanted)
    skip = DiceLoss(absent="skip", **options)(y, x)
    np.testing.assert_allclose(skip, wanted.sum(1) / [1, 1, 2], rtol=1e-6)


@pytest.mark.parametrize("asymmetric", [True, False])
def test_the_unified_focal_loss_without_focus_is_half_dice_and_cross_entropy(asymmetric):
    """With delta one half background and foreground count alike, and Tversky is Dice."""
    x, y = make()
    unified = losses.UnifiedFocalLoss(gamma=0, delta=0.5, weight=0.3, asymmetric=asymmetric)
    dice = {"lambda_dice": 0.3, "smooth_nr": 2e-7, "smooth_dr": 2e-7}
    both = losses.DiceCELoss(lambda_ce=0.5 * 0.7, **dice)
    np.testing.assert_allclose(unified(y, x), both(y, x), rtol=1e-6)


def test_numbers_may_be_arrays_without_an_axis():
    """They have an iterator, as a list of one number for each class has, but are no list."""
    x, y = make()
    for number in (np.array(1.5), np.float32(1.5), tf.constant(1.5)):
        given = {"activation": "sigmoid", "pos_weight": number, "focal_gamma": number}
        wanted = losses.DiceCELoss(activation="sigmoid", pos_weight=1.5, focal_gamma=1.5)
        assert losses.DiceCELoss(**given).get_config() == wanted.get_config()
    lists = {"pos_weight": [1.5] * 3, "focal_gamma": np.array([1.5] * 3)}
    loss = losses.DiceCELoss(activation="sigmoid", **lists)
    np.testing.assert_allclose(loss(y, x), wanted(y, x), rtol=1e-6)


def test_ignored_voxels_count_for_nothing():
    x, y = make()
    y[np.random.default_rng(1).random(y.shape) < 0.4] = 255
    t = reference.one_hot(y, 3)
    counts = (y != 255).astype(float).reshape(3, -1)
    expected, gradient = reference.loss_and_gradient(
        flat(x), flat(t), mean_dice, counts, activation="softmax"
    )
    x = tf.constant(x)
    value, found = value_and_gradient(lambda x: DiceLoss(ignore_label=255)(y, x), x)
    assert abs(float(value) - expected) <= 1e-6
    reference.assert_gradient(found, gradient.reshape(x.shape))


def test_dice_equals_that_of_keras():
    x, y = make()
    p = tf.nn.softmax(x)
    t = reference.one_hot(y, 3).astype(np.float32)
    theirs = keras.losses.Dice()(t, p)
    ours = DiceLoss(activation="none", average="micro", batch=True, smooth_nr=0, smooth_dr=1e-7)
    assert abs(float(ours(y, p)) - float(theirs)) <= 1e-6


def test_weights_apply_per_sample_and_per_voxel():
    x, y = make()
    loss, each = DiceLoss(), DiceLoss(reduction="none")(y, x).numpy()
    assert each.shape == (3,)
    weight = np.float32([1, 0, 4])
    for given in (weight, weight[:, None], tf.constant(weight, tf.float64)):
        np.testing.assert_allclose(loss(y, x, given), (each * weight).mean(), rtol=1e-6)
    weighted_mean = DiceLoss(reduction="mean_with_sample_weight")(y, x, weight)
    np.testing.assert_allclose(weighted_mean, (each * weight).sum() / 5, rtol=1e-6)

    rng = np.random.default_rng(2)
    voxels = rng.integers(0, 3, size=y.shape).astype(np.float32)
    t = reference.one_hot(y, 3)
    expected, gradient = reference.loss_and_gradient(
        flat(x),
        flat(t),
        mean_dice,
        voxels.reshape(3, -1),
        activation="softmax",
    )
    x = tf.constant(x)

    @tf.function(input_signature=[tf.TensorSpec(None)] * 2)
    def of_unknown_shapes(x, weight):
        return loss(y, x, weight)

    np.testing.assert_allclose(of_unknown_shapes(x, weight), loss(y, x, weight), rtol=1e-6)
    np.testing.assert_allclose(of_unknown_shapes(x, voxels), loss(y, x, voxels), rtol=1e-6)
    for given in (voxels, voxels[..., None], voxels.astype(np.uint8)):
        value, found = value_and_gradient(lambda x, given=given: loss(y, x, given), x)
        assert abs(float(value) - expected) <= 1e-6
        reference.assert_gradient(found, gradient.reshape(x.shape))


def test_weights_per_sample_enter_the_sums_of_a_batch():
    """The loss is as if each voxel had the weight of its sample."""
    x, y = make()
    weight = np.float32([1, 0, 4])
    expected, gradient = reference.loss_and_gradient(
        flat(x),
        flat(reference.one_hot(y, 3)),
        lambda *s: dice_losses(*over_batch(*s)).mean(),
        np.repeat(weight[:, None], y[0].size, axis=1),
        activation="softmax",
    )
    x = tf.constant(x)
    for given in (weight, weight[:, None]):
        value, found = value_and_gradient(
            lambda x, given=given: DiceLoss(batch=True)(y, x, given), x
        )
        assert abs(float(value) - expected) <= 1e-6
        reference.assert_gradient(found, gradient.reshape(x.shape))


@pytest.fixture
def seen(monkeypatch):
    """The dtypes of labels and logits that reach the op."""
    dtypes = set()
    backend = losses._base.backend
    original = backend.dice_sums

    def spy(y_true, y_pred, **options):
        dtypes.add((y_true.dtype.name, y_pred.dtype.name))
        return original(y_true, y_pred, **options)

    monkeypatch.setattr(backend, "dice_sums", spy)
    return dtypes


def model_and_data(dtype=None, classes=3):
    """A network of two layers, and volumes whose labels are a function of the intensity."""
    keras.utils.set_random_seed(0)
    rng = np.random.default_rng(0)
    images = rng.uniform(0, 3, size=(8, 6, 6, 6, 1)).astype(np.float32)
    labels = np.minimum(images[..., 0], classes - 1).astype(np.uint8)
    model = keras.Sequential(
        [
            keras.Input((None, None, None, 1)),
            keras.layers.Conv3D(8, 1, activation="relu", dtype=dtype),
            keras.layers.Conv3D(classes, 1, dtype=dtype),
        ]
    )
    return model, images, labels


def test_a_model_is_compiled_trained_and_evaluated(seen):
    model, images, labels = model_and_data()
    model.compile(optimizer=keras.optimizers.Adam(0.05), loss=DiceLoss())
    before = model.evaluate(images, labels, verbose=0)
    history = model.fit(images, labels, batch_size=3, epochs=30, verbose=0)
    after = model.evaluate(images, labels, verbose=0)
    assert after < 0.5 * before
    assert history.history["loss"][-1] < history.history["loss"][0]
    # For 8 samples in batches of 3 it is the mean over samples, not over batches.
    each = DiceLoss(reduction="none")(labels, model.predict(images, verbose=0)).numpy()
    np.testing.assert_allclose(after, each.mean(), rtol=1e-5)
    assert seen == {("uint8", "float32")}


def test_fit_takes_datasets_and_weights(seen):
    model, images, labels = model_and_data()
    model.compile(optimizer="adam", loss=DiceLoss(), weighted_metrics=[])
    per_sample = np.float32([1, 0, 2, 0, 1, 3, 1, 1])
    per_voxel = np.ones(labels.shape, np.float32)
    per_voxel[:, :3] = 0
    outputs = model.predict(images, verbose=0)
    for weight in (per_sample, per_voxel):
        data = tf.data.Dataset.from_tensor_slices((images, labels.astype(np.int32), weight))
        value = model.evaluate(data.batch(8), verbose=0)
        np.testing.assert_allclose(value, DiceLoss()(labels, outputs, weight), rtol=1e-5)
        model.fit(data.batch(4), epochs=1, verbose=0)
        outputs = model.predict(images, verbose=0)
    assert seen == {("int32", "float32"), ("uint8", "float32")}


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_a_model_in_mixed_precision_with_loss_scaling_trains(policy, seen):
    model, images, labels = model_and_data(policy)
    optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(0.05))
    model.compile(optimizer=optimizer, loss=DiceLoss())
    history = model.fit(images, labels, batch_size=4, epochs=30, verbose=0).history["loss"]
    assert np.isfinite(history).all()
    assert history[-1] < 0.5 * history[0]
    assert float(optimizer.dynamic_scale) > 1
    assert seen == {("uint8", policy[6:])}


def test_each_of_several_outputs_has_its_loss():
    model, images, labels = model_and_data()
    two = keras.Model(model.inputs, {"a": model.outputs[0], "b": -model.outputs[0]})
    loss = {"a": DiceLoss(), "b": DiceLoss(include_background=False)}
    two.compile(optimizer="adam", loss=loss, loss_weights={"a": 1.0, "b": 0.5})
    total = two.evaluate(images, {"a": labels, "b": labels}, verbose=0)
    x = model.predict(images, verbose=0)
    expected = float(loss["a"](labels, x)) + 0.5 * float(loss["b"](labels, -x))
    np.testing.assert_allclose(np.ravel(total)[0], expected, rtol=1e-5)


def arguments_of(cls):
    """The names of all arguments that a loss takes, by the signatures of its class and bases."""
    own = [inspect.signature(c.__init__) for c in cls.__mro__ if issubclass(c, _family.SumsLoss)]
    named = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return {p.name for s in own for p in s.parameters.values() if p.kind in named} - {"self"}


CONFIGURED = {
    losses.DiceLoss: dict(
        activation="sigmoid", include_background=False, class_weight=np.array([1, 2], np.float32),
        squared_pred=True, jaccard=True, smooth_nr=0, smooth_dr=1e-3, average="micro", batch=True,
        ignore_label=np.uint8(255), data_format="channels_first", reduction="sum", name="mine",
        dtype="float64",
    ),
    losses.TverskyLoss: dict(alpha=1, beta=2, gamma=0.5, absent="skip"),
    losses.MatthewsLoss: dict(
        smooth_nr=1, average="weighted", transform="log_cosh",
        label_sets={np.uint8(200): np.array([0, 2]), 7: {1}},
    ),
    losses.GeneralizedDiceLoss: dict(weight_type="simple", soft_label=True, smooth_nr=2),
    losses.GeneralizedDiceFocalLoss: dict(
        infinite_weight="zero", focal_gamma=(0, 1.5), lambda_dice=3, focal_alpha=0.25,
        activation="sigmoid",
    ),
    losses.DiceCELoss: dict(
        lambda_dice=2, lambda_ce=3, ce_class_weight=[1, 2], label_smoothing=0.5, transform="log",
        activation="sigmoid", regions=((1, 2), {2}), pos_weight=(3, 4),
    ),
    losses.DiceFocalLoss: dict(focal_gamma=3),
    losses.GeneralizedWassersteinDiceLoss: dict(
        dist_matrix=np.array([[0, 2], [4, 0]]), weighting_mode="GDL", activation="none",
        smooth_nr=1,
    ),
    losses.UnifiedFocalLoss: dict(
        weight=0.25, delta=0.75, gamma=0, asymmetric=False, smooth=1, ignore_label=255,
    ),
}  # fmt: skip
# What a configuration holds in the place of the arrays, tuples and sets above.
IN_CONFIGURATION = {
    "class_weight": [1, 2],
    "regions": [[1, 2], [2]],
    "label_sets": {200: [0, 2], 7: [1]},
    "focal_gamma": [0, 1.5],
    "pos_weight": [3, 4],
    "dist_matrix": [[0, 0.5], [1, 0]],  # divided by the largest distance
}


@pytest.mark.parametrize("cls", CONFIGURED)
def test_a_configuration_brings_back_the_loss(cls):
    given = CONFIGURED[cls]
    loss = cls(**given)
    text = json.dumps(keras.losses.serialize(loss))  # JSON makes strings of the keys of a dict.
    again = keras.losses.deserialize(json.loads(text))
    assert type(again) is cls
    assert again.get_config() == loss.get_config()
    assert again.get_config() == cls.from_config(loss.get_config()).get_config()
    assert set(loss.get_config()) == arguments_of(cls)
    for name, value in given.items():
        wanted = IN_CONFIGURATION.get(name, value) if np.iterable(value) else value
        assert again.get_config()[name] == wanted, name


def test_a_saved_keras_model_trains_in_another_process(tmp_path, run_python):
    model, images, labels = model_and_data()
    model.compile(optimizer="adam", loss=DiceLoss(class_weight=[1, 2, 3]))
    model.fit(images, labels, epochs=1, verbose=0)
    expected = model.evaluate(images, labels, verbose=0)
    model.save(tmp_path / "model.keras")
    np.savez(tmp_path / "data.npz", images=images, labels=labels)
    code = """
        import sys
        import dice_op.losses, keras, numpy as np
        model = keras.models.load_model(sys.argv[1] + "/model.keras")
        data = np.load(sys.argv[1] + "/data.npz")
        print(model.evaluate(data["images"], data["labels"], verbose=0))
        model.fit(data["images"], data["labels"], epochs=1, verbose=0)
    """
    np.testing.assert_allclose(float(run_python(code, tmp_path).split()[-1]), expected, rtol=1e-6)


def test_a_saved_model_runs_in_another_process(tmp_path, run_python):
    """The SavedModel is a training step: loss and gradient of a batch of any size."""
    loss = DiceLoss()

    @tf.function(
        input_signature=[
            tf.TensorSpec([None, None, None, None, 3], tf.float32),
            tf.TensorSpec([None, None, None, None], tf.uint8),
        ]
    )
    def step(x, y):
        with tf.GradientTape() as tape:
            tape.watch(x)
            value = loss(y, x)
        return {"loss": value, "gradient": tape.gradient(value, x)}

    module = tf.Module()
    module.step = step
    tf.saved_model.save(module, str(tmp_path / "saved"))
    x, y = make()
    expected = step(x, y)
    np.savez(tmp_path / "data.npz", x=x, y=y)
    code = """
        import sys
        import dice_op, numpy as np, tensorflow as tf
        dice_op.dice_sums  # loads the op
        step = tf.saved_model.load(sys.argv[1] + "/saved").step
        data = np.load(sys.argv[1] + "/data.npz")
        x, y = tf.constant(data["x"]), tf.constant(data["y"])
        result = step(x, y)
        with tf.GradientTape() as tape:  # differentiated here: the gradient's gradient
            tape.watch(x)
            norm = tf.reduce_sum(step(x, y)["gradient"] ** 2)
        assert tf.reduce_max(tf.abs(tape.gradient(norm, x))) > 0
        np.savez(sys.argv[1] + "/result.npz", **result)
    """
    run_python(code, tmp_path)
    result = np.load(tmp_path / "result.npz")
    for name, value in expected.items():
        np.testing.assert_array_equal(result[name], value)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (dict(activation="relu"), "activation is 'relu'.*'softmax', 'sigmoid', 'none'"),
        (dict(data_format="NDHWC"), "data_format is 'NDHWC'.*'channels_last', 'channels_first'"),
        (dict(average="mean"), "average is 'mean'.*'macro', 'weighted', 'micro'"),
        (dict(smooth_nr=-1), "smooth_nr is -1.*at least 0"),
        (dict(smooth_dr=float("nan")), "smooth_dr is nan"),
        (dict(class_weight=[1, -2, 1]), "class_weight is .*at least 0"),
        (dict(class_weight=[0, 0]), "class_weight is .*not all 0"),
        (dict(class_weight=[]), "class_weight is .*one finite weight per class"),
        (dict(class_weight={0: 1, 1: 2}), "class_weight is {0: 1, 1: 2}.*a list of one weight"),
        (dict(class_weight="12"), "class_weight is '12'.*a list of one weight"),
        (dict(class_weight=2.0), "class_weight is 2.0.*a list of one weight"),
        (dict(class_weight=["a"]), "class_weight is 'a', but must be a number"),
        (dict(smooth_nr=None), "smooth_nr is None, but must be a number"),
        (dict(batch="no"), "batch is 'no', but must be True or False"),
        (dict(ignore_label=255.0), "ignore_label is 255.0, but must be an integer"),
        (dict(transform=["log"]), r"transform is \['log'\], but must be one of 'linear'"),
        (dict(absent="skip", average="micro"), "absent='skip' asks about each class"),
        (dict(absent="skip", average="none"), 'but average="none"'),
        (dict(regions=[(1,), (2,)]), 'activation="softmax" gives a voxel one class'),
        (dict(regions=[]), "regions is empty"),
        (dict(regions=3), "regions is 3, but must be lists"),
        (dict(regions=[(1, 256)]), "regions must be the label values of each class"),
        (
            dict(regions=[(1,), (2,)], activation="sigmoid", include_background=False),
            "would leave out the first of the regions",
        ),
        (dict(label_sets={}), "label_sets is empty"),
        (dict(label_sets=[200]), r"label_sets is \[200\], but must be a dict from label values"),
        (dict(label_sets={200: 1}), r"label_sets is \{200: 1\}, but must be a dict"),
        (dict(label_sets={200: (0, 1.5)}), r"label_sets is .*1.5\)\}, but must be a dict"),
        (dict(label_sets={"a": (0, 1)}), "label_sets is {'a'.*, but must be a dict"),
        (dict(label_sets={256: (0, 1)}), "the label value 256, but .* must be from 0 to 255"),
        (dict(label_sets={200: ()}), r"label_sets\[200\] must be the classes .* at least one"),
        (dict(label_sets={200: (0, 0)}), r"label_sets\[200\] must be the classes .* each once"),
        (dict(label_sets={200: (0, -1)}), r"label_sets\[200\] must be the classes"),
        (
            dict(activation="sigmoid", regions=[(1,), (2,)], label_sets={200: (0, 1)}),
            "regions and label_sets cannot be combined",
        ),
    ],
)
def test_wrong_arguments_are_errors_in_words(arguments, says):
    with pytest.raises(ValueError, match=says):
        DiceLoss(**arguments)


@pytest.mark.parametrize(
    ("loss", "arguments", "says"),
    [
        (TverskyLoss, dict(alpha=0, beta=0), "no error would count"),
        (TverskyLoss, dict(alpha=[0.3, 0.7]), r"alpha is \[0.3, 0.7\], but must be a number"),
        (TverskyLoss, dict(gamma=0), "gamma is 0"),
        (TverskyLoss, dict(gamma=2, transform="log"), "exclude each other"),
        (TverskyLoss, dict(squared_pred=True), "would make FP = P - I negative"),
        (losses.MatthewsLoss, dict(squared_pred=True), "would make FP = P - I and TN wrong"),
        (losses.MatthewsLoss, dict(transform="log"), "no value for a correlation below 0"),
        (DiceLoss, dict(average="weighted", class_weight=[1, 2]), "weights from the labels"),
        (losses.GeneralizedDiceFocalLoss, dict(lambda_dice=0, lambda_ce=0), "both 0"),
        (GeneralizedDiceLoss, dict(weight_type="cube"), "weight_type is 'cube'"),
        (GeneralizedDiceLoss, dict(infinite_weight="one"), "infinite_weight is 'one'"),
        *(
            (losses.GeneralizedWassersteinDiceLoss, dict(dist_matrix=DISTANCES) | wrong, says)
            for wrong, says in (
                (dict(dist_matrix=[0, 1]), r"dist_matrix is \[0, 1\], but must be a distance for"),
                (dict(dist_matrix=[[0]]), r"dist_matrix is \[\[0\]\], but must be a distance for"),
                (dict(dist_matrix=[[0, 1, 2], [1, 0, 3]]), "has 2 rows, but row 0 has 3 distances"),
                (dict(dist_matrix=[[0, 1], [-1, 0]]), r"dist_matrix\[1\]\[0\] is -1"),
                (dict(dist_matrix=[[0, 1], [1, 0.5]]), r"dist_matrix\[1\]\[1\] is 0.5.* must be 0"),
                (dict(dist_matrix=[[0, 0], [0, 0]]), "dist_matrix holds only zeros"),
                (dict(weighting_mode="square"), "weighting_mode is 'square'.*'default', 'GDL'"),
                (dict(activation="sigmoid"), 'do not add up to 1.* use "softmax"'),
                (dict(include_background=False), "include_background=False has no meaning here"),
                (dict(squared_pred=True), "squared_pred has no meaning here"),
                (dict(soft_label=True), "soft_label has no meaning here"),
                (dict(label_sets={200: (0, 1)}), "label_sets has no meaning here"),
            )
        ),
        (losses.DiceCELoss, dict(lambda_dice=0, lambda_ce=0), "both 0"),
        (losses.DiceCELoss, dict(average="none"), "but the cross-entropy has one"),
        (losses.DiceCELoss, dict(label_smoothing=1.5), "label_smoothing is 1.5"),
        (losses.DiceCELoss, dict(activation="none", regions=[(1,)]), "binary cross-entropy"),
        (losses.DiceFocalLoss, dict(focal_gamma=-1), "focal_gamma is -1"),
        (losses.DiceFocalLoss, dict(focal_gamma=[1, -1]), "focal_gamma is -1"),
        (losses.DiceFocalLoss, dict(focal_gamma=[]), "must have one exponent for each class"),
        (
            losses.DiceFocalLoss,
            dict(focal_gamma={1: 2}),
            r"is \{1: 2\}, but must be a number, or a",
        ),
        (losses.DiceCELoss, dict(pos_weight=2), "for the binary .* of 'softmax', pass ce_class"),
        (losses.DiceCELoss, dict(focal_alpha=0.2, activation="none"), "for the binary .* 'none'"),
        (losses.DiceCELoss, dict(focal_alpha=1.5, activation="sigmoid"), r"must be in \[0, 1\]"),
        (losses.DiceCELoss, dict(focal_alpha=[0.5]), "focal_alpha is .*, but must be a number"),
        (losses.DiceCELoss, dict(pos_weight=-1), "pos_weight is -1, but must be finite"),
        (losses.DiceCELoss, dict(pos_weight=[0, 0]), "pos_weight is .*not all 0"),
        (
            losses.DiceCELoss,
            dict(pos_weight=2, focal_alpha=0.2, activation="sigmoid"),
            "both weight the label 1: pass one of them",
        ),
        (
            losses.DiceCELoss,
            dict(ce_class_weight=[1, 2], label_sets={200: (0, 1)}),
            "which label_sets do not tell",
        ),
        (losses.UnifiedFocalLoss, dict(weight=1.5), r"weight is 1.5, but must be in \[0, 1\]"),
        (losses.UnifiedFocalLoss, dict(delta=2), r"delta is 2.0, but must be in \[0, 1\]"),
        (losses.UnifiedFocalLoss, dict(gamma=1), "gamma is 1, but must be below 1"),
        (losses.UnifiedFocalLoss, dict(gamma=[0, 1]), "gamma is .*, but must be a number"),
        (losses.UnifiedFocalLoss, dict(asymmetric="no"), "asymmetric is 'no', but must be True"),
        (losses.UnifiedFocalLoss, dict(activation="sigmoid"), "an output for the background"),
        (losses.UnifiedFocalLoss, dict(include_background=False), "has a part for the background"),
        (losses.UnifiedFocalLoss, dict(squared_pred=True), "would make FP = P - I negative"),
        (
            losses.UnifiedFocalLoss,
            dict(activation="none", regions=[(0,), (1,)]),
            "regions overlap, but the unified focal loss",
        ),
    ],
)
def test_wrong_arguments_of_the_family_are_errors_in_words(loss, arguments, says):
    with pytest.raises(ValueError, match=says):
        loss(**arguments)


def test_the_cross_entropy_of_probabilities_is_categorical():
    """For a sigmoid's probabilities it would miss the background, which is an error where it can
    be seen."""
    loss = losses.DiceCELoss(activation="none")
    x, y = make(1)
    with pytest.raises(ValueError, match='cross-entropy of activation="none" is categorical'):
        loss(y, tf.sigmoid(x))
    model, images, labels = model_and_data()
    ended = keras.Sequential([model, keras.layers.Activation("sigmoid")])
    ended.compile("adam", loss)
    with pytest.raises(ValueError, match="the output of a sigmoid, but the cross-entropy"):
        ended.fit(images, labels, verbose=0)
    ended.compile("adam", losses.DiceCELoss(activation="sigmoid"))
    with pytest.raises(ValueError, match="remove the model's last activation") as error:
        ended.fit(images, labels, verbose=0)
    assert 'pass activation="none"' not in str(error.value)


def test_class_weights_that_squares_would_spoil_are_refused():
    x, y = make()
    t = reference.one_hot(y, SHAPE[-1])
    loss = losses.DiceCELoss(squared_pred=True, ce_class_weight=[1, 2, 3])
    np.testing.assert_allclose(loss(t.astype(np.uint8), x), loss(y, x), rtol=1e-6)
    with pytest.raises(ValueError, match="which squared_pred=True squares"):
        loss(t.astype(np.float32), x)


def test_generalized_dice_shows_the_errors_of_a_large_volume():
    """Its sums are near 1 / T, so that the smoothing of the other losses would hide the errors."""
    y = np.zeros((1, 100, 100, 100), np.uint8)
    y[:, :50] = 1
    x = np.zeros((*y.shape, 2), np.float32)
    x[..., 1] = np.where(y == 1, -9, 9)  # All voxels are wrong.
    assert float(GeneralizedDiceLoss()(y, x)) > 0.999


def test_log_dice_of_a_class_that_is_absent_keeps_its_gradient():
    x = tf.zeros((1, 60, 60, 60, 2))
    y = np.zeros((1, 60, 60, 60), np.uint8)
    loss = DiceLoss(transform="log", average="none")
    value, gradient = value_and_gradient(lambda x: loss(y, x), x)
    assert np.isfinite(value) and (gradient.numpy()[..., 1] > 1e-7).all()


@pytest.mark.parametrize(
    ("arguments", "classes", "says"),
    [
        ({}, 1, 'y_pred has one class.*use activation="sigmoid"'),
        (dict(activation="sigmoid", include_background=False), 1, "leaves no class"),
        (dict(class_weight=[1, 2]), 3, "class_weight has 2 entries, but 3 classes count"),
        (dict(class_weight=[1, 2, 3], include_background=False), 3, "but 2 classes count"),
    ],
)
def test_arguments_that_do_not_fit_the_logits_are_errors(arguments, classes, says):
    x, y = make(classes)
    with pytest.raises(ValueError, match=says):
        DiceLoss(**arguments)(y, x)


SET = {"label_sets": {200: (0, 2)}}


@pytest.mark.parametrize(
    ("loss", "arguments", "classes", "says"),
    [
        (losses.DiceFocalLoss, dict(focal_gamma=[1, 2]), 3, "focal_gamma has 2 exponents.* 3 cl"),
        (
            losses.DiceCELoss,
            dict(activation="sigmoid", pos_weight=[1, 2]),
            3,
            "pos_weight has 2 entries, but 3 classes count",
        ),
        (losses.UnifiedFocalLoss, {}, 1, "one class, .* give the model an output for each"),
        (losses.UnifiedFocalLoss, dict(activation="none"), 1, "one class, .* an output for each"),
        (DiceLoss, SET, 2, "label_sets name class 2, but logits .* have 2 classes"),
        (DiceLoss, SET | dict(activation="sigmoid"), 1, "label_sets need two classes or more"),
        (DiceLoss, SET | dict(ignore_label=200), 3, "200 is also in label_sets"),
    ],
)
def test_arguments_of_the_family_that_do_not_fit_the_logits_are_errors(
    loss, arguments, classes, says
):
    x, y = make(classes)
    x = np.full_like(x, 0.5) if arguments.get("activation") == "none" else x
    with pytest.raises((ValueError, tf.errors.InvalidArgumentError), match=says):
        loss(**arguments)(y, x)


def test_labels_that_do_not_fit_label_sets_are_errors():
    x, y = make()
    loss = DiceLoss(label_sets={200: (0, 2)})
    says = r"\[0, 0, 0, 0\] have the value 9, but must be in \[0, 3\), or one of label_sets \(200\)"
    with pytest.raises(tf.errors.InvalidArgumentError, match=says):
        loss(np.full_like(y, 9), x)
    with pytest.raises(tf.errors.InvalidArgumentError, match="label_sets are for class indices"):
        loss(reference.one_hot(y, 3).astype(np.float32), x)


def test_the_asymmetric_loss_needs_a_known_number_of_classes():
    """Its exponents, one for each of them, are an attribute of the op. The symmetric loss has
    one."""
    x, y = make()
    signature = [tf.TensorSpec(y.shape, tf.uint8), tf.TensorSpec([None] * 5)]
    with pytest.raises(ValueError, match="unknown number of classes.* a fixed number"):
        tf.function(losses.UnifiedFocalLoss(), input_signature=signature)(y, x)
    loss = losses.UnifiedFocalLoss(asymmetric=False)
    compiled = tf.function(loss, input_signature=signature)
    np.testing.assert_allclose(compiled(y, x), loss(y, x), rtol=1e-6)


@pytest.mark.parametrize("last", [[], [keras.layers.Activation("linear", dtype="float32")]])
@pytest.mark.parametrize("end", ["softmax", "sigmoid"])
def test_a_model_that_ends_in_an_activation_needs_a_loss_of_probabilities(end, last):
    model, images, labels = model_and_data()
    dtype = "mixed_float16" if last else None
    probabilities = keras.Sequential([model, keras.layers.Activation(end, dtype=dtype), *last])
    says = "y_pred are probabilities.*remove the model's last activation.*activation=.none."
    for compiled in (True, False) if not last else (True,):
        probabilities.compile("adam", loss=DiceLoss(activation=end), run_eagerly=not compiled)
        with pytest.raises(ValueError, match=says):
            probabilities.fit(images, labels, verbose=0)
        probabilities.compile("adam", loss=DiceLoss(activation="none"), run_eagerly=not compiled)
        expected = DiceLoss(activation=end)(labels, model.predict(images, verbose=0))
        value = probabilities.evaluate(images, labels, verbose=0)
        np.testing.assert_allclose(value, expected, rtol=1e-3 if last else 1e-5)


def test_unknown_shapes_are_checked_when_they_are_known():
    """Checks that need the number of classes are made when it is known, which is while running."""
    x, y = make()

    def compiled(loss):
        signature = [tf.TensorSpec(None, tf.float32), tf.TensorSpec(None, tf.uint8)]
        return tf.function(lambda x, y: loss(y, x), input_signature=signature)

    for loss in (DiceLoss(), DiceLoss(class_weight=[1, 2, 3])):
        np.testing.assert_allclose(compiled(loss)(x, y), loss(y, x), rtol=1e-6)
    with pytest.raises(tf.errors.InvalidArgumentError):
        compiled(DiceLoss(class_weight=[1]))(x, y)


def test_a_weight_of_another_shape_is_an_error():
    x, y = make()
    with pytest.raises(ValueError, match=r"sample_weight has shape \(4,\), but y_pred \(3, 6"):
        DiceLoss()(y, x, np.ones(4, np.float32))
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"sample_weight\) has shape \[3, 6\]"):
        DiceLoss()(y, x, np.ones((3, 6), np.float32))


def test_wrong_labels_in_fit_are_named():
    model, images, labels = model_and_data()
    model.compile(optimizer="adam", loss=DiceLoss())
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"voxel \[0, .*have the value 7"):
        model.fit(images, np.where(labels == 2, 7, labels), verbose=0)
    with pytest.raises(Exception, match=r"labels \(y_true\) have shape \[.*6, 6\]"):
        model.fit(images, labels[:, 0], verbose=0)
