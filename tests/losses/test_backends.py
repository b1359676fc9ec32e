"""Keras' other backends: the same losses, metrics and saved models on JAX and on PyTorch.

`make test-full` installs both. A process has one backend, so that each has a process of its own.
"""

import json
import sys
from concurrent import futures

import keras
import numpy as np
import pytest

from dice_op import losses, metrics
from helpers.installed import needs
from helpers.paths import ROOT
from helpers.processes import output_of

OTHERS = ("jax", "torch")


def full(*packages):
    return [pytest.mark.full, needs(*packages)]


# JAX has four devices, as a machine with four GPUs.
FOUR_DEVICES = {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
}
SHAPE = (8, 12, 10)  # [N, spatial...]
CLASSES = 3

TRAIN = """
    import json, sys
    import keras
    import numpy as np
    by_keras = set(sys.modules)
    import dice_op.metrics

    imported = sorted({"tensorflow", "jax", "torch"} & set(sys.modules) - by_keras)
    folder, kind = sys.argv[1:]
    if kind == "data parallel":
        keras.distribution.set_distribution(keras.distribution.DataParallel())
    data = np.load(f"{folder}/data.npz")
    model = keras.models.load_model(f"{folder}/model.keras")
    model.fit(data["x"], data["y"], sample_weight=data["weight"], epochs=2, batch_size=4,
              shuffle=False, verbose=0)
    model.save(f"{folder}/trained.keras")
    values = model.evaluate(data["x"], data["y"], batch_size=4, verbose=0)
    print(json.dumps({
        "values": [float(v) for value in values for v in np.ravel(value)],
        "imported": imported,
    }))
"""


@pytest.mark.full
@needs("jax")  # Keras on NumPy needs it
def test_a_backend_that_cannot_train_is_refused_in_words(run_python):
    out = run_python(
        """
        try:
            import dice_op.losses
        except ImportError as error:
            print(error)
        """,
        KERAS_BACKEND="numpy",
    )
    assert "work with Keras on tensorflow, jax, torch, but its backend is numpy" in out


@pytest.mark.parametrize("backend", [pytest.param(b, marks=full(b)) for b in OTHERS])
def test_the_tests_of_losses_and_metrics_pass(backend):
    """Those that need a tensor which only TensorFlow has are skipped there."""
    names = ("keras", "metrics", "deep_supervision", "saved")
    files = [ROOT / "tests" / "losses" / f"test_{name}.py" for name in names]
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider"]
    out = output_of(*command, *files, KERAS_BACKEND=backend, JAX_PLATFORMS="cpu")
    passed = int(out.split(" passed")[0].split()[-1])
    assert passed > 300, out[-500:]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """What TensorFlow saved, and what it makes of the same training."""
    folder = tmp_path_factory.mktemp("saved")
    rng = np.random.default_rng(0)
    x = rng.normal(size=(*SHAPE, 2)).astype(np.float32)
    y = (x[..., 0] > 0).astype(np.uint8) + (x[..., 1] > 1)
    weight = rng.random(SHAPE).astype(np.float32)
    np.savez(folder / "data.npz", x=x, y=y, weight=weight)
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((*SHAPE[1:], 2))])
    model.add(keras.layers.Conv2D(4, 3, padding="same", activation="relu"))
    model.add(keras.layers.Conv2D(CLASSES, 1))
    model.compile(
        keras.optimizers.SGD(0.5),
        loss=losses.DiceCELoss(batch=True, class_weight=[1, 2, 3], focal_gamma=0.5),
        metrics=[
            metrics.DiceScore(average="none", name="each"),
            metrics.Matthews(over="dataset"),
            metrics.TverskyScore(alpha=0.3, beta=0.7, average="weighted"),
        ],
    )
    model.save(folder / "model.keras")
    model.fit(x, y, sample_weight=weight, epochs=2, batch_size=4, shuffle=False, verbose=0)
    values = np.concatenate(list(map(np.ravel, model.evaluate(x, y, batch_size=4, verbose=0))))
    return folder, x, y, model.get_weights(), values


CASES = [
    ("jax", "one device"),
    ("jax", "data parallel"),
    ("torch", "one device"),
]


@pytest.mark.parametrize(
    ("backend", "kind"), [pytest.param(*case, marks=full(case[0])) for case in CASES]
)
def test_a_model_that_tensorflow_saved_trains_to_the_same_weights(
    backend, kind, trained, run_python, tmp_path
):
    """What is trained there loads here again. With `batch=True` several devices must add up their
    sums."""
    folder, x, y, weights, values = trained
    for file in ("data.npz", "model.keras"):
        (tmp_path / file).write_bytes((folder / file).read_bytes())
    variables = FOUR_DEVICES if kind == "data parallel" else {"JAX_PLATFORMS": "cpu"}
    found = json.loads(run_python(TRAIN, tmp_path, kind, KERAS_BACKEND=backend, **variables))
    assert found["imported"] == []
    model = keras.models.load_model(tmp_path / "trained.keras")
    for ours, theirs in zip(weights, model.get_weights(), strict=True):
        np.testing.assert_allclose(theirs, ours, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(found["values"], values, rtol=1e-3)
    again = np.concatenate(list(map(np.ravel, model.evaluate(x, y, batch_size=4, verbose=0))))
    np.testing.assert_allclose(again, values, rtol=1e-3)


IN_PYTORCH = """
    import sys
    import keras
    import numpy as np
    import torch
    from dice_op.losses import DiceCELoss, DownsampledLabels

    file, rank = sys.argv[1], int(sys.argv[2])
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(4, 6, 5, 3)).astype("float32"), rng.integers(0, 3, (4, 6, 5))
    loss, whole = DiceCELoss(batch=True), DiceCELoss(batch=True)(y, x)

    masked = torch.tensor(x)
    masked._keras_mask = torch.tensor(rng.random((4, 6)) < 0.5)
    for each in (DiceCELoss(), DownsampledLabels(DiceCELoss())):
        torch.compiler.reset()
        compiled = torch.compile(each, backend="aot_eager")(y, masked)
        torch.testing.assert_close(compiled, each(y, masked))
        assert abs(float(compiled) - float(each(y, x))) > 1e-3

    for sparse in (torch.tensor(y).to_sparse(), torch.tensor(y[0]).to_sparse_csr()):
        try:
            loss(sparse, x)
        except TypeError as error:
            assert "y_true is a sparse or nested tensor" in str(error)
        else:
            raise AssertionError(sparse.layout)

    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{file}", rank=rank, world_size=2
    )
    half = slice(2 * rank, 2 * rank + 2)
    torch.testing.assert_close(loss(y[half], x[half]), whole)
    print("good")
"""


@pytest.mark.parametrize("backend", [pytest.param("torch", marks=full("torch"))])
def test_two_processes_of_pytorch_add_up_their_sums(backend, run_python, tmp_path):
    """The processes try two more things: a mask counts in a compiled program, and sparse tensors
    are refused."""
    with futures.ThreadPoolExecutor() as pool:
        ranks = [
            pool.submit(run_python, IN_PYTORCH, tmp_path / "meeting", rank, KERAS_BACKEND=backend)
            for rank in "01"
        ]
    assert all("good" in rank.result() for rank in ranks)


MEDICAI = """
    import json, sys
    import keras
    import numpy as np
    import medicai
    from dice_op import losses

    keras.utils.set_random_seed(0)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 32, 32, 1)).astype(np.float32)
    y = (x[..., 0] > 0).astype(np.int32) + (x[..., 0] > 1)
    logits = rng.normal(size=(2, 9, 8, 3)).astype(np.float32)
    labels = rng.integers(0, 3, (2, 9, 8, 1)).astype(np.int32)
    smooth = dict(smooth_nr=1e-7, smooth_dr=1e-7)
    of = dict(from_logits=True, num_classes=3)
    pairs = {
        "Dice": (medicai.losses.SparseDiceLoss(**of), losses.DiceLoss(**smooth)),
        "Dice + CE": (
            medicai.losses.SparseDiceCELoss(**of),
            losses.DiceCELoss(lambda_ce=1 / 3, **smooth),
        ),
    }
    values = {name: [float(loss(labels, logits)) for loss in pair]
              for name, pair in pairs.items()}
    model = medicai.models.UNet(
        input_shape=(32, 32, 1), encoder_name="resnet18", encoder_depth=3,
        decoder_filters=(8, 8, 4), num_classes=3, classifier_activation=None)
    theirs, ours = pairs["Dice + CE"]
    model.compile(keras.optimizers.SGD(0.01), loss=ours, metrics=[lambda y, x: theirs(y, x)],
                  jit_compile=False)
    history = list(model.fit(x, y[..., None], epochs=3, verbose=0).history.values())
    print(json.dumps({"values": values, "history": history}))
"""


@pytest.mark.parametrize(
    "backend", [pytest.param(b, marks=full("medicai", b)) for b in ("tensorflow", *OTHERS)]
)
def test_a_model_of_medicai_trains_with_our_loss_in_place_of_its_own(backend, run_python):
    out = run_python(MEDICAI, KERAS_BACKEND=backend, JAX_PLATFORMS="cpu")
    found = json.loads(out.strip().splitlines()[-1])
    for theirs, ours in found["values"].values():
        assert abs(ours - theirs) <= 1e-5 * theirs
    one, other = found["history"]
    np.testing.assert_allclose(one, other, rtol=1e-5)
    assert one[-1] < one[0]
