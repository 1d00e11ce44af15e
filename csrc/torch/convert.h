// Tensors to the parts of parameter structs, checked. Shared by all operators.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "core/params.h"
#include "torch/checks.h"

namespace flux::torch_ops {

using OptionalTensor = std::optional<Tensor>;

// The kernels find an entry of the routes and row bounds by offsets of 32 bits. A view that reaches further than that
// into its memory is copied: these tensors are tiny.
inline OptionalTensor near(const OptionalTensor& t) {
  if (!t) return t;
  constexpr int64_t kReach = std::numeric_limits<int32_t>::max();
  int64_t reach = 0;
  for (int64_t d = 0; d < t->dim() && reach <= kReach; ++d)
    if (t->size(d) > 1) reach = t->stride(d) > kReach ? t->stride(d) : reach + (t->size(d) - 1) * t->stride(d);
  if (reach <= kReach) return t;
  Tensor copy = torch::stable::new_empty(*t, t->sizes());
  return torch::stable::copy_(copy, *t);
}

constexpr int kMaxHeadDim = 256;

inline DType to_dtype(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::Half:
      return DType::kFloat16;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    default:
      break;
  }
  FLUX_CHECK(false, name, " must be float16, bfloat16 or float32, got ", name_of(t.scalar_type()));
  return {};
}

inline int32_t to_int32(int64_t value, const char* name) {
  FLUX_CHECK(value >= 0 && value <= std::numeric_limits<int32_t>::max(), name, " must fit in 31 bits, got ", value);
  return int32_t(value);
}

// Strides of [.., S, H, D], with or without the leading dimension.
// A dimension of one entry may have any stride; nothing may depend on it.
inline Strides strides_of(const Tensor& t) {
  const auto stride = [&](int64_t d) { return t.size(d) > 1 ? t.stride(d) : 0; };
  const int64_t n = t.dim();
  return {n == 4 ? stride(0) : 0, stride(n - 3), stride(n - 2)};
}

inline void check_bounds_shape(const Tensor& t, int64_t batch, int64_t heads, bool per_head, const char* name) {
  FLUX_CHECK(
      (t.dim() == 1 && t.size(0) == batch) || (per_head && t.dim() == 2 && t.size(0) == batch && t.size(1) == heads),
      name, " must be [", batch, "]",
      per_head ? " or [" + std::to_string(batch) + ", " + std::to_string(heads) + "]" : "", ", got ", shape_of(t));
}

// Rows are counted, and positions compared with windows that have no end, in 32 bits.
inline int32_t to_rows(int64_t rows, const char* name) {
  FLUX_CHECK(rows <= kUnlimited, name, " must have at most ", kUnlimited, " rows, got ", rows);
  return int32_t(rows);
}

// Bounds of packed sequences that follow each other: sequence b has the rows [cu_seqlens[b], cu_seqlens[b + 1]).
inline RowSpans to_spans(const Tensor& cu_seqlens, const Tensor& q, int64_t batch, int32_t capacity) {
  check_index_tensor(cu_seqlens, q, "cu_seqlens");
  FLUX_CHECK(cu_seqlens.dim() == 1 && cu_seqlens.size(0) == batch + 1, "cu_seqlens must be [", batch + 1, "], got ",
             shape_of(cu_seqlens));
  RowSpans s;
  s.capacity = capacity;
  s.begin = cu_seqlens.const_data_ptr<int32_t>();
  s.begin_stride_b = s.end_stride_b = int32_t(cu_seqlens.stride(0));
  s.end = s.begin + s.begin_stride_b;
  return s;
}

inline RowSpans to_spans(const OptionalTensor& begin, const OptionalTensor& end, const Tensor& q, int64_t batch,
                         int64_t heads, int32_t capacity, bool per_head, const char* begin_name, const char* end_name) {
  RowSpans s;
  s.capacity = capacity;
  if (begin) {
    check_index_tensor(*begin, q, begin_name);
    check_bounds_shape(*begin, batch, heads, per_head, begin_name);
    s.begin = begin->const_data_ptr<int32_t>();
    s.begin_stride_b = int32_t(begin->stride(0));
    s.begin_stride_h = begin->dim() == 2 ? int32_t(begin->stride(1)) : 0;
  }
  if (end) {
    check_index_tensor(*end, q, end_name);
    check_bounds_shape(*end, batch, heads, per_head, end_name);
    s.end = end->const_data_ptr<int32_t>();
    s.end_stride_b = int32_t(end->stride(0));
    s.end_stride_h = end->dim() == 2 ? int32_t(end->stride(1)) : 0;
  }
  return s;
}

inline Pattern to_pattern(const int64_t* n, const char* name) {
  FLUX_CHECK(n[0] >= 0, name, ".sink must be >= 0, got ", n[0]);
  FLUX_CHECK(n[3] >= 1, name, ".align must be >= 1, got ", n[3]);
  FLUX_CHECK(n[1] >= 1 && n[1] % n[3] == 0, name, ".window must be a positive multiple of align (", n[3], "), got ",
             n[1]);
  FLUX_CHECK(n[2] >= 0, name, ".last_q must be >= 0, got ", n[2]);
  const auto clamp = [](int64_t x) { return int32_t(x < kUnlimited ? x : kUnlimited); };
  if (n[1] >= kUnlimited) return {clamp(n[0]), kUnlimited, clamp(n[2]), 1};  // reaches every key, wherever it begins
  return {clamp(n[0]), clamp(n[1]), clamp(n[2]), clamp(n[3])};
}

}  // namespace flux::torch_ops
