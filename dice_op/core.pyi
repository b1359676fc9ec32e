"""
This module computes the fused sums and gradients on arrays, without TensorFlow and without copies.

It takes NumPy arrays, or arrays on a CUDA device that support DLPack (PyTorch, JAX, CuPy) or
__cuda_array_interface__. All arrays of a call must be in the same memory and contiguous in C order. An
object that NumPy can convert, such as a list, is copied once. N is the number of samples and C the number
of classes; see dice_op.dice_sums for the formulas.
"""
from __future__ import annotations
import collections.abc
import typing
__all__: list[str] = ['DeviceArray', 'PROBABILITY_EPSILON', 'asked_sums', 'build_info', 'ffi_targets', 'ffi_workspace', 'gradient', 'label_kind', 'op_attributes', 'scores', 'sums']
class DeviceArray:
    """
    A result on a CUDA device. Other libraries read it through __cuda_array_interface__
    (torch.as_tensor, cupy.asarray), and numpy() copies it to the host.
    """
    def numpy(self) -> typing.Any:
        """
        Wait for the stream and return a copy on the host.
        """
    @property
    def __cuda_array_interface__(self) -> dict:
        ...
    @property
    def dtype(self) -> typing.Any:
        ...
    @property
    def shape(self) -> tuple:
        ...
def asked_sums(*, activation: str = 'softmax', data_format: str = 'channels_last', squared_pred: bool = False, soft_label: bool = False, cross_entropy: bool = False, focal_gamma: typing.SupportsFloat | typing.SupportsIndex = 0.0, label_smoothing: typing.SupportsFloat | typing.SupportsIndex = 0.0, threshold: typing.SupportsFloat | typing.SupportsIndex = 0.0, ignore_label: typing.SupportsInt | typing.SupportsIndex | None = None, regions: typing.Any = None, label_sets: typing.Any = None, focal_gammas: collections.abc.Sequence[typing.SupportsFloat | typing.SupportsIndex] | None = None, dist_matrix: collections.abc.Sequence[collections.abc.Sequence[typing.SupportsFloat | typing.SupportsIndex]] | None = None) -> dict:
    """
    Name the sums that `sums` computes with these options, in their order. The values of the dict say which
    of them have a gradient.
    """
def build_info() -> dict:
    """
    Describe this build: its version, the tensorflow and cuda versions it was built for (None if it was built
    without), its cuda_archs, the version of XLA's foreign function interface (ffi) that its handlers were
    compiled with, the simd_levels it contains, the simd_level used here, and its compiler.
    """
def ffi_targets() -> dict:
    """
    Return the same calls as handlers of XLA's foreign function interface, for jax.ffi.register_ffi_target(name,
    handler, platform=platform): a dict from platform ('cpu', 'CUDA') to a dict from name to handler. The file
    csrc/core/dice_op.h describes their operands, results and attributes.
    """
def ffi_workspace(platform: str, batch: typing.SupportsInt | typing.SupportsIndex, voxels: typing.SupportsInt | typing.SupportsIndex, classes: typing.SupportsInt | typing.SupportsIndex) -> int:
    """
    Return the size in bytes of the workspace, which is one of the results of dice_op_sums.
    """
def gradient(logits: typing.Any, labels: typing.Any, *, d_intersection: typing.Any, d_pred_sum: typing.Any, d_cross_entropy: typing.Any | None = None, d_negative_cross_entropy: typing.Any | None = None, d_distance_sum: typing.Any | None = None, voxel_weight: typing.Any | None = None, activation: str = 'softmax', data_format: str = 'channels_last', squared_pred: bool = False, soft_label: bool = False, cross_entropy: bool = False, focal_gamma: typing.SupportsFloat | typing.SupportsIndex = 0.0, label_smoothing: typing.SupportsFloat | typing.SupportsIndex = 0.0, threshold: typing.SupportsFloat | typing.SupportsIndex = 0.0, ignore_label: typing.SupportsInt | typing.SupportsIndex | None = None, regions: typing.Any = None, label_sets: typing.Any = None, focal_gammas: collections.abc.Sequence[typing.SupportsFloat | typing.SupportsIndex] | None = None, dist_matrix: collections.abc.Sequence[collections.abc.Sequence[typing.SupportsFloat | typing.SupportsIndex]] | None = None, threads: typing.SupportsInt | typing.SupportsIndex = 0, stream: typing.SupportsInt | typing.SupportsIndex = 0, out: typing.Any | None = None) -> typing.Any:
    """
    Compute the gradient of a loss with respect to the logits in one pass, from its derivatives with respect to
    the sums.
    
    Args:
      d_intersection, d_pred_sum, d_cross_entropy, d_negative_cross_entropy: [N, C], of the sums' dtype. For
        'sigmoid', give both cross-entropies or neither; the same array twice counts both the same.
      d_distance_sum: the same, needed with dist_matrix.
      out: the array to write to, with the logits' dtype and shape; not a list, but it may be the logits array.
        After a MemoryError it may hold a part of the gradient.
      The other arguments are those of `sums`. A label that is not a class belongs to no class.
    
    Returns: an array of the logits' dtype and shape.
    """
def label_kind(logits_shape: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex | None], labels_shape: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex | None], labels_dtype: str, *, ignore_label: typing.SupportsInt | typing.SupportsIndex | None = None, regions: typing.Any = None, data_format: str = 'channels_last') -> str:
    """
    Say how labels of this shape and dtype are read. 'indices': one class index per voxel. 'per class': one-hot
    or soft labels, one per class. 'mask': a foreground mask of floats, one per voxel, which may be soft; only if
    there is one class. None in a shape stands for a size that is not known yet. If the number of classes is not
    known, floats that may be indices give 'mask', and labels of the logits' rank give 'per class'.
    
    Raises: ValueError if the shapes do not fit together.
    """
def op_attributes(*, activation: str = 'softmax', data_format: str = 'channels_last', squared_pred: bool = False, soft_label: bool = False, cross_entropy: bool = False, focal_gamma: typing.SupportsFloat | typing.SupportsIndex = 0.0, label_smoothing: typing.SupportsFloat | typing.SupportsIndex = 0.0, threshold: typing.SupportsFloat | typing.SupportsIndex = 0.0, ignore_label: typing.SupportsInt | typing.SupportsIndex | None = None, regions: typing.Any = None, label_sets: typing.Any = None, focal_gammas: collections.abc.Sequence[typing.SupportsFloat | typing.SupportsIndex] | None = None, dist_matrix: collections.abc.Sequence[collections.abc.Sequence[typing.SupportsFloat | typing.SupportsIndex]] | None = None) -> dict:
    """
    Convert options, given as for `sums`, to the attributes of the TensorFlow op and of XLA's handlers. All
    options are in the result, with their defaults, in the attributes' order: strings, bools, floats, and
    arrays of int64 or float32.
    """
def scores(prediction: typing.Any, labels: typing.Any, *, classes: typing.SupportsInt | typing.SupportsIndex | None = None, ignore_label: typing.SupportsInt | typing.SupportsIndex | None = None, regions: typing.Any = None, label_sets: typing.Any = None, threshold: typing.SupportsFloat | typing.SupportsIndex = 0.0, data_format: str = 'channels_last', threads: typing.SupportsInt | typing.SupportsIndex = 0) -> dict:
    """
    Compute hard scores of each sample and class, for evaluation scripts.
    
    Args:
      prediction: a label map [N, spatial...] like `labels`, or floating-point logits [N, spatial..., C]. With
        logits, a voxel belongs to the class of the largest logit; with one class or with regions, it belongs to
        each class whose logit is above `threshold`.
      labels: class indices [N, spatial...], of any dtype and byte order; with one class, the foreground mask.
        Pass a single volume as volume[numpy.newaxis].
      classes: the number of classes, needed if prediction is a label map and no regions are given.
      ignore_label, regions, label_sets, data_format, threads: as for `sums`. A predicted label map holds classes
        alone.
    
    Returns: a dict with dice, 2 I / (P + T), and jaccard, I / (P + T - I), both float64 [N, C]. They are NaN
      for a class that is in neither map (numpy.nanmean leaves it out). The dict also has the voxel counts
      intersection (I), pred_sum (P) and label_sum (T), int64 [N, C].
    
    Raises: ValueError or TypeError, with a message that says which argument is wrong and what it must be.
    """
def sums(logits: typing.Any, labels: typing.Any, *, voxel_weight: typing.Any | None = None, activation: str = 'softmax', data_format: str = 'channels_last', squared_pred: bool = False, soft_label: bool = False, cross_entropy: bool = False, focal_gamma: typing.SupportsFloat | typing.SupportsIndex = 0.0, label_smoothing: typing.SupportsFloat | typing.SupportsIndex = 0.0, threshold: typing.SupportsFloat | typing.SupportsIndex = 0.0, ignore_label: typing.SupportsInt | typing.SupportsIndex | None = None, regions: typing.Any = None, label_sets: typing.Any = None, focal_gammas: collections.abc.Sequence[typing.SupportsFloat | typing.SupportsIndex] | None = None, dist_matrix: collections.abc.Sequence[collections.abc.Sequence[typing.SupportsFloat | typing.SupportsIndex]] | None = None, threads: typing.SupportsInt | typing.SupportsIndex = 0, stream: typing.SupportsInt | typing.SupportsIndex = 0) -> dict:
    """
    Compute the sums of each sample and class in one pass.
    
    Args:
      logits: [N, spatial..., C] (channels_last) or [N, C, spatial...]; float16, bfloat16, float32, float64.
      labels: class indices [N, spatial...], or one-hot or soft labels of the logits' shape; C-contiguous.
      activation: 'softmax', 'sigmoid', or 'none' if the logits are already probabilities. For scores, 'argmax'
        gives 1 to the class of the largest logit, and 'threshold' gives 1 to each logit above `threshold`.
      squared_pred: whether pred_sum and label_sum add up squares.
      soft_label: whether intersection adds up min(p, t) in place of p t, for soft labels.
      voxel_weight: [N, spatial...], any dtype; voxels of weight 0 are left out.
      ignore_label: voxels with this class index are left out.
      cross_entropy: whether sum t (1-p)^gamma (-log p) is computed too, with gamma = focal_gamma and the labels t
        smoothed by label_smoothing. For 'sigmoid' there is also sum (1-t) p^gamma (-log(1-p)).
      focal_gammas: one exponent for each class, used in place of focal_gamma.
      regions: for overlapping classes, the label values of each, such as [(1, 2, 3), (2, 3), (3,)].
      label_sets: for label values that stand for one of several classes, a dict from the value to the classes,
        such as {200: (0, 2, 3)}. Such a voxel says nothing about these classes.
      dist_matrix: [C, C], how far each class is from each other one; the row is the label's class. It asks for
        distance_sum.
      threads: the number of threads, or 0 for one per processor. It does not change a single bit of the result.
      stream: for arrays on a device, the CUDA stream to work on, as a number
        (torch.cuda.current_stream().cuda_stream). The arrays must be ready on it.
    
    Returns: a dict with intersection, pred_sum, label_sum [, cross_entropy] [, negative_cross_entropy]
      [, unknown_sum] [, distance_sum] of shape [N, C] and weight_sum [N]. negative_cross_entropy is for 'sigmoid'
      with cross_entropy; unknown_sum, the weight of the voxels that may belong to a class, for label_sets; and
      distance_sum, the sum over the voxels of a class of how far their predictions are from it, for dist_matrix.
      The sums are float32, or float64 for float64 logits and for scores. On a device they are DeviceArrays, and
      the sums of a sample are NaN if one of its labels is not a class.
    
    Raises: ValueError or TypeError, with a message that says which argument is wrong and what it must be.
    """
PROBABILITY_EPSILON: float = 1e-07
