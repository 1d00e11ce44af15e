// Stage 1: pool both ends of a prompt, two MLPs, decision, in one launch.
//
// The weights (1.2 MB for a LayerRouter of head dimension 128) would take one multiprocessor over 10 us to read, so the
// blocks of a cluster share them: each holds the rows of every layer that produce its own outputs, fetched to shared
// memory while the states are pooled, and sends its outputs to all others. Every sum has a fixed order.
#include <algorithm>

#include "cuda/cluster.h"
#include "cuda/cuda.h"
#include "cuda/element.h"
#include "cuda/sm80/ptx.h"

namespace flux::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kMaxBatch = 4;                                       // decisions of one cluster
constexpr int kClusterBytes = 220 * 1024, kLoneBytes = 96 * 1024;  // shared memory to count on: Hopper, any GPU

// Shared memory of a block, in bytes from its start.
struct RouteLayout {
  int32_t batch;        // decisions per cluster
  int32_t width;        // widest layer
  int32_t share;        // most outputs a block computes of one layer, or D
  int32_t pooled;       // float [cluster, batch, D]: everyone's share of the sums
  int32_t activations;  // float [2, batch, width]
  int32_t outputs;      // float [batch, share]: the block's own, before they are sent
  int32_t sums;         // float [kThreads * 8]: the block's sums before they are added up
  int32_t bias[kRouterLayers];
  int32_t weight[kRouterLayers];   // the block's rows
  bool staged;                     // weights in shared memory; else read where they are
  bool x_vectors, weight_vectors;  // 16-byte loads are possible
  int32_t bytes;
};

// Outputs of a layer that one block computes; the last layer (two outputs) is the first block's.
FLUX_HD int32_t share_of(const Linear& layer, bool last, int32_t blocks) {
  return last ? 2 : ceil_div(layer.out, blocks);
}

// Eight elements in 16-byte pieces.
template <typename T>
struct Vector8 {
  static constexpr int kPieces = sizeof(T) / 2;
  uint4 pieces[kPieces];

  __device__ void load(const T* x) {
#pragma unroll
    for (int i = 0; i < kPieces; ++i) pieces[i] = reinterpret_cast<const uint4*>(x)[i];
  }
  // One by one, where 16-byte loads are not possible.
  __device__ void load(const T* x, int32_t count) {
    T each[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) each[i] = i < count ? x[i] : T(0.f);
#pragma unroll
    for (int i = 0; i < kPieces; ++i) pieces[i] = reinterpret_cast<const uint4*>(each)[i];
  }
  __device__ float operator[](int i) const { return float(reinterpret_cast<const T*>(pieces)[i]); }
};

template <typename W>
__device__ void stage_weights(const RouteParams& p, const RouteLayout& at, unsigned char* memory, int rank,
                              int blocks) {
  for (int l = 0; l < kRouterLayers; ++l) {
    const Linear& layer = p.layers[l];
    const bool last = l == kRouterLayers - 1;
    const int32_t share = share_of(layer, last, blocks), first = rank * share;
    const int32_t count = max_of(min_of(layer.out - first, share), 0);
    auto* bias = reinterpret_cast<float*>(memory + at.bias[l]);
    for (int i = threadIdx.x; i < count; i += kThreads) bias[i] = float(static_cast<const W*>(layer.bias)[first + i]);
    if (!at.staged) continue;
    const auto* from =
        reinterpret_cast<const unsigned char*>(static_cast<const W*>(layer.weight) + int64_t(first) * layer.in);
    for (int i = threadIdx.x * 16; i < count * layer.in * int(sizeof(W)); i += kThreads * 16)
      sm80::cp_async16(sm80::shared_address(memory + at.weight[l] + i), from + i, true);
  }
  sm80::cp_async_commit();
}

// Adds this block's share of the rows pooled for one decision and sends the sums to all blocks.
template <typename X>
__device__ void pool_share(const RouteParams& p, const RouteLayout& at, unsigned char* memory, int32_t decision, int j,
                           int rank, int blocks) {
  const int32_t per_sequence = p.per_head ? p.num_heads : 1, heads = p.per_head ? 1 : p.num_heads;
  const int32_t b = decision / per_sequence, first_head = p.per_head ? decision % per_sequence : 0;
  const Span rows = p.rows(b, 0);
  const int32_t count = min_of(p.pool_size, rows.size()), vectors = 2 * count * heads;
  const int32_t chunks = ceil_div(p.head_dim, 8), lanes = kThreads / chunks;  // threads that share a chunk column
  const int32_t chunk = threadIdx.x % chunks, lane = threadIdx.x / chunks;
  const X* x = static_cast<const X*>(p.x) + b * p.x_stride.b + first_head * p.x_stride.h + chunk * 8;
  float sum[8] = {};
  if (lane < lanes) {
    constexpr int kInFlight = 8;
    for (int32_t first = rank * lanes + lane; first < vectors; first += kInFlight * blocks * lanes) {
      Vector8<X> y[kInFlight];
#pragma unroll
      for (int n = 0; n < kInFlight; ++n) {
        const int32_t i = first + n * blocks * lanes, r = i / heads, head = i - r * heads;
        const int64_t row = r < count ? rows.begin + r : rows.end - 2 * count + r;
        const X* from = x + row * p.x_stride.s + head * p.x_stride.h;
        if (i >= vectors)
          y[n] = {};
        else if (at.x_vectors)
          y[n].load(from);
        else
          y[n].load(from, p.head_dim - chunk * 8);
      }
#pragma unroll
      for (int n = 0; n < kInFlight; ++n)
#pragma unroll
        for (int e = 0; e < 8; ++e) sum[e] += y[n][e];
    }
  }
  auto* sums = reinterpret_cast<float*>(memory + at.sums);  // [lanes, chunks * 8]
#pragma unroll
  for (int e = 0; e < 8; ++e) sums[threadIdx.x * 8 + e] = sum[e];
  __syncthreads();
  auto* own = reinterpret_cast<float*>(memory + at.outputs);
  for (int d = threadIdx.x; d < p.head_dim; d += kThreads) {
    float total = 0.f;
#pragma unroll 8
    for (int i = 0; i < lanes; ++i) total += sums[i * chunks * 8 + d];
    own[d] = total;
  }
  if (j == 0) cluster_wait();  // every block of the cluster has started: its memory may be written to
  __syncthreads();
  send_to_all(own, reinterpret_cast<float*>(memory + at.pooled) + (rank * at.batch + j) * p.head_dim, p.head_dim,
              blocks);
  __syncthreads();
}

template <typename W>
__device__ float dot(const W* w, const float* x, int32_t n, bool vectors) {
  const int lane = threadIdx.x % 32;
  float sum = 0.f;
  if (vectors) {
#pragma unroll 4
    for (int32_t i = 8 * lane; i < n; i += 256) {
      Vector8<W> y;
      y.load(w + i);
      const float4 lo = *reinterpret_cast<const float4*>(x + i), hi = *reinterpret_cast<const float4*>(x + i + 4);
      sum +=
          y[0] * lo.x + y[1] * lo.y + y[2] * lo.z + y[3] * lo.w + y[4] * hi.x + y[5] * hi.y + y[6] * hi.z + y[7] * hi.w;
    }
  } else {
    for (int32_t i = lane; i < n; i += 32) sum += float(w[i]) * x[i];
  }
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
  return sum;
}

template <typename X, typename W>
__global__ void __launch_bounds__(kThreads, 1)
    route_kernel(const __grid_constant__ RouteParams p, const __grid_constant__ RouteLayout at) {
  extern __shared__ __align__(16) unsigned char memory[];
  const int rank = cluster_rank(), blocks = cluster_size(), warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int32_t decisions = p.batch * (p.per_head ? p.num_heads : 1);
  const int32_t first = blockIdx.x / blocks * at.batch, batch = min_of(at.batch, decisions - first);
  cluster_arrive();  // pool_share waits
  stage_weights<W>(p, at, memory, rank, blocks);
  for (int j = 0; j < batch; ++j) pool_share<X>(p, at, memory, first + j, j, rank, blocks);
  sm80::cp_async_wait<0>();
  cluster_barrier();

  auto* activations = reinterpret_cast<float*>(memory + at.activations);
  auto* own = reinterpret_cast<float*>(memory + at.outputs);
  const auto* shares = reinterpret_cast<const float*>(memory + at.pooled);
  for (int i = threadIdx.x; i < batch * p.head_dim; i += kThreads) {
    const int j = i / p.head_dim, d = i % p.head_dim;
    float sum = 0.f;
#pragma unroll 8
    for (int r = 0; r < blocks; ++r) sum += shares[(r * at.batch + j) * p.head_dim + d];
    const int32_t b = (first + j) / (p.per_head ? p.num_heads : 1);
    const int32_t count = min_of(p.pool_size, p.rows(b, 0).size());
    const float mean = count ? sum / (2.f * float(count) * float(p.per_head ? 1 : p.num_heads)) : 0.f;
    activations[j * at.width + d] = mean;
    if (rank == 0) p.pooled[int64_t(first) * p.head_dim + i] = mean;
  }
  __syncthreads();

  for (int l = 0; l < kRouterLayers; ++l) {
    const Linear& layer = p.layers[l];
    const bool last = l == kRouterLayers - 1;
    if (last && rank > 0) break;
    const int32_t share = share_of(layer, last, blocks), begin = rank * share;
    const int32_t outputs = max_of(min_of(layer.out - begin, share), 0);
    const float* in = activations + l % 2 * at.batch * at.width;
    float* next = activations + (l + 1) % 2 * at.batch * at.width;
    const auto* bias = reinterpret_cast<const float*>(memory + at.bias[l]);
    const W* weight = at.staged ? reinterpret_cast<const W*>(memory + at.weight[l])
                                : static_cast<const W*>(layer.weight) + int64_t(begin) * layer.in;
    for (int i = warp; i < outputs * batch; i += kThreads / 32) {
      const int o = i % outputs, j = i / outputs;
      float y = dot(weight + o * layer.in, in + j * at.width, layer.in, at.weight_vectors) + bias[o];
      if (l != kEncoderLayers - 1 && !last) y /= 1.f + __expf(-y);
      if (lane == 0) (last ? next + j * at.width : own + j * at.share)[o] = y;
    }
    if (last) break;
    __syncthreads();
    for (int j = 0; j < batch; ++j) send_to_all(own + j * at.share, next + j * at.width + begin, outputs, blocks);
    cluster_barrier();
  }
  if (rank > 0) return;
  __syncthreads();
  const float* z = activations + kRouterLayers % 2 * at.batch * at.width;
  for (int j = threadIdx.x; j < batch; j += kThreads) {
    const float sparse = z[j * at.width], full = z[j * at.width + 1];
    p.logits[2 * (first + j)] = sparse;
    p.logits[2 * (first + j) + 1] = full;
    p.route[first + j] = sparse >= full ? 1 : 0;  // a NaN chooses full
  }
}

bool aligned16(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

RouteLayout lay_out(const RouteParams& p, int blocks, int batch, int most_bytes) {
  const int x_size = p.dtype == DType::kFloat32 ? 4 : 2, w_size = p.weight_dtype == DType::kFloat32 ? 4 : 2;
  RouteLayout at{};
  at.batch = batch;
  at.x_vectors = aligned16(p.x) && p.head_dim % 8 == 0;
  for (int64_t stride : {p.x_stride.b, p.x_stride.s, p.x_stride.h}) at.x_vectors &= stride * x_size % 16 == 0;
  at.width = at.share = p.head_dim;
  at.weight_vectors = true;
  for (const Linear& layer : p.layers) {
    at.width = std::max(at.width, layer.out);
    at.share = std::max(at.share, ceil_div(layer.out, blocks));
    at.weight_vectors &= layer.in % 8 == 0 && aligned16(layer.weight);
  }
  const auto take = [&](int32_t& offset, int64_t bytes) {
    offset = at.bytes;
    at.bytes += int32_t((bytes + 15) / 16 * 16);
  };
  take(at.pooled, int64_t(4) * blocks * batch * p.head_dim);
  take(at.activations, int64_t(4) * 2 * batch * at.width);
  take(at.outputs, int64_t(4) * batch * at.share);
  take(at.sums, 4 * 8 * kThreads);
  for (int l = 0; l < kRouterLayers; ++l) take(at.bias[l], 4 * share_of(p.layers[l], l == kRouterLayers - 1, blocks));
  int64_t weights = 0;
  for (int l = 0; l < kRouterLayers; ++l)
    weights += int64_t(share_of(p.layers[l], l == kRouterLayers - 1, blocks)) * p.layers[l].in * w_size;
  at.staged = at.weight_vectors && at.bytes + weights <= most_bytes;
  if (at.staged)
    for (int l = 0; l < kRouterLayers; ++l)
      take(at.weight[l], int64_t(share_of(p.layers[l], l == kRouterLayers - 1, blocks)) * p.layers[l].in * w_size);
  return at;
}

template <typename X, typename W>
cudaError_t launch(const RouteParams& p, cudaStream_t stream) {
  const auto kernel = route_kernel<X, W>;
  const int32_t decisions = p.batch * (p.per_head ? p.num_heads : 1);
  cudaFuncAttributes attributes;
  if (cudaError_t e = cudaFuncGetAttributes(&attributes, kernel)) return e;
  const bool clusters = attributes.ptxVersion >= 90;
  for (int blocks : {16, 8, 1}) {
    if (blocks > 1 && !clusters) continue;
    // As many clusters as a Hopper has room for, then several decisions each.
    int32_t batch = blocks > 8 ? 1 : std::clamp(ceil_div(decisions, 128 / blocks), 1, kMaxBatch);
    const int most_bytes = blocks > 1 ? kClusterBytes : kLoneBytes;
    RouteLayout at = lay_out(p, blocks, batch, most_bytes);
    while (batch > 1 && at.bytes > most_bytes) at = lay_out(p, blocks, batch /= 2, most_bytes);
    cudaLaunchAttribute attribute;
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {unsigned(blocks), 1, 1};
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(ceil_div(decisions, batch) * blocks);
    config.blockDim = dim3(kThreads);
    config.dynamicSmemBytes = at.bytes;
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = blocks > 1 ? 1 : 0;
    if (cudaError_t e = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, at.bytes)) return e;
    if (blocks > 8) {  // few such clusters have room at a time
      int fit = 0;
      if (cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1) != cudaSuccess ||
          cudaOccupancyMaxActiveClusters(&fit, kernel, &config) != cudaSuccess || fit < decisions) {
        cudaGetLastError();
        continue;
      }
    }
    return cudaLaunchKernelEx(&config, kernel, p, at);
  }
  return cudaErrorNotSupported;
}

template <typename Use>
cudaError_t with_type(DType dtype, Use use) {
  switch (dtype) {
    case DType::kFloat16:
      return use(__half{});
    case DType::kBFloat16:
      return use(__nv_bfloat16{});
    default:
      return use(float{});
  }
}

}  // namespace

cudaError_t route(const RouteParams& p, cudaStream_t stream) {
  if (p.batch == 0) return cudaSuccess;
  return with_type(p.dtype, [&](auto x) {
    return with_type(p.weight_dtype, [&](auto w) { return launch<decltype(x), decltype(w)>(p, stream); });
  });
}

}  // namespace flux::cuda
