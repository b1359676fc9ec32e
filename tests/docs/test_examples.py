"""The examples run in small and write what they promise, and their notebooks are theirs."""

import base64
import json
import re
import sys

import nibabel as nib
import numpy as np
import pytest

from helpers.paths import DOCS, EXAMPLES, PACKAGE
from helpers.processes import output_of

NOTEBOOKS = ("nifti_pipeline", "small_structures")


def quick(name, folder, *options):
    """Runs an example with a few steps. Returns what it printed, and its summary."""
    example = [sys.executable, EXAMPLES / f"{name}.py", "--quick", "--output", folder, *options]
    printed = output_of(*example, PYTHONPATH=str(PACKAGE.parent), MPLBACKEND="agg")
    return printed, json.loads((folder / "summary.json").read_text())


def in_range(dice):
    """Whether these are scores. A class that is in neither map has none, but one at least has."""
    values = [value for value in dice if value is not None]
    return values and all(0 <= value <= 1 for value in values)


def pictures(folder):
    return {path.name for path in folder.glob("*.png") if path.read_bytes()[:4] == b"\x89PNG"}


def test_the_pipeline_runs_with_files_of_its_own(tmp_path):
    printed, summary = quick("nifti_pipeline", tmp_path, "--accumulate", "2")
    assert "held-out Dice" in printed and "grey matter" in printed
    assert pictures(tmp_path) == {"curve.png", "slices.png"}
    assert (tmp_path / "model.keras").exists()
    assert len(summary["training"]) == 2 and len(summary["held_out"]) == 1
    assert len(summary["history"]["val_full_dice"]) == 2
    (name,) = summary["held_out"]
    for kind in ("untrained_dice", "held_out_dice"):
        assert set(summary[kind][name]) == {"grey matter", "white matter"}
        assert in_range(summary[kind][name].values())
    truth, prediction = (
        nib.load(path)
        for path in (
            tmp_path / "cases" / f"{name}_seg.nii.gz",
            tmp_path / "predictions" / f"{name}.nii.gz",
        )
    )
    np.testing.assert_array_equal(prediction.affine, truth.affine)
    maps = [np.asarray(image.dataobj) for image in (prediction, truth)]
    assert maps[0].shape == maps[1].shape and maps[0].dtype == np.uint8
    for label, dice in enumerate(summary["held_out_dice"][name].values(), 1):
        ours, theirs = (labels == label for labels in maps)
        assert abs(dice - 2 * (ours & theirs).sum() / (ours.sum() + theirs.sum())) < 1e-9


@pytest.mark.full
def test_the_pipeline_takes_folders_of_nnunet_with_channels_and_another_spacing(tmp_path):
    """Volumes are smaller than a patch along one axis, and predictions have the files' grid."""
    rng = np.random.default_rng(0)
    for folder in ("imagesTr", "labelsTr", "out"):
        (tmp_path / folder).mkdir()
    affine = np.diag([1.5, 2.0, 4.0, 1.0])
    for number in range(3):
        labels = np.zeros((30, 26, 6), np.uint8)
        labels[8:20, 8:18, 2:5] = 1
        for channel in range(2):
            image = nib.Nifti1Image(np.float32(100 + labels + rng.random(labels.shape)), affine)
            nib.save(image, tmp_path / "imagesTr" / f"liver_{number:04}_{channel:04}.nii.gz")
        nib.save(nib.Nifti1Image(labels, affine), tmp_path / f"labelsTr/liver_{number:04}.nii.gz")
    printed, summary = quick(
        "nifti_pipeline", tmp_path / "out", "--images", tmp_path / "imagesTr/*.nii.gz",
        "--labels", tmp_path / "labelsTr/*.nii.gz", "--spacing", "2", "2", "2",
    )  # fmt: skip
    assert "2 channel(s), 2 classes: background, class 1" in printed
    (name,) = summary["held_out"]
    prediction = nib.load(tmp_path / "out" / "predictions" / f"{name}.nii.gz")
    assert prediction.shape == (30, 26, 6)
    np.testing.assert_allclose(prediction.affine, affine)


@pytest.mark.full
def test_the_pipeline_cuts_ct_to_a_window_and_normalises_all_cases_alike(tmp_path):
    rng = np.random.default_rng(0)
    for number in range(3):
        labels = np.zeros((28, 28, 28), np.uint8)
        labels[8:16, 8:16, 8:16] = 1
        image = np.full(labels.shape, -1000.0, np.float32)
        image[4:24, 4:24, 4:24] = 0
        image[20, 20, 20] = 3000  # metal
        image[labels == 1] = 50 + 20 * number + rng.normal(0, 10, 512)
        for kind, volume in (("img", image), ("seg", labels)):
            nib.save(nib.Nifti1Image(volume, np.eye(4)), tmp_path / f"case_{number}_{kind}.nii.gz")
    _, summary = quick(
        "nifti_pipeline", tmp_path / "out", "--images", tmp_path / "*_img.nii.gz", "--labels",
        tmp_path / "*_seg.nii.gz", "--window", "-160", "240", "--foreground", "0.5",
    )  # fmt: skip
    images, labels = (
        {
            name: np.load(tmp_path / "out" / "prepared" / f"{name}_{what}.npy")
            for name in (*summary["training"], *summary["held_out"])
        }
        for what in ("image", "labels")
    )
    assert {image.shape for image in images.values()} == {(20, 20, 20, 1)}
    foreground = np.concatenate([images[name][labels[name] == 1] for name in summary["training"]])
    assert abs(foreground.mean()) < 1e-3 and abs(foreground.std() - 1) < 1e-3
    water, metal = ({float(i[n, n, n, 0]) for i in images.values()} for n in (0, 16))
    assert len(water) == len(metal) == 1  # The same HU are the same number in each case.
    assert 10 < 240 / (metal.pop() - water.pop()) < 30
    (name,) = summary["held_out"]
    assert nib.load(tmp_path / "out" / "predictions" / f"{name}.nii.gz").shape == (28, 28, 28)


def test_the_comparison_of_losses_runs_with_files_of_its_own(tmp_path):
    printed, summary = quick("small_structures", tmp_path)
    assert "held-out Dice" in printed and "amygdala" in printed
    assert pictures(tmp_path) == {"losses.png", "slices.png"}
    assert set(summary["held_out_dice"]) == {"cross-entropy", "Dice + CE"}
    for dice in summary["held_out_dice"].values():
        assert list(dice) == summary["classes"][1:] and in_range(dice.values())
    voxels = summary["voxels"][1:]
    assert voxels == sorted(voxels, reverse=True) and 10 < voxels[-1] < 30


def cells_of_script(name):
    """(kind, source) of each cell."""
    text = (EXAMPLES / f"{name}.py").read_text()
    for mark, source in re.findall(r"^# %%( \[markdown\])?\n(.*?)(?=^# %%|\Z)", text, re.M | re.S):
        if mark:
            yield "markdown", re.sub(r"^# ?", "", source, flags=re.M).strip()
        else:
            yield "code", source.strip()


def cells_of_notebook(name):
    return json.loads((DOCS / "examples" / f"{name}.ipynb").read_text())["cells"]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_has_the_cells_of_its_example(name):
    """After a change of the example, `make notebooks` brings them together again."""
    cells = [(cell["cell_type"], "".join(cell["source"])) for cell in cells_of_notebook(name)]
    assert cells == list(cells_of_script(name))


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_was_executed_and_names_no_path(name):
    cells = [cell for cell in cells_of_notebook(name) if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert not any(o["output_type"] == "error" or o.get("name") == "stderr" for o in outputs)
    images = [base64.b64decode(o["data"]["image/png"]) for o in outputs if "data" in o]
    assert len(images) == 2 and all(len(image) < 150_000 for image in images)
    printed = "".join("".join(o["text"]) for o in outputs if o["output_type"] == "stream")
    assert "held-out Dice" in printed
    text = (DOCS / "examples" / f"{name}.ipynb").read_text()
    assert not re.search(r"/(home|root|tmp|usr|Users)/", text) and len(text) < 700_000
    assert "McConnell Brain Imaging Centre" in text
