"""The front end for JAX: bits, derivatives, vmap, sharded arrays.

`make test-full` installs JAX. front_ends/test_jax.py tests the handlers that it calls, and
losses/test_conformance.py the values of its losses.
"""

import os

import numpy as np
import pytest

from dice_op import _family, core
from helpers.installed import has, needs
from helpers.kernel_inputs import distances_of, make

pytestmark = [pytest.mark.full, needs("jax")]
if has("jax"):
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    import jax
    import jax.numpy as jnp
    from jax.test_util import check_grads

    import dice_op.jax as front_end

OPTIONS = {
    "softmax": {},
    "sigmoid": {"activation": "sigmoid", "cross_entropy": True, "focal_gamma": 2.0},
    "label sets": {"label_sets": {4: (0, 1), 3: (2, 3, 4)}, "cross_entropy": True},
    "distances": {"dist_matrix": distances_of(5), "cross_entropy": True, "label_smoothing": 0.25},
    "probabilities": {"activation": "none", "cross_entropy": True},
}


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


def arrays(options, shape=(2, 77, 5), labels="int16"):
    x, y, _ = make(shape, labels, options.get("activation", "softmax"))
    if options.get("activation") == "none":
        x = (x + 0.1) / 1.5  # The numeric derivative of a small probability's logarithm is inexact.
    return jnp.asarray(x, jnp.float64), jnp.asarray(y)


def total(sums, seed=5):
    """A scalar that depends on every sum, on each with another coefficient."""
    rng = np.random.default_rng(seed)
    return sum((rng.normal(size=s.shape) * s).sum() for s in sums if s is not None)


@pytest.mark.parametrize("name", OPTIONS)
def test_jax_gives_the_same_bits_as_numpy(name):
    x, y = arrays(OPTIONS[name])
    weight = np.random.default_rng(1).integers(0, 3, y.shape)
    wanted = core.sums(np.asarray(x), np.asarray(y), voxel_weight=weight, **OPTIONS[name])
    sums = jax.jit(lambda x: front_end.dice_sums(x, y, voxel_weight=weight, **OPTIONS[name]))(x)
    for sum_name, found in sums._asdict().items():
        if sum_name in wanted:
            np.testing.assert_array_equal(found, wanted[sum_name])
        else:
            assert found is None


@pytest.mark.parametrize("x64", [False, True])
def test_counts_are_as_exact_as_jax_has_numbers(x64):
    """Ten million voxels and one more, which a float32 would still count, with a weight of three
    halves each, so that it does not."""
    y = np.zeros((1, 10_000_001), np.uint8)
    x = np.zeros((*y.shape, 2), np.float32)
    weight = np.full(y.shape, 1.5, np.float32)
    with jax.enable_x64(x64):
        sums = front_end.dice_sums(x, y, voxel_weight=weight, activation="argmax")
        assert sums.intersection.dtype == (jnp.float64 if x64 else jnp.float32)
        exact = 1.5 * y.size
        assert sums.intersection[0, 0] == (exact if x64 else np.float32(exact))


def test_shapes_that_do_not_fit_are_an_error_while_tracing():
    with pytest.raises(ValueError, match="they fit data_format='channels_first'"):
        jax.eval_shape(front_end.dice_sums, jnp.zeros((2, 3, 6, 5)), jnp.zeros((2, 6, 5), int))


@pytest.mark.parametrize("name", OPTIONS)
def test_gradients_agree_with_numeric_ones_to_second_order(name):
    """Also with respect to the weights of the voxels."""
    x, y = arrays(OPTIONS[name], (2, 6, 5))
    weight = jnp.asarray(np.random.default_rng(1).random((2, 6)) + 0.5)

    def function(x, weight):
        return total(front_end.dice_sums(x, y, voxel_weight=weight, **OPTIONS[name]))

    check_grads(function, (x, weight), order=1, modes=["rev"])
    check_grads(lambda x: function(x, weight), (x,), order=2, modes=["rev"])


def test_soft_labels_have_gradients():
    options = {"activation": "softmax", "soft_label": True, "cross_entropy": True}
    x, t = arrays(options, (2, 6, 5), "soft")
    t = t.astype(jnp.float64)

    def function(x, t):
        return total(front_end.dice_sums(x, t, **options))

    # A small step, because min(p, t) has no derivative where p = t.
    check_grads(function, (x, t), order=2, modes=["rev"], eps=1e-6)


def test_scores_have_no_gradient():
    x, y = arrays({}, (2, 6, 5))
    scores = jax.grad(lambda x: total(front_end.dice_sums(x, y, activation="argmax")))(x)
    assert not np.any(scores)


def test_a_program_for_another_platform_than_the_default_has_room_enough(monkeypatch):
    x, y = arrays({}, (2, 6, 5))
    wanted = front_end.DiceLoss()(x, y)
    sizes = core.ffi_workspace
    monkeypatch.setattr(core, "ffi_workspace", lambda *a: sizes(*a) + 1000)
    np.testing.assert_allclose(jax.jit(front_end.DiceLoss())(x, y), wanted, rtol=1e-12)


def test_vmap_gives_what_a_loop_gives():
    x, y = arrays({}, (6, 50, 5))
    x, y = x.reshape(3, 2, 50, 5), y.reshape(3, 2, 50)
    loss = front_end.DiceCELoss()
    found = jax.jit(jax.vmap(jax.value_and_grad(loss)))(x, y)
    wanted = [jax.value_and_grad(loss)(a, b) for a, b in zip(x, y, strict=True)]
    for i, (value, gradient) in enumerate(wanted):
        np.testing.assert_allclose(found[0][i], value, rtol=1e-12)
        np.testing.assert_allclose(found[1][i], gradient, rtol=1e-12, atol=1e-15)
    one_label = jax.vmap(loss, (0, None))(x, y[0])
    np.testing.assert_allclose(one_label[1], loss(x[1], y[0]), rtol=1e-12)


def test_every_loss_of_the_family_is_here():
    for name in set(_family.__all__) - {"LogitsFirst"}:
        assert issubclass(getattr(front_end, name), getattr(_family, name))


SHARDED = """
import os
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
import sys
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
import dice_op.jax

rng = np.random.default_rng(0)
x = rng.normal(size=(2, 16, 12, 10, 3)).astype(np.float32)
y = rng.integers(0, 3, size=x.shape[:-1]).astype(np.uint8)
weight = rng.integers(0, 3, size=y.shape).astype(np.float32)
mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("batch", "space"))
for loss in (dice_op.jax.DiceCELoss(), dice_op.jax.DiceLoss(batch=True)):
    step = jax.jit(jax.value_and_grad(loss))
    wanted = step(x, y, weight)
    for spec in (P("batch", "space"), P(None, ("batch", "space")), P("batch", None, "space")):
        volume = NamedSharding(mesh, spec)
        given = [jax.device_put(a, volume) for a in (x, y, weight)]
        found = step(*given)
        text = step.lower(*given).compile().as_text()
        print(
            abs(found[0] / wanted[0] - 1),
            jnp.linalg.norm(jax.device_get(found[1]) - wanted[1]) / jnp.linalg.norm(wanted[1]),
            found[1].sharding.is_equivalent_to(volume, 5),
            "all-gather" in text,
            [m for m in ("tensorflow", "keras", "torch") if m in sys.modules],
        )
"""


def test_sharded_volumes_stay_where_they_are(run_python):
    """Four devices, over samples, voxels or both. What crosses devices are sums, [N, C]."""
    lines = run_python(SHARDED).splitlines()
    assert len(lines) == 6
    for line in lines:
        value, gradient, in_place, gathers, others = line.split(maxsplit=4)
        assert float(value) <= 1e-6 and float(gradient) <= 1e-5
        assert (in_place, gathers, others) == ("True", "False", "[]")


MAPPED = """
import os
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
import warnings
warnings.simplefilter("error")
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec as P
from dice_op import formulas
from dice_op.jax import DiceCELoss, dice_sums

rng = np.random.default_rng(0)
x = jnp.asarray(rng.normal(size=(4, 48, 3)), jnp.float32)
y = jnp.asarray(rng.integers(0, 3, x.shape[:-1]), jnp.uint8)
weight = jnp.asarray(rng.random(y.shape), jnp.float32)
dense = jnp.asarray(rng.dirichlet(np.ones(3), y.shape), jnp.float32)
mesh = Mesh(np.array(jax.devices()), ("device",))
loss = DiceCELoss()

def of_samples(x, y, weight):
    return jax.lax.pmean(loss(x, y, weight), "device")

def of_volume(x, y, weight, over="device"):
    sums = dice_sums(x, y, voxel_weight=weight, activation="softmax")
    if over:
        sums = formulas.map_sums(lambda s: jax.lax.psum(s, over), sums)
    return (1 - formulas.dice(sums)).mean()

def whole_volume(x, y, weight):
    return of_volume(x, y, weight, over=None)

for mapped, wanted, spec in (
    (of_samples, loss, P("device")),
    (of_volume, whole_volume, P(None, "device")),
):
    mapped = jax.jit(jax.shard_map(mapped, mesh=mesh, in_specs=(spec,) * 3, out_specs=P()))
    for labels, arguments in ((y, (0, 2)), (dense, (0, 1, 2))):
        found = jax.value_and_grad(mapped, arguments)(x, labels, weight)
        right = jax.value_and_grad(wanted, arguments)(x, labels, weight)
        print(abs(found[0] / right[0] - 1), *(
            jnp.linalg.norm(a - b) / jnp.linalg.norm(b)
            for a, b in zip(found[1], right[1], strict=True)
        ))
"""


def test_each_device_has_its_part_inside_shard_map(run_python):
    """A device has some of the samples, or a part of one volume, whose sums are then added up.

    The gradients of weights and of dense labels are compared as well.
    """
    lines = run_python(MAPPED).splitlines()
    assert [len(line.split()) for line in lines] == [3, 4, 3, 4]
    assert all(float(error) <= 1e-5 for line in lines for error in line.split())


def test_errors_name_what_is_wrong():
    x, y = arrays({}, (2, 4, 3))
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"voxel \[0, 1\] have the value 7"):
        jax.block_until_ready(front_end.DiceLoss()(x, y.at[0, 1].set(7)))
    with pytest.raises(ValueError, match="labels .* have shape"):
        front_end.DiceLoss()(x, y[:, :2])
    with pytest.raises(ValueError, match=r"weight has shape \[5\], but logits \[2, 4, 3\]"):
        front_end.DiceLoss()(x, y, jnp.ones(5))
    with pytest.raises(TypeError, match="DiceLoss has no argument 'softmax'"):
        front_end.DiceLoss(softmax=True)
    with pytest.raises(ValueError, match="reduction is 'all', but must be one of 'mean'"):
        front_end.DiceLoss(reduction="all")
