# Finds TensorFlow, and the header of XLA's foreign function interface. Sets:
#
#   tensorflow_version                     all of these are empty without TensorFlow
#   tensorflow_include, tensorflow_flags   how to compile against it
#   tensorflow_library, xla_library        its main library, and the library that holds its compiler
#   ffi_include                            the folder that has xla/ffi/api/ffi.h, or nothing

set(_ffi_header xla/ffi/api/ffi.h)
set(tensorflow_version "")
set(ffi_include "")
if(DICE_OP_WITH_TENSORFLOW)
  # TensorFlow knows best where it is and how to compile against it.
  execute_process(
    COMMAND ${Python_EXECUTABLE} ${CMAKE_CURRENT_LIST_DIR}/tensorflow_flags.py
    OUTPUT_VARIABLE tensorflow_flags OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_VARIABLE _errors RESULT_VARIABLE _failed)
  if(_failed)
    message(FATAL_ERROR "TensorFlow cannot be imported by ${Python_EXECUTABLE}: install it "
                        "(pip install tensorflow-cpu), or build without the op: "
                        "-DDICE_OP_WITH_TENSORFLOW=OFF\n${_errors}")
  endif()
  list(POP_FRONT tensorflow_flags tensorflow_version tensorflow_include tensorflow_library xla_library)
  set(ffi_include ${tensorflow_include})
endif()

# TensorFlow 2.19 lacks two kinds of headers. JAX has the one of XLA; for those of LLVM, a few lines of ours suffice.
# Without TensorFlow, JAX is where the header comes from anyway.
if(NOT EXISTS "${ffi_include}/${_ffi_header}")
  execute_process(COMMAND ${Python_EXECUTABLE} -c "import jaxlib; print(jaxlib.__path__[0] + '/include', end='')"
                  OUTPUT_VARIABLE ffi_include ERROR_QUIET)
  if(DICE_OP_WITH_TENSORFLOW)
    list(APPEND tensorflow_include ${CMAKE_CURRENT_LIST_DIR}/tensorflow_2_19)
    if(NOT EXISTS "${ffi_include}/${_ffi_header}")
      read_pyproject(xla_header _jaxlib)
      message(FATAL_ERROR "TensorFlow ${tensorflow_version} lacks the header ${_ffi_header}, which JAX of its time has: "
                          "${Python_EXECUTABLE} -m pip install '${_jaxlib}'")
    endif()
  endif()
endif()
