"""What runs on a GPU, tried without one: each part on a stand-in, and gpu_check.py around them."""

import functools
import importlib
import importlib.util
import itertools
import json
import math
import os
import sys
import textwrap
import types

import numpy as np
import pytest

from benchmarks import measuring
from benchmarks.cases import cube, decode, encode
from benchmarks.contenders import Contender
from benchmarks.gpu import comparison, contenders, installed, kernels, report
from benchmarks.gpu.device import DeviceError
from benchmarks.gpu.volume import RepeatedVolume
from gpu import front_ends, keras_training, tensorflow_ops
from gpu import kernels as checks
from helpers import host_device, reference
from helpers.each_loss import EACH
from helpers.host_device import HostCore, HostDevice, WrongCore
from helpers.paths import BENCHMARKS, BUILD, BUILD_TOOLS, ROOT
from helpers.processes import alone_in, run

YARDSTICKS = {name: {"bytes_per_second": 1e12} for name in ("copy", "read")}


@pytest.fixture(scope="module")
def device():
    return HostDevice()


@pytest.fixture
def gpu_check(monkeypatch):
    """The program, as a module."""
    monkeypatch.syspath_prepend(BUILD_TOOLS)
    module = importlib.import_module("gpu_check")
    yield module
    del sys.modules["gpu_check"]


# --- cases and plans ------------------------------------------------------------------------------


def test_every_module_can_be_imported_and_needs_no_tensorflow(run_python):
    names = {path.stem for path in (BENCHMARKS / "gpu").glob("*.py")}
    names -= {"__init__", "triton_kernels"}  # The latter needs Triton when it is imported.
    assert {
        "comparison",
        "contenders",
        "device",
        "frameworks",
        "kernels",
        "report",
        "volume",
    } <= names
    code = f"""
        import importlib, sys
        for name in {sorted(names)}:
            importlib.import_module("benchmarks.gpu." + name)
        import gpu.front_ends, gpu.keras_training, gpu.kernels, gpu.tensorflow_ops
        print(*{{"tensorflow", "keras", "torch", "jax"}} & set(sys.modules))
    """
    assert run_python(code, PYTHONPATH=f"{ROOT}:{ROOT / 'tests'}").split() == []


def test_the_kernels_are_measured_in_the_order_of_importance():
    quick = [str(case) for case in kernels.plan(quick=True)]
    assert quick[:3] == ["256³ × 4", "256³ × 4 bfloat16", "256³ × 14"] and len(quick) == 12
    whole = [str(case) for case in kernels.plan(quick=False)]
    assert whole[:8] == [
        f"{edge}³ × {classes}{dtype}"
        for edge in (192, 256)
        for classes in (4, 14)
        for dtype in ("", " bfloat16")
    ]
    # Seven edges and three dtypes; of seven counts of classes, two have a cross-entropy as well.
    assert len(set(whole)) == len(whole) == 7 * 3 * (7 + 2)
    assert whole[-1].endswith("float16") and "512³ × 104" in whole


def test_contenders_are_measured_in_the_order_of_importance():
    quick = [(c.title, str(case)) for c, case in contenders.plan("torch", quick=True)]
    assert [title for title, _ in quick[:4]] == [
        "dice_op",
        "Triton kernels",
        "PyTorch eager, nnU-Net's form",
        "PyTorch eager, MONAI's form",
    ]
    assert {case for _, case in quick[:4]} == {"256³ × 4"} and len(quick) == 5 * 8
    # What takes long to compile comes three volumes later.
    compiled = [number for number, (title, _) in enumerate(quick) if "compile" in title]
    assert quick[compiled[0]][1] == "256³ × 4" and 12 <= compiled[0] < 20
    whole = contenders.plan("jax", quick=False)
    assert [c.title for c, _ in whole[:2]] == ["dice_op in JAX's jit", "JAX, jit"]
    assert len(whole) == 2 * 32 and str(whole[-1][1]) == "512³ × 104 bfloat16"


def test_a_contender_says_why_it_cannot_be_measured(device):
    (triton,) = (c for c in contenders.CONTENDERS.values() if "triton" in c.needs)
    if importlib.util.find_spec("triton") is None:
        result = contenders.measure_part(None, (triton, cube(8, 4)))
        assert result == {"failed": "triton is not installed"}
    few = Contender("few", None, most_classes=16)
    assert few.why_not(cube(8, 17)) == "written for at most 16 classes" and not few.why_not(
        cube(8, 16)
    )


# --- values ---------------------------------------------------------------------------------------


def test_bfloat16_is_stored_as_others_store_it():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    values = np.concatenate([np.random.default_rng(0).normal(size=1000), [0, -0.0, 1e-30, 3e38]])
    stored = encode(values, "bfloat16")
    wanted = values.astype(np.float32).astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(stored, wanted.view(np.uint16))
    np.testing.assert_array_equal(decode(stored, "bfloat16"), wanted.astype(np.float64))


@pytest.mark.parametrize(
    "case", [cube(18, 3), cube(9, 20, dtype="bfloat16"), cube(5, 1), cube(17, 4)], ids=str
)
def test_the_results_of_a_volume_that_repeats_voxels_are_those_of_the_whole(case):
    volume = RepeatedVolume(case)
    repeats = np.arange(case.voxels) % volume.period
    x, t = volume.x[:, repeats], volume.t[:, repeats]
    options = {"activation": volume.activation}
    wanted = reference.sums(x, t, **options)
    assert volume.sums().keys() == wanted.keys()
    for name, got in volume.sums().items():
        assert reference.relative_error(got, wanted[name]) < 1e-12
    loss, gradient = reference.loss_and_gradient(x, t, reference.mean_dice, **options)
    assert abs(volume.dice()[0] - loss) < 1e-12
    rows = functools.partial(lambda start, count: gradient[0, start : start + count])
    errors = volume.errors(loss, rows)
    assert errors["gradient_error"] < 1e-10 and not errors["wrong"]
    assert volume.errors(loss + 0.1, rows)["wrong"]
    assert volume.errors(math.nan, rows)["wrong"]
    gradient[0, min(volume.period, case.voxels) // 2] = np.nan
    assert volume.errors(loss, rows)["wrong"]


# --- the kernels alone, and their checks ----------------------------------------------------------


@pytest.mark.parametrize(
    "case",
    [
        cube(8, 4),
        cube(20, 14, dtype="bfloat16", cross_entropy=True),
        cube(17, 1),
        cube(9, 104, dtype="float16"),
    ],
    ids=str,
)
def test_the_kernels_are_checked_and_timed(case, device):
    result = kernels.facts(case) | kernels.measure(HostCore(), device, YARDSTICKS, case)
    assert not result["wrong"] and result["sums_error"] > 0
    for part in kernels.PARTS:
        timed = result[part]
        assert timed["seconds"] > 0 and timed["graph"]["seconds"] > 0 and timed["host_us"] > 0
        rate = timed["bytes_per_second"] * timed["seconds"]
        assert math.isclose(rate, result["bytes"][part]) and timed["of_copy"] > 0
    assert str(case) in report.line(result) and "of the copy rate" in report.line(result)


def test_wrong_kernels_are_noticed_and_not_timed(device):
    result = kernels.measure(WrongCore(), device, YARDSTICKS, cube(20, 4))
    assert result["wrong"] and "pair" not in result
    assert 5e-5 < result["sums_error"] < 2e-4 and result["gradient_error"] > 1e-2


def test_yardsticks_and_errors_of_a_device():
    device = HostDevice()
    device.host.free = 1 << 20
    yardsticks = device.yardsticks()
    assert yardsticks["copy"]["bytes"] == 2 * yardsticks["read"]["bytes"] == 1 << 18
    assert "TB/s" in report.line({"kind": "yardsticks", **yardsticks})
    with pytest.raises(DeviceError, match="allocate: out of memory"):
        device.empty((1 << 21,), "uint8")
    assert "too little memory" in kernels.measure(None, device, None, cube(8, 4))["skipped"]


def test_all_kinds_of_checks_pass_where_the_kernels_are_right(device):
    checker = checks.Checker(HostCore(), device)
    result = checks.check(checker, math.inf, few=True)
    assert result["kind"] == "few_checks" and result["count"] > 100 and not result["left_out"]
    for call in checks.option_calls((1, 3)):
        checker.check(call)
    for call in [call for call in checks.regime_calls() if call.voxels < 2000][::20]:
        checker.check(call)
    device.host.free = 1 << 32
    for part in (
        functools.partial(checker.same_bits, 2),
        checker.bad_labels,
        checker.bad_predictions,
        checker.refusals,
        functools.partial(checker.huge, 4, 1000),
    ):
        before = checker.count
        assert part() is None and checker.count > before
    assert not checker.failures
    # One voxel in the middle of the sums that ought to be NaN would be noticed.
    assert not checks.only_second_is_nan({"a": np.array([[1.0], [np.nan], [np.nan]])})


def test_checks_fail_where_the_kernels_are_wrong(device, capsys):
    checker = checks.Checker(WrongCore(), device)
    checker.check(checks.Call(300, 4))
    assert len(checker.failures) == 6  # the five sums, and the gradient
    assert capsys.readouterr().out.count("SAY FAILED V=300 C=4") == 6

    class Careless(HostCore):
        def sums(self, *args, **options):
            sums = super().sums(*args, **options)
            return {n: host_device.Result(np.nan_to_num(v.values)) for n, v in sums.items()}

    checker = checks.Checker(Careless(), device)
    checker.bad_labels()
    checker.bad_predictions()
    assert len(checker.failures) == checker.count > 100


def test_what_a_deadline_leaves_is_said(device, capsys):
    result = checks.check(checks.Checker(HostCore(), device), -math.inf, few=True)
    assert result["count"] == 0 and "no time left" in result["left_out"][0]
    cases = kernels.plan(quick=True)
    measuring.follow(cases, -math.inf, "measure", kernels.facts, None, report.line)
    text = capsys.readouterr().out.splitlines()[0].removeprefix(measuring.RESULT)
    left = {"kind": "left_out", "step": "measure", "what": [str(case) for case in cases]}
    assert json.loads(text) == left


# --- the front ends, Keras and TensorFlow ---------------------------------------------------------


def named(**values):
    return types.SimpleNamespace(**values)


BLIND = {  # frameworks that see no GPU
    "tensorflow": named(config=named(list_physical_devices=lambda kind: []), __version__="1.2"),
    "torch": named(cuda=named(is_available=lambda: False), __version__="1.2"),
    "jax": named(default_backend=lambda: "cpu", __version__="1.2"),
}


@pytest.mark.parametrize(
    ("worker", "name"),
    [
        *itertools.product((front_ends, contenders), ("torch", "jax")),
        (tensorflow_ops, "tensorflow"),
        *((keras_training, name) for name in BLIND),
    ],
)
def test_a_framework_that_is_not_there_is_skipped(worker, name, monkeypatch, capsys):
    monkeypatch.setenv("KERAS_BACKEND", "")  # The worker sets it.
    monkeypatch.setattr(sys, "argv", ["worker", name])
    for module, why in (
        (None, f"{name} cannot be imported: "),
        (BLIND[name], f"{name} 1.2 sees no GPU"),
    ):
        monkeypatch.setitem(sys.modules, name, module)
        assert not worker.main()
        (line,) = capsys.readouterr().out.splitlines()
        assert json.loads(line.removeprefix(measuring.RESULT))["skipped"].startswith(why)


def test_what_else_may_not_be_there(monkeypatch):
    seeing = named(config=named(list_physical_devices=lambda kind: ["a GPU"]), __version__="1.2")
    monkeypatch.setitem(sys.modules, "tensorflow", seeing)
    for cuda, why in (("13.0", None), (None, "dice_op is built here without CUDA")):
        core = named(build_info=lambda cuda=cuda: {"cuda": cuda})
        monkeypatch.setitem(sys.modules, "dice_op", named(dice_sums=len, core=core))
        assert installed.why_not("tensorflow") == why
        assert installed.why_not("tensorflow", "cpu") is None
    monkeypatch.setitem(sys.modules, "keras", None)
    assert keras_training.why_not("tensorflow", "cpu").startswith("keras cannot be imported: ")
    monkeypatch.setitem(sys.modules, "dice_op", None)
    for place in ("gpu", "cpu"):
        words = "dice_op cannot be imported: "
        assert installed.why_not("tensorflow", place).startswith(words)
    monkeypatch.setitem(sys.modules, "triton", None)
    assert "Triton" in installed.why_not_compiled("torch")
    assert installed.why_not_compiled("jax") is None


@pytest.mark.full
def test_every_loss_of_pytorch_is_checked(monkeypatch):
    pytest.importorskip("torch")
    shapes = {(2, 6, 5, 4): front_ends.DTYPES, (1, 35): ("float32",)}
    monkeypatch.setattr(front_ends, "SHAPES", shapes)
    front_end = front_ends.PyTorch("cpu", host_device.HostCuda())
    result = front_ends.check(front_end)
    # A value and a gradient in each type, and of three other ways to call one of the losses.
    assert result["count"] == 2 * (4 * len(EACH) + 3)
    assert not result["failures"] and not result["left_out"]
    gradient = front_end.losses.core.gradient

    def a_little_too_large(logits, *others, out, **options):
        gradient(logits, *others, out=out, **options)
        out.mul_(1.01 if logits.dtype is not front_end.torch.float64 else 1)

    with monkeypatch.context() as patch:
        patch.setattr(front_end.losses.core, "gradient", a_little_too_large)
        failures = front_ends.check(front_end)["failures"]
    assert len(failures) == result["count"] / 2
    assert all(": gradient, " in failure for failure in failures)
    outcomes, loss = checks.Outcomes(), front_end.losses.DiceLoss()
    volume = front_ends.volume((1, 35))
    wanted = front_end.result(loss, *volume, "float64")
    not_in_place = functools.partial(front_end.result, front_end.in_place(loss), *volume, "float32")
    front_ends.compare(outcomes, "in place", "float32", not_in_place, wanted)
    assert "other memory than the logits" in outcomes.failures[0]


@pytest.mark.full
def test_every_loss_of_jax_is_checked(run_python):
    """Only a few losses are checked here, because JAX compiles a program for each."""
    pytest.importorskip("jax")
    code = """
        import json
        import dice_op.jax
        from gpu import front_ends

        front_ends.SHAPES = {(2, 6, 10, 4): front_ends.DTYPES}
        few = ("Dice + focal", "label sets")
        front_ends.EACH = {name: front_ends.EACH[name] for name in few}
        print(json.dumps(front_ends.check(front_ends.Jax("cpu"))))
        gradient = dice_op.jax._gradient
        dice_op.jax._gradient = lambda text, logits, *others: gradient(text, logits, *others) * (
            1.01 if logits.dtype != "float64" else 1
        )
        print(json.dumps(front_ends.check(front_ends.Jax("cpu"))))
    """
    variables = {"JAX_PLATFORMS": "cpu", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    devices = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    lines = run_python(code, **variables, **devices).splitlines()
    right, wrong = (json.loads(line) for line in lines if line.startswith("{"))
    # The sharded array besides.
    assert right["count"] == 2 * (3 * 2 + 1) and not right["failures"] and not right["left_out"]
    assert len(wrong["failures"]) == right["count"] / 2


def test_the_ops_of_tensorflow_are_compared(monkeypatch):
    import dice_op

    right = tensorflow_ops.check("cpu")
    assert right["count"] == 12 * 6 and not right["failures"]
    calls, of_ours = itertools.count(), dice_op.dice_sums

    def every_second_too_large(y, x, **options):
        sums = of_ours(y, x, **options)
        larger = 1 + 1e-5 * (next(calls) % 2)
        return type(sums)(*(s if s is None else s * larger for s in sums))

    monkeypatch.setattr(dice_op, "dice_sums", every_second_too_large, raising=False)
    wrong = tensorflow_ops.check("cpu")["failures"]
    assert len(wrong) >= 12 * 5 and "C=2 float32: pred_sum: error 1.0" in "; ".join(wrong)


@pytest.mark.parametrize(
    ("backend", "ways"),
    [
        ("tensorflow", [False, True]),
        # Operation by operation JAX takes long, and so does the compiler of PyTorch.
        pytest.param("jax", [True], marks=pytest.mark.full),
        pytest.param("torch", [False], marks=pytest.mark.full),
    ],
)
def test_a_network_trains_in_keras(backend, ways, run_python):
    pytest.importorskip(backend)
    code = f"""
        from gpu import keras_training
        assert keras_training.why_not("{backend}", "cpu") is None
        options = dict(ways={ways}, edge=8, epochs=12)
        assert keras_training.check("{backend}", "cpu", **options)
    """
    variables = {"JAX_PLATFORMS": "cpu", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    out = run_python(code, KERAS_BACKEND=backend, **variables)
    lines = [line for line in out.splitlines() if line.startswith(measuring.RESULT)]
    results = [json.loads(line.removeprefix(measuring.RESULT)) for line in lines]
    assert [result["compiled"] for result in results] == ways
    assert all(len(result["losses"]) == 12 and not result["failures"] for result in results)


def test_a_network_that_does_not_train_is_noticed(monkeypatch, capsys):
    right = {"losses": [1.0, 0.5], "scores": [0.2, 0.6]}
    trained = {False: right, True: {"losses": [1.1, 1.0], "scores": [0.2, 0.3]}}
    monkeypatch.setattr(keras_training, "train", trained.get)
    assert not keras_training.check("jax")
    out = capsys.readouterr().out
    assert "SAY Keras on jax, without compilation: losses 1.000 to 0.500, scores 0.200 to" in out
    wrong = "the loss went from 1.1000 to 1.0000; the score went from 0.2000 to 0.3000; "
    assert wrong + "the first loss is 1.1000, but 1.0000 without compilation" in out
    assert keras_training.check("jax", deadline=-math.inf)
    assert capsys.readouterr().out.count("compilation: no time left") == 2


# --- contenders -----------------------------------------------------------------------------------


def one_measurement(framework, title, case):
    contender = contenders.CONTENDERS[title]
    result = contenders.measure_part(framework, (contender, case))
    assert not result["wrong"] and result["error"] < 1e-5 and result["seconds"] > 0
    assert result["gradient_error"] < (1e-5 if case.dtype == "float32" else 1e-2)
    assert result["extra_bytes"] > 0
    return contenders.facts((contender, case)) | result


@pytest.mark.full
@pytest.mark.parametrize("case", [cube(12, 4), cube(17, 14, dtype="bfloat16")], ids=str)
def test_contenders_in_pytorch_compute_the_loss_in_question(case, device):
    pytest.importorskip("torch")
    framework = host_device.PyTorchOnHost(device)
    for title, contender in contenders.CONTENDERS.items():
        if contender.framework == "torch" and not contender.needs and not contender.later:
            result = one_measurement(framework, title, case)
            assert result["graph"]["seconds"] > 0
            assert f"{title}, {case}: " in report.line(result)


@pytest.mark.full
def test_contenders_in_jax_compute_the_loss_in_question(run_python):
    pytest.importorskip("jax")
    code = """
        from benchmarks.cases import cube
        from helpers import host_device
        from test_without_gpu import contenders, one_measurement
        framework = host_device.JaxOnHost(host_device.HostDevice())
        for title, contender in contenders.CONTENDERS.items():
            if contender.framework == "jax":
                for case in cube(12, 4), cube(17, 14, dtype="bfloat16"):
                    result = one_measurement(framework, title, case)
                    assert result["calls_per_sample"] == 10 and "graph" not in result
                    print(title)
    """
    path = [ROOT, ROOT / "tests", ROOT / "tests" / "gpu", ROOT / "examples"]
    printed = run_python(code, PYTHONPATH=":".join(map(str, path)), JAX_PLATFORMS="cpu")
    assert printed.split("\n")[::2] == ["dice_op in JAX's jit", "JAX, jit", ""]


class Numbers(measuring.Framework):
    """A framework whose arrays are numbers, and whose clock goes one second a call."""

    has_graphs = True

    def arguments(self, volume):
        return (volume,)

    def ready(self, step, case, arguments):
        return step

    def peak(self, step, arguments):
        return step(*arguments), 7

    def samples(self, runs, repeats):
        return [float(run() is None or 1) for run in (runs[:1] * repeats)]

    def graph(self, runs):
        raise RuntimeError("cannot be recorded")


class OneNumber:
    def errors(self, loss, rows):
        return {"error": abs(loss - 1), "wrong": loss != 1}


@pytest.mark.parametrize("same_loss, timed", [(True, False), (False, True)])
def test_the_harness_times_no_wrong_result(same_loss, timed):
    contender = Contender("two", lambda case: lambda x: (2.0, None), same_loss=same_loss)
    result = measuring.measure(Numbers(), contender, cube(8, 4), OneNumber())
    assert result["wrong"] == (not timed) and ("seconds" in result) == timed
    right = Contender("one", lambda case: lambda x: (1.0, None))
    result = measuring.measure(Numbers(), right, cube(8, 4), OneNumber())
    assert result["seconds"] == 1 and result["repeats"] == 5 and result["extra_bytes"] == 7
    assert result["graph"] == {"failed": "RuntimeError: cannot be recorded"}


# --- gpu_check.py ---------------------------------------------------------------------------------


def test_a_worker_imports_what_was_built_for_the_gpu(gpu_check, tmp_path, monkeypatch):
    """And not the package of the source folder, though that holds all else that it imports."""
    (tmp_path / "dice_op").mkdir()
    (tmp_path / "dice_op" / "__init__.py").write_text("")
    (tmp_path / "looks.py").write_text(
        "import dice_op, benchmarks, gpu.kernels, helpers, sys\n"
        "found = [dice_op, benchmarks, gpu.kernels, helpers]\n"
        "print(*(module.__file__ for module in found), sys.argv[1:])\n"
    )
    monkeypatch.setattr(gpu_check.Gpu, "install", tmp_path)
    command, folder, environment = gpu_check.Gpu().worker("looks", "--seconds", "3")
    record = None
    status, log = gpu_check.run_worker(command, 60, record, folder, environment)
    assert status == 0, log
    wanted = [tmp_path / "dice_op", BENCHMARKS]
    wanted = [f"{folder / '__init__.py'}" for folder in wanted]
    wanted += [str(ROOT / "tests" / "gpu" / "kernels.py")]
    wanted += [str(ROOT / "tests" / "helpers" / "__init__.py")]
    wanted += ["['--seconds', '3']"]
    assert log.strip() == " ".join(wanted)
    _, folder, environment = gpu_check.Gpu().worker("gpu.tensorflow_ops", installed=False)
    assert folder == ROOT and str(tmp_path) not in environment["PYTHONPATH"]


# A worker of gpu_check.py, but on the stand-in and with little to do. It takes dice_op from the
# source folder, because nothing is built for a GPU.
STAND_IN = """
    import importlib, sys
    import dice_op
    from benchmarks.cases import cube
    from benchmarks.contenders import CONTENDERS
    from benchmarks.gpu import contenders, kernels
    from benchmarks.gpu import installed
    from gpu import front_ends, keras_training
    from gpu import kernels as checks
    from helpers import host_device

    core, name, sys.argv = sys.argv[1], sys.argv[2], sys.argv[2:]
    worker = importlib.import_module(name)
    worker.Device = host_device.HostDevice
    if worker is not contenders:
        dice_op.core = getattr(host_device, core)()
    kernels.plan = lambda quick: [cube(8, 4), cube(8, 14, dtype="bfloat16")]
    computing = CONTENDERS["dice_op.core"], contenders.CONTENDERS["Triton kernels"]
    contenders.plan = lambda framework, quick: [(c, cube(8, 17)) for c in computing]
    contenders.FRAMEWORKS = dict.fromkeys(("torch", "jax"), host_device.NumpyOnHost)
    few = [*checks.few_calls()][::4]
    checks.few_calls = checks.option_calls = lambda: few
    checks.regime_calls = lambda: ()
    checks.Checker.same_bits = lambda self: None

    class Known:  # a front end whose losses are 1, and whose gradients are the logits
        def __init__(self, place):
            self.losses = self

        def __getattr__(self, kind):
            return dict

        def result(self, loss, x, y, dtype, place=None):
            return 1.0, x * (1.1 if (core, dtype) == ("WrongCore", "float16") else 1)

        def ways(self, kind, options):
            return {"another way": "not here"}

    front_ends.FRONT_ENDS = dict.fromkeys(("torch", "jax"), Known)
    front_ends.SHAPES = {(2, 3): front_ends.DTYPES}
    last = 0.9 if core == "WrongCore" else 0.1
    keras_training.train = lambda compiled: {"losses": [1, last], "scores": [0, 1 - last]}
    absent = () if worker is contenders else ("tensorflow", "jax")
    installed.why_not = lambda name, *_: f"{name} is not here" if name in absent else None
    installed.why_not_compiled = lambda name, place: "no compiler"
    sys.exit(worker.main())
"""
GPU = {
    "name": "NVIDIA H200", "driver_version": "580.1", "compute_cap": "9.0",
    "clocks.sm": "345 MHz", "clocks.max.sm": "1980 MHz",
}  # fmt: skip


@pytest.fixture
def on_the_stand_in(gpu_check, tmp_path, monkeypatch):
    """Runs gpu_check.py with workers on the stand-in. Returns the exit status and the record.

    The sources are those of a commit, whatever this folder is.
    """
    start_of, output_of = gpu_check.Gpu.worker, gpu_check.output_of

    def run(core, *arguments, commit="abc", changes=""):
        def worker(target, module, *words, installed=True):
            *_, environment = start_of(target, module, *words, installed=installed)
            code = textwrap.dedent(STAND_IN)
            return [sys.executable, "-c", code, core, module, *words], ROOT, environment

        def without_git(*command):
            if command[0] != "git":
                return output_of(*command)
            return commit if "rev-parse" in command else changes

        monkeypatch.setattr(gpu_check, "output_of", without_git)
        monkeypatch.setattr(gpu_check, "nvcc_path", lambda: str(tmp_path / "nvcc"))
        monkeypatch.setattr(gpu_check.Gpu, "worker", worker)
        monkeypatch.setattr(gpu_check.Gpu, "facts", lambda target: GPU)
        monkeypatch.setattr(gpu_check.Gpu, "sanitizers", ("memcheck",))
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        sanitizer = tmp_path / "compute-sanitizer"
        sanitizer.write_text('#!/bin/sh\nshift 4; exec "$@"\n')
        sanitizer.chmod(0o755)
        monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--out", str(tmp_path), *arguments])
        status = gpu_check.main()
        (path,) = tmp_path.glob(f"*-nvidia-h200-{commit}.json")
        return status, path, json.loads(path.read_text())

    return run


def test_gpu_check_records_what_workers_find(on_the_stand_in, gpu_check, monkeypatch, capfd):
    steps = "check,sanitizer,measure,contenders"
    status, path, record = on_the_stand_in("HostCore", "--quick", "--steps", steps)
    assert status == 0, capfd.readouterr().out
    assert {name: step["status"] for name, step in record["steps"].items()} == dict.fromkeys(
        steps.split(","), "passed"
    )
    kinds = [result["kind"] for result in record["results"]]
    measured = ["yardsticks", "kernels", "kernels", "yardsticks_again"]
    assert kinds == ["checks", *measured, *["contender"] * 4, "few_checks"]
    assert not record["rehearsal"] and record["starts"][0]["time_limit"] == 540
    printed = capfd.readouterr().out
    assert "8³ × 14 bfloat16: forward" in printed and " checks, 0 failed" in printed
    # What is written says it all, and can be written again.
    text = path.with_suffix(".md").read_text()
    assert text in printed and str(path.with_suffix(".md")) in printed
    for words in (
        "# NVIDIA H200, ", "| check | passed | 108.0 | ", "- memcheck: no errors",
        "## Calculated and measured", "- front_ends: was not asked for",
        " checks of the kernels, 0 failed", "This GPU, in the same process: copy ", "| 8³ × 4 | ",
        "| 8³ × 14 bfloat16 | ", "| 8³ × 17 | dice_op.core | ",
        "| 8³ × 17 | Triton kernels | – | – | – | – | ",
    ):  # fmt: skip
        assert words in text, words
    if importlib.util.find_spec("matplotlib"):
        assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    path.with_suffix(".md").unlink()
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--render", str(path)])
    assert gpu_check.main() == 0 and path.with_suffix(".md").read_text() == text


def test_what_is_most_valuable_comes_first_and_the_time_is_planned(
    on_the_stand_in, gpu_check, capfd
):
    assert [*gpu_check.STEPS] == [
        "build", "check", "measure", "contenders", "front_ends", "keras", "sanitizer", "tensorflow",
    ]  # fmt: skip
    assert {"build", *gpu_check.WORKERS, "sanitizer"} == {*gpu_check.STEPS}
    assert {"build", *report.STEPS} == {*gpu_check.STEPS}
    planned = gpu_check.plan([*gpu_check.STEPS], 100)
    assert math.isclose(sum(planned.values()), 100) and planned["keras"] == 2 * planned["check"]
    _, _, record = on_the_stand_in(
        "HostCore", "--steps", "sanitizer,tensorflow", "--time-limit", "50"
    )
    plan = [
        "planned:",
        "  sanitizer       30 s",
        "  tensorflow      20 s",
        "  together        50 s",
    ]
    assert "\n".join(plan) in capfd.readouterr().out
    found = {
        name: (step["planned"], step["seconds"] < 30) for name, step in record["steps"].items()
    }
    assert found == {"sanitizer": (30, True), "tensorflow": (20, True)}


def test_a_second_start_continues_a_record(on_the_stand_in, gpu_check, monkeypatch, capfd):
    run_step = gpu_check.run_step

    def interrupted(name, target, arguments, seconds, record, start):
        run_step(name, target, arguments, seconds, record, start)
        if name == "measure":  # as if it had been killed before its last results
            record.data["steps"][name] = {"status": "unfinished", "planned": 1}
            del record.data["results"][-2:]
            record.write()
            raise KeyboardInterrupt

    steps = ("--steps", "check,measure,contenders")
    monkeypatch.setattr(gpu_check, "run_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        on_the_stand_in("HostCore", *steps)
    monkeypatch.setattr(gpu_check, "run_step", run_step)
    monkeypatch.setattr(gpu_check, "render", lambda path: None)  # It takes seconds.
    capfd.readouterr()
    status, path, record = on_the_stand_in("HostCore", *steps)
    assert status == 0 and len(record["starts"]) == 2
    printed = capfd.readouterr().out
    assert f"continues {path.name}" in printed and "check         passed before" in printed
    assert [step["status"] for step in record["steps"].values()] == ["passed"] * 3
    measured = ["yardsticks", "kernels", "kernels", "yardsticks_again"]
    kinds = [result["kind"] for result in record["results"]]
    assert kinds == ["checks", *measured, *["contender"] * 4]  # None is there twice.

    # A step that fails is run again; one that has passed is not, even where it would fail now.
    status, _, record = on_the_stand_in("WrongCore", "--steps", "check,front_ends")
    assert status == 1 and record["steps"]["check"]["status"] == "passed"
    assert record["steps"]["front_ends"]["status"] == "failed"
    assert [*record["steps"]] == ["check", "measure", "contenders", "front_ends"]
    status, _, record = on_the_stand_in("HostCore", "--steps", "check,front_ends")
    assert status == 0 and record["steps"]["front_ends"]["status"] == "passed"
    assert len([r for r in record["results"] if r["step"] == "front_ends"]) == 2

    # What was not measured for want of time is measured later.
    status, _, record = on_the_stand_in("HostCore", "--steps", "tensorflow", "--time-limit", "1")
    assert record["steps"]["tensorflow"]["reason"] == "no time left"
    status, _, record = on_the_stand_in("HostCore", "--steps", "tensorflow")
    assert record["steps"]["tensorflow"]["reason"] == "tensorflow is not here"


def test_a_start_with_other_sources_begins_a_new_record(on_the_stand_in, gpu_check, monkeypatch):
    monkeypatch.setattr(gpu_check, "render", lambda path: None)
    steps = ("--steps", "keras")
    _, first, _ = on_the_stand_in("HostCore", *steps)
    for words, others in (
        (("--quick",), {}),  # measures less
        ((), {"commit": "def"}),
        ((), {"changes": " M csrc/core/voxel.h"}),
        (("--anew",), {}),
    ):
        _, _, record = on_the_stand_in("HostCore", *steps, *words, **others)
        assert len(record["starts"]) == 1
    # A record may be named, which says that changes of the sources do not matter.
    words = ("--continue", str(first))
    _, _, record = on_the_stand_in("HostCore", *steps, *words, changes=" M README.md")
    assert len(record["starts"]) == 2
    with pytest.raises(SystemExit, match="is a record with commit abc, and not def"):
        on_the_stand_in("HostCore", *steps, *words, commit="def")


def test_gpu_check_fails_if_a_result_is_wrong(on_the_stand_in, capfd):
    steps = "sanitizer,measure"
    status, _, record = on_the_stand_in("WrongCore", "--steps", steps)
    assert status == 1
    assert {name: step["status"] for name, step in record["steps"].items()} == dict.fromkeys(
        steps.split(","), "failed"
    )
    assert "  FAILED V=" in capfd.readouterr().out
    assert all(result["wrong"] for result in record["results"] if result["kind"] == "kernels")


def test_gpu_check_says_what_was_not_there(on_the_stand_in, capfd):
    steps = ("front_ends", "keras", "tensorflow")
    status, path, record = on_the_stand_in("HostCore", "--steps", ",".join(steps))
    printed = capfd.readouterr().out
    assert status == 0, printed
    found = {name: (step["status"], step["reason"]) for name, step in record["steps"].items()}
    absent = "tensorflow is not here; jax is not here"
    without = "Keras on torch, with compilation: no compiler"
    for name, (_, reason) in found.items():
        assert all(
            f"- {name}: {r}" in path.with_suffix(".md").read_text() for r in reason.split("; ")
        )
    assert found == {
        "front_ends": ("passed", "jax is not here"),
        "keras": ("passed", f"{absent}; {without}"),
        "tensorflow": ("skipped", "tensorflow is not here"),
    }
    of_torch = next(r for r in record["results"] if r.get("framework") == "torch")
    assert of_torch["count"] == 2 * 3 * len(EACH)
    assert of_torch["left_out"] == ["another way: not here"]
    assert f"{absent}; {without}" in printed and f"{absent}; {without}" in path.read_text()
    assert f"  torch: {of_torch['count']} checks, 0 failed" in printed


def test_gpu_check_fails_if_a_framework_computes_something_wrong(on_the_stand_in, capfd):
    status, _, record = on_the_stand_in("WrongCore", "--steps", "front_ends,keras")
    assert status == 1
    assert [step["status"] for step in record["steps"].values()] == ["failed", "failed"]
    printed = capfd.readouterr().out
    assert "  FAILED Dice, (2, 3): gradient, float16: error 1.00e-01" in printed
    assert "the loss went from 1.0000 to 0.9000" in printed


def test_a_record_of_a_gpu_becomes_a_table_and_a_plot(tmp_path):
    """The ratios are to the first contender of ours, and what is wrong or missing says why."""

    def timed(seconds):
        return {"seconds": seconds, "p10_p90": [seconds / 2, 2 * seconds], "of_copy": 0.9}

    def contender(title, case, ours=False, **measured):
        facts = Contender(title, None, ours=ours).facts()
        result = {"error": 0.0, "gradient_error": 0.0, "wrong": False, "extra_bytes": 1 << 20}
        result |= {"logits_bytes": case.logits_bytes} | measured
        return {"kind": "contender", **facts, **case.facts(), **result}

    case = cube(64, 4)
    part = {**timed(2e-5), "graph": {**timed(1e-5), "of_read": 0.8}, "host_us": 5.0}
    results = [
        {"kind": "yardsticks", **{name: timed(1) | v for name, v in YARDSTICKS.items()}},
        {**kernels.facts(case), **dict.fromkeys(kernels.PARTS, part), "wrong": False,
         "bytes": kernels.bytes_of(case)},
        {**kernels.facts(cube(512, 104)), "skipped": "the GPU has too little memory"},
        contender("slow", case, **timed(6e-5)),
        contender("ours", case, True, **timed(3e-5), graph=timed(2e-5)),
        contender("other", case, wrong=True, error=0.5),
        {"kind": "left_out", "step": "contenders", "what": ["256³ × 4"]},
    ]  # fmt: skip
    step_of = {"contender": "contenders", "left_out": "contenders"}
    record = {
        "date": "2026-11-29T00:00:00", "gpu": GPU, "compiler": "nvcc 13.0", "commit": "abc",
        "dirty": False, "rehearsal": False, "packages": {"numpy": "2"},
        "starts": [{"arguments": ["--quick"], "time_limit": 540}],
        "steps": {"measure": {"status": "passed", "planned": 2, "seconds": 1}},
        "results": [{"step": step_of.get(r["kind"], "measure"), **r} for r in results],
    }  # fmt: skip
    path = tmp_path / "record.json"
    path.write_text(json.dumps(record))
    written = report.render(path)
    text = written[0].read_text()
    lines = text.splitlines()
    rows = [line for line in lines if line.startswith("| 64³ × 4 |")]
    kernel = "20.0 | 10.0 | 80 % | 20.0 | 10.0 | 90 % | 20.0 | 10.0 | 90 % | 5.0 – 20.0 | 5 |"
    assert rows == [
        f"| 64³ × 4 | {kernel}",
        "| 64³ × 4 | ours | 30.0 | 20.0 | 1.00 | 0.25 |  |",
        "| 64³ × 4 | slow | 60.0 | – | 3.00 | 0.25 |  |",
        "| 64³ × 4 | other | – | – | – | 0.25 | differs: loss 0.5, gradient 0.0 |",
    ]
    assert "- contenders: 1 of its parts, for want of time" in lines
    assert "- measure: 512³ × 104, the GPU has too little memory" in lines
    if importlib.util.find_spec("matplotlib"):
        assert written[1].read_bytes().startswith(b"\x89PNG")


# --- calculated and measured ----------------------------------------------------------------------


def measured_kernel(case, sums, gradient):
    """What the record says of a kernel that reached these fractions of the memory's rate."""
    forward = {"seconds": 1, "graph": {"seconds": 1, "of_read": sums}, "of_read": sums / 2}
    backward = {"seconds": 1, "graph": {"failed": "no"}, "of_copy": gradient}
    parts = {"forward": forward, "backward": backward, "pair": {}}
    return {**kernels.facts(case), "bytes": kernels.bytes_of(case), **parts}


CALCULATED = {
    ("float32", 4, "sums"): 0.98, ("float32", 4, "gradient"): 1.0,
    ("bfloat16", 14, "sums"): 0.5, ("bfloat16", 14, "gradient"): 0.5,
    ("float16", 2, "sums"): 1.0,
}  # fmt: skip


def test_kernels_that_differ_from_what_was_calculated_are_named():
    results = [
        measured_kernel(cube(256, 4), 0.98 * 1.149, 0.851),
        measured_kernel(cube(64, 4), 0.1, 0.1),  # too small to reach its rate
        measured_kernel(cube(256, 4, cross_entropy=True), 0.1, 0.1),
        measured_kernel(cube(128, 14, dtype="bfloat16"), 0.5 * 1.16, 0.5 * 0.84),
        {**kernels.facts(cube(512, 14, dtype="bfloat16")), "skipped": "too large"},
    ]
    rows = comparison.compare(results, CALCULATED)
    found = {(r["dtype"], r["classes"], r["part"]): (r["volume"], r["differs"]) for r in rows}
    assert found == {
        ("float32", 4, "sums"): ("256³ × 4", False),
        ("float32", 4, "gradient"): ("256³ × 4", False),
        ("bfloat16", 14, "sums"): ("128³ × 14 bfloat16", True),
        ("bfloat16", 14, "gradient"): ("128³ × 14 bfloat16", True),
        ("float16", 2, "sums"): (None, False),
    }
    assert [*comparison.markdown_rows(rows)][2:] == [
        ("bfloat16, 14 classes, sums", "128³ × 14 bfloat16", "50 %", "58 %", "1.16", "**differs**"),
        ("bfloat16, 14 classes, gradient", "128³ × 14 bfloat16", "50 %", "42 %", "0.84")
        + ("**differs**",),
        ("float16, 2 classes, sums", "–", "100 %", "–", "–", "not measured"),
    ]


def test_what_was_calculated_is_found_by_the_name_of_the_gpu(tmp_path):
    path = tmp_path / "calculated.json"
    assert comparison.calculated_for("NVIDIA H200", path) == "there is no calculated.json"
    row = {"sums": 0.5, "sums with cross-entropy": 0.25}
    gpus = {name: {"float32": {"4": row}} for name in ("H20", "H200")}
    memory = {"H20": 4e12, "H200": 4.8e12, "H200 NVL": 4.8e12}
    gpus["H200 NVL"] = {"float32": {}}
    path.write_text(json.dumps({"memory": memory, "gpus": gpus}))
    assert comparison.calculated_for("NVIDIA H200", path) == {("float32", 4, "sums"): 2.4e12}
    assert comparison.calculated_for("NVIDIA H20", path) == {("float32", 4, "sums"): 2e12}
    assert comparison.calculated_for("NVIDIA H200 NVL", path) == {}
    why = "calculated.json has nothing for the GPU NVIDIA A100, only for H20, H200, H200 NVL"
    assert comparison.calculated_for("NVIDIA A100", path) == why


def test_what_was_calculated_is_compared_with_what_reading_and_copying_reach():
    calculated = {("float32", 4, "sums"): 4.8e12, ("bfloat16", 3, "gradient"): 2e12}
    yardsticks = {"read": {"bytes_per_second": 4.4e12}, "copy": {"bytes_per_second": 4e12}}
    assert comparison.of_yardsticks(calculated, yardsticks) == {
        ("float32", 4, "sums"): 1,
        ("bfloat16", 3, "gradient"): 0.5,
    }


def test_a_record_holds_the_comparison(on_the_stand_in, tmp_path, monkeypatch, capfd):
    _, written, record = on_the_stand_in("HostCore", "--steps", "measure")
    assert "calculated" in record
    path = tmp_path / "calculated.txt"
    monkeypatch.setattr(comparison, "FILE", path)
    report.render(written)
    why = "there is no calculated.txt"
    assert json.loads(written.read_text())["calculated"] == {"skipped": why}
    assert f"Nothing is compared: {why}." in written.with_suffix(".md").read_text()
    gpus = {"H200": {"float32": {"4": {"sums": 1e-9}}}}
    path.write_text(json.dumps({"memory": {"H200": 4.8e12}, "gpus": gpus}))
    report.render(written)
    (row,) = json.loads(written.read_text())["calculated"]["kernels"]
    assert row["volume"] == "8³ × 4" and row["differs"] and row["measured"] > 0
    text = written.with_suffix(".md").read_text()
    assert "1 of 1 differ by more than 15 %" in text and "| **differs** |" in text


# --- the rehearsal --------------------------------------------------------------------------------


def test_a_rehearsal_is_no_result_of_a_benchmark(gpu_check, monkeypatch, capsys):
    out = BENCHMARKS / "results" / "folder"
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--rehearse", "--out", str(out)])
    with pytest.raises(SystemExit):
        gpu_check.parse_arguments()
    assert "a rehearsal measures nothing" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--rehearse"])
    assert gpu_check.parse_arguments().out == ROOT / "build"


@pytest.mark.full
def test_the_whole_check_is_rehearsed(tmp_path):
    """Every step runs its own code, with the CUDA kernels on the emulator."""
    for name in ("torch", "jax", "keras"):
        pytest.importorskip(name)
    command = [sys.executable, BUILD_TOOLS / "gpu_check.py", "--rehearse", "--out", tmp_path]
    with alone_in(BUILD / "rehearsal"):
        done = run(*command, "--time-limit", "900")
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-3000:]
    (path,) = tmp_path.glob("*-rehearsal-without-a-gpu-*.json")
    record = json.loads(path.read_text())
    assert record["rehearsal"] is True
    status = {name: step["status"] for name, step in record["steps"].items()}
    assert status == dict.fromkeys(("build", *report.STEPS), "passed")
    of_kind = {}
    for result in record["results"]:
        of_kind.setdefault(result["kind"], []).append(result)
    (checked,), (few,) = of_kind["checks"], of_kind["few_checks"]
    assert checked["count"] > 500 and few["count"] > 100 and not checked["left_out"]
    assert checked["build_info"]["cuda_archs"] == ["emulator"]
    assert {r["case"]["classes"] for r in of_kind["kernels"]} == {2, 4, 14, 104}
    for result in of_kind["kernels"]:
        assert not result["wrong"] and all(result[p]["seconds"] > 0 for p in kernels.PARTS)
    titles = {r["contender"] for r in of_kind["contender"] if "seconds" in r}
    assert titles >= {t for t, c in contenders.CONTENDERS.items() if not c.needs}
    assert {r["framework"] for r in of_kind["front_ends"] if r["count"] > 100} == {"torch", "jax"}
    trained = {(r["backend"], r["compiled"]) for r in of_kind["keras"] if "losses" in r}
    assert trained == {*itertools.product(("tensorflow", "jax", "torch"), (False, True))}
    lines = path.with_suffix(".md").read_text().splitlines()
    assert "a rehearsal on a stand-in for a GPU, whose times mean nothing" in lines[0]
    assert lines.count("This is a rehearsal: these times mean nothing.") == 2
