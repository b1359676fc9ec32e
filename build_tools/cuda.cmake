# Adds the CUDA kernels to dice_op_kernels, if nvcc is found. Sets cuda_definition to the macro that says that they are
# there, or to nothing.

set(cuda_definition "")

# The compute capabilities of this machine's GPUs, such as "8.6;9.0".
execute_process(COMMAND nvidia-smi --query-gpu=compute_cap --format=csv,noheader
                OUTPUT_VARIABLE _gpus OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET RESULT_VARIABLE _no_gpu)
if(_no_gpu OR NOT _gpus MATCHES "^[0-9]+\\.[0-9]")
  set(_gpus "")
endif()
if(DICE_OP_CUDA STREQUAL "auto" AND _gpus STREQUAL "")
  message(STATUS "There is no GPU here: the CUDA kernels are left out (DICE_OP_CUDA=on compiles them)")
  return()
endif()

if(NOT CMAKE_CUDA_COMPILER)
  if(NOT DICE_OP_NVCC)
    execute_process(COMMAND ${Python_EXECUTABLE} ${CMAKE_CURRENT_LIST_DIR}/find_nvcc.py
                    OUTPUT_VARIABLE _nvcc OUTPUT_STRIP_TRAILING_WHITESPACE)
    set(DICE_OP_NVCC "${_nvcc}" CACHE FILEPATH "CUDA's compiler" FORCE)
  endif()
  if(NOT DICE_OP_NVCC)
    if(DICE_OP_CUDA STREQUAL "on")
      read_pyproject(cuda _toolkit)
      message(FATAL_ERROR "DICE_OP_CUDA is on, but there is no nvcc on PATH, under CUDA_HOME, or beside "
                          "${Python_EXECUTABLE}: install the CUDA toolkit, or pip install '${_toolkit}'")
    endif()
    message(STATUS "There is no nvcc here: the CUDA kernels are left out")
    return()
  endif()
  set(CMAKE_CUDA_COMPILER ${DICE_OP_NVCC})
endif()

execute_process(COMMAND ${CMAKE_CUDA_COMPILER} --version OUTPUT_VARIABLE _cuda_version ERROR_VARIABLE _cuda_version)
if(_cuda_version MATCHES "release ([0-9]+\\.[0-9]+)")
  set(_cuda_version ${CMAKE_MATCH_1})
else()
  message(FATAL_ERROR "${CMAKE_CUDA_COMPILER} does not run:\n${_cuda_version}")
endif()
if(_cuda_version VERSION_LESS 12)
  set(_problem "${CMAKE_CUDA_COMPILER} is of CUDA ${_cuda_version}, but dice_op needs 12 or later")
  if(DICE_OP_CUDA STREQUAL "on")
    message(FATAL_ERROR "${_problem}: name another one (CUDACXX=/path/to/nvcc), "
                        "or build without CUDA (DICE_OP_CUDA=off)")
  endif()
  message(WARNING "${_problem}: the CUDA kernels are left out")
  unset(CMAKE_CUDA_COMPILER)
  return()
endif()

# nvcc may be a link, or a script that calls another nvcc. Only nvcc itself can say where its toolkit is.
execute_process(COMMAND ${CMAKE_CUDA_COMPILER} --dryrun dice_op.cu OUTPUT_VARIABLE _dryrun ERROR_VARIABLE _dryrun)
if(NOT _dryrun MATCHES "#\\$ TOP=([^\n]+)")
  message(FATAL_ERROR "${CMAKE_CUDA_COMPILER} does not run:\n${_dryrun}")
endif()
string(STRIP "${CMAKE_MATCH_1}" _root)
find_library(DICE_OP_CUDART NAMES libcudart_static.a NO_DEFAULT_PATH REQUIRED HINTS ${_root} /usr
             PATH_SUFFIXES lib64 lib targets/x86_64-linux/lib lib/x86_64-linux-gnu lib/aarch64-linux-gnu)
cmake_path(GET DICE_OP_CUDART PARENT_PATH _library_folder)
set(CMAKE_CUDA_FLAGS_INIT "-L${_library_folder}") # pip's nvcc looks for it in the wrong folder
set(CMAKE_CUDA_RUNTIME_LIBRARY None)              # it is linked below
if(NOT CMAKE_CUDA_ARCHITECTURES)
  set(CMAKE_CUDA_ARCHITECTURES OFF) # the flags below replace this
endif()
enable_language(CUDA)
set(CMAKE_CUDA_STANDARD 17)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
set(CMAKE_CUDA_EXTENSIONS OFF)

string(REPLACE "," ";" _archs "${DICE_OP_CUDA_ARCHS}")
if(_archs STREQUAL "")
  if(_gpus STREQUAL "")
    set(_archs all)
  else()
    string(REPLACE "." "" _gpus "${_gpus}")
    string(REGEX MATCHALL "[0-9]+" _archs "${_gpus}")
    list(REMOVE_DUPLICATES _archs)
  endif()
endif()
if(_archs STREQUAL "all")
  # The architectures of the wheels, as far as this nvcc knows them: those of the wheels for CUDA 13 since 12.8. Portable
  # code for later GPUs is always wanted here.
  file(STRINGS ${CMAKE_CURRENT_LIST_DIR}/wheels.toml _wheels REGEX "^archs = ")
  list(GET _wheels 0 _archs)
  if(_cuda_version VERSION_GREATER_EQUAL 12.8)
    list(GET _wheels 1 _archs)
  endif()
  string(REGEX MATCHALL "[0-9]+" _archs "${_archs}")
  list(POP_BACK _archs _latest)
  list(APPEND _archs ${_latest}+PTX)
endif()
list(SORT _archs COMPARE NATURAL)

# Each architecture gets machine code. +PTX adds portable code of the general kernels, which drivers compile for later
# GPUs.
set(_cuda_flags "")
set(_machine_code "")
set(_portable_code "")
foreach(_entry IN LISTS _archs)
  if(NOT _entry MATCHES "^([0-9]+[af]?)(\\+PTX)?$")
    message(FATAL_ERROR "DICE_OP_CUDA_ARCHS has '${_entry}', but must list architectures such as 80,90 or 80,90+PTX")
  endif()
  set(_arch ${CMAKE_MATCH_1})
  list(APPEND _machine_code "--generate-code=arch=compute_${_arch},code=sm_${_arch}")
  if(CMAKE_MATCH_2)
    list(APPEND _portable_code "--generate-code=arch=compute_${_arch},code=compute_${_arch}")
  endif()
endforeach()
if(_cuda_version VERSION_GREATER_EQUAL 13)
  list(APPEND _cuda_flags --compress-mode=size) # every driver for CUDA 13 can unpack this
else()
  list(APPEND _cuda_flags -Xfatbin=-compress-all)
endif()
if(CMAKE_COMPILE_WARNING_AS_ERROR)
  list(APPEND _cuda_flags "-Xptxas=-warn-spills,-warn-lmem-usage,-Werror")
endif()
list(APPEND _cuda_flags --threads=0) # nvcc compiles for several architectures at a time
list(JOIN _archs "," _cuda_archs)
message(STATUS "CUDA ${_cuda_version} kernels for ${_cuda_archs}")

add_library(dice_op_cuda OBJECT csrc/cuda/dice_op_cuda.cu csrc/cuda/kernels.cu)
target_include_directories(dice_op_cuda PRIVATE csrc)
target_compile_definitions(dice_op_cuda PRIVATE DICE_OP_CUDA_VERSION="${_cuda_version}"
                                                DICE_OP_CUDA_ARCHS="${_cuda_archs}")
target_compile_options(dice_op_cuda PRIVATE ${_cuda_flags} -Xcompiler=-Wall,-Wextra)
set_source_files_properties(csrc/cuda/dice_op_cuda.cu PROPERTIES COMPILE_OPTIONS "${_machine_code};${_portable_code}")
set_source_files_properties(csrc/cuda/kernels.cu PROPERTIES COMPILE_OPTIONS "${_machine_code}")
if(_portable_code)
  target_sources(dice_op_cuda PRIVATE csrc/cuda/portable_kernels.cu)
  set_source_files_properties(csrc/cuda/portable_kernels.cu PROPERTIES COMPILE_OPTIONS "${_portable_code}")
  target_compile_definitions(dice_op_cuda PRIVATE DICE_OP_WITH_PTX)
endif()
set_target_properties(dice_op_cuda PROPERTIES CUDA_VISIBILITY_PRESET hidden CUDA_ARCHITECTURES OFF)
target_sources(dice_op_kernels PRIVATE $<TARGET_OBJECTS:dice_op_cuda>)
set_target_properties(dice_op_kernels PROPERTIES CUDA_ARCHITECTURES OFF) # without it, CMake refuses to write Makefiles

find_package(Threads REQUIRED)
target_link_libraries(dice_op_kernels PRIVATE ${DICE_OP_CUDART} Threads::Threads ${CMAKE_DL_LIBS} rt)
set(cuda_definition DICE_OP_WITH_CUDA)
target_compile_definitions(dice_op_kernels PUBLIC ${cuda_definition})
