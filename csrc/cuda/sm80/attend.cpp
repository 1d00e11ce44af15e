// The sm80 family: cp.async and mma.sync, for every GPU since compute capability 8.0.
#include <algorithm>

#include "cuda/sm80/kernels.h"

namespace flux::cuda::sm80 {
namespace {

struct Entry {
  const Instance& instance;
  int (*blocks_per_multiprocessor)(int device);
};

template <DType kDType, int kDim, int kRows>
constexpr Entry entry() {
  using K = Kernel<kDType, kDim, kRows>;
  return {K::instance, K::blocks_per_multiprocessor};
}

// In this order, on which find_entry relies: by type, then by head dimension, then by rows.
const Entry kEntries[] = {
    entry<DType::kFloat16, 64, kDecodeRows>(),   entry<DType::kFloat16, 64, kSmallRows>(),
    entry<DType::kFloat16, 64, 128>(),           entry<DType::kFloat16, 96, kDecodeRows>(),
    entry<DType::kFloat16, 96, kSmallRows>(),    entry<DType::kFloat16, 96, 128>(),
    entry<DType::kFloat16, 128, kDecodeRows>(),  entry<DType::kFloat16, 128, kSmallRows>(),
    entry<DType::kFloat16, 128, 128>(),          entry<DType::kFloat16, 256, kDecodeRows>(),
    entry<DType::kFloat16, 256, kSmallRows>(),   entry<DType::kBFloat16, 64, kDecodeRows>(),
    entry<DType::kBFloat16, 64, kSmallRows>(),   entry<DType::kBFloat16, 64, 128>(),
    entry<DType::kBFloat16, 96, kDecodeRows>(),  entry<DType::kBFloat16, 96, kSmallRows>(),
    entry<DType::kBFloat16, 96, 128>(),          entry<DType::kBFloat16, 128, kDecodeRows>(),
    entry<DType::kBFloat16, 128, kSmallRows>(),  entry<DType::kBFloat16, 128, 128>(),
    entry<DType::kBFloat16, 256, kDecodeRows>(), entry<DType::kBFloat16, 256, kSmallRows>(),
};

// The smallest head dimension that holds the problem's; of its tiles the smallest that holds all queries of a sequence,
// or else the largest. None: not even one query's heads fit into a tile.
const Entry* find_entry(const AttendParams& p) {
  const int64_t rows_wanted = std::max<int64_t>(most_rows(p), p.group());
  const Entry* best = nullptr;
  for (const Entry& e : kEntries) {
    const Instance& i = e.instance;
    if (i.dtype != p.dtype || i.head_dim < p.head_dim) continue;
    if (best && (i.head_dim > best->instance.head_dim || best->instance.tile_rows >= rows_wanted)) break;
    best = &e;
  }
  return best && best->instance.tile_rows >= p.group() ? best : nullptr;
}

}  // namespace

bool configure(const AttendParams& p, const Device& device, AttendConfig* c) {
  const Entry* e = find_entry(p);
  if (!e) return false;
  c->instance = &e->instance;
  c->tile = {q_tokens_of(p, e->instance.tile_rows), e->instance.kv_block};
  c->num_workers = e->blocks_per_multiprocessor(device.index) * device.num_sms;
  c->inline_plan = e->instance.tile_rows == kDecodeRows && plans_inline(p, *c);
  return c->num_workers > 0;
}

}  // namespace flux::cuda::sm80
