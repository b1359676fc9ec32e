"""The volumes that are measured, and their names."""

import dataclasses
import math

import numpy as np

SMOOTH = 1e-5


@dataclasses.dataclass(frozen=True)
class Case:
    """Random logits `[batch, D, H, W, classes]`, and labels."""

    shape: tuple  # (D, H, W)
    classes: int
    batch: int = 1
    dtype: str = "float32"
    labels: str = "uint8"  # class indices, or "one-hot" for floats
    data_format: str = "channels_last"

    def __str__(self):
        extra = [f"N={self.batch}"] * (self.batch > 1) + [self.dtype] * (self.dtype != "float32")
        extra += [self.labels] * (self.labels != "uint8")
        extra += [self.data_format] * (self.data_format != "channels_last")
        cube = len(set(self.shape)) == 1
        size = f"{self.shape[0]}" if cube else "x".join(map(str, self.shape))
        return " ".join([f"{size}{'³' if cube else ''} × {self.classes}", *extra])

    @classmethod
    def from_json(cls, fields):
        """Makes a case from what `dataclasses.asdict` gave. JSON has turned tuples into lists."""
        return cls(**{**fields, "shape": tuple(fields["shape"])})

    @property
    def plain(self):
        """Whether everything has its default except the size and the number of classes."""
        return self == Case(self.shape, self.classes)

    @property
    def voxels(self):
        return self.batch * math.prod(self.shape)

    @property
    def logits_bytes(self):
        return self.voxels * self.classes * np.dtype(self.dtype).itemsize

    @property
    def labels_bytes(self):
        return self.voxels * (4 * self.classes if self.labels == "one-hot" else 1)

    def make(self, labels=None):
        """Makes logits, and labels if none are given, in the layout of a model."""
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
