// Full attention in two parts, one after the other: the keys that a sparse pattern shows a query, then the rest of
// those up to its own. What has been summed up when the first part is done is what the sparse pattern gives; at the end
// of the second it is what full attention gives. So one walk over the keys makes both branches of a mixture, with one
// softmax and one output; only key blocks of which a tile sees some keys in either part are visited twice.
//
// Which keys are the rest is derived from the pattern alone, as pattern.h derives what it shows;
// cpp_tests/mixture_test.cpp holds it to the specification.
#pragma once

#include "core/mixture.h"

namespace flux {

enum Part : int32_t { kSparsePart, kRestPart, kParts };

// Of a mixture: does its full pattern show every key, so that what the sparse one shows is part of it?
FLUX_HD bool is_in_parts(const Routing& r) { return !r.blocks[0].blocks && r.patterns[0].window >= kUnlimited; }

// The routing by the sparse pattern of such a mixture alone, from which all below is derived.
inline Routing sparse_alone(const Routing& r) {
  Routing sparse;
  sparse.patterns[0] = r.patterns[1];
  sparse.blocks[0] = r.blocks[1];
  return sparse;
}

// What is left of full attention's keys, [0, last], where `sparse` are shown. A list leaves whole blocks: kernels visit
// those alone, and the bounds do not tell.
FLUX_HD VisibleKeys rest_of(const VisibleKeys& sparse, const BlockList& list) {
  if (list.blocks) return sparse;
  return {sparse.sink, min_of(sparse.begin - 1, sparse.last), 0};
}

// The key blocks that a tile visits for a part, ascending.
struct PartBlocks {
  KvBlocks blocks;
  int32_t count = 0;
  bool between = false;  // not the blocks of the list, but those that it leaves out

  FLUX_HD int32_t size() const { return count; }
  FLUX_HD int32_t operator[](int32_t i) const {
    if (!between) return blocks[i];
    int32_t lo = 0, hi = blocks.size();  // how many of the list come before: those with at most i others before them
    while (lo < hi) {
      const int32_t mid = lo + (hi - lo) / 2;
      if (blocks[mid] - mid <= i)
        lo = mid + 1;
      else
        hi = mid;
    }
    return i + lo;
  }
};

// `sparse`: a tile as the sparse pattern alone shows it, with key blocks of `kv_block`.
FLUX_HD PartBlocks part_blocks(const TileView& sparse, Part part, int32_t kv_block) {
  if (part == kSparsePart) return {sparse.blocks, sparse.blocks.size(), false};
  if (sparse.list.blocks) {
    const int32_t end = max_of(ceil_div(sparse.q_pos_end(), kv_block), 0);
    return {sparse.blocks, max_of(end - sparse.blocks.size(), 0), true};  // a list of more than there are: none
  }
  // The windows of the queries begin at or before that of the last one which has a window.
  PartBlocks rest;
  const int32_t last = min_of(sparse.q_pos_end(), sparse.kv_rows.size() - sparse.pattern.last_q) - 1;
  if (last < max_of(sparse.q_pos, 0)) return rest;
  const int32_t end = sparse.pattern.window_begin(last);
  if (end <= sparse.pattern.sink) return rest;
  rest.blocks.window_begin = sparse.pattern.sink / kv_block;
  rest.blocks.window_count = ceil_div(end, kv_block) - rest.blocks.window_begin;
  rest.count = rest.blocks.window_count;
  return rest;
}

// Which of the key blocks of a part must be masked for some queries.
struct PartMask {
  TileMask sparse;
  Part part;
  int32_t begin = 0, end = 0;  // keys that all the queries see in the rest

  template <typename Range>
  FLUX_HD PartMask(const Range& r, Part part) : sparse(r), part(part) {
    if (part == kSparsePart) return;
    begin = r.list.blocks ? 0 : r.pattern.sink;
    if (r.list.blocks)
      end = r.q_pos + 1;
    else if (r.q_pos >= 0 && r.q_pos_end() <= r.kv_rows.size() - r.pattern.last_q)
      end = r.pattern.window_begin(r.q_pos);
  }
  // True wherever a query does not see every key in [kv_begin, kv_end).
  FLUX_HD bool operator()(int32_t kv_begin, int32_t kv_end) const {
    return part == kSparsePart ? sparse(kv_begin, kv_end) : kv_begin < begin || kv_end > end;
  }
};

// A part of a tile: what it visits, masks and sees stands in the place of the tile's.
struct PartView : TileView {
  Part part = kSparsePart;
  PartBlocks blocks;

  PartView() = default;
  FLUX_HD PartView(const TileView& sparse, Part part, int32_t kv_block)
      : TileView(sparse), part(part), blocks(part_blocks(sparse, part, kv_block)) {}

  FLUX_HD PartMask mask() const { return PartMask(*this, part); }
  FLUX_HD VisibleKeys visible_keys(int32_t token) const {
    const VisibleKeys sparse = TileView::visible_keys(token);
    return part == kSparsePart ? sparse : rest_of(sparse, list);
  }
};

// Of the queries that see any of [kv_begin, kv_end) in a part: those that see all of it, as positions. With lists the
// keys must lie in one of their blocks.
FLUX_HD SeeingQueries queries_seeing_all(const Pattern& p, bool listed, Part part, int32_t kv_begin, int32_t kv_end,
                                         int32_t kv_len) {
  SeeingQueries all{{kv_end - 1, kUnlimited}, {kUnlimited, kUnlimited}};
  if (listed || p.window >= kUnlimited) return all;
  if (part == kRestPart) {  // window_begin(q) >= kv_end, solved for q
    all.near.begin = kv_begin < p.sink ? kUnlimited : (kv_end - 1 + p.window) / p.align * p.align;
    all.near.end = kv_len - p.last_q;
  } else if (kv_end > p.sink) {  // window_begin(q) <= kv_begin
    all.near.end = (max_of(kv_begin, p.sink) + p.window) / p.align * p.align;
    all.last.begin = max_of(kv_len - p.last_q, all.near.begin);
  }
  return all;
}

// Such queries as rows, see QueryBlocks: of `q_len` queries, the first at `q_pos`.
struct RowsSeeingAll {
  Span near, last;

  FLUX_HD RowsSeeingAll(const SeeingQueries& q, int32_t q_pos, int32_t q_len, int32_t group)
      : near(rows_of(q.near, q_pos, q_len, group)), last(rows_of(q.last, q_pos, q_len, group)) {}
  // Of a block of rows, of which those past the last query do not count.
  FLUX_HD bool contain(int32_t begin, int32_t end) const {
    return (begin >= near.begin && end <= near.end) || (begin >= last.begin && end <= last.end);
  }

 private:
  static FLUX_HD Span rows_of(const Span& positions, int32_t q_pos, int32_t q_len, int32_t group) {
    const int32_t begin = positions.begin - q_pos, end = positions.end - q_pos;
    return {min_of(max_of(begin, 0), q_len) * group, end < q_len ? max_of(end, 0) * group : INT32_MAX};
  }
};

// The blocks of rows that hold a query which sees a range of keys in the rest; arguments as of query_blocks.
// `unlisted`: the bits of the lists, inverted.
FLUX_HD QueryBlocks rest_query_blocks(const Pattern& p, int32_t kv_begin, int32_t kv_end, int32_t kv_len, int32_t q_pos,
                                      int32_t q_len, int32_t group, int32_t block, const ListedBits& unlisted = {}) {
  if (unlisted.words) return query_blocks({}, kv_begin, kv_end, kv_len, q_pos, q_len, group, block, unlisted);
  QueryBlocks b;
  b.block = block;
  const int32_t first_key = max_of(kv_begin, p.sink);
  if (first_key >= min_of(kv_end, kv_len) || p.window >= kUnlimited) return b;
  // window_begin(q) > first_key, solved for q
  const int32_t begin = max_of((first_key + p.window) / p.align * p.align, q_pos);
  const int32_t end = min_of(q_pos + q_len, kv_len - p.last_q);
  if (begin >= end) return b;
  b.near = {(begin - q_pos) * group / block, ceil_div((end - q_pos) * group, block)};
  b.last = {b.near.end, b.near.end};
  return b;
}

}  // namespace flux
