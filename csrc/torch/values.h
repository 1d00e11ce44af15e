// Checks of what stands inside CPU tensors, before anything is computed. (CUDA tensors are not read back:
// there, RowSpans, BlockTable and the kernels clamp what could lead outside a tensor.)
#pragma once

#include <algorithm>
#include <vector>

#include "core/params.h"
#include "torch/attend_args.h"

namespace flux::torch_ops {

inline void check_spans(const RowSpans& s, int32_t batch, int32_t heads, const char* begin_name, const char* end_name) {
  for (int32_t b = 0; b < batch; ++b)
    for (int32_t h = 0; h < heads; ++h) {
      const int32_t lo = s.begin ? s.begin[b * s.begin_stride_b + h * s.begin_stride_h] : 0;
      const int32_t hi = s.end ? s.end[b * s.end_stride_b + h * s.end_stride_h] : s.capacity;
      FLUX_CHECK(lo >= 0, begin_name, " must not be negative, got ", lo, " for sequence ", b);
      FLUX_CHECK(hi <= s.capacity, end_name, " must not exceed the ", s.capacity, " rows there are, got ", hi,
                 " for sequence ", b);
      FLUX_CHECK(lo <= hi, begin_name, " and ", end_name, " must not decrease, got ", lo, " and ", hi, " for sequence ",
                 b);
    }
}

inline void check_cu_seqlens(const RowSpans& s, int32_t batch) {
  int32_t begin = *s.begin;
  FLUX_CHECK(begin == 0, "cu_seqlens must begin at 0, got ", begin);
  for (int32_t b = 0; b < batch; ++b) {
    const int32_t end = s.end[b * s.end_stride_b];
    FLUX_CHECK(begin <= end, "cu_seqlens must not decrease, got ", begin, " and ", end, " for sequence ", b);
    FLUX_CHECK(end <= s.capacity, "cu_seqlens must not exceed the ", s.capacity, " rows there are, got ", end,
               " for sequence ", b);
    begin = end;
  }
}

inline void check_values(const AttendParams& p, const AttendArgs& a) {
  if (a.q.dim() == 3 && !a.q_end)
    check_cu_seqlens(p.q.rows, p.batch);
  else
    check_spans(p.q.rows, p.batch, 1, "q_begin", "q_end");
  if (a.k.dim() == 3 && !a.kv_end)
    check_cu_seqlens(p.kv.rows, p.batch);
  else
    check_spans(p.kv.rows, p.batch, p.kv.num_heads, "kv_begin", "kv_len");
  for (int32_t b = 0; b < p.batch; ++b)
    for (int32_t h = 0; h < p.kv.num_heads; ++h) {
      if (p.routing.route) {
        const int32_t r = p.routing.route[b * p.routing.stride_b + h * p.routing.stride_h];
        FLUX_CHECK(r == 0 || r == 1, "route must be 0 (full) or 1 (sparse), got ", r, " for sequence ", b);
      }
      if (p.kv.page_table) {
        const Span rows = p.kv.rows(b, h);
        for (int32_t i = rows.begin / p.kv.page_size; i < ceil_div(rows.end, p.kv.page_size); ++i) {
          const int32_t page = p.kv.page_table[b * p.kv.page_stride_b + h * p.kv.page_stride_h + i];
          FLUX_CHECK(page >= 0 && page < p.kv.num_pages, "page_table must index the ", p.kv.num_pages, " pages, got ",
                     page, " at page ", i, " of sequence ", b);
        }
      }
      for (const BlockTable& t : p.routing.blocks) {
        if (!t.blocks) continue;
        const int32_t offset = p.kv.rows(b, h).size() - p.q.rows(b, h).size();
        const int32_t rows = p.q.rows(b, h).size();
        for (int32_t i = 0; i < ceil_div(rows, t.q_width); ++i) {
          const int32_t count = t.counts[(int64_t(b) * p.kv.num_heads + h) * t.q_blocks + i];
          FLUX_CHECK(count >= 0 && count <= t.max_count, "counts must be from 0 to the ", t.max_count,
                     " entries of a block list, got ", count, " for query block ", i, " of sequence ", b, ", head ", h);
          const BlockList list = t(b, h, p.kv.num_heads, i * t.q_width);
          const int32_t last = offset + min_of((i + 1) * t.q_width, rows) - 1;
          for (int32_t n = 0; n < list.count; ++n)
            FLUX_CHECK(list.blocks[n] >= 0 && (n == 0 || list.blocks[n] > list.blocks[n - 1]) && last >= 0 &&
                           list.blocks[n] <= last / list.width,
                       "a block list must ascend from 0 and end at the diagonal, got block ", list.blocks[n],
                       " at entry ", n, " of query block ", i);
        }
      }
    }
}

// Rows of a packed tensor that two sequences claim would be written by both.
inline void check_disjoint(const RowSpans& s, int32_t batch, int32_t heads, const char* rule) {
  if (s.begin_stride_h == 0 && s.end_stride_h == 0) heads = 1;
  std::vector<Span> spans(batch);
  for (int32_t h = 0; h < heads; ++h) {
    for (int32_t b = 0; b < batch; ++b) spans[b] = s(b, h);
    const auto end = std::remove_if(spans.begin(), spans.end(), [](const Span& x) { return x.size() == 0; });
    std::sort(spans.begin(), end, [](const Span& x, const Span& y) { return x.begin < y.begin; });
    const auto two =
        std::adjacent_find(spans.begin(), end, [](const Span& x, const Span& y) { return y.begin < x.end; });
    FLUX_CHECK(two == end, rule, ", got [", two->begin, ", ", two->end, ") and [", two[1].begin, ", ", two[1].end, ")");
  }
}

}  // namespace flux::torch_ops
