// Random calls of block selection, and whether the lists are right: straight from the definition, in double precision.
#pragma once

#include <algorithm>

#include "attend_case.h"
#include "core/selection.h"

namespace flux::test {

struct SelectCase {
  AttendCase attend;
  SelectParams params;
  std::vector<int32_t> blocks, counts;
};

inline void random_select(Random& random, DType dtype, Layout kind, int32_t dim, int32_t unit, const ProblemOptions& o,
                          SelectCase& c) {
  random_attend(random, dtype, kind, dim, unit, o, c.attend);
  const AttendParams& a = c.attend.params.forward;
  SelectParams& p = c.params;
  p.batch = a.batch;
  p.head_dim = dim;
  p.dtype = dtype;
  p.scale = 4.f * a.scale;  // so that masses differ
  p.threshold = random.chance(20) ? 1. : random.integer(5, 99) / 100.;
  p.stride = random.chance(50) ? 8 : 16;
  p.width = random.chance(50) ? 64 : 128;
  p.q = a.q;
  p.kv = a.kv;
  if (random.chance(50)) p.routing = a.routing;
  p.mode = random.integer(0, 1);
  p.q_blocks = ceil_div(p.q.max_len, kQueryBlock);
  p.max_count = max_of(ceil_div(p.kv.rows.capacity, p.width), 1);
  c.counts.assign(size_t(p.batch) * p.kv.num_heads * p.q_blocks, -7);
  c.blocks.assign(c.counts.size() * p.max_count, -7);
  p.blocks = c.blocks.data();
  p.counts = c.counts.data();
}

// Shares of the key blocks up to the diagonal of a block of queries; empty where it sees none.
inline std::vector<double> shares_of(const SelectCase& c, int32_t b, int32_t h, int32_t q_block) {
  const SelectParams& p = c.params;
  const AttendParams& a = c.attend.params.forward;
  const int32_t q_len = p.q.rows(b, h).size(), kv_len = p.kv.rows(b, h).size(), offset = kv_len - q_len;
  const int32_t end = min_of((q_block + 1) * kQueryBlock, q_len);
  if (end + offset <= 0 || q_block * kQueryBlock >= q_len) return {};
  std::vector<double> mass(ceil_div(end + offset, p.width), 0.);
  for (int32_t g = h * p.group(); g < (h + 1) * p.group(); ++g)
    for (int32_t i = q_block * kQueryBlock; i < end; i += p.stride) {
      std::vector<double> scores;
      for (int32_t j = 0; j < kv_len && j <= offset + i + p.stride - 1; j += p.stride) {
        double sum = 0;
        for (int32_t s = 0; s < p.stride; ++s) {
          const int32_t query = i + p.stride - 1 - s, key = j + s;
          if (query >= q_len || key >= kv_len) continue;
          for (int32_t d = 0; d < p.head_dim; ++d)
            sum += c.attend.q[at(p.q.stride, b, p.q.rows(b, h).begin + query, g) + d] *
                   c.attend.k[kv_at(a, p.kv.k.stride, b, h, key) + d];
        }
        scores.push_back(sum * p.scale / p.stride);
      }
      if (scores.empty()) continue;
      const double max = *std::max_element(scores.begin(), scores.end());
      double total = 0;
      for (double& s : scores) total += s = std::exp(s - max);
      for (size_t j = 0; j < scores.size(); ++j) mass[j * p.stride / p.width] += scores[j] / total;
    }
  const double total = std::accumulate(mass.begin(), mass.end(), 0.);
  for (double& m : mass) m /= total;
  return mass;
}

// The lists hold what is always kept, and of the rest the largest shares and no more of them than the threshold asks
// for; all but shares that differ by rounding.
inline void expect_selected(const SelectCase& c) {
  const SelectParams& p = c.params;
  constexpr double kSlack = 1e-5;
  for (int32_t b = 0; b < p.batch; ++b)
    for (int32_t h = 0; h < p.kv.num_heads; ++h)
      for (int32_t i = 0; i < p.q_blocks; ++i) {
        SCOPED_TRACE(testing::Message() << "sequence " << b << ", head " << h << ", query block " << i);
        const bool chosen = !p.routing.route || p.routing.mode(b, h) == p.mode;
        const std::vector<double> share = chosen ? shares_of(c, b, h, i) : std::vector<double>();
        const int32_t offset = p.kv.rows(b, h).size() - p.q.rows(b, h).size();
        const int32_t* blocks = c.blocks.data() + p.list(b, h, i) * p.max_count;
        const int32_t count = c.counts[p.list(b, h, i)];
        ASSERT_LE(count, int32_t(share.size()));
        for (int32_t n = count; n < p.max_count; ++n) ASSERT_EQ(blocks[n], 0);
        if (share.empty()) continue;
        std::vector<char> kept(share.size(), 0);
        for (int32_t n = 0; n < count; ++n) {
          ASSERT_TRUE(blocks[n] >= 0 && blocks[n] < int32_t(share.size()) && (n == 0 || blocks[n] > blocks[n - 1]));
          kept[blocks[n]] = 1;
        }
        double sum = 0, least = 1, largest_left = 0;
        for (int32_t j = 0; j < int32_t(share.size()); ++j) {
          const bool always = j == 0 || (j + 1) * p.width > i * kQueryBlock + offset;
          ASSERT_TRUE(kept[j] || !always) << j;
          if (kept[j]) sum += share[j];
          if (kept[j] && !always) least = std::min(least, share[j]);
          if (!kept[j]) largest_left = std::max(largest_left, share[j]);
        }
        if (p.threshold == 1.) {
          ASSERT_EQ(count, int32_t(share.size()));
          continue;
        }
        ASSERT_GE(sum, p.threshold - kSlack);
        if (least < 1) {
          ASSERT_LT(sum - least, p.threshold + kSlack);
          ASSERT_GE(least, largest_left - kSlack);
        }
      }
}

}  // namespace flux::test
