"""Importing: without TensorFlow, a second time, beside another copy, beside Keras 2."""

import re
import shutil

import pytest

from helpers.installed import needs
from helpers.paths import PACKAGE


def test_importing_the_package_imports_no_tensorflow(run_python):
    loaded = run_python(
        """
        import sys
        import numpy as np
        import dice_op
        dice_op.core.sums(np.zeros((1, 5, 3), np.float32), np.zeros((1, 5), np.uint8))
        dice_op.core.build_info()
        print("tensorflow" in sys.modules, "keras" in sys.modules)
        """
    )
    assert loaded.split() == ["False", "False"]


@pytest.mark.parametrize("built", ["2.18.0", "3.0.1", ""])
def test_another_tensorflow_is_named(built, run_python):
    """The error names both versions and a command that helps. The build is made to look like
    another."""
    out = run_python(
        f"""
        from dice_op import core
        info = {{**core.build_info(), "tensorflow": {built or None!r}}}
        core.build_info = lambda: info
        import tensorflow as tf
        try:
            import dice_op.losses
        except ImportError as error:
            print(tf.__version__, error)
        """
    )
    running, _, message = out.partition(" ")
    if not built:
        assert "has no TensorFlow op" in message and "pip install" in message
        return
    assert f"built with {built}" in message and f"TensorFlow {running} is running" in message
    assert re.search(rf'pip install "tensorflow(-cpu)?=={built.rpartition(".")[0]}\.\*"', message)
    assert f"DICE_OP_TENSORFLOW={running.rpartition('.')[0]} pip install" in message


def test_a_source_folder_that_is_not_built_says_so(tmp_path, run_python):
    folder = tmp_path / "dice_op"
    folder.mkdir()
    (folder / "__init__.py").write_text((PACKAGE / "__init__.py").read_text())
    out = run_python(
        """
        import sys
        sys.path.insert(0, sys.argv[1])
        try:
            import dice_op
        except ImportError as error:
            print(error)
        """,
        tmp_path,
    )
    assert str(folder) in out and "run `make build`" in out


def test_a_second_import_changes_nothing(run_python):
    """The second import happens in all ways in which people come by one, one after the other."""
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


def test_a_package_of_links_can_be_imported_twice(tmp_path, run_python):
    """Some installers make such a package: a folder whose files are links to another place."""
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
@needs("tf_keras")
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
