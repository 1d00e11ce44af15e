// The host-only view of the core: schedules and masks as NumPy arrays. No torch.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>
#include <vector>

#include "core/pattern.h"
#include "cpu/cpu.h"

namespace py = pybind11;
using IntArray = py::array_t<int32_t, py::array::c_style | py::array::forcecast>;

namespace {

flux::Pattern to_pattern(const std::array<int32_t, 4>& n) {
  if (n[0] < 0 || n[2] < 0 || n[3] < 1 || n[1] < 1 || n[1] % n[3])
    throw std::invalid_argument(
        "a pattern is (sink >= 0, window a positive multiple of align, last_q >= 0, align >= 1)");
  return {n[0], n[1], n[2], n[3]};
}

// [q_len, kv_len] booleans: what csrc/core/pattern.h calls visible.
py::array_t<bool> mask(const std::array<int32_t, 4>& pattern, int32_t q_len, int32_t kv_len) {
  if (q_len < 0 || kv_len < 0) throw std::invalid_argument("q_len and kv_len must be >= 0");
  const flux::Pattern p = to_pattern(pattern);
  py::array_t<bool> out({q_len, kv_len});
  auto view = out.mutable_unchecked<2>();
  for (int32_t i = 0; i < q_len; ++i)
    for (int32_t j = 0; j < kv_len; ++j) view(i, j) = flux::visible(p, kv_len - q_len + i, j, kv_len);
  return out;
}

// Who does what: one row per piece of a tile.
// Columns: worker, sequence, kv_head, first query row, first block of the piece, one past its last, blocks of the tile.
py::array_t<int32_t> plan(const IntArray& q_len, const IntArray& kv_len, const IntArray& route, int32_t group,
                          const std::array<int32_t, 4>& full, const std::array<int32_t, 4>& sparse, int32_t q_tokens,
                          int32_t kv_block, int32_t num_workers) {
  if (route.ndim() != 2) throw std::invalid_argument("route must be [B, Hkv]");
  if (q_len.ndim() != 1 || kv_len.ndim() != 1 || q_len.shape(0) != route.shape(0) || kv_len.shape(0) != route.shape(0))
    throw std::invalid_argument("q_len and kv_len must be [B]");
  if (group < 1 || q_tokens < 1 || kv_block < 1 || num_workers < 1)
    throw std::invalid_argument("group, q_tokens, kv_block and num_workers must be >= 1");
  flux::AttendParams p;
  p.batch = int32_t(route.shape(0));
  p.kv.num_heads = int32_t(route.shape(1));
  p.q.num_heads = group * p.kv.num_heads;
  for (int32_t b = 0; b < p.batch; ++b) {
    p.q.max_len = flux::max_of(p.q.max_len, q_len.at(b));
    p.kv.rows.capacity = flux::max_of(p.kv.rows.capacity, kv_len.at(b));
  }
  p.q.total_rows = int64_t(p.batch) * p.q.max_len;
  p.q.rows.capacity = p.q.max_len;
  p.q.rows.end = q_len.data();
  p.kv.rows.end = kv_len.data();
  p.routing.route = route.data();
  p.routing.stride_b = p.kv.num_heads;
  p.routing.stride_h = 1;
  p.routing.patterns[0] = to_pattern(full);
  p.routing.patterns[1] = to_pattern(sparse);
  const flux::TileShape tile{q_tokens, kv_block};
  const flux::cpu::Plan work = flux::cpu::plan(p, tile, num_workers);
  std::vector<int32_t> rows;
  for (int32_t w = 0; w < num_workers; ++w) {
    const flux::WorkRange& r = work.ranges[w];
    if (flux::empty(r)) continue;
    for (int32_t t = r.tile; t < flux::tiles_end(r); ++t) {
      const flux::TileView v = flux::view_tile(p, tile, work.tiles[t]);
      const flux::TileSpan span = flux::tile_span(r, t, v.blocks.size());
      rows.insert(rows.end(), {w, v.tile.seq, v.tile.kv_head, v.q_rows.begin, span.begin, span.end, v.blocks.size()});
    }
  }
  py::array_t<int32_t> out({py::ssize_t(rows.size() / 7), py::ssize_t(7)});
  std::copy(rows.begin(), rows.end(), out.mutable_data());
  return out;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Host-side views of csrc/core: masks and schedules as NumPy arrays.";
  m.def("mask", &mask, py::arg("pattern"), py::arg("q_len"), py::arg("kv_len"));
  m.def("plan", &plan, py::arg("q_len"), py::arg("kv_len"), py::arg("route"), py::arg("group"), py::arg("full"),
        py::arg("sparse"), py::arg("q_tokens"), py::arg("kv_block"), py::arg("num_workers"));
  m.def("isa", [] { return std::string(flux::cpu::isa()); });
}
