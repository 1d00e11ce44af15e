// Attention on CUDA: the choice of the kernel, and the stages one after the other.
#include <climits>

#include "cuda/cuda.h"

namespace flux::cuda {

Status configure(const AttendParams& p, AttendConfig* c) {
  Device device{};
  if (const Status s = supported_device(p.dtype, &device); !s.ok()) return s;
  if (num_seq_heads(p) >= 1 << kSeqHeadBits)
    return {"q must have less than 2^22 (sequence, KV head) pairs", cudaSuccess};
  c->overlap = device.overlap;
  const cudaError_t before = cudaPeekAtLastError();  // somebody else's, who may still want to see it
#ifdef FLUX_SM90
  const bool found = (device.capability == 90 && sm90::configure(p, device, c)) || sm80::configure(p, device, c);
#else
  const bool found = sm80::configure(p, device, c);
#endif
  if (!found) return {no_kernel_fits(p.head_dim), cudaPeekAtLastError() == before ? cudaSuccess : cudaGetLastError()};
  if (ceil_div(p.q.max_len, c->tile.q_tokens) > kMaxSeqHeadTiles || max_tiles(p, c->tile) > INT_MAX)
    return {"q must have at most 2^20 tiles per sequence and 2^31 in all: split the batch", cudaSuccess};
  return {};
}

Status explain(const AttendParams& p, Explanation* e) {
  if (p.batch == 0 || p.q.max_len == 0) return {};
  AttendConfig c;
  if (const Status s = configure(p, &c); !s.ok()) return s;
  Device device{};
  if (cudaError_t error = current_device(&device)) return {"asking for the device", error};
  e->processor = device.capability;
  e->family = c.instance->family;
  e->decode = c.instance->tile_rows == kDecodeRows;
  e->tile_rows = c.instance->tile_rows;
  e->q_tokens = c.tile.q_tokens;
  e->kv_block = c.tile.kv_block;
  e->head_dim = c.instance->head_dim;
  e->workers = c.num_workers;
  e->plans_itself = c.inline_plan || c.order != TileOrder::kPlanned;
  e->workspace_bytes = int64_t(lay_out(p, c, nullptr).bytes);
  return {};
}

Status attend(const AttendParams& p, const AttendConfig& c, void* memory, cudaStream_t stream) {
  const Workspace w = lay_out(p, c, memory);
  if (cudaError_t e = plan(p, c, w.plan, stream)) return {"plan", e};
  if (cudaError_t e = c.instance->launch(p, c, w, stream)) return {"attend", e};
  if (c.order != TileOrder::kPlanned) return {};  // nothing was cut
  if (cudaError_t e = combine(p, c, w, stream)) return {"combine", e};
  return {};
}

}  // namespace flux::cuda
