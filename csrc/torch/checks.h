// The one error path of the operators: a message names the argument, the rule and the value.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>

#include "core/broken_rule.h"

namespace flux::torch_ops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string shape_of(const Tensor& t) {
  std::ostringstream s;
  s << "[";
  for (int64_t i = 0; i < t.dim(); ++i) s << (i ? ", " : "") << t.size(i);
  s << "]";
  return s.str();
}

inline const char* name_of(ScalarType t) {
  switch (t) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Short:
      return "int16";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Bool:
      return "bool";
    case ScalarType::ComplexFloat:
      return "complex64";
    case ScalarType::ComplexDouble:
      return "complex128";
    default:
      return "another dtype";
  }
}

inline std::string device_of(const Tensor& t) {
  return t.is_cuda() ? "cuda:" + std::to_string(t.get_device_index()) : t.is_cpu() ? "cpu" : "another device";
}

template <typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream s;
  s << kBrokenRule;
  (s << ... << parts);
  throw std::invalid_argument(s.str());
}

#define FLUX_CHECK(condition, ...)                          \
  do {                                                      \
    if (!(condition)) ::flux::torch_ops::fail(__VA_ARGS__); \
  } while (false)

inline void check_like(const Tensor& t, const Tensor& q, const char* name, const char* of) {
  FLUX_CHECK(t.scalar_type() == q.scalar_type(), name, " must have the dtype of ", of, " (", name_of(q.scalar_type()),
             "), got ", name_of(t.scalar_type()));
  FLUX_CHECK(t.is_cuda() == q.is_cuda() && t.get_device_index() == q.get_device_index(), name,
             " must be on the device of ", of, " (", device_of(q), "), got ", device_of(t));
}

inline void check_shape(const Tensor& t, const Tensor& q, const char* name) {
  bool same = t.dim() == q.dim();
  for (int64_t i = 0; same && i < q.dim(); ++i) same = t.size(i) == q.size(i);
  FLUX_CHECK(same, name, " must have the shape of q (", shape_of(q), "), got ", shape_of(t));
}

inline void check_last_contiguous(const Tensor& t, const char* name) {
  FLUX_CHECK(t.size(t.dim() - 1) <= 1 || t.stride(t.dim() - 1) == 1, name,
             " must have a contiguous last dimension, got stride ", t.stride(t.dim() - 1));
}

inline void check_index_tensor(const Tensor& t, const Tensor& q, const char* name) {
  FLUX_CHECK(t.scalar_type() == ScalarType::Int, name, " must be int32, got ", name_of(t.scalar_type()));
  FLUX_CHECK(t.is_cuda() == q.is_cuda() && t.get_device_index() == q.get_device_index(), name,
             " must be on the device of q (", device_of(q), "), got ", device_of(t));
}

}  // namespace flux::torch_ops
