// The attend stage on Hopper (TMA, WGMMA): the interface to the rest of the CUDA backend.
#pragma once

#include "cuda/cuda.h"

namespace flux::cuda::sm90 {

// Chooses tile and tile_rows for a problem. False: its layout, type or head dimension is left to the sm80 kernels.
bool configure(const AttendParams& p, AttendConfig& c);

// Runs the plan's tiles on c.num_workers persistent thread blocks, one per multiprocessor.
cudaError_t attend(const AttendParams& p, const AttendConfig& c, const PlanView& plan, const Partials& partials,
                   cudaStream_t stream);

}  // namespace flux::cuda::sm90
