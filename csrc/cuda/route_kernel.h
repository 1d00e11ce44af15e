// Stage 1 on the device: pool both ends of prompts, two MLPs, decision.
//
// The weights (1.2 MB for a LayerRouter of head dimension 128) would take one multiprocessor over 10 us to read, so the
// blocks of a cluster share them. Layers come in pairs: a block computes a slice of the inner layer and at once what
// that adds to every output of the outer one, so that blocks exchange once per pair (as in Megatron-LM, arXiv
// 1909.08053, section 3). A cluster takes a group of decisions at a time and keeps its weights for the next group.
// Every sum has a fixed order.
//
// For each group the blocks of a cluster exchange three times: their shares of the pooled states, of the features (what
// the first pair of layers gives) and of the last layer's input. A block writes its shares into the shared memory of
// the others, and waits until as many bytes have come in as it knows will (Inbox, cluster.h). The next group uses the
// same memory without a further barrier, because no share is overwritten before it was read:
// - Pooled shares: a block sends the next ones when it has received the features from all blocks, and each had read the
//   pooled shares before it sent those.
// - Features and last inputs: a block sends the next ones when it has received the next pooled shares, or the next
//   features, from the block it sends to. Between reading the old ones and sending these that block has a
//   __syncthreads.
// Nothing is written to a block that has not started (cluster_wait), or that has ended: a block ends when it has
// received all that is sent to it.
#pragma once

#include <cstring>

#include "cuda/cluster.h"
#include "cuda/dependent_launch.h"
#include "cuda/element.h"
#include "cuda/route.h"
#include "cuda/sm80/ptx.h"

namespace flux::cuda {

// Eight elements in 16-byte pieces.
template <typename T>
struct Vector8 {
  static constexpr int kPieces = sizeof(T) / 2;
  uint4 pieces[kPieces];

  __device__ void load(const T* x) {
#pragma unroll
    for (int i = 0; i < kPieces; ++i) pieces[i] = reinterpret_cast<const uint4*>(x)[i];
  }
  __device__ float operator[](int i) const {
    uint32_t words[4 * kPieces];
    memcpy(words, pieces, sizeof(words));
    if constexpr (sizeof(T) == 4) {
      return reinterpret_cast<const float&>(words[i]);
    } else {
      const float2 pair = unpack<T>(words[i / 2]);
      return i % 2 ? pair.y : pair.x;
    }
  }
};

struct Place {
  int32_t row, column;  // row < spread.rows, or the thread has no part
};
__device__ inline Place place_in(const Spread& s) {
  const int32_t row = quotient(threadIdx.x, s.inverse);
  return {row, int32_t(threadIdx.x) - row * s.columns};
}

// Where activation i lies: first come the lower four of every eight, then the upper four. A thread reads eight in two
// loads of four, so that neighbouring threads, which have neighbouring eights, read neighbouring fours.
__device__ inline int32_t half_apart(int32_t i, int32_t pitch) {
  return (i & 4 ? pitch >> 1 : 0) + ((i >> 3) << 2 | (i & 3));
}

__device__ inline float silu(float x) { return __fdividef(x, 1.f + __expf(-x)); }

// Inner outputs of a pair, [begin, begin + count), that this block computes.
struct Slice {
  int32_t begin, count;
};
__device__ inline Slice slice_of(const RouteParams& p, const RouteLayout& at, int pair, int rank) {
  const int32_t begin = rank * at.share[pair];
  return {begin, max_of(min_of(p.layers[2 * pair].out - begin, at.share[pair]), 0)};
}

// Starts to copy what the block needs of weights and biases; whoever reads them waits for cp.async and for a barrier.
// Few instructions: every warp runs them while the first states are under way.
template <typename W>
__device__ void stage_weights(const RouteParams& p, const RouteLayout& at, unsigned char* memory, int rank) {
  constexpr int kPiece = 16 / sizeof(W), kWord = 4 / sizeof(W);
#pragma unroll
  for (int l = 0; l < kRouterLayers; ++l) {
    const Linear& layer = p.layers[l];
    const LayerLayout& to = at.layers[l];
    const Slice slice = l / 2 < kRoutePairs ? slice_of(p, at, l / 2, rank) : Slice{0, layer.out};
    const bool outer = l % 2;
    if (at.staged) {
      const Place t = place_in(to.copy);
      const int32_t column = t.column * kPiece;
      const int32_t rows = outer ? layer.out : slice.count, columns = outer ? slice.count : layer.in;
      // What fits in shared memory has offsets of 32 bits.
      const int32_t begin = (outer ? slice.begin : slice.begin * layer.in) + t.row * layer.in + column;
      const W* from = static_cast<const W*>(layer.weight) + begin;
      const int32_t from_step = to.copy.rows * layer.in, step = to.copy.rows * to.pitch * int(sizeof(W));
      uint32_t shared = sm80::shared_address(memory + to.weight) + (t.row * to.pitch + column) * int(sizeof(W));
      if (t.row < to.copy.rows && column < columns)
#pragma unroll 1
        for (int32_t r = t.row; r < rows; r += to.copy.rows, from += from_step, shared += step)
          sm80::cp_async16(shared, from, 16);
    }
    if (int(threadIdx.x) / 32 != l) continue;  // a warp for each bias
    const int32_t count = outer ? layer.out : slice.count;
    const W* bias = static_cast<const W*>(layer.bias) + (outer ? 0 : slice.begin);
    auto* own = reinterpret_cast<W*>(memory + to.bias);
    const int lane = threadIdx.x % 32;
    if (at.bias_vectors) {
#pragma unroll 1
      for (int32_t i = lane * kPiece; i + kPiece <= count; i += 32 * kPiece)
        sm80::cp_async16(sm80::shared_address(own + i), bias + i, 16);
      // The rest by words: a copy of 16 bytes that is told to read fewer is an error to memcheck.
#pragma unroll 1
      for (int32_t i = count / kPiece * kPiece + lane * kWord; i < count; i += 32 * kWord)
        sm80::cp_async4(sm80::shared_address(own + i), bias + i);
    } else {
#pragma unroll 1
      for (int32_t i = lane; i < count; i += 32) own[i] = bias[i];
    }
  }
  sm80::cp_async_commit();
}

// This block's share of the means of decisions [first, first + here), into its place among the pooled shares.
// Not yet `begun`: waits for the blocks of the cluster and for the previous kernel, and has `stage` start the copy of
// the weights behind the first loads, of `kInFlight` vectors at either end.
template <typename X, int kInFlight, typename Stage>
__device__ void pool(const RouteParams& p, const RouteLayout& at, unsigned char* memory, int32_t first, int32_t here,
                     int rank, bool& begun, Stage stage) {
  // Each thread sums vectors of 8 columns, one stream from the first rows and one, `apart` elements further, from the
  // last. A step adds a fixed distance; where it passes the last head it wraps to the first head of the next row.
  const int32_t heads = p.per_head ? 1 : p.num_heads;
  const Place t = place_in(at.pool);
  const int32_t j = quotient(t.row, at.lanes_inverse), step = at.pool_lanes << at.log_blocks;
  int32_t i = rank * at.pool_lanes + t.row - j * at.pool_lanes;
  const int32_t r = quotient(i, at.heads_inverse);
  int32_t head = i - r * heads;
  const X* from = static_cast<const X*>(p.x) + r * p.x_stride.s + head * p.x_stride.h + t.column * 8;
  const int64_t distance = at.step_rows * p.x_stride.s + at.step_heads * p.x_stride.h;
  const int64_t next_row = p.x_stride.s - heads * p.x_stride.h;
  const auto move = [&] {
    i += step, from += distance, head += at.step_heads;
    if (head >= heads) head -= heads, from += next_row;
  };

  if (!begun) {  // not earlier: all that depends on the launch alone is worked out by now
    cluster_wait();
    wait_for_previous();
    let_next_start();
  }
  Span rows{0, 0};
  if (t.row < at.pool.rows && j < here) {
    const int32_t decision = first + j, b = p.per_head ? decision / p.num_heads : decision;
    rows = p.rows(b, 0);
    from += b * p.x_stride.b + (p.per_head ? decision - b * p.num_heads : 0) * p.x_stride.h;
  }
  from += rows.begin * p.x_stride.s;
  const int32_t count = min_of(p.pool_size, rows.size()), vectors = count * heads;
  const int64_t apart = (rows.size() - count) * p.x_stride.s;
  float sum[8] = {};
  do {
    Vector8<X> begin[kInFlight], end[kInFlight];
    const int32_t left = vectors - i;
    if (at.x_vectors)
#pragma unroll
      for (int n = 0; n < kInFlight; ++n) {
        if (n * step >= left) break;
        begin[n].load(from), end[n].load(from + apart);
        move();
      }
    if (!begun) stage();
    begun = true;
    if (at.x_vectors) {
#pragma unroll
      for (int n = 0; n < kInFlight; ++n) {
        if (n * step >= left) break;
#pragma unroll
        for (int e = 0; e < 8; ++e) sum[e] += begin[n][e] + end[n][e];
      }
    } else {
      for (; i < vectors; move())
#pragma unroll
        for (int e = 0; e < 8; ++e)
          if (t.column * 8 + e < p.head_dim) sum[e] += float(from[e]) + float(from[apart + e]);
    }
  } while (i < vectors);
  const float scale = count ? __fdividef(1.f, 2.f * float(count) * float(heads)) : 0.f;
  auto* sums = reinterpret_cast<float*>(memory + at.features);  // [pool.rows, pooled_pitch]
  auto* to = reinterpret_cast<float4*>(sums) + 2 * threadIdx.x;
  to[0] = {sum[0] * scale, sum[1] * scale, sum[2] * scale, sum[3] * scale};
  to[1] = {sum[4] * scale, sum[5] * scale, sum[6] * scale, sum[7] * scale};
  __syncthreads();
  auto* own = reinterpret_cast<float*>(memory + at.pooled) + rank * at.batch * at.pooled_pitch;
  const Place at_sum = place_in(at.pooled_sums);
  if (at_sum.row < at.pooled_sums.rows)
    for (int32_t k = at_sum.row; k < at.batch; k += at.pooled_sums.rows) {
      const float* from = sums + k * at.pool_lanes * at.pooled_pitch + at_sum.column;
      float total = 0.f;
#pragma unroll 8
      for (int32_t n = 0; n < at.pool_lanes; ++n) total += from[n * at.pooled_pitch];
      own[k * at.pooled_pitch + at_sum.column] = total;
    }
}

// What a lane holds after `add_lanes`: sums of decisions first, ..., first + count - 1. One lane writes each.
struct Held {
  int32_t first, count;
  bool writes;
};

// A butterfly reduction over `lanes` threads. While a lane holds the sums of several decisions, it keeps one half and
// hands the other half to its partner, so that each step halves the work.
template <int kBatch>
__device__ Held add_lanes(float (&sum)[kBatch], int part, int lanes) {
  Held held{0, kBatch, true};
  int step = lanes / 2;
#pragma unroll
  for (int half = kBatch / 2; half > 0; half /= 2) {
    if (step == 0) continue;
    const bool upper = part & step;
#pragma unroll
    for (int j = 0; j < half; ++j) {
      const float mine = upper ? sum[j + half] : sum[j], other = upper ? sum[j] : sum[j + half];
      sum[j] = mine + __shfl_xor_sync(~0u, other, step);
    }
    held.first += upper ? half : 0;
    held.count = half;
    step /= 2;
  }
  held.writes = step == 0 || (part & (2 * step - 1)) == 0;
  for (; step > 0; step /= 2) sum[0] += __shfl_xor_sync(~0u, sum[0], step);
  return held;
}

// finish(o, j, weight[o] . x[j]) for all outputs o, rounded up to 8 (0 beyond the end), and decisions j < batch; x has
// room for kBatch.
// A thread has kRows outputs at a time: each weight is read once for all decisions, each x once for all its outputs.
template <bool kVectors, int kRows, int kBatch, typename W, typename Finish>
__device__ void multiply(const W* weight, int32_t pitch, int32_t outputs, int32_t inputs, int32_t log_lanes,
                         const float* x, int32_t x_pitch, int32_t batch, Finish finish) {
  const int lanes = 1 << log_lanes, part = threadIdx.x & (lanes - 1), step = kRouteThreads >> log_lanes;
  const int32_t padded = ceil_div(outputs, 8) * 8;
  for (int32_t first = 0; first < padded; first += kRows * step) {
    const int32_t begin = first + (int(threadIdx.x) >> log_lanes);
    float sum[kRows][kBatch] = {};
    if constexpr (kVectors) {
      for (int32_t c = part; c < inputs / 8; c += lanes) {
        Vector8<W> w[kRows];
#pragma unroll
        for (int n = 0; n < kRows; ++n) {
          const int32_t o = begin + n * step;
          w[n] = {};
          if (o < outputs) w[n].load(weight + int64_t(o) * pitch + 8 * c);
        }
#pragma unroll
        for (int j = 0; j < kBatch; ++j) {
          const float* in = x + j * x_pitch + 4 * c;
          const float4 lo = *reinterpret_cast<const float4*>(in);
          const float4 hi = *reinterpret_cast<const float4*>(in + x_pitch / 2);
#pragma unroll
          for (int n = 0; n < kRows; ++n) {
            float s = fmaf(w[n][0], lo.x, sum[n][j]);
            s = fmaf(w[n][1], lo.y, s);
            s = fmaf(w[n][2], lo.z, s);
            s = fmaf(w[n][3], lo.w, s);
            s = fmaf(w[n][4], hi.x, s);
            s = fmaf(w[n][5], hi.y, s);
            s = fmaf(w[n][6], hi.z, s);
            sum[n][j] = fmaf(w[n][7], hi.w, s);
          }
        }
      }
    } else {
      static_assert(kRows == 1);
      if (begin < outputs)
#pragma unroll 1
        for (int32_t i = part; i < inputs; i += lanes) {
          const float w = weight[int64_t(begin) * pitch + i];
#pragma unroll
          for (int j = 0; j < kBatch; ++j) sum[0][j] = fmaf(w, x[j * x_pitch + half_apart(i, x_pitch)], sum[0][j]);
        }
    }
#pragma unroll
    for (int n = 0; n < kRows; ++n) {
      const int32_t o = begin + n * step;
      const Held held = add_lanes(sum[n], part, lanes);
      if (o >= padded || !held.writes) continue;
#pragma unroll
      for (int j = 0; j < kBatch; ++j)
        if (j < held.count && held.first + j < batch) finish(o, held.first + j, sum[n][j]);
    }
  }
}

// One layer from activations `x`. The weights are in shared memory or where they lie; of the latter one decision has
// more loads in flight. Element by element (shapes no model has) there is one decision at a time.
template <int kBatch, typename W, typename Finish>
__device__ void layer_of(const RouteLayout& at, int l, const unsigned char* memory, const W* weight, int32_t outputs,
                         int32_t inputs, const float* x, int32_t x_pitch, Finish finish) {
  const LayerLayout& to = at.layers[l];
  const auto* own = reinterpret_cast<const W*>(memory + to.weight);
  if constexpr (kBatch > 1) {
    multiply<true, 2, kBatch>(at.staged ? own : weight, to.pitch, outputs, inputs, to.log_lanes, x, x_pitch, at.batch,
                              finish);
  } else if (at.staged) {
    multiply<true, 1, 1>(own, to.pitch, outputs, inputs, to.log_lanes, x, x_pitch, 1, finish);
  } else if (at.weight_vectors) {
    multiply<true, 4, 1>(weight, to.pitch, outputs, inputs, to.log_lanes, x, x_pitch, 1, finish);
  } else {
    multiply<false, 1, 1>(weight, to.pitch, outputs, inputs, to.log_lanes, x, x_pitch, 1, finish);
  }
}

// The sum of all blocks' shares of a value, which are `apart` floats apart. There are 1, 8 or 16 blocks.
__device__ inline float sum_of_shares(const float* shares, int32_t apart, int log_blocks) {
  float sum = shares[0];
  if (log_blocks == 0) return sum;
#pragma unroll
  for (int r = 1; r < 8; ++r) sum += shares[r * apart];
  if (log_blocks == 3) return sum;
#pragma unroll
  for (int r = 8; r < 16; ++r) sum += shares[r * apart];
  return sum;
}

// value(column) = sum of all blocks' shares, for every decision: use(decision, column, value).
template <typename Use>
__device__ void add_shares(const RouteLayout& at, const float* shares, int32_t pitch, const Spread& spread, Use use) {
  const Place t = place_in(spread);
  if (t.row >= spread.rows) return;
  for (int32_t c = t.column; c < pitch; c += spread.columns)
    for (int32_t j = t.row; j < at.batch; j += spread.rows)
      use(j, c, sum_of_shares(shares + j * pitch + c, at.batch * pitch, at.log_blocks));
}

// The last layer and the decision. All threads add up the layer's input, then a warp takes each decision of this block.
template <typename W>
__device__ void decide(const RouteParams& p, const RouteLayout& at, unsigned char* memory, int32_t first, int32_t here,
                       int rank) {
  constexpr int kLast = kRouterLayers - 1;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const Linear& layer = p.layers[kLast];
  auto* shares = reinterpret_cast<float*>(memory + at.last);
  const auto* in_bias = reinterpret_cast<const W*>(memory + at.layers[kLast - 1].bias);
  const auto* bias = reinterpret_cast<const W*>(memory + at.layers[kLast].bias);
  const W* weight =
      at.staged ? reinterpret_cast<const W*>(memory + at.layers[kLast].weight) : static_cast<const W*>(layer.weight);
  for (int slot = 0; slot < at.slots; ++slot)
    for (int32_t i = threadIdx.x; i < layer.in; i += kRouteThreads) {
      float* x = shares + slot * at.last_pitch + i;  // takes the place of the first block's share
      *x = silu(sum_of_shares(x, at.slots * at.last_pitch, at.log_blocks) + float(in_bias[i]));
    }
  __syncthreads();
  for (int slot = warp; slot < at.slots; slot += kRouteThreads / 32) {
    const int32_t j = (slot << at.log_blocks) + rank;
    if (j >= here) return;
    float logits[2] = {};
#pragma unroll 4
    for (int32_t i = lane; i < layer.in; i += 32)
#pragma unroll
      for (int o = 0; o < 2; ++o)
        logits[o] += float(weight[o * at.layers[kLast].pitch + i]) * shares[slot * at.last_pitch + i];
#pragma unroll
    for (int step = 16; step > 0; step /= 2)
#pragma unroll
      for (int o = 0; o < 2; ++o) logits[o] += __shfl_xor_sync(~0u, logits[o], step);
    if (lane > 0) continue;
    const float sparse = logits[0] + float(bias[0]), full = logits[1] + float(bias[1]);
    p.logits[2 * (int64_t(first) + j)] = sparse;
    p.logits[2 * (int64_t(first) + j) + 1] = full;
    p.route[first + j] = decide_route(sparse, full);
  }
}

template <typename X, typename W, int kBatch>
__global__ void __launch_bounds__(kRouteThreads, 1)
    route_kernel(const __grid_constant__ RouteParams p, const __grid_constant__ RouteLayout at) {
  unsigned char* memory = sm80::shared_memory();
  const int rank = cluster_rank(), blocks = 1 << at.log_blocks;
  const int32_t decisions = p.batch * (p.per_head ? p.num_heads : 1);
  auto* pooled = reinterpret_cast<float*>(memory + at.pooled);
  auto* features = reinterpret_cast<float*>(memory + at.features);
  auto* last = reinterpret_cast<float*>(memory + at.last);
  auto* in = reinterpret_cast<float*>(memory + at.in);
  auto* hidden = reinterpret_cast<float*>(memory + at.hidden);
  auto* inboxes = reinterpret_cast<Inbox*>(memory + at.inboxes);
  if (threadIdx.x == 0)
    for (int i = 0; i < 3; ++i) init_inbox(inboxes + i);
  cluster_arrive();  // waited for before anything is sent

  bool begun = false;
  uint32_t round = 0;
  const int32_t groups_apart = (int32_t(gridDim.x) >> at.log_blocks) * at.batch;
  for (int32_t first = (int32_t(blockIdx.x) >> at.log_blocks) * at.batch; first < decisions;
       first += groups_apart, ++round) {
    const int32_t here = min_of(at.batch, decisions - first);
    pool<X, (kBatch > 1 ? 8 : 14) / sizeof(X)>(p, at, memory, first, here, rank, begun,
                                               [&] { stage_weights<W>(p, at, memory, rank); });
    __syncthreads();
    const int32_t group_pooled = at.batch * at.pooled_pitch, group_features = at.batch * at.feature_pitch;
    send_to_others(pooled + rank * group_pooled, group_pooled, rank, at.log_blocks, inboxes);
    sm80::cp_async_wait<0>();
    receive(inboxes, (blocks - 1) * group_pooled * int(sizeof(float)), round);
    add_shares(at, pooled, at.pooled_pitch, at.pooled_sums, [&](int32_t j, int32_t d, float mean) {
      in[j * at.in_pitch + half_apart(d, at.in_pitch)] = mean;
      if ((j & (blocks - 1)) == rank && j < here && d < p.head_dim)
        p.pooled[(int64_t(first) + j) * p.head_dim + d] = mean;
    });
    __syncthreads();

#pragma unroll
    for (int pair = 0; pair < kRoutePairs; ++pair) {
      const int l = 2 * pair;
      const Linear &inner = p.layers[l], &outer = p.layers[l + 1];
      const Slice slice = slice_of(p, at, pair, rank);
      const auto* inner_bias = reinterpret_cast<const W*>(memory + at.layers[l].bias);
      layer_of<kBatch>(at, l, memory, static_cast<const W*>(inner.weight) + int64_t(slice.begin) * inner.in,
                       slice.count, inner.in, in, at.in_pitch, [&](int32_t o, int32_t j, float y) {
                         hidden[j * at.hidden_pitch + half_apart(o, at.hidden_pitch)] =
                             o < slice.count ? silu(y + float(inner_bias[o])) : 0.f;
                       });
      __syncthreads();
      layer_of<kBatch>(at, l + 1, memory, static_cast<const W*>(outer.weight) + slice.begin, outer.out, slice.count,
                       hidden, at.hidden_pitch, [&](int32_t o, int32_t j, float y) {
                         if (pair == 0)
                           features[rank * group_features + j * at.feature_pitch + o] = y;
                         else
                           send(last + (rank * at.slots + (j >> at.log_blocks)) * at.last_pitch + o, j & (blocks - 1),
                                y, inboxes + 2);
                       });
      if (pair == 0) {
        __syncthreads();
        send_to_others(features + rank * group_features, group_features, rank, at.log_blocks, inboxes + 1);
        receive(inboxes + 1, (blocks - 1) * group_features * int(sizeof(float)), round);
        const auto* bias = reinterpret_cast<const W*>(memory + at.layers[l + 1].bias);
        add_shares(at, features, at.feature_pitch, at.feature_sums, [&](int32_t j, int32_t o, float y) {
          in[j * at.in_pitch + half_apart(o, at.in_pitch)] = o < outer.out ? y + float(bias[o]) : 0.f;
        });
        __syncthreads();
      }
    }
    const int32_t own = (at.batch - 1 - rank + blocks) >> at.log_blocks;  // decisions of the group that end here
    receive(inboxes + 2, blocks * own * at.last_pitch * int(sizeof(float)), round);
    decide<W>(p, at, memory, first, here, rank);
  }
}

}  // namespace flux::cuda
