"""The front end for PyTorch: bits, gradients to second order, torch.compile, DDP, and errors.

`make test-full` installs PyTorch and MONAI.
"""

import copy

import ml_dtypes
import numpy as np
import pytest

from dice_op import _family, _text, core
from helpers.each_loss import EACH
from helpers.kernel_inputs import distances_of, make
from helpers.peers import (
    HAS_PEERS,
    NEEDS_PEERS,
    VOLUMES,
    assert_conforms,
    of_torch,
    volume,
)

if HAS_PEERS:
    import torch
    from monai import losses as monai
    from torch import library

    import dice_op.torch as front_end

pytestmark = NEEDS_PEERS

OPTIONS = {
    "softmax": {},
    "sigmoid": {"activation": "sigmoid", "cross_entropy": True, "focal_gamma": 2.0},
    "squares": {"squared_pred": True, "cross_entropy": True, "ignore_label": 2},
    "smoothing": {"cross_entropy": True, "label_smoothing": 0.25},
    "regions": {"activation": "sigmoid", "regions": [(0,), (1, 2), (2,), (3,), (4, 1)]},
    "label sets": {"label_sets": {4: (0, 1), 3: (2, 3, 4)}, "cross_entropy": True},
    "exponents": {"cross_entropy": True, "focal_gamma": [2, 0, 0.5, 1, 0]},
    "distances": {"dist_matrix": distances_of(5)},
    "probabilities": {"activation": "none", "cross_entropy": True},
}  # fmt: skip
DTYPES = ("float32", "float64", "float16", "bfloat16")


def tensors(options, dtype="float64", shape=(2, 77, 5), labels="int16", seed=0):
    """Logits, channels last, and labels as tensors."""
    x, y, _ = make(shape, labels, options.get("activation", "softmax"), seed)
    return torch.tensor(x).to(getattr(torch, dtype)), torch.tensor(y)


def array_of(tensor):
    """The tensor's memory as an array."""
    if tensor.dtype == torch.bfloat16:
        return tensor.detach().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.detach().numpy()


def total(sums, seed=5):
    """A scalar that depends on every sum, on each with another coefficient."""
    rng = np.random.default_rng(seed)
    drawn = [(s, torch.tensor(rng.normal(size=s.shape)).to(s)) for s in sums if s is not None]
    return sum((s * k).sum() for s, k in drawn)


@pytest.mark.parametrize("data_format", ["channels_first", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OPTIONS)
def test_pytorch_gives_the_same_bits_as_numpy(name, dtype, data_format):
    """kernels/test_core.py compares the bits on NumPy arrays with the float64 reference. Volumes
    with the channels last in memory alone take the way of those that have them last."""
    options = OPTIONS[name]
    x, y = tensors(options, dtype)
    weight = torch.tensor(np.random.default_rng(1).integers(0, 3, y.shape).astype(np.float32))
    given = dict(options)
    if isinstance(given.get("focal_gamma"), list):
        given["focal_gammas"] = given.pop("focal_gamma")
    arrays = array_of(x), y.numpy()
    wanted = core.sums(*arrays, voxel_weight=weight.numpy(), **given)
    logits = (x.movedim(-1, 1) if data_format == "channels_first" else x).requires_grad_()
    sums = front_end.dice_sums(logits, y, voxel_weight=weight, data_format=data_format, **options)
    assert {n for n, s in sums._asdict().items() if s is not None} == set(wanted)
    d = {}
    for sum_name, has_gradient in core.asked_sums(**given).items():
        found = getattr(sums, sum_name)
        np.testing.assert_array_equal(found.detach(), wanted[sum_name])
        if has_gradient:
            d[sum_name] = torch.tensor(np.random.default_rng(len(d)).normal(size=found.shape)).to(
                found
            )
    sum((getattr(sums, n) * k).sum() for n, k in d.items()).backward()
    given.pop("cross_entropy", None)
    derivatives = {f"d_{n}": k.numpy() for n, k in d.items()}
    gradient = core.gradient(*arrays, voxel_weight=weight.numpy(), **derivatives, **given)
    found = logits.grad.movedim(1, -1) if data_format == "channels_first" else logits.grad
    np.testing.assert_array_equal(found.double(), gradient.astype(np.float64))
    assert np.any(gradient.astype(np.float64))


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("data_format", ["channels_first", "channels_last"])
def test_memory_of_the_other_layout_is_read_as_it_is(data_format, dense, monkeypatch):
    """Labels and weights that have the logits' axes are in the same layout as the logits."""
    x, y = tensors({}, "float32", (2, 4 * 5 * 6, 3))
    labels = torch.nn.functional.one_hot(y.long(), 3).float() if dense else y
    weight = torch.rand(2, 4 * 5 * 6, 1)
    one = front_end.dice_sums(x, labels, voxel_weight=weight, data_format="channels_last")
    there = x.movedim(-1, 1)  # channels first, in memory that has them last
    if data_format == "channels_last":
        there = there.contiguous().movedim(1, -1)
    elif dense:
        labels = labels.movedim(-1, 1)
    weight = weight if data_format == "channels_last" else weight.movedim(-1, 1)
    read = []
    kernels = core.sums
    monkeypatch.setattr(core, "sums", lambda x, *a, **o: read.append(x) or kernels(x, *a, **o))
    other = front_end.dice_sums(there, labels, voxel_weight=weight, data_format=data_format)
    assert read[0].data_ptr() == there.data_ptr()
    for a, b in zip(one, other, strict=True):
        if a is not None:
            np.testing.assert_allclose(a, b, rtol=1e-6)


@pytest.mark.parametrize("name", OPTIONS)
def test_gradients_agree_with_numeric_ones_to_second_order(name):
    """Also with respect to the weights of the voxels."""
    options = OPTIONS[name]
    x, y = tensors(options, "float64", (2, 6, 5))
    weight = torch.tensor(np.random.default_rng(1).random((2, 6)) + 0.5, requires_grad=True)
    x.requires_grad_()

    def function(x, weight):
        return total(
            front_end.dice_sums(x, y, voxel_weight=weight, data_format="channels_last", **options)
        )

    assert torch.autograd.gradcheck(function, (x, weight))
    assert torch.autograd.gradgradcheck(lambda x: function(x, weight.detach()), (x,))


@pytest.mark.parametrize("activation", ["softmax", "sigmoid", "none"])
def test_soft_labels_have_gradients_to_second_order(activation):
    options = {"activation": activation, "soft_label": True, "cross_entropy": True}
    x, t = tensors(options, "float64", (2, 6, 5), "soft")
    x, t = x.requires_grad_(), t.double().requires_grad_()

    def function(x, t):
        return total(front_end.dice_sums(x, t, data_format="channels_last", **options))

    assert torch.autograd.gradcheck(function, (x, t))
    assert torch.autograd.gradgradcheck(function, (x, t))


def test_derivatives_end_at_what_the_loss_is_given():
    """Labels, weights and logits may come from each other, as those of a teacher do."""
    x, t = tensors({}, "float64", (2, 6, 5), "soft")
    t = t.double().requires_grad_()

    def function(t):
        weight = t.sum(-1) + 1
        sums = front_end.dice_sums(
            3 * t, t * t, voxel_weight=weight, activation="sigmoid", data_format="channels_last"
        )
        return total(sums)

    assert torch.autograd.gradcheck(function, (t,))


def test_third_derivatives_agree_with_numeric_ones():
    x, y = tensors({}, "float64", (1, 4, 3))

    def gradient(x):
        sums = front_end.dice_sums(x, y, data_format="channels_last", squared_pred=True)
        return torch.autograd.grad(total(sums), x, create_graph=True)[0]

    assert torch.autograd.gradgradcheck(gradient, (x.requires_grad_(),))


def test_scores_have_no_gradient():
    x, y = tensors({}, "float32", (2, 6, 5))
    weight = torch.ones(y.shape, requires_grad=True)
    x.requires_grad_()
    sums = front_end.dice_sums(
        x, y, voxel_weight=weight, data_format="channels_last", activation="argmax"
    )
    assert sums.pred_sum.dtype == torch.float64
    total(sums).backward()
    assert x.grad is None and weight.grad is None


@pytest.mark.parametrize("name", OPTIONS)
def test_the_ops_pass_pytorchs_own_check(name):
    x, y = tensors(OPTIONS[name], "float32", (2, 12, 5))
    given = dict(OPTIONS[name])
    text = _text.written({**given, "data_format": "channels_last"})
    arguments = (x.requires_grad_(), y, torch.ones(y.shape), text, False)
    library.opcheck(torch.ops.dice_op.sums.default, arguments)
    sums = torch.ops.dice_op.sums(*arguments)
    d = [torch.ones_like(s) for s in front_end._with_gradient(sums, text)]
    library.opcheck(torch.ops.dice_op.sums_gradient.default, (x, y, arguments[2], d, text))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("data_format", ["channels_first", "channels_last"])
def test_the_gradient_may_take_the_memory_of_the_logits(data_format, dtype):
    """Also where the channels are last in memory alone. The bits are the same."""
    x, y = tensors({}, dtype)
    channels_first = data_format == "channels_first"
    x = x.movedim(-1, 1) if channels_first else x
    weight = torch.ones(y.shape).requires_grad_()

    def gradients(**options):
        weights = torch.full_like(x, 2).requires_grad_()
        logits = x * weights  # as those of a network, which somebody else has made
        address = logits.data_ptr()
        loss = front_end.DiceCELoss(data_format=data_format, **options)
        logits.register_hook(lambda g: places.append(g.data_ptr() == address))
        loss(logits, y, weight).backward()
        found, weight.grad = (weights.grad, weight.grad), None
        return found

    places = []
    for found, wanted in zip(gradients(overwrite_logits=True), gradients(), strict=True):
        assert torch.equal(found, wanted) and torch.any(found != 0)
    assert places == [True, False]


# --- losses ---------------------------------------------------------------------------------------


def in_pytorch(loss, x, y):
    """The value and gradient of a loss of channels first."""
    x = torch.tensor(x, requires_grad=True)
    value = loss(x.movedim(-1, 1), torch.tensor(y))
    value.sum().backward()
    return value.detach().numpy(), x.grad.numpy()


def test_every_loss_of_the_family_is_here():
    for name in set(_family.__all__) - {"LogitsFirst"}:
        assert issubclass(getattr(front_end, name), (getattr(_family, name), torch.nn.Module))
    assert {name for name, _ in EACH.values()} == set(_family.__all__) - {
        "SumsLoss",
        "OverlapLoss",
        "LogitsFirst",
    }


@pytest.mark.parametrize("volume_name", VOLUMES)
@pytest.mark.parametrize(
    ("ours", "theirs", "options"),
    [
        ("DiceLoss", "DiceLoss", {}),
        ("DiceLoss", "DiceLoss", {"batch": True, "squared_pred": True}),
        ("TverskyLoss", "TverskyLoss", {"alpha": 0.3, "beta": 0.7}),
        ("DiceCELoss", "DiceCELoss", {"lambda_dice": 0.3, "lambda_ce": 2.0}),
    ],
)
def test_losses_conform_to_monai_with_labels_that_have_a_channel(
    ours, theirs, options, volume_name
):
    x, y = volume(volume_name)
    loss = getattr(front_end, ours)(**options)
    wanted = of_torch(getattr(monai, theirs)(softmax=True, to_onehot_y=True, **options), x, y)
    assert_conforms(in_pytorch(loss, x, y[:, None]), wanted)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_weights_and_reductions(reduction):
    x, y = volume("random")
    logits, labels = torch.tensor(x).movedim(-1, 1), torch.tensor(y)
    each = front_end.DiceLoss(reduction="none")(logits, labels)
    assert each.shape == (3,)
    weight = torch.tensor([1.0, 0.5, 4.0])
    found = front_end.DiceLoss(reduction=reduction)(logits, labels, weight)
    wanted = each * weight
    wanted = wanted if reduction == "none" else getattr(wanted, reduction)()
    torch.testing.assert_close(found, wanted)
    mask = torch.tensor(np.random.default_rng(0).integers(0, 2, y.shape))
    for given in (mask, mask[:, None], mask.bool()):
        found = front_end.DiceLoss()(logits, labels, given)
        torch.testing.assert_close(
            found, front_end.DiceLoss(ignore_label=9)(logits, torch.where(mask == 0, 9, labels))
        )


@pytest.mark.parametrize("name", EACH)
def test_torch_compile_takes_each_loss_without_a_break(name):
    kind, options = EACH[name]
    loss = getattr(front_end, kind)(**options)
    x, y = volume("random")
    torch.compiler.reset()  # It keeps only a few programs of one function.
    wanted = in_pytorch(loss, x, y)
    for overwrite in (False, True):
        loss.overwrite_logits = overwrite
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        for found, value in zip(in_pytorch(compiled, x, y), wanted, strict=True):
            np.testing.assert_allclose(found, value, rtol=1e-6, atol=1e-9)


def test_a_network_trains_under_autocast():
    torch.manual_seed(0)
    x, y = volume("random")
    images = torch.tensor(x[..., 0])[:, None]
    model = torch.nn.Conv3d(1, 4, 3, padding=1)
    loss = front_end.DiceCELoss()
    optimizer = torch.optim.Adam(model.parameters(), 0.05)
    labels = (images[:, 0] > 0).long() + (images[:, 0] > 2)
    history = []
    for _ in range(40):
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(images)
            assert logits.dtype == torch.bfloat16
            value = loss(logits, labels)
        assert value.dtype == torch.float32
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        history.append(float(value))
    assert history[-1] < 0.7 * history[0]


def test_tensors_of_monai_are_taken():
    from monai.data import MetaTensor

    x, y = volume("random")
    logits, labels = torch.tensor(x).movedim(-1, 1), torch.tensor(y)
    wanted = front_end.DiceCELoss()(logits, labels)
    found = front_end.DiceCELoss()(
        MetaTensor(logits), MetaTensor(labels), MetaTensor(torch.ones(3))
    )
    assert type(found) is torch.Tensor and torch.equal(found, wanted)


def test_weights_per_sample_need_no_axis_of_voxels():
    x, y = torch.randn(4, 3), torch.tensor([0, 1, 2, 1])
    loss = front_end.DiceCELoss(reduction="none")
    weight = torch.tensor([1, 100, 0.5, 2])
    torch.testing.assert_close(loss(x, y, weight), weight * loss(x, y))
    found = loss(x, y, weight.double())
    assert found.dtype == torch.float32


TRAIN = """
import sys
import numpy as np
import torch
import torch.distributed as distributed
from dice_op.torch import DiceCELoss

rank, world = int(sys.argv[1]), int(sys.argv[2])
if world > 1:
    distributed.init_process_group(
        "gloo", init_method="file://" + sys.argv[3], rank=rank, world_size=world
    )
rng = np.random.default_rng(0)
images = torch.tensor(rng.normal(size=(4, 1, 8, 8)), dtype=torch.float32)
labels = torch.tensor(rng.integers(0, 3, size=(4, 8, 8)))
labels[0] = 0
torch.manual_seed(0)
model = torch.nn.Conv2d(1, 3, 3, padding=1)
if world > 1:
    model = torch.nn.parallel.DistributedDataParallel(model)
optimizer = torch.optim.SGD(model.parameters(), 1.0)
share = slice(rank * 4 // world, (rank + 1) * 4 // world)
loss_function = torch.compile(
    DiceCELoss(batch=True, ce_class_weight=[1, 2, 3]), fullgraph=True, backend="aot_eager"
)
for _ in range(3):
    loss = loss_function(model(images[share]), labels[share])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(float(loss))
print(*(float(v) for p in model.parameters() for v in p.flatten()))
"""


def test_two_processes_train_as_one(run_python, tmp_path):
    import concurrent.futures

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        store = str(tmp_path / "store")
        two = list(pool.map(lambda rank: run_python(TRAIN, str(rank), "2", store), range(2)))
    one = run_python(TRAIN, "0", "1")
    numbers = [np.array(text.split(), np.float64) for text in (one, *two)]
    assert len(numbers[0]) == 3 + 3 * 9 + 3
    np.testing.assert_allclose(numbers[1], numbers[2], rtol=1e-6)
    np.testing.assert_allclose(numbers[1], numbers[0], rtol=1e-5, atol=1e-7)


def test_torch_compile_takes_losses_that_differ_in_a_number():
    """It then makes a variable of the number, but the kernels need to know it."""
    x, y = volume("random")
    x, y = torch.tensor(x).movedim(-1, 1), torch.tensor(y)
    torch.compiler.reset()
    for gamma in (0.5, 2.0, 3.0):
        loss = front_end.DiceFocalLoss(focal_gamma=gamma)
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x, y), loss(x, y))
    loss.focal_gamma = 1.0  # Its program is another then.
    torch.testing.assert_close(compiled(x, y), front_end.DiceFocalLoss(focal_gamma=1.0)(x, y))


def test_importing_the_front_end_imports_no_other_framework(run_python):
    code = "import sys, dice_op.torch; print(*{'tensorflow', 'keras', 'jax'} & set(sys.modules))"
    assert run_python(code).strip() == ""


def test_errors_name_what_is_wrong():
    x, y = tensors({}, "float32", (2, 4, 3))
    first = x.movedim(-1, 1)
    with pytest.raises(ValueError, match=r"voxel \[0, 1\] have the value 7"):
        labels = y.clone()
        labels[0, 1] = 7
        front_end.DiceLoss()(first, labels)
    with pytest.raises(TypeError, match="logits have dtype torch.int32"):
        front_end.dice_sums(first.int(), y)
    with pytest.raises(TypeError, match="labels is a ndarray, but must be a torch.Tensor"):
        front_end.DiceLoss()(first, y.numpy())
    with pytest.raises(ValueError, match="labels .* have shape"):
        front_end.DiceLoss()(first, y[:, :2])
    with pytest.raises(TypeError, match="DiceLoss has no argument 'softmax'.* applied by default"):
        front_end.DiceLoss(softmax=True)
    with pytest.raises(ValueError, match="reduction is 'all', but must be one of 'mean'"):
        front_end.DiceLoss(reduction="all")


def test_a_loss_can_be_saved_and_copied(tmp_path):
    loss = front_end.DiceCELoss(label_sets={7: (0, 1)}, ce_class_weight=None, focal_gamma=2)
    torch.save(loss, tmp_path / "loss.pt")
    again = torch.load(tmp_path / "loss.pt", weights_only=False)
    for other in (again, copy.deepcopy(loss)):
        assert type(other) is front_end.DiceCELoss
        assert other.options() == loss.options()
    assert "focal_gamma=2.0" in repr(loss) and "reduction='mean'" in repr(loss)
