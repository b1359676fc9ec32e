# Sets VARIABLE to the first quoted text of the line "KEY = ..." in pyproject.toml, which is where versions and
# requirements are written down.
function(read_pyproject key variable)
  file(STRINGS ${CMAKE_CURRENT_SOURCE_DIR}/pyproject.toml line REGEX "^${key} = ")
  if(NOT line MATCHES "\"([^\"]+)\"")
    message(FATAL_ERROR "pyproject.toml has no line '${key} = \"...\"'")
  endif()
  set(${variable} "${CMAKE_MATCH_1}" PARENT_SCOPE)
endfunction()
