// How the router's work is laid over the blocks of a cluster and their shared memory; made on the host.
#pragma once

#include <cstdint>

#include "core/params.h"

namespace flux::cuda {

constexpr int kRouteThreads = 512;
constexpr int kRouteBatch = 8;  // most decisions a cluster takes at a time
constexpr int kRoutePairs = 2;  // of layers, see route_kernel.h; the last layer stands alone
static_assert(kRouterLayers == 2 * kRoutePairs + 1);

// How the threads of a block share a matrix: thread t has column t % columns, and of its rows t / columns, then every
// `rows`-th one.
struct Spread {
  int32_t columns, rows;
  uint32_t inverse;  // of `columns`, see quotient
};

// n / d for 0 <= n <= 2^13 and d > 0, by a multiplication.
constexpr uint32_t inverse_of(int32_t d) { return (1u << 31) / uint32_t(d) + 1; }
FLUX_HD int32_t quotient(int32_t n, uint32_t inverse) { return int32_t(uint64_t(uint32_t(n)) * inverse >> 31); }

struct LayerLayout {
  int32_t weight, bias;  // bytes from the start of shared memory
  int32_t pitch;         // elements from one output's weights to the next's
  int32_t log_lanes;     // 2^log_lanes threads share an output
  Spread copy;           // 16-byte pieces of the weights
};

struct RouteLayout {
  int32_t log_blocks;  // blocks of a cluster
  int32_t batch;       // decisions of a group, which a cluster takes at a time
  // The last layer and the choice are the work of one block for each decision: decision j of a group is finished by
  // block j % blocks of the cluster, as its number j / blocks. This is the most that one block finishes.
  int32_t slots;
  int32_t share[kRoutePairs];  // inner width of a pair that one block computes

  // Widths rounded up to 8: of what the blocks exchange (pooled states, features, input of the last layer), and of the
  // two buffers below.
  int32_t pooled_pitch, feature_pitch, last_pitch, in_pitch, hidden_pitch;
  // Bytes from the start of shared memory. Parts of sums, one from each block of the cluster:
  int32_t pooled;    // float [blocks, batch, pooled_pitch]
  int32_t features;  // float [blocks, batch, feature_pitch], before that float [threads, 8], sums of the pooling
  int32_t last;      // float [blocks, slots, last_pitch]
  int32_t inboxes;   // Inbox [3], of the three above
  // Activations of 1 or kRouteBatch decisions. Of each eight, the two halves lie apart (half_apart says where).
  int32_t in;      // float [decisions, in_pitch], the same in every block
  int32_t hidden;  // float [decisions, hidden_pitch], the block's own

  Spread pool;         // 8 columns of the states x rows
  int32_t pool_lanes;  // rows of `pool` for each decision
  uint32_t lanes_inverse, heads_inverse;
  int32_t step_rows, step_heads;     // from one of a thread's vectors to its next
  Spread pooled_sums, feature_sums;  // columns x decisions
  LayerLayout layers[kRouterLayers];
  bool staged;                                   // weights in shared memory; else read where they are
  bool x_vectors, weight_vectors, bias_vectors;  // 16-byte loads are possible
  int32_t bytes;
};

}  // namespace flux::cuda
