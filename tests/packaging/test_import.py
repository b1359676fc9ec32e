"""Importing: a second time, beside another copy, beside Keras 2; and what `info` says of a machine
on which something is broken."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys

import pytest

from helpers.paths import PACKAGE


def test_a_second_import_changes_nothing(run_python):
    """In all ways that people come by one, one after the other."""
    run_python(
        """
        import sys, importlib
        import numpy as np
        import tensorflow as tf

        def train():
            import dice_op
            x = tf.constant(np.random.default_rng(0).normal(size=(2, 6, 5, 3)))
            y = np.zeros((2, 6, 5), np.uint8)
            with tf.GradientTape() as outer:
                outer.watch(x)
                with tf.GradientTape() as inner:
                    inner.watch(x)
                    loss = dice_op.losses.DiceCELoss()(y, x)
                gradient = inner.gradient(loss, x)
                square = tf.reduce_sum(gradient**2)
            second = outer.gradient(square, x)
            score = dice_op.metrics.DiceScore()
            score.update_state(y, x)
            return float(loss), float(square), float(tf.norm(second)), float(score.result())

        def modules():
            return [name for name in sys.modules if name.partition(".")[0] == "dice_op"]

        def reload_each():
            for name in modules():
                importlib.reload(sys.modules[name])

        def forget(names):
            for name in names:
                del sys.modules[name]

        def import_twice():
            forget(modules())
            import dice_op.losses
            forget(modules())

        first = train()
        for again in (
            reload_each,
            lambda: forget(modules()),
            import_twice,
            lambda: forget([name for name in modules() if name not in ("dice_op", "dice_op.core")]),
            lambda: forget([name for name in modules() if name.endswith("ops")]),
            reload_each,
        ):
            again()
            assert train() == first, (train(), first)
        """
    )


def test_a_package_of_links_is_imported_twice(tmp_path, run_python):
    """As some installers make it: a folder whose files are links to another place."""
    (tmp_path / "dice_op").mkdir()
    for file in PACKAGE.iterdir():
        if file.is_file():
            (tmp_path / "dice_op" / file.name).symlink_to(file.resolve())
    run_python(
        """
        import importlib, sys
        sys.path.insert(0, sys.argv[1])
        import dice_op
        assert dice_op.__path__[0].startswith(sys.argv[1])
        importlib.reload(dice_op)
        """,
        tmp_path,
    )


def test_another_copy_is_refused_in_words(tmp_path, run_python):
    copy = tmp_path / "dice_op"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    out = run_python(
        """
        import sys
        import dice_op
        for name in [n for n in sys.modules if n.partition(".")[0] == "dice_op"]:
            del sys.modules[name]
        sys.path.insert(0, sys.argv[1])
        try:
            import dice_op
        except ImportError as error:
            print(error)
        """,
        tmp_path,
    )
    assert f"already, from {PACKAGE.resolve()}, and cannot be loaded a second time, from" in out
    assert str(copy) in out and "start a new process" in out


# --- Keras 2 --------------------------------------------------------------------------------------


def test_the_setting_for_keras_2_is_refused_at_import(run_python):
    run_python(
        """
        import importlib, os
        import dice_op

        for value in ("1", "True", "true"):
            os.environ["TF_USE_LEGACY_KERAS"] = value
            dice_op.dice_sums  # needs no Keras
            for module in ("losses", "metrics"):
                try:
                    importlib.import_module(f"dice_op.{module}")
                except ImportError as error:
                    assert "unset it before importing tensorflow" in str(error), error
                else:
                    raise AssertionError((value, module))
        os.environ["TF_USE_LEGACY_KERAS"] = "0"
        dice_op.losses, dice_op.metrics
        """
    )


@pytest.mark.full
@pytest.mark.skipif(not importlib.util.find_spec("tf_keras"), reason="needs tf_keras")
def test_models_of_keras_2_are_refused_and_others_in_the_same_process_are_not(run_python):
    run_python(
        """
        import numpy as np
        import tf_keras
        import tensorflow as tf
        import keras
        from dice_op import losses, metrics

        x = np.random.default_rng(0).normal(size=(2, 6, 5, 3)).astype("float32")
        y = np.zeros((2, 6, 5), np.uint8)

        def model_of(library, **options):
            layers = [library.Input((6, 5, 3)), library.layers.Conv2D(3, 1)]
            model = library.Sequential(layers)
            model.compile("sgd", **options)
            return model

        for options in (
            {"loss": losses.DiceLoss()},
            {"loss": losses.DiceLoss(), "run_eagerly": True},
            {"loss": losses.DownsampledLabels(losses.DiceCELoss())},
            {"loss": "sparse_categorical_crossentropy", "metrics": [metrics.DiceScore()]},
        ):
            try:
                model_of(tf_keras, **options).fit(x, y, verbose=0)
            except TypeError as error:
                assert "this model is one of tf_keras (Keras 2)" in str(error), error
            else:
                raise AssertionError(options)

        model_of(keras, loss=losses.DiceLoss(), metrics=[metrics.DiceScore()]).fit(x, y, verbose=0)

        class OwnStep(tf_keras.Sequential):  # calls the loss as it is meant to be called
            def train_step(self, data):
                with tf.GradientTape() as tape:
                    loss = losses.DiceLoss()(data[1], self(data[0]))
                tape.gradient(loss, self.trainable_variables)
                return {"loss": loss}

        own = OwnStep([tf_keras.Input((6, 5, 3)), tf_keras.layers.Conv2D(3, 1)])
        own.compile("sgd")
        own.fit(x, y, verbose=0)
        """
    )


# --- python -m dice_op info -----------------------------------------------------------------------


def info(**environment):
    return subprocess.run(
        [sys.executable, "-m", "dice_op", "info"],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"KERAS_BACKEND": "bogus"}, r"losses +not loaded: ValueError: .*bogus"),
        ({"KERAS_BACKEND": "jax"}, r"(losses|keras) +not loaded: "),
        ({"TF_USE_LEGACY_KERAS": "1"}, r"losses +not loaded: ImportError: .*TF_USE_LEGACY_KERAS"),
    ],
)
def test_info_tells_what_does_not_work(environment, says):
    done = info(**environment)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert re.search(says, done.stdout), done.stdout


@pytest.mark.parametrize(
    ("broken", "error"),
    [("tensorflow", "ImportError('no symbol')"), ("keras", "RuntimeError('other numpy')")],
)
def test_info_where_a_package_cannot_be_imported(broken, error, tmp_path):
    (tmp_path / f"{broken}.py").write_text(f"raise {error}")
    done = info(PYTHONPATH=str(tmp_path))
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    reason = error.partition("'")[2][:-2]
    assert re.search(rf"^{broken} +not loaded: .*{reason}", done.stdout, re.MULTILINE)


def test_info_where_the_module_is_missing(tmp_path):
    (tmp_path / "dice_op").mkdir()
    for module in PACKAGE.glob("*.py"):
        shutil.copy(module, tmp_path / "dice_op")
    done = subprocess.run(
        [sys.executable, "-m", "dice_op", "info"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0 and "Traceback" not in done.stderr, done.stderr
    assert "compiled module cannot be loaded" in done.stderr
