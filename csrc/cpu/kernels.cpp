// Compiled once per instruction set, with FLUX_ISA naming it: see CMakeLists.txt.
#include "cpu/kernels.h"

#include "cpu/attend_tile.h"
#include "cpu/backward_tile.h"
#include "cpu/mix_tile.h"
#include "cpu/select_tile.h"

#define FLUX_STRING_OF(x) #x
#define FLUX_STRING(x) FLUX_STRING_OF(x)

namespace flux::cpu::FLUX_ISA {

#ifdef __AVX512BF16__
using ProductOfBFloat16 = BFloat16Product;
#else
using ProductOfBFloat16 = Float32Product;
#endif
#ifdef __AMX_BF16__
using AttendsBFloat16 = TileProduct;
#else
using AttendsBFloat16 = ProductOfBFloat16;
#endif

extern const Kernels table;
const Kernels table = {
    FLUX_STRING(FLUX_ISA),
    {attend_tile<Float32Product, float>, attend_tile<Float32Product, Half>, attend_tile<AttendsBFloat16, BFloat16>},
    {mix_tile<Float32Product, float>, mix_tile<Float32Product, Half>, mix_tile<AttendsBFloat16, BFloat16>},
    {queries_backward<Float32Product, float>, queries_backward<Float32Product, Half>,
     queries_backward<ProductOfBFloat16, BFloat16>},
    {keys_backward<Float32Product, float>, keys_backward<Float32Product, Half>,
     keys_backward<ProductOfBFloat16, BFloat16>},
    {select_tile<Float32Product, float>, select_tile<Float32Product, Half>, select_tile<ProductOfBFloat16, BFloat16>},
};

}  // namespace flux::cpu::FLUX_ISA
