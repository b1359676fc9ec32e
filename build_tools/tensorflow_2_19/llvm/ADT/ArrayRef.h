// TensorFlow 2.19 has a header about streams that names two types of LLVM, but it does not ship LLVM's headers. dice_op
// calls nothing that uses these types, so it is enough to declare them.
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
