"""Every CUDA kernel reaches voxels, elements and bytes beyond 2^32.

The kernels run on the emulator, over address space of which only the chosen places are memory
(kernels/cuda_emulator/run_extents.cc says how).
"""

import shutil

import pytest

from helpers import emulation
from helpers.paths import CSRC


def of_voxels(kernels):
    return {name for name in kernels if "SumsKernel" in name or "GradKernel" in name}


def test_a_kernel_of_each_sort_reaches_more_than_2_to_32_voxels():
    runs, wrong = emulation.run_extents(emulation.build_extents(few=True), "brief")
    assert wrong == []
    assert len(runs) >= 30 and all("Kernel" in name for name in runs)


@pytest.mark.full
def test_every_kernel_reaches_more_than_2_to_32_voxels(seen):
    runs, wrong = emulation.run_extents(emulation.build_extents())
    assert wrong == []
    assert of_voxels(runs) == of_voxels(launch.kernel for launch in emulation.plans())
    seen("scale", "CUDA kernels run beyond 2^32 voxels, emulated", len(runs))
    seen("scale", "launches beyond 2^32 voxels, emulated", sum(runs.values()))


# The file, what stands there, and what takes its place: a number that has too few bits.
BUGS = {
    "direct: a unit": (
        "direct.h",
        "Units<kStore>(tile * static_cast<int64_t>(kTile / kVoxels) + Lane(), voxel);",
        "Units<kStore>(tile * (kTile / kVoxels) + Lane(), voxel);",
    ),
    "direct: the last voxels": (
        "direct.h",
        "          One<kStore>(v, voxel);",
        "          One<kStore>(static_cast<uint32_t>(v), voxel);",
    ),
    "direct: a sample": (
        "direct.h",
        "voxel_offset_(sample * call.voxels),",
        "voxel_offset_(static_cast<uint32_t>(sample * call.voxels)),",
    ),
    "rows: the step in bytes": (
        "rows.h",
        "const int64_t bytes = sign * step * (kTileWords * 16), voxels",
        "const int bytes = sign * step * (kTileWords * 16); const int64_t voxels",
    ),
    "rows: the first tile's labels": (
        "rows.h",
        "int64_t labels_at = voxel_offset_ + begin * kTile + Lane() * kVoxels;",
        "uint32_t labels_at = voxel_offset_ + begin * kTile + Lane() * kVoxels;",
    ),
    "rows: a tile's weights": ("rows.h", "tile * int64_t{kTile}", "tile * kTile"),
    "rows: the last voxels": (
        "rows.h",
        "            Last<kStore>(v, voxel);",
        "            Last<kStore>(static_cast<uint32_t>(v), voxel);",
    ),
    "staged: the step in bytes": (
        "staged.h",
        "const int64_t bytes = stride * tile_bytes_;",
        "const int bytes = stride * tile_bytes_;",
    ),
    "staged: the labels": (
        "staged.h",
        "int64_t labels_at = voxel_offset_ + begin * kTile + Lane();",
        "int labels_at = voxel_offset_ + begin * kTile + Lane();",
    ),
    "general: a tile": (
        "general.h",
        "const int64_t begin = tile * static_cast<int64_t>(kTile);",
        "const int64_t begin = tile * kTile;",
    ),
    "general: the distance of planes": (
        "general.h",
        "const int64_t step = call_.planar ?",
        "const int step = call_.planar ?",
    ),
    "general: an element": (
        "general.h",
        "int64_t at = call_.planar ? first_class_",
        "uint32_t at = call_.planar ? first_class_",
    ),
    "labels: one of two bytes": (
        "voxel_access.h",
        "DICE_OP_DEVICE uint32_t ReadLabel(const Call& call, int64_t at) {",
        "DICE_OP_DEVICE uint32_t ReadLabel(const Call& call, uint32_t at) {",
    ),
    "combined: a block's row": (
        "dice_op_cuda.cu",
        "partials.values + sample * partials.blocks_per_sample * length;",
        "partials.values + static_cast<int>(sample) * partials.blocks_per_sample * length;",
    ),
    "searched: a voxel": (
        "dice_op_cuda.cu",
        "static_cast<unsigned long long>(2 * at + (good_label ? 1 : 0))",
        "static_cast<unsigned>(2 * at + (good_label ? 1 : 0))",
    ),
}


@pytest.mark.long
@pytest.mark.parametrize("bug", BUGS)
def test_a_number_of_too_few_bits_is_noticed(bug, tmp_path, seen):
    file, old, new = BUGS[bug]
    csrc = tmp_path / "csrc"
    shutil.copytree(CSRC, csrc)
    emulation.plant(csrc / "cuda" / file, old, new)
    program = emulation.build_extents(few=True, csrc=csrc, folder=tmp_path)
    _, wrong = emulation.run_extents(program, "brief")
    assert wrong != [], "nobody noticed"
    seen("planted bugs", f"too few bits in {bug}", True)
