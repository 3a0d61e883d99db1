// The data that solver.cpp passes to refit.h. No functions here: see solver_job.h.
#pragma once
#include <cstdint>

#include "solver_job.h"

namespace moe {

// Tiles solved together, so that each read of the factor serves all their rows.
inline constexpr int kPanelTiles = 8;
inline constexpr int kPanelBatches = 16;   // batches of 16 rows
inline constexpr int kPanelColumns = 128;  // columns between two updates from all columns before them
inline constexpr int kChunkColumns = 64;   // source columns of one step of an update: their errors stay in L1
inline constexpr int kStrip = 4;           // columns updated together
inline constexpr int kMaxRank = 256;

struct RefitJob : SolverJob {
  const float* factor;  // [factor blocks][factor_block][factor_block], V upper triangular, H = V * V^T; or null
  int64_t factor_block;
  const float* inverse;     // [padded columns] 1 / V_kk
  const float* importance;  // [padded columns], 0 past the end: V_kk^2 in some unit, or the caller's
  // For an approximate gain: <w, w> and <w, e> are those of G * G^T plus sums over columns with these weights.
  const float* diagonal;  // [padded columns], weights of w_k^2
  const float* pairing;   // [padded columns], weights of w_k times its rounding error
  const float* low_rank;  // G in strips: [rank / kStrip][padded][kStrip]
  int64_t rank;
  const double* damping;  // [factor blocks]: amount added to H's diagonal, in that unit
  bool exact;             // compute the gain by H itself, at twice the cost
  bool dynamic;           // choose a group's S and M after the errors before it are known
  int64_t padded;         // columns rounded up to 256
  int64_t groups;         // groups of a row
  // [padded / group_size]: a group's position in the order of feedback; all fields above are in that order.
  const int32_t* position;
  // Scratch for kPanelBatches batches:
  float* w;        // [padded][16] a batch
  float* e;        // same: correction of a column, then its error w - w'
  uint8_t* codes;  // same
  float* s;        // [padded / group_size][16] a batch, whole numbers
  float* m;
  float* innovation;     // [kPanelColumns][16] a batch
  float *low_w, *low_e;  // [rank][16] a batch: G^T w, G^T e
  // Scratch for one batch:
  float *a, *b, *mean, *spread;  // [padded / group_size][16]
  float* total;                  // [padded / group_size]
  float* packed;                 // [kPanelColumns + kChunkColumns][kPanelColumns]
};

struct RefitResult {
  TileResult plain;
  double error;   // e^T H e over rows
  double energy;  // w^T H w
};

struct RefitKernels {
  // Writes up to kPanelTiles tiles. Returns a moe_status.
  int32_t (*panel)(const RefitJob&, int64_t tile_begin, int64_t tile_end, uint8_t* out, int64_t stride,
                   RefitResult* results);
};

extern const RefitKernels kRefitPortable;
#if defined(MOE_X86)
extern const RefitKernels kRefitAvx2;
extern const RefitKernels kRefitAvx512;
#endif

}  // namespace moe
