"""The volumes that are measured on a CPU and on a GPU, and how their elements are stored."""

import dataclasses
import math

import numpy as np

SMOOTH = 1e-5
# The types in which NumPy stores elements. NumPy has no bfloat16, and stores its bits.
STORED = {"bfloat16": np.dtype(np.uint16)} | {
    name: np.dtype(name)
    for name in ("float16", "float32", "float64", "uint8", "int16", "int32", "int64")
}


# --- elements -------------------------------------------------------------------------------------


def itemsize(dtype):
    """The bytes of one element."""
    return STORED[dtype].itemsize


def encode(values, dtype):
    """Converts values to the form in which `dtype` is stored."""
    if dtype != "bfloat16":
        return np.ascontiguousarray(values, STORED[dtype])
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)  # round to nearest even


def decode(stored, dtype):
    """Converts what `encode` returned to float64."""
    if dtype == "bfloat16":
        stored = (stored.astype(np.uint32) << 16).view(np.float32)
    return stored.astype(np.float64)


# --- volumes --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Case:
    """Logits `[batch, D, H, W, classes]`, and labels."""

    shape: tuple  # (D, H, W)
    classes: int
    batch: int = 1
    dtype: str = "float32"
    labels: str = "uint8"  # class indices, or "one-hot" for floats
    data_format: str = "channels_last"
    cross_entropy: bool = False  # whether the sum for a cross-entropy is computed as well

    def __str__(self):
        extra = [f"N={self.batch}"] * (self.batch > 1) + [self.dtype] * (self.dtype != "float32")
        extra += [self.labels] * (self.labels != "uint8")
        extra += [self.data_format] * (self.data_format != "channels_last")
        extra += ["with cross-entropy"] * self.cross_entropy
        cube = len(set(self.shape)) == 1
        size = f"{self.shape[0]}" if cube else "x".join(map(str, self.shape))
        return " ".join([f"{size}{'³' if cube else ''} × {self.classes}", *extra])

    @classmethod
    def from_json(cls, fields):
        """Makes a case from what `dataclasses.asdict` gave. JSON has turned tuples into lists.

        A record may be older than some of the fields, which then have their defaults.
        """
        return cls(**{**fields, "shape": tuple(fields["shape"])})

    def facts(self):
        """What a record says about the case."""
        return {"case": dataclasses.asdict(self), "name": str(self)}

    @property
    def plain(self):
        """Whether everything has its default except the size and the number of classes."""
        return self == Case(self.shape, self.classes)

    @property
    def voxels(self):
        return self.batch * math.prod(self.shape)

    @property
    def logits_bytes(self):
        return self.voxels * self.classes * itemsize(self.dtype)

    @property
    def labels_bytes(self):
        if self.labels == "one-hot":
            return self.voxels * self.classes * itemsize("float32")
        return self.voxels * itemsize(self.labels)

    def make(self, labels=None):
        """Makes random logits, and labels if none are given, in the layout of a model."""
        rng = np.random.default_rng(0)
        shape = (self.batch, *self.shape)
        x = rng.standard_normal((*shape, self.classes), dtype=np.float32).astype(self.dtype)
        y = labels
        if y is None:
            y = rng.integers(0, max(2, self.classes), size=shape, dtype=np.uint8)
        if self.labels == "one-hot":
            y = (y[..., None] == np.arange(self.classes)).astype(np.float32)
        if self.data_format == "channels_first":
            x = np.ascontiguousarray(np.moveaxis(x, -1, 1))
            y = np.ascontiguousarray(np.moveaxis(y, -1, 1)) if self.labels == "one-hot" else y
        return x, y

    def loss(self, labels=None):
        """The mean loss over samples and classes in double precision.

        It is computed slice by slice to save memory.
        """
        x, y = dataclasses.replace(self, labels="uint8", data_format="channels_last").make(labels)
        sums = np.zeros((3, self.batch, self.classes))
        classes = np.arange(self.classes) if self.classes > 1 else np.array([1])
        for n in range(self.batch):
            for x_slice, y_slice in zip(x[n], y[n], strict=True):
                z = x_slice.astype(np.float64)
                if self.classes > 1:
                    p = np.exp(z - z.max(-1, keepdims=True))
                    p /= p.sum(-1, keepdims=True)
                else:
                    p = 1 / (1 + np.exp(-z))
                t = y_slice[..., None] == classes
                sums[:, n] += [v.sum((0, 1)) for v in (p * t, p, t)]
        i, p, t = sums
        return float(np.mean(1 - (2 * i + SMOOTH) / (p + t + SMOOTH)))


def cube(edge, classes, **options):
    return Case((edge,) * 3, classes, **options)


CASES = [
    *(cube(edge, 4) for edge in (64, 96, 128, 160, 192, 256)),
    cube(512, 4),
    *(cube(96, classes) for classes in (1, 2, 3, 5, 8, 14, 28, 56, 104)),
    cube(128, 14),
    *(cube(edge, c, dtype="float16") for edge, c in ((160, 4), (128, 14), (96, 104))),
    *(cube(96, c, batch=4) for c in (4, 14)),
    *(cube(128, c, labels="one-hot") for c in (4, 14)),
    *(cube(128, c, data_format="channels_first") for c in (4, 14)),
]
