# Finds TensorFlow, and the header of XLA's foreign function interface. Sets:
#
#   tensorflow_version                     all of these are empty without TensorFlow
#   tensorflow_include, tensorflow_flags   how to compile against it
#   tensorflow_library, xla_library        its main library, and the library that holds its compiler
#   ffi_include                            the folder that has xla/ffi/api/ffi.h, or nothing

set(_ffi_header xla/ffi/api/ffi.h)
set(tensorflow_version "")
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
endif()

# A runtime takes handlers of its own version of the interface and of earlier ones.
set(_packages jaxlib)
if(DICE_OP_WITH_TENSORFLOW)
  list(PREPEND _packages tensorflow)
endif()
execute_process(COMMAND ${Python_EXECUTABLE} ${CMAKE_CURRENT_LIST_DIR}/find_ffi_header.py ${_packages}
                OUTPUT_VARIABLE _found OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
list(GET _found 0 ffi_include)
list(GET _found 1 _ffi_version)
list(GET _found 2 _own_version)

if(DICE_OP_WITH_TENSORFLOW)
  read_pyproject(xla_header _jaxlib)
  set(_mend "which JAX of its time has: ${Python_EXECUTABLE} -m pip install '${_jaxlib}'")
  if(NOT ffi_include)
    message(FATAL_ERROR "TensorFlow ${tensorflow_version} lacks the header ${_ffi_header}, ${_mend}")
  endif()
  if(_own_version AND _own_version VERSION_LESS _ffi_version)
    message(FATAL_ERROR "TensorFlow ${tensorflow_version} takes handlers of version ${_own_version} of XLA's interface, "
                        "but ${ffi_include} has version ${_ffi_version}: it needs the header ${_ffi_header} of "
                        "${_own_version}, ${_mend}")
  endif()
  # It also lacks some headers of LLVM, in place of which a few lines of ours suffice.
  if(NOT EXISTS "${tensorflow_include}/${_ffi_header}")
    list(APPEND tensorflow_include ${CMAKE_CURRENT_LIST_DIR}/tensorflow_2_19)
  endif()
endif()
