// Chooses the instance for a problem, and describes its tensors to TMA.
#include "cuda/sm90/instances.h"
#include "cuda/sm90/mix_kernels.h"
#include "cuda/sm90/tensor_map.h"

namespace flux::cuda::sm90 {
namespace {

cudaError_t to_kernel_params(const AttendParams& p, const AttendConfig& c, const Workspace& w, KernelParams* k);

template <DType kDType, int kHeadDim, int kKvBlock, int kWarpgroups>
cudaError_t launch(const AttendParams& p, const AttendConfig& c, const Workspace& w, cudaStream_t stream) {
  KernelParams k;
  const cudaError_t e = to_kernel_params(p, c, w, &k);
  return e == cudaSuccess ? launch_instance<kDType, kHeadDim, kKvBlock, kWarpgroups>(k, c, stream) : e;
}

// A consumer warpgroup has 64 rows.
template <DType kDType, int kHeadDim, int kKvBlock, int kWarpgroups = 2>
constexpr Instance instance() {
  return {90, kDType, kHeadDim, 64 * kWarpgroups, kKvBlock, launch<kDType, kHeadDim, kKvBlock, kWarpgroups>};
}

// By type and head dimension. 64 keys at a time: for block lists as narrow, and where 80, which registers and shared
// memory hold at head dimension 256, do not divide what they must.
constexpr Instance kInstances[] = {
    instance<DType::kBFloat16, 64, 128>(),
    instance<DType::kBFloat16, 64, 128, 3>(),
    instance<DType::kBFloat16, 96, 128>(),
    instance<DType::kBFloat16, 128, 128>(),
    instance<DType::kBFloat16, 64, 64>(),
    instance<DType::kBFloat16, 96, 64>(),
    instance<DType::kBFloat16, 128, 64>(),
    instance<DType::kBFloat16, 256, 80>(),
    instance<DType::kBFloat16, 256, 64>(),
    instance<DType::kFloat16, 64, 128>(),
    instance<DType::kFloat16, 64, 128, 3>(),
    instance<DType::kFloat16, 96, 128>(),
    instance<DType::kFloat16, 128, 128>(),
    instance<DType::kFloat16, 64, 64>(),
    instance<DType::kFloat16, 96, 64>(),
    instance<DType::kFloat16, 128, 64>(),
    instance<DType::kFloat16, 256, 80>(),
    instance<DType::kFloat16, 256, 64>(),
    // One warpgroup, for a few queries over a cache.
    instance<DType::kBFloat16, 64, 128, 1>(),
    instance<DType::kBFloat16, 128, 64, 1>(),
    instance<DType::kBFloat16, 256, 64, 1>(),
    instance<DType::kFloat16, 64, 128, 1>(),
    instance<DType::kFloat16, 128, 64, 1>(),
    instance<DType::kFloat16, 256, 64, 1>(),
};
constexpr int32_t kFewRows = 64, kRows = 128, kWideRows = 192;

int32_t slab_columns(const Instance& i) { return i.head_dim % 64 == 0 ? 64 : 32; }

// Three warpgroups hide more of each other's latencies than two (head dimension 64: 8 % faster at 16K, 12 % at 128K),
// but larger tiles end more raggedly, and hold more padding where sequences are short, groups large, or tiles end with
// the blocks of a list.
constexpr int32_t kWideTilesPerSm = 4, kWideTilesPerHead = 4;
const Instance* find_wide(const AttendParams& p, int32_t num_sms) {
  if (p.routing.has_lists() || p.group() > kRows) return nullptr;
  const int32_t tokens = q_tokens_of(p, kWideRows);
  if (2 * tokens < 3 * q_tokens_of(p, kRows) || p.q.max_len < kWideTilesPerHead * tokens) return nullptr;
  for (const Instance& i : kInstances)
    if (i.dtype == p.dtype && i.head_dim >= p.head_dim && i.tile_rows == kWideRows)
      return max_tiles(p, {tokens, i.kv_block}) >= int64_t(kWideTilesPerSm) * num_sms ? &i : nullptr;
  return nullptr;
}

// A page is one box, or holds whole key blocks. (Swizzled rows repeat every 8.)
bool pages_fit(const AttendParams& p, int32_t kv_block) {
  if (!p.kv.page_table) return true;
  const int32_t size = p.kv.page_size;
  return !p.kv.rows.begin && size % 8 == 0 && (size % kv_block == 0 || kv_block % size == 0);
}

bool lists_fit(const AttendParams& p, int32_t kv_block) {
  for (const BlockTable& t : p.routing.blocks)
    if (t.blocks && t.kv_width % kv_block != 0) return false;
  return true;
}

// The smallest head dimension that holds the problem's, and the most keys that lists and pages can be cut into.
const Instance* find_instance(const AttendParams& p, int32_t tile_rows) {
  const Instance* best = nullptr;
  for (const Instance& i : kInstances) {
    if (i.dtype != p.dtype || i.head_dim < p.head_dim || i.tile_rows != tile_rows) continue;
    if (!lists_fit(p, i.kv_block) || !pages_fit(p, i.kv_block)) continue;
    const bool same_dim = best && i.head_dim == best->head_dim;
    if (!best || i.head_dim < best->head_dim || (same_dim && i.kv_block > best->kv_block)) best = &i;
  }
  return best;
}

// A few queries are bound by memory: what counts is how many keys are under way, and how soon a buffer is free again.
const Instance* choose_instance(const AttendParams& p, int32_t num_sms) {
  if (const Instance* few = most_rows(p) <= kFewRows ? find_instance(p, kFewRows) : nullptr) return few;
  if (const Instance* wide = find_wide(p, num_sms); wide && pages_fit(p, wide->kv_block)) return wide;
  return find_instance(p, kRows);
}

// ---- tensor maps ----

using Shape4 = TensorShape<4>;

// A batch stride of 0 is a packed tensor, or one sequence shared by all: one entry.
Shape4 q_shape(const AttendParams& p) {
  const Strides& t = p.q.stride;
  return {p.q.data, {p.head_dim, p.q.num_heads, p.q.rows.capacity, t.b == 0 ? 1 : p.batch}, {1, t.h, t.s, t.b}};
}

Shape4 kv_shape(const AttendParams& p, const View& x) {
  const Strides& t = x.stride;
  if (p.kv.page_table)
    return {x.data,
            {p.head_dim, p.kv.page_size, p.kv.pages_per_head ? 1 : p.kv.num_heads, p.kv.num_pages},
            {1, t.s, t.h, t.b}};
  return {x.data, {p.head_dim, p.kv.rows.capacity, p.kv.num_heads, t.b == 0 ? 1 : p.batch}, {1, t.s, t.h, t.b}};
}

Shape4 out_shape(const AttendParams& p) {
  const Strides& t = p.out.stride;
  return {p.out.data, {p.head_dim, p.q.num_heads, p.q.rows.capacity, t.b == 0 ? 1 : p.batch}, {1, t.h, t.s, t.b}};
}

bool describable(const AttendParams& p) {
  return q_shape(p).describable() && kv_shape(p, p.kv.k).describable() && kv_shape(p, p.kv.v).describable() &&
         out_shape(p).describable();
}

cudaError_t to_kernel_params(const AttendParams& p, const AttendConfig& c, const Workspace& w, KernelParams* k) {
  const Instance& i = *c.instance;
  k->attend = p;
  k->tile = c.tile;
  k->plan = w.plan;
  k->order = c.inline_plan ? TileOrder::kInLine : c.order;
  k->tiles_each = tiles_each(p, c.tile);
  k->num_tiles = k->tiles_each * num_seq_heads(p);
  k->inline_plan = c.inline_plan;
  k->uncounted = c.uncounted;
  k->partials = w.partials;
  k->group = p.group();
  k->group_inverse = inverse_of_group(p.group());
  k->kv_box_rows = p.kv.page_table ? min_of(p.kv.page_size, i.kv_block) : i.kv_block;
  const int32_t slab = slab_columns(i);
  // Rows of K and V are read in slabs of 128 bytes: where 256 came at once, few queries over a cache took up to 9 %
  // longer.
  constexpr auto kFetch = CU_TENSOR_MAP_L2_PROMOTION_L2_128B;
  const auto encoded = [&](const Shape4& tensor, std::initializer_list<int32_t> box, CUtensorMap* map) {
    return encode(tensor, p.dtype, box, map, kFetch);
  };
  if (cudaError_t e = encoded(q_shape(p), {slab, p.group(), c.tile.q_tokens}, &k->q_map)) return e;
  if (cudaError_t e = encoded(out_shape(p), {slab, p.group(), c.tile.q_tokens}, &k->out_map)) return e;
  if (cudaError_t e = encoded(kv_shape(p, p.kv.k), {slab, k->kv_box_rows}, &k->k_map)) return e;
  return encoded(kv_shape(p, p.kv.v), {slab, k->kv_box_rows}, &k->v_map);
}

}  // namespace

bool configure(const AttendParams& p, const Device& device, AttendConfig* c) {
  const Instance* i = choose_instance(p, device.num_sms);
  // Decode is left to the sm80 kernels, which take smaller tiles.
  if (!i || p.group() > i->tile_rows || most_rows(p) <= kDecodeRows) return false;
  // The running maximum is taken before scaling.
  if (!(p.scale > 0.f)) return false;
  if (!describable(p)) return false;
  c->instance = i;
  c->tile = {q_tokens_of(p, i->tile_rows), i->kv_block};
  c->num_workers = device.num_sms;
  c->order = known_order(p, c->tile, c->num_workers);
  const bool spare = has_spare_registers(i->head_dim, i->tile_rows);
  c->uncounted = spare && is_uncounted(c->order, max_tiles(p, c->tile), c->num_workers);
  c->inline_plan = c->order == TileOrder::kPlanned && spare && plans_few(p, c->tile);
  return true;
}

// ---- mixtures ----

namespace {

template <DType kDType, int kHeadDim>
cudaError_t launch_mixture(const AttendParams& p, const Mixture& m, int32_t* counter, const Device& device,
                           cudaStream_t stream) {
  constexpr Instance kInstance{90, kDType, kHeadDim, kMixRows, kMixKeys, nullptr};
  AttendConfig c;
  c.instance = &kInstance;
  c.tile = {q_tokens_of(p, kMixRows), kMixKeys};
  MixKernelParams k{{}, m, MixTiles(p, kMixRows, kMixKeys), counter};
  if (k.tiles.total() == 0) return cudaSuccess;
  if (cudaError_t e = to_kernel_params(p, c, {}, &k)) return e;
  if (cudaError_t e = clear_counter(counter, device.overlap, stream)) return e;
  return launch_mix<kDType, kHeadDim>(k, device, stream);
}

template <DType kDType>
cudaError_t launch_mixture(const AttendParams& p, const Mixture& m, int32_t* counter, const Device& device,
                           cudaStream_t stream) {
  if (p.head_dim <= 64) return launch_mixture<kDType, 64>(p, m, counter, device, stream);
  if (p.head_dim <= 96) return launch_mixture<kDType, 96>(p, m, counter, device, stream);
  return launch_mixture<kDType, 128>(p, m, counter, device, stream);
}

}  // namespace

bool mixes(const AttendParams& p) {
  return p.head_dim <= 128 && p.group() <= kMixRows && lists_fit(p, kMixKeys) && pages_fit(p, kMixKeys) &&
         p.scale > 0.f && describable(p);
}

cudaError_t mix(const AttendParams& p, const Mixture& m, int32_t* counter, const Device& device, cudaStream_t stream) {
  return p.dtype == DType::kFloat16 ? launch_mixture<DType::kFloat16>(p, m, counter, device, stream)
                                    : launch_mixture<DType::kBFloat16>(p, m, counter, device, stream);
}

}  // namespace flux::cuda::sm90
