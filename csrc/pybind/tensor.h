// Turns arrays from Python, on the host or on a CUDA device, into plain pointers. NumPy arrays, and arrays that support
// DLPack (PyTorch, JAX, CuPy) or __cuda_array_interface__, are used without a copy. Anything else that NumPy can
// convert, such as a list, is copied once, and the copy is kept.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <limits>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "core/dice_op.h"
#include "core/problem.h"

namespace dice_op {

namespace py = pybind11;

struct Tensor {
  void* data = nullptr;
  Dims dims;
  DType dtype = DType::kFloat;
  bool on_device = false;
  int device = -1;              // its number, if the array gives it
  std::shared_ptr<void> owner;  // keeps the memory alive as long as the tensor
};

namespace dlpack {  // the ABI of https://dmlc.github.io/dlpack, version 0

struct DLTensor {
  void* data;
  int32_t device_type, device_id;
  int32_t ndim;
  uint8_t code, bits;
  uint16_t lanes;
  int64_t* shape;
  int64_t* strides;  // in elements; null if compact
  uint64_t byte_offset;
};
struct DLManagedTensor {
  DLTensor tensor;
  void* context;
  void (*deleter)(DLManagedTensor*);
};
constexpr int kHost = 1, kCuda = 2, kCudaManaged = 13;

}  // namespace dlpack

// Only this function turns our errors into Python's.
inline void Require(const Error& error) {
  switch (error.kind) {
    case ErrorKind::kNone:
      return;
    case ErrorKind::kInvalidArgument:
      throw py::value_error(error.message);
    case ErrorKind::kUnsupported:
      PyErr_SetString(PyExc_NotImplementedError, error.message.c_str());
      throw py::error_already_set();
    case ErrorKind::kDevice:
      break;
  }
  throw std::runtime_error(error.message);
}

// While an exception is handled: throws it again if it says nothing about an argument, but that there is no memory, or
// that the user has interrupted.
inline void ThrowAgainIfNotOfArgument() {
  try {
    throw;
  } catch (const std::bad_alloc&) {
    throw;
  } catch (const py::error_already_set& error) {
    if (error.matches(PyExc_MemoryError) || !error.matches(PyExc_Exception)) throw;
  } catch (const std::exception&) {
  }
}

[[noreturn]] inline void RefuseDType(const std::string& name, const std::string& dtype) {
  throw py::type_error(name + " has dtype " + dtype +
                       ", but must be bool, uint8, int8, uint16, int16, int32, int64, float16, bfloat16, "
                       "float32 or float64");
}

inline DType DTypeNamed(const std::string& dtype, const char* name) {
  static const std::pair<const char*, DType> kTypes[] = {
      {"bool", DType::kBool},     {"uint8", DType::kUint8},    {"int8", DType::kInt8},
      {"uint16", DType::kUint16}, {"int16", DType::kInt16},    {"int32", DType::kInt32},
      {"int64", DType::kInt64},   {"float16", DType::kHalf},   {"bfloat16", DType::kBFloat16},
      {"float32", DType::kFloat}, {"float64", DType::kDouble},
  };
  for (const auto& [known, type] : kTypes) {
    if (dtype == known) return type;
  }
  RefuseDType(name, dtype);
}

inline py::dtype NumpyType(DType dtype) {
  if (dtype == DType::kBFloat16) return py::dtype::from_args(py::module_::import("ml_dtypes").attr("bfloat16"));
  return py::dtype(dtype == DType::kHalf ? "float16" : Name(dtype));
}

// `unit` is the size of an element in the unit of `strides`: the number of bytes, or 1.
template <class Strides>
void RequireCompact(const Dims& dims, const Strides& strides, int64_t unit, const char* name) {
  if (std::find(dims.begin(), dims.end(), 0) != dims.end()) return;
  int64_t expected = unit;
  for (size_t i = dims.size(); i-- > 0; expected *= dims[i]) {
    if (dims[i] != 1 && strides[i] != expected) {
      throw py::value_error(std::string(name) + " is not contiguous in C order; make a copy that is");
    }
  }
}

// The kernels read whole elements, which a compiler takes to lie at multiples of their size.
inline void RequireAligned(const Tensor& tensor, int64_t size, const char* name) {
  const bool empty = std::find(tensor.dims.begin(), tensor.dims.end(), 0) != tensor.dims.end();
  if (empty || reinterpret_cast<uintptr_t>(tensor.data) % size == 0) return;
  throw py::value_error(std::string(name) + " does not lie at a multiple of its elements' size in memory; " +
                        "numpy.array() makes a copy that does");
}

inline void RefuseMask(const py::handle& object, const char* name) {
  if (!py::isinstance(object, py::module_::import("numpy").attr("ma").attr("MaskedArray"))) return;
  throw py::type_error(std::string(name) + " is a masked array, whose mask would not count: pass its .data, and " +
                       "the mask as ignore_label or as a voxel_weight of 0");
}

inline Tensor FromNumpy(const py::array& array, const char* name) {
  RefuseMask(array, name);
  if (!(array.flags() & py::array::c_style)) {
    throw py::value_error(std::string(name) +
                          " is not contiguous in C order; numpy.ascontiguousarray() makes a copy that is");
  }
  if (!array.dtype().attr("isnative").cast<bool>()) {
    throw py::value_error(std::string(name) + " is not in this machine's byte order; " +
                          "array.astype(array.dtype.newbyteorder('=')) makes a copy that is");
  }
  Tensor tensor;
  tensor.data = const_cast<void*>(array.data());
  tensor.dims = Dims(array.shape(), array.shape() + array.ndim());
  tensor.dtype = DTypeNamed(py::str(array.dtype().attr("name")), name);
  tensor.owner = std::make_shared<py::array>(array);  // it may be a temporary of ours
  RequireAligned(tensor, array.itemsize(), name);
  return tensor;
}

inline Tensor FromCudaArrayInterface(const py::object& object, const char* name) {
  const py::dict about = object.attr("__cuda_array_interface__");
  Tensor tensor;
  tensor.on_device = true;
  tensor.owner = std::make_shared<py::object>(object);
  tensor.data = reinterpret_cast<void*>(about["data"].cast<py::tuple>()[0].cast<uintptr_t>());
  for (const auto& size : about["shape"].cast<py::tuple>()) tensor.dims.push_back(size.cast<int64_t>());
  const py::dtype dtype = py::dtype::from_args(about["typestr"]);
  tensor.dtype = DTypeNamed(py::str(dtype.attr("name")), name);
  if (about.contains("strides") && !about["strides"].is_none()) {
    RequireCompact(tensor.dims, about["strides"].cast<std::vector<int64_t>>(), dtype.itemsize(), name);
  }
  RequireAligned(tensor, dtype.itemsize(), name);
  return tensor;
}

inline Tensor FromDlpack(const py::object& object, const char* name) {
  // On a device the caller passes the stream on which the array is ready, so the exporter need not wait (-1).
  const bool asks_stream = py::hasattr(object, "__dlpack_device__") &&
                           object.attr("__dlpack_device__")().cast<py::tuple>()[0].cast<int>() != dlpack::kHost;
  const py::capsule capsule =
      asks_stream ? object.attr("__dlpack__")(py::arg("stream") = -1) : object.attr("__dlpack__")();
  auto* const managed = static_cast<dlpack::DLManagedTensor*>(PyCapsule_GetPointer(capsule.ptr(), "dltensor"));
  if (!managed) throw py::error_already_set();
  PyCapsule_SetName(capsule.ptr(), "used_dltensor");  // it is ours now
  Tensor tensor;
  tensor.owner = std::shared_ptr<void>(managed, [](void* memory) {
    auto* const owned = static_cast<dlpack::DLManagedTensor*>(memory);
    if (owned->deleter) owned->deleter(owned);
  });
  const dlpack::DLTensor& source = managed->tensor;
  tensor.data = static_cast<char*>(source.data) + source.byte_offset;
  tensor.dims.assign(source.shape, source.shape + source.ndim);
  tensor.on_device = source.device_type == dlpack::kCuda || source.device_type == dlpack::kCudaManaged;
  if (tensor.on_device) tensor.device = source.device_id;
  if (!tensor.on_device && source.device_type != dlpack::kHost) {
    throw py::value_error(std::string(name) + " is neither in host memory nor on a CUDA device");
  }
  static const char* const kKinds[] = {"int", "uint", "float", "", "bfloat", "", "bool"};
  std::string dtype = source.lanes == 1 && source.code < 7 ? kKinds[source.code] : "of another kind";
  if (source.code != 6) dtype += std::to_string(source.bits);
  tensor.dtype = DTypeNamed(dtype, name);
  if (source.strides) RequireCompact(tensor.dims, source.strides, 1, name);
  RequireAligned(tensor, std::max(1, source.bits / 8), name);
  return tensor;
}

// Whether the object is used without a copy: a NumPy array, or an array of another library that shares its memory.
inline bool IsArray(const py::object& object) {
  return py::isinstance<py::array>(object) || py::hasattr(object, "__dlpack__") ||
         py::hasattr(object, "__cuda_array_interface__");
}

// Copies a list, or an object that has only __array__, to a NumPy array.
inline py::array Converted(const py::object& object, const char* name) {
  if (py::isinstance<py::list>(object) || py::isinstance<py::tuple>(object)) {
    for (const py::handle item : object) RefuseMask(item, name);
  }
  try {
    return py::module_::import("numpy").attr("ascontiguousarray")(object);
  } catch (const py::error_already_set& error) {
    ThrowAgainIfNotOfArgument();
    throw py::type_error(std::string(name) + " is a " + std::string(py::str(py::type::of(object).attr("__name__"))) +
                         ", which cannot be made an array: " + std::string(py::str(error.value())));
  }
}

inline Tensor TensorOf(const py::object& object, const char* name) {
  if (py::isinstance<py::array>(object)) return FromNumpy(object.cast<py::array>(), name);
  if (py::hasattr(object, "__dlpack__")) return FromDlpack(object, name);
  if (py::hasattr(object, "__cuda_array_interface__")) return FromCudaArrayInterface(object, name);
  return FromNumpy(Converted(object, name), name);
}

// For arrays that are written to. Objects that need a conversion are refused: the caller would never see the copy.
inline Tensor WritableTensorOf(const py::object& object, const char* name) {
  if (!IsArray(object)) {
    throw py::type_error(std::string(name) + " is a " + std::string(py::str(py::type::of(object).attr("__name__"))) +
                         ", but must be an array that can be written to, such as numpy.empty_like(logits)");
  }
  if (py::isinstance<py::array>(object) && !object.cast<py::array>().writeable()) {
    throw py::value_error(std::string(name) + " is read-only");
  }
  return TensorOf(object, name);
}

// For the label maps of scores, which may have any integer type and byte order. Those that the kernels cannot read are
// copied once.
inline Tensor LabelMapOf(const py::object& object, const char* name) {
  py::object array = IsArray(object) ? object : Converted(object, name);
  if (!py::isinstance<py::array>(array)) return TensorOf(array, name);
  RefuseMask(array, name);
  const py::dtype dtype = array.cast<py::array>().dtype();
  if (!dtype.attr("isnative").cast<bool>()) array = array.attr("astype")(dtype.attr("newbyteorder")("="));
  if (!array.attr("flags").attr("aligned").cast<bool>()) array = array.attr("copy")();
  if (dtype.kind() == 'u' && dtype.itemsize() >= 4) {
    const py::module_ numpy = py::module_::import("numpy");
    constexpr int64_t kLargest = std::numeric_limits<int64_t>::max();  // larger values are not classes either
    array = numpy.attr("minimum")(array, numpy.attr("uint64")(kLargest)).attr("astype")("int64");
  }
  return TensorOf(array, name);
}

inline void RequireSameMemory(const Tensor& tensor, const char* name, const Tensor& logits) {
#ifndef DICE_OP_WITH_CUDA
  if (logits.on_device) {
    throw py::value_error(
        "logits are on a CUDA device, but this build of dice_op has no CUDA kernels (DICE_OP_CUDA=on)");
  }
#endif
  if (tensor.on_device != logits.on_device) {
    throw py::value_error(std::string(name) + (tensor.on_device ? " is on a CUDA device" : " is in host memory") +
                          ", but logits are " + (logits.on_device ? "on a CUDA device" : "in host memory") +
                          "; move one of them");
  }
#ifdef DICE_OP_WITH_CUDA
  const int current = cuda::CurrentDevice();
  for (const int device : {tensor.device, logits.device}) {
    if (device >= 0 && device != current) {
      throw py::value_error("an array is on CUDA device " + std::to_string(device) + ", but the current device is " +
                            std::to_string(current) + "; make that the current one (torch.cuda.device) for the call");
    }
  }
#endif
}

#ifdef DICE_OP_WITH_CUDA

// Device memory that is allocated and released in the order of a stream.
class DeviceMemory {
 public:
  DeviceMemory(size_t bytes, uintptr_t stream) : stream_(reinterpret_cast<void*>(stream)) {
    Require(cuda::Allocate(std::max<size_t>(bytes, 1), stream_, &data_));
  }
  ~DeviceMemory() { static_cast<void>(cuda::Release(data_, stream_)); }  // a destructor cannot report an error
  DeviceMemory(const DeviceMemory&) = delete;
  void* data() const { return data_; }
  void* stream() const { return stream_; }

 private:
  void* const stream_;
  void* data_ = nullptr;
};

class DeviceArray {
 public:
  DeviceArray(DType dtype, const Dims& dims, uintptr_t stream)
      : dtype_(dtype), dims_(dims), memory_(Bytes(dtype, dims), stream) {}
  void* data() const { return memory_.data(); }
  DType dtype() const { return dtype_; }
  py::tuple Shape() const { return py::tuple(py::cast(dims_)); }
  py::dict Interface() const {
    if (dtype_ == DType::kBFloat16) {  // makes hasattr() return False
      throw py::attribute_error("__cuda_array_interface__ knows no bfloat16; pass `out`");
    }
    py::dict about;
    about["shape"] = Shape();
    about["typestr"] = NumpyType(dtype_).attr("str");
    about["data"] = py::make_tuple(reinterpret_cast<uintptr_t>(data()), false);
    about["version"] = 3;
    about["stream"] = memory_.stream() ? reinterpret_cast<uintptr_t>(memory_.stream()) : 1;  // 1: the default stream
    return about;
  }
  py::array ToNumpy() const {
    py::array array(NumpyType(dtype_), std::vector<py::ssize_t>(dims_.begin(), dims_.end()));
    Require(cuda::CopyToHost(array.mutable_data(), data(), array.nbytes(), memory_.stream()));
    return array;
  }

 private:
  static size_t Bytes(DType dtype, const Dims& dims) {
    size_t bytes = NumpyType(dtype).itemsize();
    for (int64_t size : dims) bytes *= size;
    return bytes;
  }
  const DType dtype_;
  const Dims dims_;
  const DeviceMemory memory_;
};

#endif

}  // namespace dice_op
