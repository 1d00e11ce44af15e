// Who computes what: all visible work is a line of (tile, key block) units, cut into equal pieces.
//
// A sequence head is one KV head of one sequence: what has keys of its own, and so what work is counted by. There are
// batch * num_kv_heads of them; number n is KV head n % num_kv_heads of sequence n / num_kv_heads.
// A tile is a block of the queries of one sequence head. Its rows are these queries for every query head that shares
// the KV head (row = query * group + head of the group), so a decode step is a tile with few rows. Tiles are numbered
// sequence head by sequence head, and within one from the last block of queries, which under a causal mask sees the
// most keys, to the first. The planner and the kernels call the same functions, so they cannot disagree.
#pragma once

#include <cstdint>

#include "core/macros.h"
#include "core/params.h"
#include "core/pattern.h"

namespace flux {

constexpr int32_t kTileOverhead = 1;  // prologue and epilogue of a tile, in key blocks

// Query tokens and keys of one step of a kernel.
struct TileShape {
  int32_t q_tokens = 0;  // query positions per tile (rows / group)
  int32_t kv_block = 0;
};

struct Tile {
  int32_t seq, kv_head, q_block;
};

// Everything a kernel has to know about a tile.
struct TileView {
  Tile tile;
  Span q_rows;    // rows of q that belong to the tile
  Span kv_rows;   // rows of k of the whole sequence
  int32_t q_pos;  // position of the first query, see pattern.h
  Pattern pattern;
  BlockList list;
  KvBlocks blocks;

  FLUX_HD int32_t q_pos_end() const { return q_pos + q_rows.size(); }
  FLUX_HD TileMask mask() const { return TileMask(*this); }

  // Of a query, counted from the first of the tile (`token`). Is the pair visible?
  FLUX_HD bool sees(int32_t token, int32_t kv_pos) const {
    return visible(pattern, q_pos + token, kv_pos, kv_rows.size(), list);
  }
  // The last key it may see; -1 in padding, which sees nothing.
  FLUX_HD int32_t last_key(int32_t token) const { return token < q_rows.size() ? q_pos + token : -1; }
  FLUX_HD VisibleKeys visible_keys(int32_t token) const {
    return flux::visible_keys(pattern, last_key(token), kv_rows, list);
  }
  // Every pattern shows a query its own token; so only queries before the first key, and lists that start later, see
  // none.
  FLUX_HD bool sees_any(int32_t token) const {
    return list.blocks ? list.count > 0 && list.blocks[0] * list.width <= q_pos + token : q_pos + token >= 0;
  }
  // Do its queries see all keys up to their own in the blocks that the tile visits?
  FLUX_HD bool hides_only_later_keys() const { return list.blocks || pattern.window >= kUnlimited; }
};

FLUX_HD int32_t tiles_in_seq_head(const AttendParams& p, const TileShape& tile, int32_t seq, int32_t kv_head) {
  return ceil_div(p.q.rows(seq, kv_head).size(), tile.q_tokens);
}

// No launch has more tiles than this, whatever the lengths on the device are (spans that overlap, which no
// valid input has, are cut off by the planner).
FLUX_HD int64_t max_tiles(const AttendParams& p, const TileShape& tile) {
  const int64_t padded = int64_t(p.batch) * ceil_div(p.q.max_len, tile.q_tokens);
  const int64_t packed = p.q.total_rows / tile.q_tokens + p.batch;
  return (padded < packed ? padded : packed) * p.kv.num_heads;
}

// By one mode of the routing, whatever the route is.
FLUX_HD TileView view_tile(const AttendParams& p, const TileShape& tile_shape, const Tile& t, int32_t mode) {
  TileView v;
  v.tile = t;
  const Span q = p.q.rows(t.seq, t.kv_head);
  v.kv_rows = p.kv.rows(t.seq, t.kv_head);
  const int32_t first = t.q_block * tile_shape.q_tokens;
  v.q_rows = {q.begin + first, min_of(q.begin + first + tile_shape.q_tokens, q.end)};
  v.q_pos = v.kv_rows.size() - q.size() + first;
  v.pattern = p.routing.patterns[mode];
  v.list = p.routing.blocks[mode](t.seq, t.kv_head, p.kv.num_heads, first);
  v.blocks = kv_blocks(v.pattern, v.q_pos, v.q_pos_end(), v.kv_rows.size(), tile_shape.kv_block, v.list);
  return v;
}
FLUX_HD TileView view_tile(const AttendParams& p, const TileShape& tile_shape, const Tile& t) {
  return view_tile(p, tile_shape, t, p.routing.mode(t.seq, t.kv_head));
}

// The gradients cut a sequence head otherwise: into blocks of equally many rows, whatever the group is. So the heads of
// one query may stand in two blocks, but no block holds queries of two block lists (128 queries times any group).

// All queries of a sequence head. (Block lists are those of the first.)
FLUX_HD TileView view_seq_head(const AttendParams& p, int32_t seq, int32_t kv_head, int32_t kv_block) {
  return view_tile(p, {p.q.max_len, kv_block}, {seq, kv_head, 0});
}

// The queries of which the rows [rows.begin, rows.end) of a sequence head are heads.
FLUX_HD TileView view_rows(const AttendParams& p, const TileView& seq_head, const Span& rows, int32_t kv_block) {
  TileView v = seq_head;
  const Span queries{rows.begin / p.group(), ceil_div(rows.end, p.group())};
  v.q_rows = {v.q_rows.begin + queries.begin, v.q_rows.begin + queries.end};
  v.q_pos += queries.begin;
  if (v.list.blocks)
    v.list = p.routing.blocks[p.routing.mode(v.tile.seq, v.tile.kv_head)](v.tile.seq, v.tile.kv_head, p.kv.num_heads,
                                                                          queries.begin);
  v.blocks = kv_blocks(v.pattern, v.q_pos, v.q_pos_end(), v.kv_rows.size(), kv_block, v.list);
  return v;
}

FLUX_HD int32_t tile_cost(const TileView& v) { return v.blocks.size() + kTileOverhead; }

// The tiles [tile, end_tile], from key block `block` of the first up to `end_block` of the last.
struct WorkRange {
  int32_t tile, block, end_tile, end_block;
};

// The key blocks of one tile that one worker owns.
struct TileSpan {
  int32_t begin, end;
  bool split;  // the tile is cut: its result is a partial
};

// A unit of the line of work: the tile that holds it, and which key block of that tile it is. The first kTileOverhead
// units of a tile stand for its overhead; they count as block 0.
struct Position {
  int32_t tile, block;
};
FLUX_HD Position position_in(int32_t tile, int32_t unit) { return {tile, max_of(unit - kTileOverhead, 0)}; }

// cost[t] = sum of tile_cost over the tiles before t; cost[num_tiles] = total.
FLUX_HD Position locate(const int64_t* cost, int32_t num_tiles, int64_t unit) {
  if (unit >= cost[num_tiles]) return {num_tiles, 0};
  int32_t lo = 0, hi = num_tiles;  // the last tile with cost[tile] <= unit
  while (hi - lo > 1) {
    const int32_t mid = lo + (hi - lo) / 2;
    (cost[mid] <= unit ? lo : hi) = mid;
  }
  return position_in(lo, int32_t(unit - cost[lo]));
}

// The first unit of a worker's even share, which is where that of the worker before it ends.
FLUX_HD int64_t share_unit(int64_t total_cost, int32_t worker, int32_t num_workers) {
  return total_cost * worker / num_workers;  // the product would overflow only beyond 2^63 / 2^20 units
}
FLUX_HD Position share_begin(const int64_t* cost, int32_t num_tiles, int32_t worker, int32_t num_workers) {
  return locate(cost, num_tiles, share_unit(cost[num_tiles], worker, num_workers));
}

FLUX_HD WorkRange work_range(const int64_t* cost, int32_t num_tiles, int32_t worker, int32_t num_workers) {
  const Position begin = share_begin(cost, num_tiles, worker, num_workers);
  const Position end = share_begin(cost, num_tiles, worker + 1, num_workers);
  return {begin.tile, begin.block, end.tile, end.block};
}

// The worker whose even share holds a unit.
FLUX_HD int32_t worker_of(int64_t unit, int64_t total_cost, int32_t num_workers) {
  return int32_t(((unit + 1) * num_workers - 1) / total_cost);
}

FLUX_HD bool empty(const WorkRange& r) { return r.tile == r.end_tile && r.block == r.end_block; }

// One past the last tile the worker touches.
FLUX_HD int32_t tiles_end(const WorkRange& r) { return r.end_tile + (r.end_block > 0 ? 1 : 0); }

FLUX_HD TileSpan tile_span(const WorkRange& r, int32_t tile, int32_t num_blocks) {
  TileSpan s;
  s.begin = tile == r.tile ? r.block : 0;
  s.end = tile == r.end_tile ? r.end_block : num_blocks;
  s.split = s.begin > 0 || s.end < num_blocks;
  return s;
}

// A worker leaves at most two partials: of its first tile and of its last.
FLUX_HD int32_t partial_slot(const WorkRange& r, int32_t worker, int32_t tile) {
  return 2 * worker + (tile == r.tile ? 0 : 1);
}

// The pieces that even shares cut a tile into, in order; one: the tile is whole. Every share has a unit.
struct TilePieces {
  int32_t count;
  int32_t leader;       // the worker that holds the first
  int32_t leader_slot;  // and where its partial is

  // A later piece is the first its worker holds.
  FLUX_HD int32_t slot(int32_t i) const { return i ? 2 * (leader + i) : leader_slot; }
};
FLUX_HD TilePieces tile_pieces(const int64_t* cost, int32_t num_tiles, int32_t tile, int32_t num_workers) {
  const int64_t total = cost[num_tiles], blocks_begin = cost[tile] + kTileOverhead, end = cost[tile + 1];
  // A tile without key blocks has one piece, also where it is rounded up to a whole share.
  const bool has_blocks = end > blocks_begin;
  TilePieces p{1, worker_of(has_blocks ? blocks_begin : cost[tile], total, num_workers), 0};
  if (has_blocks) p.count = worker_of(end - 1, total, num_workers) - p.leader + 1;
  p.leader_slot = 2 * p.leader + (share_begin(cost, num_tiles, p.leader, num_workers).tile == tile ? 0 : 1);
  return p;
}

// Work can be handed out in two ways:
// - Whole tiles: a worker that is free takes the next tile from a counter. Nothing is cut, so nothing is merged, and
//   tiles that run at the same time share keys through the cache. But the end is ragged: workers idle while the last
//   tiles run.
// - Even shares (work_range): all workers end together, but tiles are cut, and their pieces stored and merged. That was
//   measured to cost as much as kSplitBlocks key blocks for every worker and an eighth of the work (docs/kernels.md).
// So tiles are handed out whole unless one of them might end later than even shares would at that cost. A tile starts
// when the work before it, spread over all workers, is done, or earlier; `ends_late` bounds its end by that. A tile
// that is a small part of a worker's share makes no difference worth a cut.
constexpr int32_t kSplitBlocks = 8;
constexpr int32_t kSmallPart = 4;
FLUX_HD bool is_small_part(int64_t tile_cost, int64_t total_cost, int32_t num_workers) {
  return tile_cost * num_workers * kSmallPart <= total_cost;
}
FLUX_HD bool ends_after_a_split(int64_t before, int64_t tile_cost, int64_t total_cost, int32_t num_workers) {
  return before + tile_cost * num_workers > total_cost + total_cost / 8 + int64_t(kSplitBlocks) * num_workers;
}
FLUX_HD bool ends_late(int64_t before, int64_t tile_cost, int64_t total_cost, int32_t num_workers) {
  return !is_small_part(tile_cost, total_cost, num_workers) &&
         ends_after_a_split(before, tile_cost, total_cost, num_workers);
}

// Nor does a tile end later than if all were as large as the largest and came in waves, one for every worker.
FLUX_HD bool waves_end_in_time(int32_t num_tiles, int64_t largest_cost, int64_t total_cost, int32_t num_workers) {
  const int64_t waves = ceil_div(num_tiles, num_workers);
  return !ends_after_a_split((waves - 1) * num_workers * largest_cost, largest_cost, total_cost, num_workers);
}

// Whole tiles are handed out one sequence head after the other; what comes before a tile is then at most all other
// sequence heads and the tiles before it in its own. `siblings`: the tiles of its sequence head.
FLUX_HD int64_t work_before(const int64_t* cost, int32_t num_tiles, int32_t tile, Span siblings) {
  return cost[num_tiles] - (cost[siblings.end] - cost[tile]);
}

// Or the sequence heads take turns: the first tile of each, then the second of each. So the longest come first and the
// shortest last, and the end is even. For sequence heads with equally many tiles, few enough, whose keys the cache
// holds all at once.
constexpr int32_t kSeqHeadsInTurn = 32;
constexpr int64_t kKeysInTurn = int64_t(32) << 20;  // bytes of keys and values, two for an element
FLUX_HD bool takes_turns(int32_t num_seq_heads, int64_t longest_kv, int32_t head_dim) {
  return num_seq_heads > 1 && num_seq_heads <= kSeqHeadsInTurn &&
         4 * longest_kv * head_dim * num_seq_heads <= kKeysInTurn;
}
// Of the tiles with this place in their sequence heads: the cost of the largest, and what comes before it at most.
struct Turn {
  int64_t before = 0, largest = 0;
};
FLUX_HD Turn turn_of(const int64_t* cost, int32_t num_seq_heads, int32_t tiles_each, int32_t place) {
  Turn turn;
  for (int32_t n = 0; n < num_seq_heads; ++n) {
    const int64_t *first = cost + n * tiles_each, own = first[place + 1] - first[place];
    turn.before += first[place + 1] - first[0];
    if (own > turn.largest) turn.largest = own;
  }
  turn.before -= turn.largest;
  return turn;
}

// The order in which whole tiles are handed out, where it is a formula.
enum class TileOrder : int32_t {
  kPlanned,  // it is none: the planner says
  kInTurn,   // sequence heads take turns
  kInLine,   // one sequence head after the other
};
// Sequence heads that take turns end evenly enough without a counter, if they have few tiles: worker w does the w-th of
// one wave and the w-th from behind of the next, a short one after a long one.
constexpr int32_t kWavesUncounted = 4;
inline bool is_uncounted(TileOrder order, int64_t num_tiles, int32_t num_workers) {
  return order == TileOrder::kInTurn && num_tiles <= int64_t(kWavesUncounted) * num_workers;
}
FLUX_HD int32_t item_uncounted(int32_t worker, int32_t wave, int32_t num_workers) {
  return wave * num_workers + (wave % 2 ? num_workers - 1 - worker : worker);
}

FLUX_HD Tile tile_at(TileOrder order, int32_t t, int32_t num_seq_heads, int32_t num_kv_heads, int32_t tiles_each) {
  const bool in_turn = order == TileOrder::kInTurn;
  const int32_t seq_head = in_turn ? t % num_seq_heads : t / tiles_each;
  const int32_t place = in_turn ? t / num_seq_heads : t % tiles_each;
  return {seq_head / num_kv_heads, seq_head % num_kv_heads, tiles_each - 1 - place};
}

// Where all lengths are the tensors' own, the host knows all but the routes. Then no plan is needed if no tile ends
// later than after a split, whatever the routes are. Of the sequence heads let `full` be routed full and the others
// sparse: the condition is linear in `full` while there are some of both, so the ends of that range decide. In line,
// sequence heads stand as they come and not, as in a plan, costliest first: `work_before` holds for any order of them.
// For few tiles each, as this costs the host time.
constexpr int32_t kTilesKnown = 256;
inline TileOrder known_order(const AttendParams& p, const TileShape& tile, int32_t num_workers) {
  const int32_t tiles_each = ceil_div(p.q.max_len, tile.q_tokens), seq_heads = p.batch * p.kv.num_heads;
  const bool bounded = p.q.rows.begin || p.q.rows.end || p.kv.rows.begin || p.kv.rows.end;
  if (bounded || p.routing.has_lists() || tiles_each > kTilesKnown || tiles_each == 0 || seq_heads == 0)
    return TileOrder::kPlanned;
  const bool in_turn = takes_turns(seq_heads, p.kv.rows.capacity, p.head_dim);
  int32_t cost[2][kTilesKnown];  // by mode and place
  int64_t total[2] = {}, largest_cost[2] = {};
  const int modes = p.routing.route ? 2 : 1;
  AttendParams one = p;
  one.routing.route = nullptr;
  for (int mode = 0; mode < modes; ++mode) {
    one.routing.patterns[0] = p.routing.patterns[mode];
    for (int32_t i = 0; i < tiles_each; ++i) {
      cost[mode][i] = tile_cost(view_tile(one, tile, {0, 0, tiles_each - 1 - i}));
      total[mode] += cost[mode][i];
      if (cost[mode][i] > largest_cost[mode]) largest_cost[mode] = cost[mode][i];
    }
  }
  const int32_t counts[] = {seq_heads, seq_heads - 1, 1, 0};
  for (const int32_t full : counts) {
    const int32_t heads[2] = {full, seq_heads - full};
    if (modes == 1 && heads[1] > 0) break;
    const int64_t all = heads[0] * total[0] + heads[1] * total[1];
    const int64_t largest_of[2] = {heads[0] ? largest_cost[0] : 0, heads[1] ? largest_cost[1] : 0};
    if (waves_end_in_time(tiles_each * seq_heads, largest_of[largest_of[1] > largest_of[0]], all, num_workers))
      continue;
    const auto late = [&](int64_t before, int64_t own) { return ends_after_a_split(before, own, all, num_workers); };
    int64_t done[2] = {};  // of a sequence head, up to a tile and with it
    for (int32_t i = 0; i < tiles_each; ++i) {
      int64_t turn = 0, largest = 0;
      for (int mode = 0; mode < modes; ++mode) {
        if (heads[mode] == 0) continue;
        const int64_t own = cost[mode][i];
        if (!in_turn && late(all - (total[mode] - done[mode]), own)) return TileOrder::kPlanned;
        done[mode] += own;
        turn += heads[mode] * done[mode];
        if (own > largest) largest = own;
      }
      if (in_turn && late(turn - largest, largest)) return TileOrder::kPlanned;
    }
  }
  return in_turn ? TileOrder::kInTurn : TileOrder::kInLine;
}

// If any tile would end late, the line is split evenly: over all workers, or, where there is little to do, over so many
// that each has two units at least. One unit each is enough where that occupies at most half of the workers and cuts a
// tile, on average, into no more pieces than combine merges at once.
constexpr int32_t kPiecesAtOnce = 24;
template <typename Int>  // of 32 or 64 bits
FLUX_HD int32_t sharing_workers(Int total_cost, int32_t num_tiles, int32_t num_workers) {
  const Int workers = num_workers;
  const bool few = total_cost <= workers / 2 && total_cost <= Int(num_tiles) * kPiecesAtOnce;
  const Int most = few ? total_cost : total_cost / 2;
  return most < 1 ? 1 : int32_t(most < workers ? most : workers);
}

// A decode step (see plans_inline, cuda/cuda.h) has one tile per sequence head. Where an even share holds the end of
// one tile and the beginning of another, its worker pays for both in turn. So where tiles differ in cost, each is
// rounded up to whole shares, if that takes no more workers. Kernels plan such a step twice over, for a warp and for a
// block: the decisions are here, alike for both.
template <typename Int>
FLUX_HD bool tiles_differ(Int largest_cost, Int total_cost, int32_t num_tiles) {
  return largest_cost * num_tiles != total_cost;
}
template <typename Int>
FLUX_HD Int whole_shares(Int tile_cost, Int share) {
  return (tile_cost + share - 1) / share;
}

// Where all tiles are alike, so many workers share the line evenly that each tile falls into equally many shares, two
// at least, if that makes none much larger. The heads of a sequence are then cut at the same places: at any time their
// workers read the same tokens, whose rows stand beside each other in memory. Short shares would grow too much, and the
// divisions cost more than that gives.
constexpr int kLongShare = 32;
template <typename Int>  // even_share: of all num_workers, rounded down
FLUX_HD int32_t workers_for_alike(Int tile_cost, Int even_share, int32_t num_tiles, int32_t num_workers) {
  if (even_share < kLongShare || 2 * num_tiles > num_workers) return num_workers;
  const int32_t each = num_workers / num_tiles;
  return whole_shares<Int>(tile_cost, each) <= even_share + even_share / 16 ? each * num_tiles : num_workers;
}

// Where a prefill kernel's tiles are cut and there are no more of them than workers, no worker is given parts of two,
// if shares need be little larger than even ones for that. Then the tiles of a sequence head are cut at the same
// places: their workers read the same keys at the same time, once from memory.
//
// Every tile's cost is rounded up to a multiple of `unit`, and the line of them cut evenly for so many workers. Of each
// tile all shares must have something: `smallest_cost` is what tells.
template <typename Int>
struct Cut {
  Int unit;
  int32_t num_workers;
};
constexpr int kShareSteps = 4;
template <typename Int, typename Shares>  // shares_of(share): how many of that size hold all tiles, each in its own
FLUX_HD Cut<Int> cut_apart(Int total_cost, Int smallest_cost, Int largest_cost, int32_t num_tiles, int32_t num_workers,
                           Shares shares_of) {
  if (num_tiles < 1 || num_tiles > num_workers) return {1, num_workers};
  const Int even = whole_shares<Int>(total_cost, num_workers), slack = even / 8 + kTileOverhead;
  // All tiles alike: equally many workers for each.
  const int32_t each = num_workers / num_tiles;
  if (whole_shares<Int>(largest_cost, each) <= even + slack &&
      int64_t(smallest_cost) * each > int64_t(largest_cost) * (each - 1))
    return {largest_cost, each * num_tiles};
  for (int step = 0; step < kShareSteps; ++step) {
    const Int share = even + slack * step / kShareSteps;
    if (const auto shares = int32_t(shares_of(share)); shares <= num_workers) return {share, shares};
  }
  return {1, num_workers};
}

// Tiles that differ much, as those of full and of sparse heads, cannot be cut apart; but turns can, one tile of every
// sequence head each, where all have as many: those of a chunk of a prompt over a cache are alike. The line then has
// turn after turn, each cut at the same places, and so have the tiles of a sequence head. `Cut::unit` is what a turn is
// rounded up to; 1: turns cannot be cut apart either.
template <typename Int>
FLUX_HD Cut<Int> cut_turns_apart(Int total_cost, Int smallest_turn, Int largest_turn, int32_t tiles_each,
                                 int32_t num_workers) {
  if (tiles_each < 2) return {1, num_workers};
  return cut_apart(total_cost, smallest_turn, largest_turn, tiles_each, num_workers,
                   [](Int) { return Int(INT32_MAX); });  // all turns alike, or not at all
}

// Ascending keys put the costliest sequence head first, equal ones in their order.
constexpr int kSeqHeadBits = 22;
FLUX_HD int64_t sort_key(int64_t cost, int32_t seq_head) {
  return (((int64_t(1) << 40) - cost) << kSeqHeadBits) | seq_head;
}
FLUX_HD int32_t seq_head_of(int64_t sort_key) { return int32_t(sort_key & ((1 << kSeqHeadBits) - 1)); }

// Does this worker hold the first piece of a cut tile? Then it (or its twin in the combine stage) merges
// the pieces that the following workers hold. Returns the tile, or -1.
FLUX_HD int32_t leads_tile(const WorkRange& r) {
  if (r.end_block == 0) return -1;
  return r.end_tile != r.tile || r.block == 0 ? r.end_tile : -1;
}

}  // namespace flux
