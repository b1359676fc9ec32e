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
endif()

# _version_of(FOLDER VARIABLE) reads which version of the interface the headers in a folder have, such as 0.1.
function(_version_of folder variable)
  set(_numbers "")
  if(EXISTS "${folder}/xla/ffi/api/c_api.h")
    file(STRINGS "${folder}/xla/ffi/api/c_api.h" _lines REGEX "^#define XLA_FFI_API_(MAJOR|MINOR) ")
    string(REGEX MATCHALL "[0-9]+" _numbers "${_lines}")
  endif()
  list(JOIN _numbers "." _numbers)
  set(${variable} "${_numbers}" PARENT_SCOPE)
endfunction()

# A runtime takes handlers of its own version of the interface and of earlier ones. So the earliest header that there is
# serves the most, be it TensorFlow's or JAX's. (TensorFlow 2.19 has none.)
execute_process(COMMAND ${Python_EXECUTABLE} -c "import jaxlib; print(jaxlib.__path__[0] + '/include', end='')"
                OUTPUT_VARIABLE _jax_include ERROR_QUIET)
foreach(_folder ${tensorflow_include} ${_jax_include})
  _version_of(${_folder} _version)
  if(EXISTS "${_folder}/${_ffi_header}" AND (ffi_include STREQUAL "" OR _version VERSION_LESS _ffi_version))
    set(ffi_include ${_folder})
    set(_ffi_version ${_version})
  endif()
endforeach()

if(DICE_OP_WITH_TENSORFLOW)
  read_pyproject(xla_header _jaxlib)
  set(_mend "which JAX of its time has: ${Python_EXECUTABLE} -m pip install '${_jaxlib}'")
  if(NOT ffi_include)
    message(FATAL_ERROR "TensorFlow ${tensorflow_version} lacks the header ${_ffi_header}, ${_mend}")
  endif()
  _version_of(${tensorflow_include} _version)
  if(_version AND _version VERSION_LESS _ffi_version)
    message(FATAL_ERROR "TensorFlow ${tensorflow_version} takes handlers of version ${_version} of XLA's interface, but "
                        "${ffi_include} has version ${_ffi_version}: it needs the header ${_ffi_header} of ${_version}, "
                        "${_mend}")
  endif()
  # It also lacks some headers of LLVM, in place of which a few lines of ours suffice.
  if(NOT EXISTS "${tensorflow_include}/${_ffi_header}")
    list(APPEND tensorflow_include ${CMAKE_CURRENT_LIST_DIR}/tensorflow_2_19)
  endif()
endif()
