// In which order the blocks of keys of a sequence head add their parts of the queries' gradient, under full attention
// (cuda/sm90/backward_ordered.h). Sums in fp32 depend on the order, so it is fixed: from the first keys to the last.
//
// A thread block owns kAddedKeys keys and visits the tiles of kTileRows rows that see them from the last row to the
// first; to each tile it adds its part when as many blocks have been there as stand before its own. Blocks are handed
// out in the order of an AddOrder, in which those that a block waits for come first: there is always one that waits for
// nothing. And as they all begin at the last row, they follow each other: a block that starts one step after the one
// before it waits no more. (From its diagonal on, the other way round, every block would wait for all of the one before
// it; if the last keys came first, none would wait, but the longest blocks would be left for the end.)
#pragma once

#include "core/pattern.h"

namespace flux {

constexpr int32_t kAddedKeys = 128, kTileRows = 64;

struct AddOrder {
  int32_t seq_heads = 0, key_blocks = 0;  // blocks of each, as many as the longest sequence has
  int32_t together = 1;                   // sequence heads whose blocks are handed out in turn

  struct Item {
    int32_t seq_head, block;
  };
  FLUX_HD int32_t size() const { return seq_heads * key_blocks; }
  FLUX_HD Item operator[](int32_t i) const {
    const int32_t first = i / (together * key_blocks) * together, rest = i - first * key_blocks;
    const int32_t turn = min_of(together, seq_heads - first);
    return {first + rest % turn, rest / turn};
  }
};

// Few sequence heads at a time read and add to few rows, which then stay in the L2 cache; but where they have few
// blocks, workers wait for each other at the beginning and have nothing left at the end. So about two blocks a worker.
inline AddOrder add_order(int32_t seq_heads, int32_t key_blocks, int32_t workers) {
  const int32_t least = max_of(2 * workers / max_of(key_blocks, 1), 1);
  return {seq_heads, key_blocks, ceil_div(seq_heads, max_of(ceil_div(seq_heads, least), 1))};
}

// The tiles that see a block of keys, [begin, end). Of a sequence head's q_len queries the first is at q_pos.
FLUX_HD Span seeing_tiles(int32_t block, int32_t kv_len, int32_t q_pos, int32_t q_len, int32_t group) {
  const int32_t key = block * kAddedKeys;
  return query_blocks({}, key, key + kAddedKeys, kv_len, q_pos, q_len, group, kTileRows).near;
}

// How many blocks of keys a tile sees: the first ones.
FLUX_HD int32_t blocks_seen(int32_t tile, int32_t q_pos, int32_t q_len, int32_t group) {
  const int32_t end = min_of(ceil_div((tile + 1) * kTileRows, group), q_len);
  return ceil_div(max_of(q_pos + end, 0), kAddedKeys);
}

}  // namespace flux
