# Target Cutlass::headers: CUTLASS and CuTe 4.x, headers only.
#
# FLUX_CUTLASS_INCLUDE names the folder that holds cute/ and cutlass/; the package nvidia-cutlass brings it as
# cutlass_library/source/include.
if(NOT EXISTS "${FLUX_CUTLASS_INCLUDE}/cute/tensor.hpp")
  message(FATAL_ERROR "FLUX_CUTLASS_INCLUDE='${FLUX_CUTLASS_INCLUDE}' has no CuTe headers (pip install nvidia-cutlass==4.2.0.0)")
endif()
file(STRINGS "${FLUX_CUTLASS_INCLUDE}/cutlass/version.h" Cutlass_major REGEX "#define CUTLASS_MAJOR ")
if(NOT Cutlass_major MATCHES " 4")
  message(FATAL_ERROR "CUTLASS 4.x is needed, ${FLUX_CUTLASS_INCLUDE} says: ${Cutlass_major}")
endif()
if(NOT TARGET Cutlass::headers)
  add_library(Cutlass::headers INTERFACE IMPORTED)
  target_include_directories(Cutlass::headers SYSTEM INTERFACE ${FLUX_CUTLASS_INCLUDE})
endif()
set(Cutlass_FOUND TRUE)
