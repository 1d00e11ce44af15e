// The operators' schemas; the only place that has them.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(flux_ext, m) {
  // q [B, S, Hq, D] (or packed [T, Hq, D]), k, v -> out like q, lse [B, Hq, S] (or [Hq, T]).
  // Where the rows of packed sequences follow each other, cu_seqlens [B + 1] may stand for q_begin and q_end, or for
  // kv_begin and kv_end: it is given as the first, and the second is None.
  // patterns: sink, window, last_q, align, block list width (0: no lists) of the full pattern, then of the sparse one.
  m.def(
      "attend(Tensor q, Tensor k, Tensor v, Tensor? route, int[] patterns, Tensor? full_blocks, Tensor? full_counts, "
      "Tensor? sparse_blocks, Tensor? sparse_counts, float scale, Tensor? q_begin, Tensor? q_end, Tensor? kv_begin, "
      "Tensor? kv_end, Tensor? page_table) -> (Tensor, Tensor)");
  // Which kernel `attend` would take for the same arguments, without running it: int64 [11] on the CPU, the numbers of
  // struct Explanation (csrc/core/explanation.h) in its order:
  //   0 family           of kernels: 0 the CPU's, 80 csrc/cuda/sm80, 90 csrc/cuda/sm90
  //   1 processor        CPU: 0 portable, 1 avx2, 2 avx512, 3 avx512_bf16, 4 amx_bf16; CUDA: of the device, 80, 90, ...
  //   2 decode           1 the kernel for few rows per tile, 0 the one for many
  //   3 tile_rows        rows of a tile that there is room for: queries times query heads of a KV head
  //   4 q_tokens         queries of a tile
  //   5 kv_block         keys of one step
  //   6 head_dim         that is computed with: the call's, rounded up
  //   7 workers          threads, or thread blocks, that share the work; 0: nothing to do, and all numbers are 0
  //   8 plans_itself     1: every thread block plans for itself, without a launch for it
  //   9 workspace_bytes  memory that is allocated for the call, besides the outputs, at most
  //  10 copies           CUDA: the sum of 1 (q), 2 (k), 4 (v) for those copied at every call, as they are not aligned
  // Arguments are checked as `attend` checks them, but for the values inside CPU tensors.
  m.def(
      "explain(Tensor q, Tensor k, Tensor v, Tensor? route, int[] patterns, Tensor? full_blocks, Tensor? full_counts, "
      "Tensor? sparse_blocks, Tensor? sparse_counts, float scale, Tensor? q_begin, Tensor? q_end, Tensor? kv_begin, "
      "Tensor? kv_end, Tensor? page_table) -> Tensor");
  // Gradients of q, k and v.
  m.def(
      "attend_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? route, "
      "int[] patterns, Tensor? full_blocks, Tensor? full_counts, Tensor? sparse_blocks, Tensor? sparse_counts, "
      "float scale, Tensor? q_begin, Tensor? q_end, Tensor? kv_begin, Tensor? kv_end) -> (Tensor, Tensor, Tensor)");
  // (1 - weight) * full + weight * sparse in one walk over the keys. weight: float32 [B] or [B, Hkv]. On CUDA the full
  // pattern must show every key.
  // -> mixed, full, sparse like q, full_lse, sparse_lse [B, Hq, S] (or [Hq, T]).
  m.def(
      "mix(Tensor q, Tensor k, Tensor v, Tensor weight, int[] patterns, Tensor? full_blocks, Tensor? full_counts, "
      "Tensor? sparse_blocks, Tensor? sparse_counts, float scale, Tensor? q_begin, Tensor? q_end, Tensor? kv_begin, "
      "Tensor? kv_end, Tensor? page_table) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  // Gradients of q, k, v and weight.
  m.def(
      "mix_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor full, Tensor sparse, Tensor full_lse, "
      "Tensor sparse_lse, Tensor weight, int[] patterns, Tensor? full_blocks, Tensor? full_counts, "
      "Tensor? sparse_blocks, Tensor? sparse_counts, float scale, Tensor? q_begin, Tensor? q_end, Tensor? kv_begin, "
      "Tensor? kv_end) -> (Tensor, Tensor, Tensor, Tensor)");
  // x [B, S, H, D] (or packed [T, H, D]) -> pooled [B, D], logits [B, 2], route [B]; per head: [B, H, ...].
  m.def(
      "route(Tensor x, Tensor[] weights, int pool_size, bool per_head, Tensor? begin, Tensor? end) -> "
      "(Tensor, Tensor, Tensor)");
  // Which key blocks each block of 128 queries keeps: q and k as `attend` takes them -> blocks, int32 [B, Hkv,
  // q_blocks, kv_blocks], ascending, 0 from the count on, and counts, int32 [B, Hkv, q_blocks]. Where the route is not
  // `mode`, counts are 0. stride: 8 or 16, width: keys per block, 64 or 128, scale: of attention's scores.
  m.def(
      "select_blocks(Tensor q, Tensor k, float threshold, int stride, int width, float scale, Tensor? route, int mode, "
      "Tensor? q_begin, Tensor? q_end, Tensor? kv_begin, Tensor? kv_end, Tensor? page_table) -> (Tensor, Tensor)");
  // One more token, k and v [B, Hkv, 1, D], for every KV head of every sequence of a cache with fixed addresses.
  // pattern: sink, window, last_q, align. active [B]: 1 a token, 0 none, -1 NaN in its place.
  m.def(
      "append(Tensor k, Tensor v, Tensor(a!) k_pool, Tensor(b!) v_pool, Tensor base, Tensor ring, "
      "Tensor(c!) page_table, Tensor(d!) kv_len, Tensor(e!) seen, Tensor(f!) slots, int[] pattern, "
      "int max_cache_len, Tensor? active=None) -> ()");
}
