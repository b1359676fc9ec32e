"""
The fused sums and gradients on arrays, without TensorFlow and without copies.

NumPy arrays, or arrays on a CUDA device that speak DLPack (PyTorch, JAX, CuPy) or
__cuda_array_interface__; all of one call in the same memory, contiguous in C order. What NumPy can convert, such
as a list, is copied once. N samples, C classes; see dice_op.dice_sums for the formulas.
"""
from __future__ import annotations
import collections.abc
import typing
__all__: list[str] = ['DeviceArray', 'build_info', 'ffi_targets', 'ffi_workspace', 'gradient', 'label_kind', 'op_attributes', 'region_masks', 'scores', 'sums']
class DeviceArray:
    """
    An array on a CUDA device, as results are. Other libraries take it through
    __cuda_array_interface__ (torch.as_tensor, cupy.asarray); numpy() copies it to the host.
    """
    def numpy(self) -> numpy.ndarray:
        """
        A copy on the host, once the stream has done its work.
        """
    @property
    def __cuda_array_interface__(self) -> dict:
        ...
    @property
    def dtype(self) -> numpy.dtype[typing.Any]:
        ...
    @property
    def shape(self) -> tuple:
        ...
def build_info() -> dict:
    """
    What this build is: version, tensorflow and cuda it was built for (None: without), cuda_archs, simd_levels it holds, simd_level in use here, compiler.
    """
def ffi_targets() -> dict:
    """
    The same calls as handlers of XLA's foreign function interface, for jax.ffi.register_ffi_target(name,
    handler, platform=platform): a dict from platform ('cpu', 'CUDA') to a dict from name to handler. Their
    operands, results and attributes are described in csrc/core/dice_op.h.
    """
def ffi_workspace(platform: str, batch: typing.SupportsInt | typing.SupportsIndex, voxels: typing.SupportsInt | typing.SupportsIndex, classes: typing.SupportsInt | typing.SupportsIndex) -> int:
    """
    Bytes of the workspace among the results of dice_op_sums.
    """
def gradient(logits: typing.Any, labels: typing.Any, *, d_intersection: typing.Any, d_pred_sum: typing.Any, d_cross_entropy: typing.Any | None = None, voxel_weight: typing.Any | None = None, activation: str = 'softmax', data_format: str = 'channels_last', squared_pred: bool = False, cross_entropy: bool = False, focal_gamma: typing.SupportsFloat | typing.SupportsIndex = 0.0, label_smoothing: typing.SupportsFloat | typing.SupportsIndex = 0.0, threshold: typing.SupportsFloat | typing.SupportsIndex = 0.0, ignore_label: typing.SupportsInt | typing.SupportsIndex | None = None, regions: typing.Any = None, threads: typing.SupportsInt | typing.SupportsIndex = 0, stream: typing.SupportsInt | typing.SupportsIndex = 0, out: typing.Any | None = None) -> typing.Any:
    """
    The gradient of a loss with respect to the logits, in one pass, from its derivatives with respect to the sums.
    
    Args:
      d_intersection, d_pred_sum, d_cross_entropy: [N, C], of the sums' dtype.
      out: array to write to, of the logits' dtype and shape, never a list; may be the logits themselves.
      The others are those of `sums`. Labels that are no class count as absent.
    
    Returns: an array of the logits' dtype and shape.
    """
def label_kind(logits_shape: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex | None], labels_shape: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex | None], labels_dtype: str, *, ignore_label: typing.SupportsInt | typing.SupportsIndex | None = None, regions: typing.Any = None, data_format: str = 'channels_last') -> str:
    """
    What labels of that shape and dtype are taken for: 'indices', class indices, one for each voxel; 'per class',
    one-hot or soft labels, one for each class; 'mask', a foreground mask of floats, which may be soft, one for each
    voxel, where there is one class. None in a shape is a size that is not known yet; where that is the number of
    classes, 'mask' is said of floats that may be indices, and 'per class' of labels of the logits' rank.
    
    Raises: ValueError where the shapes do not fit.
    """
def op_attributes() -> dict:
    """
    The options of a call with their defaults, by the names and in the order that the attributes of the TensorFlow
    op and of XLA's handlers have.
    """
def region_masks(regions: typing.Any) -> list[int]:
    """
    Of classes given as label values, as `sums` takes them, the mask of each value 0, 1, ...: bit c set where
    it belongs to class c. The attribute `regions` of the TensorFlow op and of XLA's handlers.
    """
def scores(prediction: typing.Any, labels: typing.Any, *, classes: typing.SupportsInt | typing.SupportsIndex | None = None, ignore_label: typing.SupportsInt | typing.SupportsIndex | None = None, regions: typing.Any = None, threshold: typing.SupportsFloat | typing.SupportsIndex = 0.0, data_format: str = 'channels_last', threads: typing.SupportsInt | typing.SupportsIndex = 0) -> dict:
    """
    Hard scores of each sample and class, for evaluation scripts.
    
    Args:
      prediction: a label map [N, spatial...], as `labels`; or logits [N, spatial..., C] of floats: the class of
        the largest then, or, for one class and for regions, where they are above `threshold`.
      labels: class indices [N, spatial...], of any dtype and byte order; with one class the foreground mask. One
        volume is volume[numpy.newaxis].
      classes: their number, where prediction is a label map and no regions are given.
      ignore_label, regions, data_format, threads: as for `sums`.
    
    Returns: a dict of dice, 2 I / (P + T), and jaccard, I / (P + T - I), float64 [N, C], NaN for a class that is
      in neither map (numpy.nanmean leaves it out); and of the counts of voxels intersection (I), pred_sum (P),
      label_sum (T), int64 [N, C].
    
    Raises: ValueError, TypeError, saying which argument is wrong and what it must be.
    """
def sums(logits: typing.Any, labels: typing.Any, *, voxel_weight: typing.Any | None = None, activation: str = 'softmax', data_format: str = 'channels_last', squared_pred: bool = False, cross_entropy: bool = False, focal_gamma: typing.SupportsFloat | typing.SupportsIndex = 0.0, label_smoothing: typing.SupportsFloat | typing.SupportsIndex = 0.0, threshold: typing.SupportsFloat | typing.SupportsIndex = 0.0, ignore_label: typing.SupportsInt | typing.SupportsIndex | None = None, regions: typing.Any = None, threads: typing.SupportsInt | typing.SupportsIndex = 0, stream: typing.SupportsInt | typing.SupportsIndex = 0) -> dict:
    """
    The sums of each sample and class, in one pass.
    
    Args:
      logits: [N, spatial..., C] (channels_last) or [N, C, spatial...]; float16, bfloat16, float32, float64.
      labels: class indices [N, spatial...] or one-hot or soft labels of the logits' shape; C-contiguous.
      activation: 'softmax', 'sigmoid' or 'none' (logits are probabilities already); for scores 'argmax', 1 for
        the class of the largest logit, or 'threshold', 1 for each logit above `threshold`.
      squared_pred: squares in pred_sum and label_sum.
      voxel_weight: [N, spatial...], any dtype; voxels of weight 0 count for nothing.
      ignore_label: voxels with this class index count for nothing.
      cross_entropy, focal_gamma, label_smoothing: also sum t (1-p)^gamma (-log p), the labels smoothed.
      regions: for classes that overlap: the label values of each, such as [(1, 2, 3), (2, 3), (3,)].
      threads: 0 for one per processor. The result does not depend on it, bit for bit.
      stream: on a device, the CUDA stream to work on, as a number (torch.cuda.current_stream().cuda_stream). The
        arrays must be ready on it.
    
    Returns: a dict of intersection, pred_sum, label_sum [, cross_entropy] of shape [N, C] and weight_sum [N],
      float32 (float64 for float64 logits and for scores); on a device as DeviceArray, and NaN for a sample
      with a label that is no class.
    
    Raises: ValueError, TypeError, saying which argument is wrong and what it must be.
    """
