# How the libraries of the package are linked. A library exports only what its version script (build_tools/*.map) names,
# finds the other libraries in its own folder, and holds no debug symbols.
#
# They are hardened as Linux distributions harden theirs. A function that writes to an array on its stack notices if it
# has written past the end (-fstack-protector-strong), all addresses of other libraries are found at loading and are
# read-only from then on (-z relro, -z now), and no stack may hold code (-z noexecstack).
#
# With DICE_OP_GLIBC, which `make wheels` sets, the libraries also run on systems that are older than this one. GCC still
# compiles, but zig links, because zig knows which symbols each glibc has. libstdc++ is then linked into each library. It
# must come before TensorFlow on the command line, because TensorFlow exports a part of its own libstdc++.

add_compile_options($<$<COMPILE_LANGUAGE:CXX>:-fstack-protector-strong>
                    $<$<COMPILE_LANGUAGE:CUDA>:-Xcompiler=-fstack-protector-strong>)

if(DICE_OP_GLIBC)
  execute_process(COMMAND ${Python_EXECUTABLE} -c "import ziglang" ERROR_QUIET RESULT_VARIABLE _no_zig)
  if(_no_zig)
    message(FATAL_ERROR "DICE_OP_GLIBC needs zig: ${Python_EXECUTABLE} -m pip install ziglang")
  endif()
  foreach(_library libstdc++.a libgcc.a libgcc_s.so.1)
    execute_process(COMMAND ${CMAKE_CXX_COMPILER} -print-file-name=${_library}
                    OUTPUT_VARIABLE _${_library} OUTPUT_STRIP_TRAILING_WHITESPACE)
    if(NOT IS_ABSOLUTE "${_${_library}}")
      message(FATAL_ERROR "DICE_OP_GLIBC needs GCC, but ${CMAKE_CXX_COMPILER} has no ${_library}")
    endif()
  endforeach()
  foreach(_kind LIBRARY MODULE)
    set(CMAKE_CXX_CREATE_SHARED_${_kind}
        "\"${Python_EXECUTABLE}\" -m ziglang cc -target ${CMAKE_SYSTEM_PROCESSOR}-linux-gnu.${DICE_OP_GLIBC} -shared \
<LINK_FLAGS> <SONAME_FLAG><TARGET_SONAME> -o <TARGET> <OBJECTS> ${_libstdc++.a} <LINK_LIBRARIES> ${_libgcc.a} \
${_libgcc_s.so.1}")
  endforeach()
  set(CMAKE_INTERPROCEDURAL_OPTIMIZATION OFF) # zig cannot read GCC's intermediate code
endif()

# set_wheel_library(TARGET MAP [LINK_OPTION ...]) applies these rules to a target that exists already.
function(set_wheel_library name map)
  set_target_properties(${name} PROPERTIES LINKER_LANGUAGE CXX BUILD_WITH_INSTALL_RPATH ON INSTALL_RPATH "$ORIGIN")
  target_link_options(${name} PRIVATE -Wl,--as-needed -Wl,--gc-sections -Wl,-z,relro,-z,now,-z,noexecstack -s
                                      ${ARGN}
                                      -Wl,--version-script=${CMAKE_SOURCE_DIR}/build_tools/${map})
  if(DICE_OP_GLIBC)
    target_sources(${name} PRIVATE ${CMAKE_SOURCE_DIR}/build_tools/old_glibc.cc)
  endif()
  install(TARGETS ${name} LIBRARY DESTINATION dice_op)
endfunction()

# add_wheel_library(TARGET MAP SOURCE ...) adds the library TARGET.so.
function(add_wheel_library name map)
  add_library(${name} SHARED ${ARGN})
  set_target_properties(${name} PROPERTIES PREFIX "" SUFFIX ".so")
  set_wheel_library(${name} ${map} -Wl,-z,defs)
endfunction()
