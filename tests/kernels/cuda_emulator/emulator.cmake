# Builds the package with its CUDA kernels on the emulator, and the library of benchmarks/gpu/device.cu too:
#
#   cmake ... -DDICE_OP_CUDA=off -DCMAKE_PROJECT_dice_op_INCLUDE=tests/kernels/cuda_emulator/emulator.cmake
#
# CMake reads this file when the project begins, and calls the function when all of its targets are there.
function(add_emulated_kernels emulator)
  set(cuda csrc/cuda/dice_op_cuda.cu csrc/cuda/kernels.cu)
  set(device benchmarks/gpu/device.cu)
  set_source_files_properties(${cuda} ${device} PROPERTIES LANGUAGE CXX)

  add_library(emulator OBJECT ${emulator}/cuda_emulator.cc)
  add_library(dice_op_cuda OBJECT ${cuda})
  target_include_directories(dice_op_cuda PRIVATE csrc)
  target_compile_definitions(dice_op_cuda PRIVATE DICE_OP_CUDA_VERSION="0.0" DICE_OP_CUDA_ARCHS="emulator")
  target_sources(dice_op_kernels PRIVATE $<TARGET_OBJECTS:dice_op_cuda> $<TARGET_OBJECTS:emulator>)
  target_compile_definitions(dice_op_kernels PUBLIC DICE_OP_WITH_CUDA)
  if(TARGET dice_op_handlers)
    target_compile_definitions(dice_op_handlers PRIVATE DICE_OP_WITH_CUDA)
  endif()

  add_library(gpu_device SHARED ${device} $<TARGET_OBJECTS:emulator>)
  foreach(target dice_op_cuda gpu_device)
    target_include_directories(${target} PRIVATE ${emulator})
    target_compile_options(${target} PRIVATE -Wno-unknown-pragmas -Wno-psabi)
  endforeach()
endfunction()

cmake_language(EVAL CODE "cmake_language(DEFER CALL add_emulated_kernels \"${CMAKE_CURRENT_LIST_DIR}\")")
