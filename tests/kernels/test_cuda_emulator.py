"""The tests of the tests: bugs are planted in correct kernels, and each must be noticed.

A bug is a line of source text that is replaced. If the line is no longer there, the test fails: the
bug must then be planted in what took its place.
"""

import os
import shutil
import subprocess

import pytest

from helpers import emulation
from helpers.cuda_cases import bits, few_cases
from helpers.emulation import plant
from helpers.paths import CSRC

ORDERS = ("forward", "reverse", "random")


# --- the emulator's own kernels: each of its features ---------------------------------------------


def selftest(kind, folder):
    """Builds and runs cuda_emulator/selftest.cc, or what stands in `folder` in its place."""
    if not (folder / "selftest.cc").exists():
        shutil.copy(emulation.EMULATOR / "selftest.cc", folder)
    flags = ["-std=c++17", "-g1", f"-I{emulation.EMULATOR}", "-Wno-unknown-pragmas"]
    engine, program = folder / f"engine_{kind}.o", folder / f"selftest_{kind}"
    for command in (
        [*flags, "-O2", "-c", emulation.EMULATOR / "cuda_emulator.cc", "-o", engine],
        [*flags, *emulation.FLAGS[kind], folder / "selftest.cc", engine, "-o", program],
    ):
        subprocess.run([emulation.CXX, *command], check=True, capture_output=True)
    return [
        subprocess.run(
            [program],
            env={**os.environ, **emulation.SANITIZER_OPTIONS, "CUDA_EMULATOR_ORDER": order},
            capture_output=True,
            text=True,
            errors="replace",
            timeout=100,
        )
        for order in ORDERS
    ]


def test_correct_kernels_pass(tmp_path):
    outputs = set()
    for kind in emulation.FLAGS:
        for result in selftest(kind, tmp_path):
            assert result.returncode == 0, result.stderr[-3000:]
            outputs.add(result.stdout)
    assert len(outputs) == 1 and outputs.pop().startswith("digest ")


SELFTEST_BUGS = {  # the line that stands there, what takes its place, the build that notices it
    "a missing barrier": ("  __syncthreads();  // the tree is filled\n", "", "thread"),
    "a barrier that some threads miss": (
        "  __syncthreads();  // the shares are written",
        "  if (threadIdx.x < 32) __syncthreads();",
        "plain",
    ),
    "a missing warp barrier": (
        "    __syncwarp();  // the copies of all lanes are there\n",
        "",
        "plain",
    ),
    "a copy that nobody waits for": ("WaitGroup(1)", "WaitGroup(2)", "plain"),
    "half a warp in the mask": (
        "__shfl_xor_sync(kFullMask, sum, lanes)",
        "__shfl_xor_sync(0x0000ffffu, sum, lanes)",
        "plain",
    ),
    "a butterfly that ends too early": ("lanes = 16; lanes > 0", "lanes = 16; lanes > 1", "plain"),
    "a write behind shared memory": (
        "  tree[t] = in[first + t];",
        "  tree[t + 1] = in[first + t];",
        "address",
    ),
    "a read behind global memory": (
        "  tree[t] = in[first + t];",
        "  tree[t] = in[first + t + 1];",
        "address",
    ),
    "a copy that is not aligned": (
        "CopyAsync<16>(&ring[lane], &in[tile * 32 + lane])",
        "CopyAsync<16>(&ring[lane], &in[tile * 32 + lane].y)",
        "plain",
    ),
    "a missing fence": (
        "    __threadfence();  // the partial sum before the ticket\n",
        "",
        "thread",
    ),
    "a fence of the block alone": (
        "    __threadfence();  // the partial sum before the ticket\n",
        "    __threadfence_block();\n",
        "thread",
    ),
    "a ticket that is not atomic": ("atomicAdd(ticket, 1)", "(*ticket)++", "thread"),
    "sums by float atomics": (
        "  for (unsigned b = 0; b < gridDim.x; ++b) total[0] += __ldcg(&partial[b]);",
        "}\n__global__ void Sum(const float* in, int n, float* total) {\n"
        "  for (int i = threadIdx.x; i < n; i += kThreads) atomicAdd(total, in[i]);",
        "plain",
    ),
}


def find_in_the_emulators_kernels(bug, folder):
    old, new, kind = SELFTEST_BUGS[bug]
    shutil.copy(emulation.EMULATOR / "selftest.cc", folder)
    plant(folder / "selftest.cc", old, new)
    floats = "float atomics" in bug
    if floats:
        arguments = "floats, n, partial.data, ticket.data, total.data"
        plant(
            folder / "selftest.cc",
            f"Launch(TicketSum, kBlocks, kThreads, 0, nullptr, {arguments})",
            "Launch(Sum, kBlocks, kThreads, 0, nullptr, floats, n / 3, total.data)",
        )
    results = selftest(kind, folder)
    other_bits = len({r.stdout for r in results}) > 1
    return other_bits or not floats and any(r.returncode != 0 for r in results)


# --- the library's kernels ------------------------------------------------------------------------

# the file, the line that stands there, what takes its place, the build that notices it
KERNEL_BUGS = {
    "rows: no wait for the other lanes' copies": (
        "rows.h",
        "      __syncwarp();  // all lanes' copies are there, and no lane is at the stage before\n",
        "",
        "thread",
    ),
    "rows: one copy too many left on its way": (
        "rows.h",
        "WaitForCopies<kStages - 2>();",
        "WaitForCopies<kStages - 1>();",
        "plain",
    ),
    "rows: the next tile over the one in use": (
        "rows.h",
        "stage == 0 ? kStages - 1 : stage - 1);",
        "stage);",
        "plain",
    ),
    "rows: stored before it is computed": (
        "rows.h",
        "        __syncwarp();  // the whole tile is computed\n",
        "",
        "thread",
    ),
    "rows: the last tile taken for a full one": (
        "rows.h",
        "call.last_voxels == kTile ? call.tiles : call.tiles - 1",
        "call.tiles",
        "address",
    ),
    "rows: padding that a round passes over": (
        "rows.h",
        "return words * (kPadded ? 18 : 16);",
        "return words * 16;",
        "plain",
    ),
    "rows: labels in the wrong order": (
        "rows.h",
        "<< 8 * kVoxels * r;",
        "<< 8 * kVoxels * (kRounds - 1 - r);",
        "plain",
    ),
    "staged: no wait for the other lanes' copies": (
        "staged.h",
        "      __syncwarp();  // all lanes' copies are there, and no lane is at the stage before\n",
        "",
        "thread",
    ),
    "staged: one copy too many left on its way": (
        "staged.h",
        "WaitForCopies<0>();",
        "WaitForCopies<1>();",
        "plain",
    ),
    "staged: the next tile over the one in use": (
        "staged.h",
        "Fetch(from, next_count, 1 - stage);",
        "Fetch(from, next_count, stage);",
        "plain",
    ),
    "staged: computed before it is there": (
        "staged.h",
        "      if (t >= first) {",
        "      if (t >= first - step) {",
        "plain",
    ),
    "staged: labels after the last": (
        "staged.h",
        "    if (Lane() >= voxels) return kNoPlace;\n",
        "",
        "address",
    ),
    "staged: stored before it is computed": (
        "staged.h",
        "        __syncwarp();  // the whole tile is computed\n",
        "",
        "thread",
    ),
    "staged: the last tile taken for a full one": (
        "staged.h",
        "const int bytes = voxels == kTile ? tile_bytes_ :",
        "const int bytes = voxels >= 0 ? tile_bytes_ :",
        "address",
    ),
    "staged: old memory where no voxel is": (
        "staged.h",
        "reinterpret_cast<Word*>(memory_)[w] = Word{};",
        "",
        "plain",
    ),
    "staged: a padded row that begins elsewhere": (
        "kernels.h",
        "variant.row_words = row / 16;",
        "variant.row_words = row / 32;",
        "plain",
    ),
    "staged: rows that are not aligned": (
        "kernels.h",
        "variant.row_padding = 16;",
        "variant.row_padding = 8;",
        "plain",
    ),
    "direct: the last tile taken for a full one": (
        "direct.h",
        "if (tile < call_.tiles - 1 || call_.last_voxels == kTile) {",
        "if (tile < call_.tiles) {",
        "address",
    ),
    "direct: words that are not aligned": (
        "kernels.h",
        "(at) % 16 == 0",
        "(at) % 8 == 0",
        "address",
    ),
    "direct: a gradient stored one word further": (
        "direct.h",
        "StoreStreaming(d_logits + first +",
        "StoreStreaming(d_logits + 1 + first +",
        "address",
    ),
    "general: an element of the next row": (
        "kernels.h",
        "variant.row_magic = (1u << 20) / classes + 1;",
        "variant.row_magic = (1u << 20) / classes;",
        "plain",
    ),
    "general: a tile overwritten while others read it": (
        "general.h",
        "      __syncwarp();  // no lane is at the tile before any more\n",
        "",
        "thread",
    ),
    "general: labels of voxels without weight": (
        "general.h",
        "if (m != R(0)) *index",
        "*index",
        "plain",
    ),
    "general: regions of a voxel without label": (
        "general.h",
        "const int set = index < 0                ? 0",
        "const int set = index < -1               ? 0",
        "address",
    ),
    "scores: every class of a tie": (
        "../core/voxel.h",
        "first == Scalar(-k.Class(i))",
        "z[i] == top",
        "plain",
    ),
    "gradient: the error of a sure voxel stays": (
        "../core/voxel.h",
        "weight * (d[i] - error * e[i])",
        "weight * d[i]",
        "plain",
    ),
    "soft labels: the derivative of the product": (
        "../core/voxel.h",
        "if (terms.soft) return linear",
        "if (false) return linear",
        "plain",
    ),
    "label sets: unknown classes count": (
        "../core/voxel.h",
        "if (terms.sets) return Select(label.IsUnknown(i), R(0), x);",
        "if (false) return Select(label.IsUnknown(i), R(0), x);",
        "plain",
    ),
    "label sets: one term for each class": (
        "../core/voxel.h",
        "Select(label.IsLowestUnknown(i), R(1), R(0))",
        "R(1)",
        "plain",
    ),
    "label sets: the derivative of a single class": (
        "../core/voxel.h",
        "set.scale * set.rest, -p)",
        "set.scale, -p)",
        "plain",
    ),
    "label sets: no place for their sums": (
        "kernels.h",
        "? problem.has_label_sets() ||",
        "?",
        "address",
    ),
    "distances: no place for their sums": (
        "kernels.h",
        "|| problem.has_distances()",
        "",
        "address",
    ),
    "distances: those of class 0 for every label": (
        "general.h",
        "max(index, 0) * call_.classes",
        "0",
        "plain",
    ),
    "distances: added to the sum of unknown voxels": (
        "kernels.h",
        "is_distance ? Sum::kDistanceSum : Sum::kUnknownSum",
        "Sum::kUnknownSum",
        "plain",
    ),
    "distances: the derivative of class 0 for every label": (
        "../core/voxel.h",
        "R(w[k.Class(i)])",
        "R(w[0])",
        "plain",
    ),
    "label sets: class 0 is the lowest of all": (
        "general.h",
        "while (c < call_.sets.classes && !call_.sets.Holds(set, c)) ++c;",
        "",
        "plain",
    ),
    "exponents: that of class 0 for all": (
        "../core/voxel.h",
        "terms.gammas[k.Class(i)]",
        "terms.gammas[0]",
        "plain",
    ),
    "binary cross-entropy: one derivative for both halves": (
        "kernels.h",
        "there && d_negative ? d_negative[c]",
        "there && d_negative ? d_cross_entropy[c]",
        "plain",
    ),
    "smoothing: none for the absent classes": (
        "../core/voxel.h",
        "R(terms.keep) * t + R(terms.spread);",
        "R(terms.keep) * t;",
        "plain",
    ),
    "sums: the wrong lanes in the mask": (
        "device.h",
        "__shfl_xor_sync(0xffffffffu",
        "__shfl_xor_sync(0x7fffffffu",
        "plain",
    ),
    "sums: a butterfly one step short": (
        "device.h",
        "if constexpr (kDistance >= kLanes) {",
        "if constexpr (kDistance > kLanes) {",
        "plain",
    ),
    "sums: several lanes hold the same": (
        "device.h",
        "return Lane() / kLanes % kSharers == 0;",
        "return true;",
        "plain",
    ),
    "sums: the last voxels never added": (
        "kernels.h",
        "if (added >= kFlush || last) Flush();",
        "if (added >= kFlush) Flush();",
        "plain",
    ),
    "sums: bins of too few classes": (
        "kernels.h",
        "problem.options.cross_entropy ? 3",
        "problem.options.cross_entropy ? 2",
        "address",
    ),
    "staged: the next class": (
        "staged.h",
        "return label | Classes::Item(label) << 8",
        "return label | Classes::Item(label + 1) << 8",
        "plain",
    ),
    "sums: no barrier before the block's sums": ("kernels.h", "  __syncthreads();\n", "", "thread"),
    "sums: a barrier for one warp": (
        "kernels.h",
        "  __syncthreads();\n",
        "  if (warp == 0) __syncthreads();\n",
        "plain",
    ),
    "sums: a block's row written to another's": (
        "kernels.h",
        "* call.blocks_per_sample + blockIdx.y) * length;",
        "* call.blocks_per_sample + blockIdx.y + 1) * length;",
        "address",
    ),
}


def find_in_the_librarys_kernels(bug, folder):
    file, old, new, kind = KERNEL_BUGS[bug]
    csrc = folder / "csrc"
    shutil.copytree(CSRC, csrc)
    plant(csrc / "cuda" / file, old, new)
    program = emulation.rebuild(kind, csrc, folder)
    cases = few_cases(small=True)
    first = None
    for order in ORDERS:
        try:
            results = emulation.run(program, cases.calls, folder, order, CUDA_EMULATOR_SMS="1")
            cases.check(results)
        except (emulation.Failed, AssertionError):
            return True
        first = first or bits(results)
        if bits(results) != first:
            return True
    return False


# --- each of them ---------------------------------------------------------------------------------

BUGS = {
    **{f"emulator: {bug}": (find_in_the_emulators_kernels, bug) for bug in SELFTEST_BUGS},
    **{bug: (find_in_the_librarys_kernels, bug) for bug in KERNEL_BUGS},
}


@pytest.mark.full
@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_noticed(bug, tmp_path, seen):
    find, name = BUGS[bug]
    assert find(name, tmp_path), "nobody noticed"
    seen("planted bugs", bug, True)
