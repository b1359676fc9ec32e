// Describes what went wrong in a call. Every layer of the library returns this one type.
#pragma once

#include <string>
#include <utility>

namespace dice_op {

// Each front end maps these to the errors of its framework, in one place.
enum class ErrorKind : int {
  kNone,
  kInvalidArgument,  // the call is wrong, and works with other arguments
  kUnsupported,      // the call is legal, but this device or this build cannot do it
  kDevice,           // CUDA has reported a failure
};

struct [[nodiscard]] Error {
  ErrorKind kind = ErrorKind::kNone;
  std::string message;  // tells the caller what is wrong and what to do about it

  explicit operator bool() const { return kind != ErrorKind::kNone; }
};

inline Error InvalidArgument(std::string message) { return {ErrorKind::kInvalidArgument, std::move(message)}; }
inline Error Unsupported(std::string message) { return {ErrorKind::kUnsupported, std::move(message)}; }
inline Error DeviceFailure(std::string message) { return {ErrorKind::kDevice, std::move(message)}; }

}  // namespace dice_op

#define DICE_OP_RETURN_IF_ERROR(expression)                         \
  do {                                                              \
    if (::dice_op::Error error = (expression); error) return error; \
  } while (false)
