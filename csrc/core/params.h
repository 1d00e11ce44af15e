// What the stages take: pointers with their shapes, sizes, strides in elements. No torch, no CUDA.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/pattern.h"

namespace flux {

enum class DType : int32_t { kFloat32, kFloat16, kBFloat16 };

// Rows [begin, end) of a tensor that belong to each sequence. Null begin: 0. Null end: `capacity`.
// cu_seqlens [B + 1] is {cu_seqlens, cu_seqlens + 1}; left padding is {padding, null}; a cache is {null, kv_len}.
// Bounds are clamped to [0, capacity], so that no value can lead outside the tensor.
struct RowSpans {
  const int32_t* begin = nullptr;  // [B] or [B, Hkv]
  const int32_t* end = nullptr;    // [B] or [B, Hkv]
  int32_t begin_stride_b = 1, begin_stride_h = 0;
  int32_t end_stride_b = 1, end_stride_h = 0;
  int32_t capacity = 0;

  FLUX_HD Span operator()(int32_t b, int32_t h) const {
    int32_t lo = begin ? begin[b * begin_stride_b + h * begin_stride_h] : 0;
    int32_t hi = end ? end[b * end_stride_b + h * end_stride_h] : capacity;
    lo = min_of(max_of(lo, 0), capacity);
    hi = min_of(max_of(hi, lo), capacity);
    return {lo, hi};
  }
};

struct Strides {
  int64_t b = 0, s = 0, h = 0;  // sequence (or page), row, head; the last dimension is contiguous
};

constexpr int32_t kQueryBlock = 128;  // queries that share a block list

// Block lists of every (sequence, KV head, query block of `width` rows). Null blocks: none.
struct BlockTable {
  const int32_t* blocks = nullptr;  // [B, Hkv, q_blocks, max_count]
  const int32_t* counts = nullptr;  // [B, Hkv, q_blocks]
  int32_t q_blocks = 0, max_count = 0;
  int32_t q_width = kQueryBlock, kv_width = 128;

  FLUX_HD BlockList operator()(int32_t b, int32_t h, int32_t num_kv_heads, int32_t q_row) const {
    if (!blocks) return {};
    const int64_t i = (int64_t(b) * num_kv_heads + h) * q_blocks + q_row / q_width;
    return {blocks + i * max_count, min_of(max_of(counts[i], 0), max_count), kv_width};
  }
};

// Where a tensor lies. [B, S, H, D], or packed [T, H, D] with stride.b = 0, or pages [num_pages, page_size, H, D]; the
// last dimension is contiguous.
struct View {
  const void* data = nullptr;
  Strides stride;
};
struct MutableView {
  void* data = nullptr;
  Strides stride;
};

struct Queries {
  const void* data = nullptr;  // [B, S, Hq, D], or packed [T, Hq, D], see View
  Strides stride;
  RowSpans rows;  // of each sequence
  int32_t num_heads = 0;
  int32_t max_len = 0;     // no sequence has more queries than this,
  int64_t total_rows = 0;  // nor all of them together; both known on the host: they bound the tiles
};

// What is attended to: the keys and values of every sequence, in tensors or in pages.
struct KeyValues {
  View k, v;      // [B, Skv, Hkv, D]; packed [T, Hkv, D]; paged [num_pages, page_size, Hkv or 1, D]
  RowSpans rows;  // of each sequence, or of each KV head of each
  const int32_t* page_table = nullptr;  // [B, max_pages] or [B, Hkv, max_pages]; null: not paged
  int64_t page_stride_b = 0, page_stride_h = 0;
  int32_t num_heads = 0;
  int32_t page_size = 0, num_pages = 0;
  bool pages_per_head = false;  // the table has a line per head, and the pages hold one head
};

// How: each sequence, or each KV head of each, by one of two modes. A mode is a pattern and, where it is block-sparse,
// the lists of blocks.
struct Routing {
  const int32_t* route = nullptr;  // [B] or [B, Hkv]; 0 full, else sparse; null: all full
  int32_t stride_b = 1, stride_h = 0;
  Pattern patterns[2];  // full, sparse
  BlockTable blocks[2];

  FLUX_HD int32_t mode(int32_t b, int32_t h) const { return route && route[b * stride_b + h * stride_h] != 0 ? 1 : 0; }
  bool has_lists() const { return blocks[0].blocks || blocks[1].blocks; }
};

// A call of attention: queries, what they attend to and how. The planner reads sizes, bounds and routing alone.
struct AttendParams {
  int32_t batch = 0, head_dim = 0;
  DType dtype = DType::kFloat32;  // of q, k, v and out
  float scale = 1.f;
  Queries q;
  KeyValues kv;
  Routing routing;
  MutableView out;       // as q
  float* lse = nullptr;  // [B, Hq, S], or packed [Hq, T]
  Strides lse_stride;

  FLUX_HD int32_t group() const { return q.num_heads / kv.num_heads; }  // query heads that share a KV head
};

struct AttendBackwardParams {
  AttendParams forward;        // q, k, v, out, lse as left by the forward pass; never paged
  View grad_out;               // as q
  MutableView grad_q;          // as q
  MutableView grad_k, grad_v;  // as k
};

// One linear layer of a router, y = weight x + bias.
struct Linear {
  const void* weight = nullptr;  // [out, in], contiguous
  const void* bias = nullptr;    // [out]
  int32_t in = 0, out = 0;
};

// Encoder: 2 layers with SiLU between; classifier: 3 layers with SiLU between.
constexpr int kRouterLayers = 5;
constexpr int kEncoderLayers = 2;

// The decision. What is not finite chooses full: where the states of a prompt have overflowed nothing is left out.
FLUX_HD int32_t decide_route(float sparse, float full) {
  return sparse >= full && sparse < INFINITY && full > -INFINITY;
}

struct RouteParams {
  DType dtype = DType::kFloat32, weight_dtype = DType::kFloat32;
  const void* x = nullptr;  // [B, S, H, D], or packed [T, H, D] with strides.b = 0
  Strides x_stride;
  RowSpans rows;
  int32_t batch = 0, num_heads = 0, head_dim = 0;
  int32_t pool_size = 100;  // rows pooled at either end of the sequence
  bool per_head = false;    // one decision per head instead of one per sequence
  Linear layers[kRouterLayers];
  float* pooled = nullptr;   // [B, D] or [B, H, D]
  float* logits = nullptr;   // [B, 2] or [B, H, 2]
  int32_t* route = nullptr;  // [B] or [B, H]
};

}  // namespace flux
