// The stages on CUDA: plain launchers, the only interface between the torch operators (host compiler) and the kernels
// (nvcc, no torch headers). Nothing here synchronises with the host: lengths and routes stay on the device.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "core/add_order.h"
#include "core/append.h"
#include "core/explanation.h"
#include "core/params.h"
#include "core/schedule.h"
#include "core/selection.h"
#include "core/softmax_state.h"

namespace flux::cuda {

// What the plan stage leaves in device memory for attend and combine.
//
// Work comes as items. Where no tile ends late, an item is one whole tile: sequence heads costliest first, the tiles of
// one beside each other and longest first, so that tiles running at the same time read the same keys; or, where
// sequence heads take turns (`takes_turns`), the longest tile of each, then the second of each. Else item i is an even
// share of all key blocks, ranges[i]. A block of the attend kernel does item blockIdx.x, then what the counter
// `next_item` gives it.
struct PlanHeader {
  int32_t num_tiles;
  int32_t num_items;    // whole tiles: num_tiles; else at most num_workers
  int32_t whole_tiles;  // 1: item i is tile i; 0: item i is ranges[i]
  int32_t next_item;    // handed out beyond those that blocks start with; starts at 0
};

struct PlanView {
  PlanHeader* header = nullptr;
  Tile* tiles = nullptr;        // [max_tiles]
  WorkRange* ranges = nullptr;  // [num_workers], empty where tiles are whole
  // Scratch of the plan stage, where shared memory is too small.
  int64_t* cost = nullptr;        // [max_tiles + 1]
  int64_t* sort_keys = nullptr;   // [sequence heads, up to a power of two]
  int32_t* tile_begin = nullptr;  // [2, sequence heads + 1]
};

// Partials of cut tiles; for slots see partial_slot (item = worker).
struct Partials {
  float* out = nullptr;           // [2 * num_workers, tile_rows, D], not normalised
  SoftmaxState* state = nullptr;  // [2 * num_workers, tile_rows]
  int32_t tile_rows = 0, head_dim = 0;

  FLUX_HD float* out_row(int32_t slot, int32_t row) const { return out + (int64_t(slot) * tile_rows + row) * head_dim; }
  FLUX_HD SoftmaxState& state_of(int32_t slot, int32_t row) const { return state[int64_t(slot) * tile_rows + row]; }
};

struct AttendConfig;
struct Workspace;

// One compiled attend kernel. Its family has a table of all it has (sm80/attend.cpp, sm90/sm90.cu).
struct Instance {
  int32_t family;    // 80 or 90, after the oldest compute capability it runs on
  DType dtype;       // of q, k, v and out
  int32_t head_dim;  // and every smaller one
  int32_t tile_rows;
  int32_t kv_block;
  cudaError_t (*launch)(const AttendParams& p, const AttendConfig& c, const Workspace& w, cudaStream_t stream);
};

// How a call is launched, chosen on the host from sizes, strides and addresses (never from values on the device).
struct AttendConfig {
  const Instance* instance = nullptr;
  TileShape tile;                         // q_tokens: as many queries as a tile of the instance holds
  int32_t num_workers = 0;                // blocks of the attend kernel: all that fit on the device at once
  bool inline_plan = false;               // the attend kernel plans for itself; see plans_inline, plans_few
  TileOrder order = TileOrder::kPlanned;  // of whole tiles, where no plan is needed; see known_order
  bool uncounted = false;                 // and workers need no counter to take them; see is_uncounted
  bool overlap = false;                   // kernels may be launched as dependent_launch.h describes
};

// A sequence head has no more tiles than this: the 1024 of them that exclusive_sum adds up at a time then sum to 31
// bits.
constexpr int32_t kMaxSeqHeadTiles = 1 << 20;

// A problem so small that every block may plan it for itself: one tile per sequence head. It is always split.
constexpr int32_t kInlineTiles = 256;
inline bool plans_inline(const AttendParams& p, const AttendConfig& c) {
  return p.q.max_len <= c.tile.q_tokens && int64_t(p.batch) * p.kv.num_heads <= kInlineTiles;
}

// The same for a prefill kernel, where a warp plans: a tile a lane. It is split if that pays.
constexpr int32_t kWarpTiles = 32;
FLUX_HD int32_t tiles_each(const AttendParams& p, const TileShape& tile) {
  return ceil_div(p.q.max_len, tile.q_tokens);
}
inline bool plans_few(const AttendParams& p, const TileShape& tile) {
  return int64_t(tiles_each(p, tile)) * p.batch * p.kv.num_heads <= kWarpTiles;
}

// A tile of no more rows than this is bound by memory; kernels for it are called decode.
constexpr int32_t kDecodeRows = 16;
// Rows of a tile that held all queries of a sequence.
inline int64_t most_rows(const AttendParams& p) { return int64_t(p.q.max_len) * p.group(); }

struct Device {
  int32_t index;
  int32_t capability;  // 80, 90, ...
  int32_t num_sms;
  bool overlap;  // the kernels' machine code has what dependent_launch.h needs
};

struct Workspace {
  PlanView plan;
  Partials partials;
  size_t bytes = 0;
};

// What the kernels of the gradients leave for each other. Rows of `lse` and `delta` lie as `row` says, as those of the
// forward pass's lse do.
struct BackwardWorkspace {
  float* lse = nullptr;    // times log2(e); +inf where a row sees no key, so that its probabilities are 0
  float* delta = nullptr;  // grad_out . out
  Strides row;
  // Of block lists, bit i of line (sequence head, n): is block n of the keys on the list of query block i?
  uint32_t* listed = nullptr;  // [sequence heads, listed_blocks, listed_words]
  int32_t listed_blocks = 0, listed_words = 0;
  // Where blocks of keys add up dQ in order (sm90/backward_ordered.h).
  float* dq = nullptr;          // [sequence heads, tiles_each, kTileRows, 128], in an order of its own
  uint32_t* tickets = nullptr;  // [sequence heads, tiles_each]: how many blocks of keys have added to a tile
  uint32_t* next = nullptr;     // the next item of the AddOrder
  int32_t tiles_each = 0;
  size_t bytes = 0;
};

// Query tokens of a tile of `tile_rows` rows. A block list belongs to 128 query rows, so with lists a tile must not
// straddle two of them.
inline int32_t q_tokens_of(const AttendParams& p, int32_t tile_rows) {
  const int32_t most = tile_rows / p.group();
  if (!p.routing.has_lists()) return most;
  int32_t tokens = 1;
  while (2 * tokens <= most) tokens *= 2;
  return tokens;
}

inline int32_t num_seq_heads(const AttendParams& p) { return p.batch * p.kv.num_heads; }

// Hands out the memory from `base` on (null: only its size counts), counting `bytes` up.
inline auto taking_from(void* base, size_t& bytes) {
  return [base, &bytes](auto*& pointer, int64_t count) {
    pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(static_cast<char*>(base) + bytes);
    bytes += (size_t(count) * sizeof(*pointer) + 255) / 256 * 256;
  };
}

// Lays the workspace out from `base`.
inline Workspace lay_out(const AttendParams& p, const AttendConfig& c, void* base) {
  Workspace w;
  const auto take = taking_from(base, w.bytes);
  const int64_t tiles = max_tiles(p, c.tile), seq_heads = num_seq_heads(p);
  const int64_t slots = 2 * int64_t(c.num_workers) * c.instance->tile_rows;
  int64_t sorted = 1;
  while (sorted < seq_heads) sorted *= 2;
  take(w.plan.header, 1);
  take(w.plan.tiles, tiles);
  take(w.plan.ranges, c.num_workers);
  take(w.plan.cost, tiles + 1);
  take(w.plan.sort_keys, sorted);
  take(w.plan.tile_begin, 2 * (seq_heads + 1));
  take(w.partials.state, slots);
  take(w.partials.out, slots * p.head_dim);
  w.partials.tile_rows = c.instance->tile_rows;
  w.partials.head_dim = p.head_dim;
  return w;
}

// `in_order`: see adds_in_order.
inline BackwardWorkspace lay_out(const AttendBackwardParams& b, bool in_order, void* base) {
  const AttendParams& p = b.forward;
  const int64_t rows = int64_t(p.q.num_heads) * p.q.rows.capacity;  // of one sequence, or packed: of all
  BackwardWorkspace w;
  w.row = {p.lse_stride.b ? rows : 0, 1, p.q.rows.capacity};
  const auto take = taking_from(base, w.bytes);
  take(w.lse, p.lse_stride.b ? p.batch * rows : rows);
  take(w.delta, p.lse_stride.b ? p.batch * rows : rows);
  if (p.routing.has_lists()) {
    for (const BlockTable& t : p.routing.blocks) {
      if (!t.blocks) continue;
      w.listed_blocks = max_of(w.listed_blocks, ceil_div(p.kv.rows.capacity, t.kv_width));
      w.listed_words = max_of(w.listed_words, ceil_div(t.q_blocks, 32));
    }
    take(w.listed, int64_t(num_seq_heads(p)) * w.listed_blocks * w.listed_words);
  }
  if (in_order) {
    w.tiles_each = int32_t(ceil_div_64(most_rows(p), kTileRows));
    const int64_t tiles = int64_t(num_seq_heads(p)) * w.tiles_each;
    take(w.dq, tiles * kTileRows * 128);
    take(w.tickets, tiles);
    take(w.next, 1);
  }
  return w;
}

// How many blocks of rows (of sequence heads, see view_rows), or of keys, the gradients have at most for one KV head:
// as many for every sequence as the longest may have, or as all their rows fill. (Spans that overlap, which no valid
// input has, are cut off.)
constexpr int32_t kMostRowsOfBlock = 128;
struct BlockCount {
  int64_t padded, packed;
  int64_t most() const { return padded < packed ? padded : packed; }
};
inline BlockCount count_row_blocks(const AttendParams& p, int32_t rows) {
  return {p.batch * ceil_div_64(most_rows(p), rows), p.q.total_rows * p.group() / rows + p.batch};
}
inline BlockCount count_key_blocks(const AttendBackwardParams& b, int32_t keys) {
  const AttendParams& p = b.forward;
  const int64_t each = ceil_div(p.kv.rows.capacity, keys);
  const bool one_tensor = b.grad_k.stride.b == 0;  // of all sequences
  return {p.batch * each, (one_tensor ? 1 : p.batch) * each + p.batch};
}

// An error has a message the operators show; null: none.
struct Status {
  const char* what = nullptr;  // the stage or rule that failed
  cudaError_t error = cudaSuccess;
  bool ok() const { return what == nullptr; }
};

cudaError_t route(const RouteParams& p, cudaStream_t stream);
cudaError_t append(const AppendParams& p, cudaStream_t stream);

struct SelectInstance;  // one compiled kernel of block selection, see select.h
struct SelectConfig {
  const SelectInstance* instance = nullptr;
  int32_t blocks = 0;  // of the grid
  size_t bytes = 0;    // of memory that the call works in
};
// Fills the rest of `c`; the instance too, where it is null: the best.
Status configure(const SelectParams& p, SelectConfig* c);
// The kernels that the current device has for a call, the best first; null past the last.
const SelectInstance* select_instance(const SelectParams& p, int index);
// `memory` is 256-byte aligned device memory of c.bytes.
Status select(const SelectParams& p, const SelectConfig& c, void* memory, cudaStream_t stream);

// Picks the attend kernel, tiles and workers for the current device. Fails with a clear message where nothing fits.
Status configure(const AttendParams& p, AttendConfig* c);
// The same for people who ask.
Status explain(const AttendParams& p, Explanation* e);
// Runs plan, attend and combine; `memory` is 256-byte aligned device memory of lay_out(p, c, nullptr).bytes.
Status attend(const AttendParams& p, const AttendConfig& c, void* memory, cudaStream_t stream);

// Does one kernel compute all gradients of heads with full attention, adding dQ up in memory (sm90/backward_ordered.h)?
// Chosen from shapes and patterns alone: of those that it can do, where heads may have full attention.
bool adds_in_order(const AttendBackwardParams& b);
bool can_add_in_order(const AttendBackwardParams& b);

// The gradients; `memory` is 256-byte aligned device memory of lay_out(b, adds_in_order(b), nullptr).bytes. Rows that
// belong to no sequence are not written.
Status attend_backward(const AttendBackwardParams& b, void* memory, cudaStream_t stream);
// Its parts: are there few enough rows and heads; and where there are block lists, w.listed.
Status check_counts(const AttendBackwardParams& b);
cudaError_t index_lists(const AttendParams& p, const BackwardWorkspace& w, cudaStream_t stream);

// Asked once per device: the driver takes microseconds to answer.
cudaError_t current_device(Device* d);
// The same, and an error where the kernels do not run on it, or not of the dtype.
Status supported_device(DType dtype, Device* d);
// What is said where more query heads share a KV head than a tile has rows.
constexpr const char* no_kernel_fits(int32_t head_dim) {
  return head_dim > 128 ? "no kernel fits: at most 64 query heads may share a KV head above head_dim 128"
                        : "no kernel fits: at most 128 query heads may share a KV head";
}

// The stages before and after the attend kernel.
cudaError_t plan(const AttendParams& p, const AttendConfig& c, const PlanView& plan, cudaStream_t stream);
cudaError_t combine(const AttendParams& p, const AttendConfig& c, const Workspace& w, cudaStream_t stream);
// Sets a counter of tiles to 0. By a kernel, as kernels may overlap: nothing starts beside a cudaMemsetAsync.
cudaError_t clear_counter(int32_t* next_item, bool overlap, cudaStream_t stream);

// The families of attend kernels. False: the family has none for the problem.
//
//           prefill             decode (at most kDecodeRows rows)
//   sm90    sm90/kernel.h       none: sm80's, whose smaller tiles suit it, runs on Hopper too
//   sm80    sm80/prefill.h      sm80/decode.h
namespace sm80 {
bool configure(const AttendParams& p, const Device& device, AttendConfig* c);
}
namespace sm90 {
bool configure(const AttendParams& p, const Device& device, AttendConfig* c);
}

}  // namespace flux::cuda
