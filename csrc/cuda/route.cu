// Stage 1 on the host: how many blocks share a decision, what lies where, the launch.
#include <algorithm>
#include <atomic>

#include "cuda/cuda.h"
#include "cuda/route_kernel.h"

namespace flux::cuda {
namespace {

constexpr int kMaxDevices = 64;
// A cluster of 16 halves what each block has to read and lengthens every exchange by about 0.2 us: worth it from here.
constexpr int64_t kWideBytes = 1 << 20;

// What a device has room for. Zero shared memory: not asked yet.
struct Limits {
  int32_t shared_bytes;  // of a block
  int16_t num_sms;
  int8_t narrow, wide;  // clusters of 8 and of 16 blocks at once; 0: none
};
static_assert(sizeof(Limits) == 8);

cudaLaunchConfig_t config_of(int clusters, int blocks, int shared_bytes, cudaStream_t stream,
                             cudaLaunchAttribute (&attributes)[2]) {
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim = {unsigned(blocks), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(clusters * blocks);
  config.blockDim = dim3(kRouteThreads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = attributes;
  return config;
}

int8_t most_clusters(const void* kernel, int blocks, int shared_bytes) {
  cudaLaunchAttribute attributes[2];
  cudaLaunchConfig_t config = config_of(1, blocks, shared_bytes, nullptr, attributes);
  config.attrs = attributes + 1;
  config.numAttrs = 1;
  int clusters = 0;
  if (cudaOccupancyMaxActiveClusters(&clusters, kernel, &config) == cudaSuccess)
    return int8_t(std::clamp(clusters, 0, 127));
  cudaGetLastError();
  return 0;
}

// Asked once per device, of any of the kernels: the driver takes microseconds to answer.
cudaError_t current_limits(const void* kernel, Limits* limits) {
  static std::atomic<Limits> known[kMaxDevices];
  int device = 0, num_sms = 0;
  if (cudaError_t e = cudaGetDevice(&device)) return e;
  if (device < kMaxDevices) {
    *limits = known[device].load(std::memory_order_relaxed);
    if (limits->shared_bytes) return cudaSuccess;
  }
  Limits found{};
  if (cudaError_t e = cudaDeviceGetAttribute(&found.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device))
    return e;
  if (cudaError_t e = cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, device)) return e;
  found.num_sms = int16_t(num_sms);
  cudaFuncAttributes attributes;
  if (cudaError_t e = cudaFuncGetAttributes(&attributes, kernel)) return e;
  if (attributes.ptxVersion >= 90) {
    if (cudaError_t e = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, found.shared_bytes))
      return e;
    found.narrow = most_clusters(kernel, 8, found.shared_bytes);
    if (cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1) == cudaSuccess)
      found.wide = most_clusters(kernel, 16, found.shared_bytes);
    else
      cudaGetLastError();
  }
  if (device < kMaxDevices) known[device].store(found, std::memory_order_relaxed);
  *limits = found;
  return cudaSuccess;
}

bool aligned16(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }
int32_t up_to_8(int32_t n) { return ceil_div(n, 8) * 8; }

Spread spread(int32_t columns) {
  columns = std::clamp(columns, 1, kRouteThreads);
  return {columns, kRouteThreads / columns, inverse_of(columns)};
}

RouteLayout lay_out(const RouteParams& p, int log_blocks, int batch, bool staged) {
  const int x_size = p.dtype == DType::kFloat32 ? 4 : 2, w_size = p.weight_dtype == DType::kFloat32 ? 4 : 2;
  const int blocks = 1 << log_blocks, heads = p.per_head ? 1 : p.num_heads;
  RouteLayout at{};
  at.log_blocks = log_blocks;
  at.batch = batch;
  at.slots = ceil_div(batch, blocks);
  at.x_vectors = aligned16(p.x) && p.head_dim % 8 == 0;
  for (int64_t stride : {p.x_stride.b, p.x_stride.s, p.x_stride.h}) at.x_vectors &= stride * x_size % 16 == 0;
  at.weight_vectors = at.bias_vectors = true;
  for (const Linear& layer : p.layers) {
    at.weight_vectors &= layer.in % 8 == 0 && aligned16(layer.weight);
    at.bias_vectors &= aligned16(layer.bias) && layer.out * w_size % 4 == 0;
  }
  at.staged = staged;
  for (int pair = 0; pair < kRoutePairs; ++pair) {
    at.share[pair] = up_to_8(ceil_div(p.layers[2 * pair].out, blocks));
    at.hidden_pitch = std::max(at.hidden_pitch, at.share[pair]);
  }
  at.pooled_pitch = up_to_8(p.head_dim);
  at.feature_pitch = up_to_8(p.layers[1].out);
  at.last_pitch = up_to_8(p.layers[3].out);
  at.in_pitch = std::max(at.pooled_pitch, at.feature_pitch);

  at.pool = spread(at.pooled_pitch / 8);
  at.pool_lanes = std::max(at.pool.rows / batch, 1);
  at.lanes_inverse = inverse_of(at.pool_lanes), at.heads_inverse = inverse_of(heads);
  at.step_rows = at.pool_lanes * blocks / heads;
  at.step_heads = at.pool_lanes * blocks % heads;
  at.pooled_sums = spread(at.pooled_pitch);
  at.feature_sums = spread(at.feature_pitch);

  int64_t bytes = 0;
  const auto take = [&](int32_t& offset, int64_t size) {
    offset = int32_t(std::min<int64_t>(bytes, INT32_MAX));
    bytes += (size + 15) / 16 * 16;
  };
  take(at.pooled, int64_t(4) * blocks * batch * at.pooled_pitch);
  take(at.features, std::max(int64_t(4) * blocks * batch * at.feature_pitch, int64_t(4) * 8 * kRouteThreads));
  take(at.last, int64_t(4) * blocks * at.slots * at.last_pitch);
  take(at.inboxes, 3 * sizeof(Inbox));
  const int64_t decisions = batch > 1 ? kRouteBatch : 1;
  take(at.in, 4 * decisions * at.in_pitch);
  take(at.hidden, 4 * decisions * at.hidden_pitch);
  for (int l = 0; l < kRouterLayers; ++l) {
    const Linear& layer = p.layers[l];
    LayerLayout& to = at.layers[l];
    // The block's part of the layer: a pair is cut along its inner width.
    const int32_t outputs = l / 2 < kRoutePairs && l % 2 == 0 ? at.share[l / 2] : layer.out;
    const int32_t inputs = l % 2 ? at.share[l / 2] : layer.in;
    const int32_t chunks = ceil_div(inputs, 8), rows = batch > 1 ? 2 : 1;
    // Staged: all threads busy. Else as many neighbours as there are pieces of a row, for wide loads.
    const auto more = [&](int lanes) {
      return lanes < 32 && lanes < chunks && (!staged || ceil_div(outputs, rows) * 2 * lanes <= kRouteThreads);
    };
    while (more(1 << to.log_lanes)) ++to.log_lanes;
    to.pitch = layer.in;
    if (staged) {
      // Rows an odd multiple of `lanes` pieces apart: any eight neighbouring threads read from different banks.
      const int32_t lanes = 1 << to.log_lanes, times = ceil_div(chunks, lanes);
      to.pitch = 8 * (lanes < 8 ? (times | 1) * lanes : chunks);
      const int32_t pieces = inputs * w_size / 16;
      to.copy = spread(pieces);
      if (pieces > kRouteThreads) bytes = INT32_MAX;  // a thread copies one piece of a row
      take(to.weight, int64_t(outputs) * to.pitch * w_size);
    }
    take(to.bias, int64_t(outputs) * w_size);
  }
  at.bytes = int32_t(std::min<int64_t>(bytes, INT32_MAX));
  return at;
}

// The layout for as many decisions at a time as it takes for all to be done in the fewest rounds of `room` clusters.
// Weights that stay in shared memory come before larger groups. False: nothing fits.
bool find_layout(const RouteParams& p, int32_t decisions, int log_blocks, int room, int most_bytes, RouteLayout* at) {
  const bool vectors = lay_out(p, log_blocks, 1, false).weight_vectors;
  for (bool staged : {true, false}) {
    if (staged && !vectors) continue;
    for (int most = vectors ? kRouteBatch : 1; most > 0; most = at->batch - 1) {
      const int32_t rounds = ceil_div(decisions, room * most);
      *at = lay_out(p, log_blocks, ceil_div(decisions, room * rounds), staged);
      if (at->bytes <= most_bytes) return true;
    }
  }
  return false;
}

template <typename X, typename W>
cudaError_t launch(const RouteParams& p, cudaStream_t stream) {
  const int32_t decisions = p.batch * (p.per_head ? p.num_heads : 1);
  Limits limits{};
  if (cudaError_t e = current_limits(reinterpret_cast<const void*>(route_kernel<X, W, 1>), &limits)) return e;
  int64_t to_read = int64_t(2) * p.pool_size * (p.per_head ? 1 : p.num_heads) * p.head_dim * sizeof(X);
  for (const Linear& layer : p.layers) to_read += int64_t(layer.in) * layer.out * sizeof(W);
  for (int log_blocks : {4, 3, 0}) {
    const int room = log_blocks == 4 ? limits.wide : log_blocks == 3 ? limits.narrow : limits.num_sms;
    if (room == 0 || (log_blocks == 4 && (decisions > room || to_read < kWideBytes))) continue;
    RouteLayout at{};
    if (!find_layout(p, decisions, log_blocks, room, limits.shared_bytes, &at)) continue;
    const auto kernel = at.batch == 1 ? route_kernel<X, W, 1> : route_kernel<X, W, kRouteBatch>;
    // Always the same limit: another thread may be about to launch the same kernel with more than this call needs.
    if (cudaError_t e = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, limits.shared_bytes))
      return e;
    if (log_blocks == 4)
      if (cudaError_t e = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1)) return e;
    cudaLaunchAttribute attributes[2];
    cudaLaunchConfig_t config =
        config_of(std::min(ceil_div(decisions, at.batch), room), 1 << log_blocks, at.bytes, stream, attributes);
    // Code for compute capability 9.0 has what both attributes need; a lone block needs no cluster.
    config.numAttrs = log_blocks ? 2 : limits.narrow ? 1 : 0;
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
