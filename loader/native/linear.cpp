// Packed and bf16 linears, split into chunks of tiles for the pool.
#include <chrono>

#include "dispatch.h"
#include "moe_kernels.h"
#include "pool.h"

using namespace moe;

namespace {

constexpr int kMaxMatrices = 16;
constexpr int64_t kFewTokens = 8;       // up to 8, memory limits the size of a chunk; beyond, arithmetic does
constexpr int64_t kChunkTiles = 4;      // about 160 KiB at 4096 columns: 5 us of memory time
constexpr int64_t kBf16ChunkRows = 16;  // 128 KiB at 4096 columns

// x as ActBlocks [superblock][token]; null if memory is short.
ActBlock* quantize_all(Pool& pool, const IsaKernels& isa, const float* x, int64_t tokens, int64_t columns) {
  const int64_t blocks = blocks_of(columns);
  auto* act = static_cast<ActBlock*>(pool.scratch(0, size_t(tokens) * size_t(blocks) * sizeof(ActBlock)));
  if (!act) return nullptr;
  const auto one = [&](int64_t t) { isa.quantize(x + t * columns, columns, act + t, tokens); };
  if (tokens < 4) {
    for (int64_t t = 0; t < tokens; ++t) one(t);  // 1 us a row: faster than a parallel region
  } else {
    pool.run(tokens, one);
  }
  return act;
}

void linear_tile(const IsaKernels& isa, const moe_matrix& w, int64_t tile, int64_t columns, const ActBlock* act,
                 int64_t tokens) {
  const auto packing = Packing(w.packing);
  const int64_t blocks = blocks_of(columns);
  const uint8_t* p = w.tiles + tile * tile_bytes(packing, columns);
  const int64_t row = tile * kTileRows;
  const int64_t rows = w.rows - row < kTileRows ? w.rows - row : kTileRows;
  alignas(64) float y[kMaxTokens * kTileRows];
  for (int64_t begin = 0; begin < tokens; begin += kMaxTokens) {
    const int n = int(tokens - begin < kMaxTokens ? tokens - begin : kMaxTokens);
    isa.tile[packing](p, blocks, {act + begin, tokens}, n, y);
    for (int t = 0; t < n; ++t)
      for (int64_t i = 0; i < rows; ++i) w.y[(begin + t) * w.rows + row + i] = y[t * kTileRows + i];
  }
}

}  // namespace

extern "C" {

int32_t moe_linear_many(const moe_matrix* matrices, int32_t count, int64_t columns, const float* x, int64_t tokens) {
  if (count < 0 || count > kMaxMatrices || columns < 0 || tokens < 0) return MOE_E_SIZE;
  for (int32_t i = 0; i < count; ++i) {
    if (!known_packing(matrices[i].packing)) return MOE_E_PACKING;
    if (matrices[i].rows < 0) return MOE_E_SIZE;
  }
  if (tokens == 0) return MOE_OK;
  Pool& pool = Pool::get();
  std::lock_guard<std::mutex> lock(pool.mutex());
  pool.prepare();
  const IsaKernels& isa = kernels();
  const ActBlock* act = quantize_all(pool, isa, x, tokens, columns);
  if (!act) return MOE_E_MEMORY;
  const int64_t chunk = tokens <= kFewTokens ? kChunkTiles : 1;
  int64_t begin[kMaxMatrices + 1] = {};
  for (int32_t i = 0; i < count; ++i) begin[i + 1] = begin[i] + (tiles_of(matrices[i].rows) + chunk - 1) / chunk;
  pool.run(begin[count], [&](int64_t item) {
    int32_t i = 0;
    while (item >= begin[i + 1]) ++i;
    const int64_t first = (item - begin[i]) * chunk, tiles = tiles_of(matrices[i].rows);
    for (int64_t tile = first; tile < first + chunk && tile < tiles; ++tile)
      linear_tile(isa, matrices[i], tile, columns, act, tokens);
  });
  pool.trim();
  return MOE_OK;
}

int32_t moe_linear(int32_t packing, const uint8_t* tiles, int64_t rows, int64_t columns, const float* x, float* y,
                   int64_t tokens) {
  const moe_matrix one = {tiles, rows, y, packing, 0};
  return moe_linear_many(&one, 1, columns, x, tokens);
}

int32_t moe_linear_bf16(const uint16_t* w, int64_t rows, int64_t columns, const float* x, float* y, int64_t tokens) {
  if (rows < 0 || columns < 0 || tokens < 0) return MOE_E_SIZE;
  if (tokens == 0) return MOE_OK;
  Pool& pool = Pool::get();
  std::lock_guard<std::mutex> lock(pool.mutex());
  const IsaKernels& isa = kernels();
  pool.run((rows + kBf16ChunkRows - 1) / kBf16ChunkRows, [&](int64_t item) {
    const int64_t end = (item + 1) * kBf16ChunkRows < rows ? (item + 1) * kBf16ChunkRows : rows;
    for (int64_t row = item * kBf16ChunkRows; row < end; ++row) {
      for (int64_t t = 0; t < tokens; t += kFewTokens) {
        const int n = int(tokens - t < kFewTokens ? tokens - t : kFewTokens);
        isa.dot_bf16(w + row * columns, x + t * columns, columns, n, y + t * rows + row, rows);
      }
    }
  });
  return MOE_OK;
}

uint64_t moe_stream_sum(const uint8_t* const* buffers, int32_t count, int64_t bytes, int64_t chunk_bytes) {
  if (count <= 0 || bytes <= 0) return 0;
  if (chunk_bytes < 256) chunk_bytes = 256;
  Pool& pool = Pool::get();
  std::lock_guard<std::mutex> lock(pool.mutex());
  const IsaKernels& isa = kernels();
  std::atomic<uint64_t> total{0};
  const int64_t chunks = (bytes + chunk_bytes - 1) / chunk_bytes;
  pool.run(chunks * count, [&](int64_t item) {
    const int64_t begin = item % chunks * chunk_bytes;
    const int64_t n = bytes - begin < chunk_bytes ? bytes - begin : chunk_bytes;
    total.fetch_add(isa.sum(buffers[item / chunks] + begin, n), std::memory_order_relaxed);
  });
  return total.load();
}

double moe_empty_region_us(int32_t repeats) {
  Pool& pool = Pool::get();
  std::lock_guard<std::mutex> lock(pool.mutex());
  const auto begin = std::chrono::steady_clock::now();
  for (int32_t i = 0; i < repeats; ++i) pool.run(2, [](int64_t) {});
  const std::chrono::duration<double, std::micro> spent = std::chrono::steady_clock::now() - begin;
  return repeats > 0 ? spent.count() / repeats : 0.0;
}

}  // extern "C"
