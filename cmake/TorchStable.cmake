# Target TorchStable: torch's stable-ABI headers and a link-time stand-in for its libraries.
#
# find_package(Torch) is not used: it needs torch's libraries, brings the whole C++ ABI and, in a CUDA torch, a full
# CUDA toolkit. The stable ABI is a set of extern "C" functions found at load time, so an empty library with the right
# name is enough to record the dependency. At run time `import torch` has already loaded the real one.
if(NOT EXISTS "${FLUX_TORCH_INCLUDE}/torch/csrc/stable/library.h")
  message(FATAL_ERROR "FLUX_TORCH_INCLUDE='${FLUX_TORCH_INCLUDE}' has no stable-ABI headers (torch >= 2.10)")
endif()

string(REGEX MATCH "^([0-9]+)\\.([0-9]+)$" _ "${FLUX_TORCH_TARGET}")
math(EXPR torch_target "(${CMAKE_MATCH_1} << 56) | (${CMAKE_MATCH_2} << 48)" OUTPUT_FORMAT HEXADECIMAL)

file(WRITE ${CMAKE_BINARY_DIR}/torch_stand_in/empty.cpp "")
foreach(lib torch torch_cpu)
  add_library(stand_in_${lib} SHARED ${CMAKE_BINARY_DIR}/torch_stand_in/empty.cpp)
  set_target_properties(stand_in_${lib} PROPERTIES OUTPUT_NAME ${lib}
    LIBRARY_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/torch_stand_in)
endforeach()

add_library(TorchStable INTERFACE)
target_include_directories(TorchStable SYSTEM INTERFACE ${FLUX_TORCH_INCLUDE})
target_compile_definitions(TorchStable INTERFACE TORCH_TARGET_VERSION=${torch_target})
target_link_options(TorchStable INTERFACE -Wl,--no-as-needed)
target_link_libraries(TorchStable INTERFACE stand_in_torch stand_in_torch_cpu)
