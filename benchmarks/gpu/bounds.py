"""What each CUDA kernel can reach at most, calculated from its machine code. No GPU is needed.

    make bounds DICE_OP_CUDA=on DICE_OP_CUDA_ARCHS=80,90

writes results/calculated.json and results/calculated.md.

A kernel reads logits in 16-byte words, and computes a tile of voxels in each turn of a loop. The
instructions of a turn are counted, by the part of a multiprocessor that executes them, on the way
that nearly all turns take: tiles are full, labels have one byte each and are classes, and sums are
not yet to be added up (what that takes is spread over the turns between). Together with what a GPU
can do in a second, each part gives a rate that it allows. The lowest is the bound.

Two numbers are assumed: schedulers issue in 85 % of the slots in which they could, and memory
answers after 700 ns. Other stalls do not count, as if enough warps took turns. So this is an
estimate of what a kernel can reach. What it does reach can only be measured.
"""

import collections
import itertools
import json
import math
import re
import sys
from pathlib import Path
from typing import NamedTuple

from benchmarks.report import table

PARTS_OF_TABLE = ("sums", "gradient")
RECORD = Path(__file__).resolve().parent.parent / "results" / "calculated.json"
WARP = 32
FLUSH = 64  # voxels that a thread adds before the warp's sums go on in double (csrc/cuda/kernels.h)
ISSUE_EFFICIENCY = 0.85  # of the slots in which a scheduler could issue an instruction
LATENCY = 700e-9  # seconds until memory answers, under load


class Gpu(NamedTuple):
    """A GPU: figures of NVIDIA's data sheets and of the CUDA C++ Programming Guide."""

    arch: str  # of the machine code that it runs
    capability: tuple[int, int]
    multiprocessors: int
    clock: float  # Hz: what it keeps up under load, which is no more than its boost clock
    memory: float  # bytes per second
    fp32: int  # warps' instructions per clock and multiprocessor

    def per_second(self):
        """Instructions of a warp, or 128 bytes of L1, per second, by the part that takes them."""
        per_clock = {
            "issue": 4 * ISSUE_EFFICIENCY, "ALU": 2, "FMA": self.fp32, "IMAD": 2, "MUFU": 0.5,
            "L1": 1,
        }  # fmt: skip
        return {part: n * self.multiprocessors * self.clock for part, n in per_clock.items()}


GPUS = {
    "A100": Gpu("80", (8, 0), 108, 1.41e9, 2.039e12, 2),
    "L4": Gpu("80", (8, 9), 58, 2.04e9, 0.3e12, 4),
    "H100": Gpu("90", (9, 0), 132, 1.755e9, 3.35e12, 4),
    "H200": Gpu("90", (9, 0), 132, 1.755e9, 4.8e12, 4),
}


# --- machine code ---------------------------------------------------------------------------------


class Instruction(NamedTuple):
    at: int
    guard: str  # the predicate that it depends on, such as "@!P0"
    op: str  # with its modifiers, such as "LDG.E.128"
    text: str
    target: int | None  # of a branch

    @property
    def name(self):
        return self.op.split(".")[0]

    @property
    def bytes(self):
        """How many bytes a thread loads or stores."""
        size = re.search(r"\.[US]?(8|16|64|128)\b", self.op)
        return int(size[1]) // 8 if size else 4


def instructions(code):
    """The instructions in cuobjdump's text of a function."""
    found = []
    for line in code.splitlines():
        match = re.match(r"\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+ )?\s*(\S+)\s*([^;]*);", line)
        if match:
            branch = (
                re.search(r"0x([0-9a-f]+)\s*$", match[4])
                if match[3].startswith(("BRA", "CALL.REL.NOINC"))
                else None
            )
            target = int(branch[1], 16) if branch else None
            found.append(
                Instruction(int(match[1], 16), (match[2] or "").strip(), *match.group(3, 4), target)
            )
    return found


class Flow:
    """The blocks of a function, which of them follow each, and its loops by their first block."""

    def __init__(self, code):
        whole = instructions(code)
        # BRX goes on at one of a table, for wide labels. CALL is how ptxas leaves some loops.
        ends = ("BRA", "BRX", "CALL", "EXIT", "RET")
        starts = {whole[0].at} | {i.target for i in whole if i.target is not None}
        starts |= {b.at for a, b in zip(whole, whole[1:], strict=False) if a.name in ends}
        self.blocks = {}
        for instruction in whole:
            if instruction.at in starts:
                block = self.blocks[instruction.at] = []
            block.append(instruction)
        self.next, before = {}, collections.defaultdict(list)
        for start, following in zip(self.blocks, [*list(self.blocks)[1:], None], strict=True):
            last = self.blocks[start][-1]
            always = not last.guard and not re.match(r"!?U?P\d", last.text)
            always = always and last.op != "BRA.DIV"
            after = [last.target] if last.target is not None else []
            after += [following] if following and not (last.name in ends and always) else []
            self.next[start] = after
            for other in after:
                before[other].append(start)
        self._drop_what_is_not_reached(before)
        # A loop begins with a block that every way to its end goes through.
        self.loops = {}
        through = self._on_every_way_to(before)
        for start, after in self.next.items():
            for first in (block for block in after if block in through[start]):
                body, todo = {first, start}, [start] if start != first else []
                while todo:
                    for block in before[todo.pop()]:
                        if block not in body:
                            body.add(block)
                            todo.append(block)
                self.loops.setdefault(first, set()).update(body)

    def _drop_what_is_not_reached(self, before):
        reached, todo = set(), [next(iter(self.blocks))]
        while todo:
            block = todo.pop()
            if block not in reached:
                reached.add(block)
                todo += self.next[block]
        self.blocks = {start: block for start, block in self.blocks.items() if start in reached}
        self.next = {start: after for start, after in self.next.items() if start in reached}
        for start in reached:
            before[start] = [other for other in before[start] if other in reached]

    def _on_every_way_to(self, before):
        """The blocks that every way from the beginning to a block goes through."""
        first, everything = next(iter(self.blocks)), set(self.blocks)
        through = {block: everything for block in self.blocks} | {first: {first}}
        changed = True
        while changed:
            changed = False
            for block in self.blocks:
                if block == first:
                    continue
                now = {block} | set.intersection(*(through[other] for other in before[block]))
                if now != through[block]:
                    through[block], changed = now, True
        return through

    def inner(self, first=None):
        """The loops directly inside of one, or of the function."""
        body = self.loops[first] if first is not None else set(self.blocks)
        inside = [f for f, other in self.loops.items() if f != first and f in body and other < body]
        return [
            f for f in inside if not any(f != g and self.loops[f] < self.loops[g] for g in inside)
        ]


PARTS = {
    "FMA": {"FFMA", "FADD", "FMUL"}, "IMAD": {"IMAD"}, "MUFU": {"MUFU"},
    "L1": {"SHFL", "LDS", "STS", "LDG", "STG", "LDGSTS", "REDUX"},
    "none": {
        "BRA", "BRX", "BSSY", "BSYNC", "DEPBAR", "LDGDEPBAR", "WARPSYNC", "EXIT", "CALL", "RET",
    },
}  # fmt: skip
PART_OF = {name: part for part, names in PARTS.items() for name in names}

# By a part of the C++ type's symbol. A kernel takes either type of 16 bits.
DTYPES = {"AnyFloat16": ("bfloat16", "float16"), "f": ("float32",)}


class Kernel(NamedTuple):
    """A specialised kernel, as its symbol says, and what it does with a tile."""

    direction: str  # "sums" or "gradient"
    access: str  # "Direct", "Rows" or "Staged"
    dtypes: tuple[str, ...]  # of the logits
    numbers: tuple[int, ...]  # the template arguments of the access
    activation: str
    cross_entropy: int  # 0: without, 1: with, 2: asked at run time

    @classmethod
    def of(cls, symbol):
        """The kernel of a symbol, or None if it is no specialised one."""
        match = re.search(
            r"(Sums|Grad)Kernel.*?(Direct|Rows|Staged)I(f|NS\d?_\d+\w+?E)((?:L[ib]\d+E)+)E"
            r".*?(Softmax|Sigmoid|Identity).*?CrossEntropyModeE(\d)",
            symbol,
        )
        if not match:
            return None
        return cls(
            {"Sums": "sums", "Grad": "gradient"}[match[1]], match[2],
            next(dtypes for name, dtypes in DTYPES.items() if name in match[3]),
            tuple(int(n) for n in re.findall(r"L[ib](\d+)E", match[4])), match[5], int(match[6]),
        )  # fmt: skip

    @property
    def size(self):
        return 4 if self.dtypes == ("float32",) else 2

    @property
    def planar(self):
        return self.access == "Direct" and bool(self.numbers[1])

    @property
    def masked(self):
        """Whether it takes weights and ignored labels."""
        return self.access != "Direct" and bool(self.numbers[-1])

    @property
    def lanes(self):
        return self.numbers[1] if self.access == "Staged" else 1

    def classes(self):
        """Numbers of classes that the kernel takes: the only one, or a few."""
        if self.access != "Staged":
            return [self.numbers[0]]
        items, lanes, always = self.numbers[:3]
        few = (5, 8, 9, 13, 14, 16, 20, 32, 40, 48, 64, 80, 96, 104, 120, 128, 160, 200, 256)
        found = [c for c in few if lanes * always < c <= lanes * items]
        # Without weights, one lane serves only the odd numbers here.
        return [c for c in found if c % 2] if lanes == 1 and not self.masked else found

    # The rest says the same as csrc/cuda/{direct,rows,staged}.h; `cost_of_tile` notices where not.

    @property
    def together(self):
        """How many labels a thread reads at once."""
        if self.access == "Direct":
            return 16 // self.size // (1 if self.planar else self.numbers[0])
        return 1 if self.access == "Staged" or self.numbers[0] * self.size % 4 == 0 else 2

    @property
    def tile(self):
        """The voxels of a tile."""
        if self.access == "Direct":
            units = 1 if self.planar else 4 if self.together < 4 else 2
            return WARP * units * self.together
        if self.access == "Rows":
            parts = self.together * self.numbers[0] * self.size // 4
            return WARP * self.together * (4 if parts <= 8 else 2)
        rounds = 1 if self.lanes == 1 else (4 if self.lanes < 8 else 8) // self.size
        return WARP // self.lanes * rounds

    def words(self, classes):
        """How many words of a tile's logits a lane reads at most."""
        return math.ceil(self.tile * classes * self.size / 16 / WARP)

    def stages(self, classes):
        """How many tiles have a place in shared memory."""
        if self.access == "Direct":
            return 0
        return 3 if self.access == "Rows" and self.tile * classes * self.size < 2048 else 2

    def traffic(self, classes):
        """The bytes that a tile moves from and to memory, with labels of one byte."""
        logits = self.tile * classes * self.size
        return logits * (2 if self.direction == "gradient" else 1) + self.tile

    def on_their_way(self, classes):
        """The bytes that a warp has asked for while it computes, or before."""
        return max(1, self.stages(classes) - 1) * self.tile * classes * self.size


class Steady:
    """One turn of a loop, on the way that nearly all turns take."""

    def __init__(self, flow, first, kernel, classes, cross_entropy=False, flushes=False):
        self.flow, self.kernel = flow, kernel
        self.cross_entropy, self.flushes = cross_entropy, flushes
        self.words = kernel.words(classes)
        self.loops = {
            f: Steady(flow, f, kernel, classes, cross_entropy, flushes) for f in flow.inner(first)
        }
        self.owner = {b: f for f in self.loops for b in flow.loops[f]}
        self.body, self.first, self.memo = flow.loops[first], first, {}
        self.cost = self._best(first, frozenset()) or collections.Counter()

    def _turns(self, first):
        """How often a loop inside of this one is gone through for each tile."""
        cost, kernel = self.loops[first].cost, self.kernel
        for name in ("LDGSTS", "STG"):
            if cost[name, 16]:
                unrolled = [loop.cost[name, 16] for loop in self.loops.values()]
                if max(unrolled) > cost[name, 16]:  # what is left after a loop over several at once
                    return self.words % max(unrolled) / cost[name, 16]
                return self.words // cost[name, 16]
        if cost["exponentials"]:
            turn = round(cost["exponentials"] / (kernel.numbers[0] + 1))
            return kernel.tile * kernel.lanes / WARP / max(1, turn)
        return 3 if cost["doubles"] else 0  # the sums whose totals are added up one after the other

    def _cost(self, node):
        cost = collections.Counter()
        if node in self.loops:
            turns = self._turns(node)
            for key, count in self.loops[node].cost.items():
                cost[key] += count * turns
            cost["words inside"] += cost.pop("words outside", 0)
            # Loops over single elements serve tiles that are not full, and wide labels.
            loads = cost["LDG", 1] + cost["LDG", 2] + cost["LDG", 4] + cost["LDG", 8]
            if loads and (self.kernel.direction == "sums" or not cost["reads shared"]):
                cost["rare"] += 1
            return cost
        for instruction in self.flow.blocks[node]:
            name = instruction.name
            if instruction.guard == "@!PT" or name == "NOP":
                continue  # ptxas pads some places with these, and they do nothing
            part = PART_OF.get(name, "none" if name.startswith("U") else "ALU")
            cost["issue"] += 1
            cost[part] += max(1, instruction.bytes / 4) if part == "L1" else 1
            cost["exponentials"] += instruction.op == "MUFU.EX2"
            cost["logarithms"] += "0.69314718" in instruction.text
            cost["doubles"] += name in ("DADD", "F2F")
            cost["reads shared"] += name == "LDS"
            if name in ("LDG", "LDGSTS", "STG"):
                cost[name, instruction.bytes] += 1
                cost["words outside"] += name != "LDG" and instruction.bytes == 16
                cost["other labels"] += name == "LDG" and instruction.bytes != self.kernel.together
        return cost

    def _score(self, cost):
        """Orders ways through the loop: the way of nearly all turns has the highest score."""
        # A loop over two words at a time leaves one if their number is odd.
        wanted = -1 if self.kernel.access == "Staged" and self.words % 2 == 0 else 1
        logarithms = cost["logarithms"] * (1 if self.cross_entropy else -1)
        return (
            -cost["rare"], cost["doubles"] * (1 if self.flushes else -1),
            cost["exponentials"] + 1.5 * logarithms, cost["words inside"],
            wanted * cost["words outside"], -cost["other labels"], -cost["issue"],
        )  # fmt: skip

    def _after(self, node):
        if node not in self.loops:
            return self.flow.next[node]
        body = self.flow.loops[node]
        return [s for b in body for s in self.flow.next[b] if s not in body]

    def _best(self, node, active):
        """The cost of the best way from a block, or a loop, to the loop's next turn."""
        if node in self.memo or node in active:
            return self.memo.get(node)
        ways = []
        for after in dict.fromkeys(self.owner.get(s, s) for s in self._after(node)):
            if after == self.first:
                ways.append(collections.Counter())
            elif after in self.body:
                way = self._best(after, active | {node})
                ways += [way.copy()] if way is not None else []
        best = None
        if ways:
            own = self._cost(node)
            for way in ways:
                for key in own:
                    way[key] += own[key]
            best = max(ways, key=self._score)
        self.memo[node] = best
        return best


def cost_of_tile(code, kernel, classes, cross_entropy=False):
    """What a warp executes for a tile: {part: instructions, or 128 bytes of L1}.

    Raises ValueError if the loop found does not do the work of a tile.
    """
    flow = Flow(code)

    def steady(flushes):
        loops = [
            Steady(flow, first, kernel, classes, cross_entropy, flushes).cost
            for first in flow.inner()
        ]
        return max(loops, key=lambda cost: (cost["exponentials"], cost["issue"]))

    cost = steady(False)
    items = kernel.numbers[0] * kernel.tile * kernel.lanes // WARP  # that a thread holds
    words = kernel.words(classes) * (1 + (kernel.direction == "gradient"))
    moved = (
        cost["LDGSTS", 16] + cost["STG", 16] + (cost["LDG", 16] if kernel.access == "Direct" else 0)
    )
    if cost["exponentials"] < items or moved < words:
        raise ValueError(
            f"{kernel} with {classes} classes: the loop found is not the one of a tile"
        )
    voxels = kernel.tile * kernel.lanes / WARP
    extra = steady(True) if kernel.direction == "sums" else cost
    parts = ("issue", "ALU", "FMA", "IMAD", "MUFU", "L1")
    cost = {part: cost[part] + (extra[part] - cost[part]) * voxels / FLUSH for part in parts}
    cost["FMA"] += cost["IMAD"]  # which half of the unit executes
    return cost


def reach(kernel, classes, cost, gpu, warps):
    """The part of the memory's rate that each part of a multiprocessor allows, at most 1.

    warps: how many a multiprocessor holds at once.
    """
    bytes_per_second = {
        part: rate / cost[part] * kernel.traffic(classes)
        for part, rate in gpu.per_second().items()
        if cost[part]
    }
    reads = kernel.tile * classes * kernel.size / kernel.traffic(classes)
    asked = warps * kernel.on_their_way(classes) * gpu.multiprocessors
    bytes_per_second["latency"] = asked / LATENCY / reads
    return {part: min(1.0, rate / gpu.memory) for part, rate in bytes_per_second.items()}


# --- the record -----------------------------------------------------------------------------------


def calculate(codes, launches, usages, devices, room):
    """The bounds of all specialised kernels with class indices.

    codes: {(arch, symbol): text of cuobjdump -sass}; launches: those of tests/helpers/emulation.py;
    usages, devices, room: of tests/helpers/launches.py. Returns the tables of the record.
    """
    of_kernel = collections.defaultdict(dict)  # {symbol: {classes: launch}}
    for launch in launches:
        classes = re.match(r"\w+\[(?:\d+, )+(\d+)\]", launch.problem)
        of_kernel[launch.kernel].setdefault(int(classes[1]), launch)
    tables = {}

    def put(table, *keys, value):
        of_table = tables.setdefault(table, {})
        for key in keys[:-1]:
            of_table = of_table.setdefault(key, {})
        of_table[keys[-1]] = value

    for (arch, symbol), code in codes.items():
        kernel = Kernel.of(symbol)
        if kernel is None or kernel.activation == "Identity":
            continue
        found = of_kernel[symbol]
        for classes, cross_entropy in itertools.product(kernel.classes(), (False, True)):
            if kernel.cross_entropy != 2 and bool(kernel.cross_entropy) != cross_entropy:
                continue
            if kernel.masked and cross_entropy:
                continue
            cost = cost_of_tile(code, kernel, classes, cross_entropy)
            # Numbers of classes that need as much as others are not among the launches.
            launch = found[min(found, key=lambda c: (c < classes, abs(c - classes)))]
            for name, gpu in GPUS.items():
                if gpu.arch != arch:
                    continue
                held = room(devices[gpu.capability], launch, usages[arch][symbol]).blocks
                parts = reach(kernel, classes, cost, gpu, held * launch.threads // WARP)
                bound = min(parts, key=parts.get)
                for dtype in kernel.dtypes:
                    part = kernel.direction + " with cross-entropy" * cross_entropy
                    part += " with an ignored label" * kernel.masked
                    keys = name, dtype, str(classes), part
                    reached = round(parts[bound], 3)
                    if kernel.planar:
                        put("channels_first", *keys, value=reached)
                        continue
                    put("gpus", *keys, value=reached)
                    put("bound_by", *keys, value=bound if reached < 1 else "memory")
                    issued = round(cost["issue"] / kernel.traffic(classes) * 16, 2)
                    put("instructions", *keys, value=issued)
    return tables


def as_markdown(record):
    """The record as tables."""
    text = [
        "# What the CUDA kernels can reach",
        "",
        "<!-- begin -->",
        "",
        "These numbers are calculated, not measured. `make bounds` reads them from the machine "
        f"code that nvcc {record['nvcc']} makes, without a GPU. They are the percentages of the "
        "memory's rate that the sums / the gradient can reach, and in brackets what binds the "
        "lower of the two, if it is not memory. benchmarks/gpu/bounds.py says how. Schedulers are "
        "taken to issue in 85 % of their slots, and memory to answer after 700 ns. Logits are "
        "channels_last, and labels are class indices of one byte. One class is a sigmoid, several "
        "are a softmax. Voxel weights are not counted: they are four more bytes for each voxel.",
        "",
    ]
    gpus = {name: record["gpus"][name] for name in GPUS}
    for suffix in ("", " with cross-entropy", " with an ignored label"):
        # The kernels of bfloat16 are those of float16.
        for dtype, title in (("float32", "float32"), ("bfloat16", "bfloat16 and float16")):
            text += [f"## {title}{',' if suffix else ''}{suffix}", ""]
            rows = []
            for classes in sorted(map(int, gpus["H200"][dtype])):
                if "sums" + suffix not in gpus["H200"][dtype][str(classes)]:
                    continue
                cells = [classes]
                for name in gpus:
                    reached = [gpus[name][dtype][str(classes)][p + suffix] for p in PARTS_OF_TABLE]
                    of = record["bound_by"][name][dtype][str(classes)]
                    lower = min(zip(reached, PARTS_OF_TABLE, strict=True))[1]
                    why = of[lower + suffix] if min(reached) < 0.995 else "memory"
                    cells.append(
                        " / ".join(f"{100 * share:.0f}" for share in reached)
                        + (f" ({why})" if why != "memory" else "")
                    )
                rows.append(cells)
            text += table(("classes", *gpus), rows)
    return "\n".join(text)


def main():
    """Calculates the bounds from the library beside this one, and writes the record."""
    from dice_op import core
    from helpers import emulation
    from helpers.launches import DEVICES, codes, room, usages
    from helpers.machine_code import ARCHS

    wanted = {gpu.arch for gpu in GPUS.values()}
    if missing := wanted - set(ARCHS):
        sys.exit(
            f"bounds: this build has no code for {', '.join(sorted(missing))}: "
            "make bounds DICE_OP_CUDA=on DICE_OP_CUDA_ARCHS=80,90"
        )
    record = {
        "nvcc": core.build_info()["cuda"],
        "memory": {name: gpu.memory for name, gpu in GPUS.items()},
        **calculate(codes(wanted), emulation.plans(), usages(), DEVICES, room),
    }
    RECORD.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
    RECORD.with_suffix(".md").write_text(as_markdown(record))
    print(RECORD)


if __name__ == "__main__":
    main()
