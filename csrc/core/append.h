// One more token for every sequence head (one KV head of one sequence, see schedule.h) of a cache with fixed addresses:
// where it goes, and what the page table then lists.
//
// A sequence head owns a run of pages of the pool. The pages of the sink stay where they are; those after it form a
// ring, in which a new token overwrites one that no query sees any more. A sequence head with fewer pages than the page
// table has columns drops tokens: its line of the table leaves out the gap between sink and window.
#pragma once

#include "core/params.h"

namespace flux {

struct AppendParams {
  DType k_dtype = DType::kFloat32, v_dtype = DType::kFloat32, pool_dtype = DType::kFloat32;
  const void* k = nullptr;  // [B, Hkv, 1, D]
  const void* v = nullptr;
  Strides k_stride, v_stride;
  void* k_pool = nullptr;  // [num_pages, page_size, 1, D]; this and all below contiguous
  void* v_pool = nullptr;
  // A sequence head counts its own tokens, so that nothing that is written for it is read for another.
  const int32_t* base = nullptr;    // [B, Hkv] first page of its run
  const int32_t* ring = nullptr;    // [B, Hkv] pages of its ring
  int32_t* page_table = nullptr;    // [B, Hkv, max_pages]
  int32_t* kv_len = nullptr;        // [B, Hkv] tokens stored
  int32_t* seen = nullptr;          // [B, Hkv] tokens so far: the position of the one to come
  int64_t* slots = nullptr;         // [] tokens so far, padding included; only counted up
  const int32_t* active = nullptr;  // [B] 1: a token; 0: none, nothing changes; -1: NaN in its place. Null: 1
  int32_t batch = 0, num_kv_heads = 0, head_dim = 0;
  int32_t num_pages = 0, page_size = 0, max_pages = 0;
  Pattern pattern;  // of the sequence heads that drop tokens
  int32_t sink_pages = 0;
  int32_t unit = 1;  // tokens are dropped by this many: whole pages, and a multiple of pattern.align
  int32_t max_cache_len = 0;

  FLUX_HD int32_t num_seq_heads() const { return batch * num_kv_heads; }
};

// A token that cannot be trusted is stored as this, so that everything computed from it says so.
FLUX_HD uint32_t quiet_nan(DType dtype) {
  return dtype == DType::kFloat32 ? 0x7fc00000u : dtype == DType::kFloat16 ? 0x7e00u : 0x7fc0u;
}

// What one sequence head does in this step. Wrong values inside the tensors lead to wrong pages, never outside a
// tensor.
struct AppendStep {
  int32_t base, last_page, ring, sink_pages, page_size;
  bool active;       // there is a token in this step
  bool full;         // there is no place for it
  bool nan;          // NaN is stored in its place: there is no place, or the caller says so
  int32_t position;  // of the new token; where there is no place, the last one
  bool drops;
  int32_t gap_pages = 0;  // pages dropped before it

  FLUX_HD AppendStep(const AppendParams& p, int32_t seq_head)
      : base(min_of(max_of(p.base[seq_head], 0), p.num_pages - 1)),
        last_page(p.num_pages - 1),
        ring(max_of(p.ring[seq_head], 1)),
        sink_pages(p.sink_pages),
        page_size(p.page_size),
        active(!p.active || p.active[seq_head / p.num_kv_heads] != 0),
        full(p.seen[seq_head] >= p.max_cache_len),
        nan(full || (p.active && p.active[seq_head / p.num_kv_heads] < 0)),
        position(min_of(max_of(p.seen[seq_head], 0), p.max_cache_len - 1)),
        drops(ring < p.max_pages - sink_pages) {
    const int64_t unseen = p.pattern.window_begin(position) - int64_t(sink_pages) * page_size;  // at most `position`
    if (drops && unseen > 0) gap_pages = int32_t(unseen) / p.unit * (p.unit / page_size);
  }

  // Page of the pool that holds page `page` of the sequence.
  FLUX_HD int32_t place(int32_t page) const {
    const int32_t in_run = page < sink_pages ? page : sink_pages + (page - sink_pages) % ring;
    return base + min_of(in_run, last_page - base);
  }

  // The new token among the tokens of the pool.
  FLUX_HD int64_t slot() const { return int64_t(place(position / page_size)) * page_size + position % page_size; }

  FLUX_HD int32_t kv_len() const { return position - gap_pages * page_size + 1; }
  FLUX_HD int32_t num_columns() const { return (position - gap_pages * page_size) / page_size + 1; }
  FLUX_HD int32_t column(int32_t i) const { return place(i < sink_pages ? i : i + gap_pages); }
};

}  // namespace flux
