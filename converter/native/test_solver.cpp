// Tests for a sanitizer build: every packing, dtype, ISA and odd sizes, with heap buffers of exact size, so that an
// access one byte past the end is reported. Python tests check the values; these check that all ISAs agree.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <vector>

#include "../../formats/native/tile_layout.h"
#include "solver_api.h"

namespace {

int failures = 0;

void expect(bool good, const char* what, int packing, int dtype, long rows, long columns, int isa) {
  if (good) return;
  ++failures;
  std::printf("FAILED %s: packing %d dtype %d [%ld, %ld] isa %d\n", what, packing, dtype, rows, columns, isa);
}

uint32_t random_state = 1;

float random_weight() {
  float sum = 0;
  for (int i = 0; i < 4; ++i) {
    random_state = random_state * 1664525u + 1013904223u;
    sum += (float)(random_state >> 8) * 0x1p-24f - 0.5f;
  }
  return sum * (random_state >> 24 == 0 ? 20.0f : 0.04f);  // a few are large enough for HQQ's shrink operator
}

// Random weights, truncated to the dtype.
std::vector<uint8_t> matrix(int dtype, long count) {
  std::vector<uint8_t> bytes((size_t)count * (dtype == MOE_F32 ? 4 : 2));
  for (long i = 0; i < count; ++i) {
    const float value = random_weight();
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if (dtype == MOE_F32) {
      std::memcpy(&bytes[4 * i], &bits, 4);
      continue;
    }
    const uint32_t exponent = bits >> 23 & 0xff;
    const uint16_t half = exponent < 113 ? 0 : (uint16_t)((exponent - 112) << 10 | (bits >> 13 & 0x3ff));
    const uint16_t word = dtype == MOE_BF16 ? (uint16_t)(bits >> 16) : (uint16_t)(bits >> 16 & 0x8000) | half;
    std::memcpy(&bytes[2 * i], &word, 2);
  }
  return bytes;
}

void check(int packing, int dtype, long rows, long columns, long gap) {
  const int64_t tiles = moe::tiles_of(rows), tile_bytes = moe::tile_bytes((moe::Packing)packing, columns);
  const int64_t stride = tile_bytes + gap, bytes = (tiles - 1) * stride + tile_bytes;
  const std::vector<uint8_t> weights = matrix(dtype, rows * columns);
  const moe_weights source = {weights.data(), rows, columns, dtype, 0};
  for (uint32_t flags = 0; flags < 2; ++flags) {
    std::vector<uint8_t> first;
    for (int isa = MOE_ISA_PORTABLE; isa <= MOE_ISA_AVX512; ++isa) {
      std::vector<uint8_t> out((size_t)bytes, 0xa5);
      std::vector<double> errors((size_t)(2 * tiles));
      moe_tiles all = {0, tiles, out.data(), stride, errors.data(), -1, packing, 0};
      const int32_t status = moe_quantize(&source, &all, flags, isa);
      if (status == MOE_E_ISA) continue;
      expect(status == MOE_OK && all.non_finite == 0, "status", packing, dtype, rows, columns, isa);
      if (first.empty()) first = out;
      expect(out == first, "bytes differ between ISAs", packing, dtype, rows, columns, isa);
      // The last tile alone, without the optional outputs.
      std::vector<uint8_t> last((size_t)tile_bytes);
      moe_tiles one = {tiles - 1, tiles, last.data(), tile_bytes, nullptr, 0, packing, 0};
      moe_quantize(&source, &one, flags, isa);
      expect(std::memcmp(last.data(), out.data() + (tiles - 1) * stride, (size_t)tile_bytes) == 0, "last tile", packing,
             dtype, rows, columns, isa);
    }
  }
}

// A factor of a positive definite Hessian: upper triangular with a positive diagonal, in blocks of `block` columns.
std::vector<float> factor_of(long columns, long block) {
  const long blocks = (columns + block - 1) / block;
  std::vector<float> factor((size_t)(blocks * block * block));
  for (long b = 0; b < blocks; ++b) {
    for (long j = 0; j < block; ++j) {
      for (long k = j; k < block; ++k)
        factor[(size_t)((b * block + j) * block + k)] = j == k ? 1.0f : 5 * random_weight() / (float)block;
    }
  }
  return factor;
}

enum Kind { kPlain, kImportance, kExactGain, kDiagonalGain, kLowRankGain, kBlocks, kStatic, kOrdered, kKinds };

void check_refit(int packing, int dtype, long rows, long columns, long gap) {
  const int64_t tiles = moe::tiles_of(rows), tile_bytes = moe::tile_bytes((moe::Packing)packing, columns);
  const int64_t stride = tile_bytes + gap, bytes = (tiles - 1) * stride + tile_bytes;
  const std::vector<uint8_t> weights = matrix(dtype, rows * columns);
  const moe_weights source = {weights.data(), rows, columns, dtype, 0};
  const long rank = 5;
  const std::vector<float> importance((size_t)columns, 0.7f), diagonal((size_t)columns, 1.3f),
      pairing((size_t)columns, 0.6f);
  const std::vector<float> low_rank((size_t)(columns * rank), 0.1f);
  for (int kind = 0; kind < kKinds; ++kind) {
    const long block = kind == kBlocks ? 256 : columns;
    const std::vector<float> factor = kind < kExactGain ? std::vector<float>() : factor_of(columns, block);
    const std::vector<double> damping((size_t)((columns + block - 1) / block), 0.05);
    // Orders whole groups from right to left.
    const int32_t size = moe::kPackingInfo[packing].group_size, groups = (int32_t)(columns / size);
    if (kind == kOrdered && columns % size != 0) continue;
    std::vector<int32_t> order((size_t)groups);
    for (int32_t g = 0; g < groups; ++g) order[(size_t)g] = groups - 1 - g;
    const bool estimated = kind == kDiagonalGain || kind == kLowRankGain;
    moe_metric metric = {};
    if (kind != kPlain) metric.importance = importance.data();
    if (!factor.empty()) {
      metric.factor = factor.data();
      metric.factor_block = block;
      metric.damping = damping.data();
    }
    if (kind == kOrdered) metric.order = order.data();
    if (estimated) {
      metric.diagonal = diagonal.data();
      metric.pairing = pairing.data();
    }
    if (kind == kLowRankGain) {
      metric.low_rank = low_rank.data();
      metric.rank = rank;
    }
    const auto run = [&](int isa, moe_tiles* to) {
      return moe_refit(&source, to, &metric, kind == kStatic ? MOE_STATIC : 0, isa);
    };
    std::vector<uint8_t> first;
    std::vector<double> first_errors;
    for (int isa = MOE_ISA_PORTABLE; isa <= MOE_ISA_AVX512; ++isa) {
      std::vector<uint8_t> out((size_t)bytes, 0xa5), last((size_t)tile_bytes);
      std::vector<double> errors((size_t)(4 * tiles)), last_errors(4);
      moe_tiles all = {0, tiles, out.data(), stride, errors.data(), -1, packing, 0};
      const int32_t status = run(isa, &all);
      if (status == MOE_E_ISA) continue;
      expect(status == MOE_OK && all.non_finite == 0, "refit's status", packing, dtype, rows, columns, isa);
      if (first.empty()) {
        first = out;
        first_errors = errors;
      }
      expect(out == first && errors == first_errors, "refit's bytes differ between ISAs", packing, dtype, rows, columns,
             isa);
      moe_tiles one = {tiles - 1, tiles, last.data(), stride, last_errors.data(), 0, packing, 0};
      run(isa, &one);
      expect(std::memcmp(last.data(), out.data() + (tiles - 1) * stride, (size_t)tile_bytes) == 0, "refit's last tile",
             packing, dtype, rows, columns, isa);
      expect(std::equal(last_errors.begin(), last_errors.end(), errors.end() - 4), "refit's last sums", packing, dtype,
             rows, columns, isa);
    }
  }
}

void check_hqq(int nbits, int group_size, int dtype, long rows, long columns) {
  const std::vector<uint8_t> weights = matrix(dtype, rows * columns);
  const moe_weights source = {weights.data(), rows, columns, dtype, 0};
  const long groups = (columns + group_size - 1) / group_size;
  for (int isa = MOE_ISA_PORTABLE; isa <= MOE_ISA_AVX512; ++isa) {
    std::vector<float> scale((size_t)(rows * groups)), zero((size_t)(rows * groups));
    std::vector<uint8_t> codes((size_t)(rows * columns));
    const int32_t status = moe_hqq(&source, nbits, group_size, 0, isa, scale.data(), zero.data(), codes.data());
    expect(status == MOE_OK || status == MOE_E_ISA, "hqq", nbits, dtype, rows, columns, isa);
  }
}

// Infinities, NaN and extreme weights give a status, without undefined behaviour.
void check_extremes() {
  const float values[] = {INFINITY, -INFINITY, NAN, 3.4e38f, -3.4e38f, 1e-45f, 1.2e-38f, 65504.0f, -0.0f, 1e30f};
  for (const float value : values) {
    for (int packing = 0; packing < moe::kPackings; ++packing) {
      for (uint32_t flags = 0; flags < 2; ++flags) {
        for (int isa = MOE_ISA_PORTABLE; isa <= MOE_ISA_AVX512; ++isa) {
          for (int fill = 0; fill < 2; ++fill) {
            std::vector<float> weights(7 * 77, fill != 0 ? value : 0.01f);
            weights[7 * 77 - 1] = value;
            std::vector<uint8_t> out((size_t)moe::tile_bytes((moe::Packing)packing, 77));
            const moe_weights source = {weights.data(), 7, 77, MOE_F32, 0};
            moe_tiles tiles = {0, 1, out.data(), (int64_t)out.size(), nullptr, 0, packing, 0};
            const int32_t status = moe_quantize(&source, &tiles, flags, isa);
            const int64_t bad = tiles.non_finite;
            const bool finite = std::isfinite(value);
            expect(status == MOE_E_ISA || (status == MOE_E_NON_FINITE) == !finite, "extremes", packing, (int)flags,
                   fill, (long)status, isa);
            std::vector<double> errors(4);
            const std::vector<float> factor = factor_of(77, 77), importance(77, 1.0f);
            for (int with = 0; with < 2; ++with) {
              moe_metric metric = {};
              metric.factor = with != 0 ? factor.data() : nullptr;
              metric.factor_block = 77;
              metric.importance = importance.data();
              tiles.errors = errors.data();
              const int32_t refit = moe_refit(&source, &tiles, &metric, 0, isa);
              expect(refit == MOE_E_ISA || (refit == MOE_E_NON_FINITE) == !finite, "refit's extremes", packing, with,
                     fill, (long)refit, isa);
            }
            if (!finite && status != MOE_E_ISA) {
              expect(bad == (fill != 0 ? 7 * 77 : 1), "count of non-finite", packing, (int)flags, fill, (long)bad, isa);
            }
          }
        }
      }
    }
  }
}

}  // namespace

int main() {
  const long shapes[][2] = {{1, 1},    {1, 16},   {2, 31},   {15, 33},  {16, 64},  {17, 65},   {31, 255},
                            {32, 256}, {33, 192}, {40, 300}, {65, 257}, {48, 511}, {70, 1030}, {300, 140}};
  for (const auto& shape : shapes) {
    for (int dtype = MOE_F32; dtype <= MOE_F16; ++dtype) {
      for (int packing = 0; packing < moe::kPackings; ++packing)
        check(packing, dtype, shape[0], shape[1], packing % 2 * 131);
      // Slow: every packing with one dtype.
      for (int packing = 0; packing < moe::kPackings; ++packing) {
        if (dtype == packing % 3) check_refit(packing, dtype, shape[0], shape[1], packing % 2 * 131);
      }
      for (int nbits = 2; nbits <= 4; ++nbits) check_hqq(nbits, 8 << (nbits - 1), dtype, shape[0], shape[1]);
    }
  }
  check_extremes();
  std::printf("%s, %d failures\n", failures == 0 ? "ok" : "FAILED", failures);
  return failures == 0 ? 0 : 1;
}
