// TensorFlow 2.19's header of its streams names two types of LLVM, whose headers TensorFlow does not ship. Nothing that
// has to do with them is called: names are enough.
#pragma once

namespace llvm {

template <class T>
class SmallVector {};

template <class T>
class ArrayRef {
 public:
  ArrayRef(const SmallVector<T>&) {}
};

}  // namespace llvm
