// For the sanitizers: every packing on every instruction set over odd sizes, in heap buffers of their exact size, at
// odd addresses, down to one row, one column and one token; threads; and all paths must give the same bits.
// Values are checked by tests/test_loader_kernels.py.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "../../formats/native/tile_layout.h"
#include "moe_kernels.h"

namespace {

std::mt19937 rng(1);
int failures = 0;

void expect(bool ok, const char* what, int packing, int64_t a, int64_t b, int64_t c) {
  if (ok) return;
  ++failures;
  std::fprintf(stderr, "FAILED %s: packing %d, %lld %lld %lld\n", what, packing, (long long)a, (long long)b, (long long)c);
}

// An exact-size heap block whose data begins `offset` bytes in, so that the end is watched, too.
struct Bytes {
  std::unique_ptr<uint8_t[]> block;
  uint8_t* data;
  Bytes(int64_t size, int offset) : block(new uint8_t[size_t(size) + size_t(offset)]), data(block.get() + offset) {
    for (int64_t i = 0; i < size; ++i) data[i] = uint8_t(rng());
  }
};

void set_heads(uint8_t* tiles, int32_t packing, int64_t rows, int64_t columns) {
  const int64_t bytes = moe::tile_bytes(moe::Packing(packing), columns);
  for (int64_t t = 0; t < moe::tiles_of(rows); ++t)
    for (int i = 0; i < 64; ++i) {
      const uint16_t half = 0x1400;  // 2^-10
      std::memcpy(tiles + t * bytes + 2 * i, &half, 2);
    }
}

std::vector<float> values(int64_t n) {
  std::normal_distribution<float> normal;
  std::vector<float> v(static_cast<size_t>(n));
  for (float& f : v) f = normal(rng);
  return v;
}

void linears(int32_t packing, int64_t rows, int64_t columns, int64_t tokens) {
  Bytes tiles(moe_packed_bytes(packing, rows, columns), int(rng() % 64));
  set_heads(tiles.data, packing, rows, columns);
  const auto x = values(tokens * columns);
  std::vector<float> first;
  for (int isa = MOE_ISA_AVX512; isa >= MOE_ISA_PORTABLE; --isa) {
    if (moe_set_isa(isa) != MOE_OK) continue;
    std::vector<float> y(static_cast<size_t>(tokens * rows), NAN);
    expect(moe_linear(packing, tiles.data, rows, columns, x.data(), y.data(), tokens) == MOE_OK, "linear", packing, rows,
           columns, tokens);
    if (first.empty()) first = y;
    expect(!std::memcmp(y.data(), first.data(), y.size() * sizeof(float)), "same bits", packing, rows, columns, tokens);
  }
}

void experts(int32_t gate_up, int32_t down, int64_t hidden, int64_t intermediate, int64_t tokens) {
  const int64_t size = moe_expert_bytes(gate_up, down, hidden, intermediate);
  const int64_t gate = moe_packed_bytes(gate_up, intermediate, hidden);
  Bytes one(size, 1), two(size, 0);
  for (uint8_t* blob : {one.data, two.data}) {
    set_heads(blob, gate_up, 2 * ((intermediate + 31) / 32 * 32), hidden);
    set_heads(blob + 2 * gate, down, hidden, intermediate);
  }
  const uint8_t* blobs[3] = {one.data, nullptr, two.data};
  const auto x = values(tokens * hidden), weights = values(tokens * 2);
  std::vector<int64_t> index(static_cast<size_t>(tokens * 2));
  for (int64_t t = 0; t < tokens; ++t) index[size_t(2 * t)] = t % 3 ? 0 : 2, index[size_t(2 * t + 1)] = t % 3 ? 2 : 0;
  std::vector<float> first;
  for (int isa = MOE_ISA_AVX512; isa >= MOE_ISA_PORTABLE; --isa) {
    if (moe_set_isa(isa) != MOE_OK) continue;
    std::vector<float> out(static_cast<size_t>(tokens * hidden), NAN);
    expect(moe_experts_topk(blobs, 3, gate_up, down, hidden, intermediate, index.data(), weights.data(), 2, x.data(),
                            out.data(), tokens, 0) == MOE_OK, "experts", gate_up, hidden, intermediate, tokens);
    if (first.empty()) first = out;
    expect(!std::memcmp(out.data(), first.data(), out.size() * sizeof(float)), "same bits of experts", gate_up, hidden,
           intermediate, tokens);
  }
  index[0] = 1;
  std::vector<float> out(static_cast<size_t>(tokens * hidden));
  expect(moe_experts_topk(blobs, 3, gate_up, down, hidden, intermediate, index.data(), weights.data(), 2, x.data(),
                          out.data(), tokens, 0) == MOE_E_INDEX, "missing expert refused", gate_up, hidden, intermediate, tokens);
}

void bf16(int64_t rows, int64_t columns, int64_t tokens) {
  std::vector<uint16_t> w(static_cast<size_t>(rows * columns));
  for (uint16_t& v : w) v = uint16_t(0x3f00 + rng() % 256);
  const auto x = values(tokens * columns);
  std::vector<float> first;
  for (int isa = MOE_ISA_AVX512; isa >= MOE_ISA_PORTABLE; --isa) {
    if (moe_set_isa(isa) != MOE_OK) continue;
    std::vector<float> y(static_cast<size_t>(tokens * rows), NAN);
    expect(moe_linear_bf16(w.data(), rows, columns, x.data(), y.data(), tokens) == MOE_OK, "bf16", -1, rows, columns, tokens);
    if (first.empty()) first = y;
    expect(!std::memcmp(y.data(), first.data(), y.size() * sizeof(float)), "same bits of bf16", -1, rows, columns, tokens);
  }
}

}  // namespace

int main() {
  const int64_t shapes[][2] = {{1, 1}, {31, 63}, {32, 64}, {33, 65}, {70, 192}, {96, 257}, {17, 700}};
  for (int threads : {1, 3}) {
    moe_set_threads(threads);
    for (int32_t packing = 0; packing < moe::kPackings; ++packing) {
      for (const auto& [rows, columns] : shapes)
        for (int64_t tokens : {1, 2, 3, 4, 5, 8, 9, 13, 49}) linears(packing, rows, columns, tokens);
      for (const auto& [hidden, intermediate] : shapes)
        for (int64_t tokens : {1, 2, 7, 50}) experts(packing, (packing + 1) % moe::kPackings, hidden, intermediate, tokens);
    }
    for (const auto& [rows, columns] : shapes)
      for (int64_t tokens : {1, 3, 8, 9}) bf16(rows, columns, tokens);
  }
  moe_set_isa(MOE_ISA_AUTO);
  std::vector<std::thread> callers;
  for (int i = 0; i < 3; ++i) callers.emplace_back([] { moe_empty_region_us(2000); });
  for (auto& caller : callers) caller.join();
  Bytes words(1000, 3);
  const uint8_t* buffers[] = {words.data};
  moe_stream_sum(buffers, 1, 1000, 300);
  expect(moe_linear(99, nullptr, 1, 1, nullptr, nullptr, 1) == MOE_E_PACKING, "bad packing", 99, 0, 0, 0);
  expect(moe_linear(0, nullptr, -1, 1, nullptr, nullptr, 1) == MOE_E_SIZE, "bad size", 0, 0, 0, 0);
  expect(moe_packed_bytes(0, -1, 1) == -1 && moe_packing_id("tile32-q9") == -1, "bad arguments", 0, 0, 0, 0);
  std::printf("%s\n", failures ? "FAILED" : "all native kernel checks passed");
  return failures != 0;
}
