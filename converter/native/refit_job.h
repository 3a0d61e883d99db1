// What solver.cpp hands to refit.h. No functions here: see solver_job.h.
#pragma once
#include <cstdint>

#include "solver_job.h"

namespace moe {

// Rows solved together: what is read of the factor serves all of them.
inline constexpr int kPanelTiles = 8;
inline constexpr int kPanelBatches = 16;   // of 16 rows
inline constexpr int kPanelColumns = 128;  // columns between two updates from all columns before them
inline constexpr int kChunkColumns = 64;   // columns of such an update whose errors stay in L1
inline constexpr int kStrip = 4;           // columns updated together
inline constexpr int kMaxRank = 256;

struct RefitJob : SolverJob {
  const float* factor;  // [factor blocks][factor_block][factor_block], V upper triangular, H = V * V^T; or null
  int64_t factor_block;
  const float* inverse;     // [padded columns] 1 / V_kk
  const float* importance;  // [padded columns], 0 past the end: V_kk^2 in some unit, or the caller's
  // Where the gain is not by all of H: <w, w> and <w, e> are those of G * G^T and these sums over columns.
  const float* diagonal;  // [padded columns], of w_k^2
  const float* pairing;   // [padded columns], of w_k times what its rounding left
  const float* low_rank;  // G in strips: [rank / kStrip][padded][kStrip]
  int64_t rank;
  const double* damping;  // [factor blocks]: what was added to H's diagonal, in that unit
  bool exact;             // the gain by H itself, at twice the cost
  bool dynamic;           // S and M of a group once the errors before it are known
  int64_t padded;         // columns rounded up to 256
  int64_t groups;         // of a row
  // [padded / group_size]: where a group stands in the order of feedback, which all of the above has, too.
  const int32_t* position;
  // Scratch: of kPanelBatches batches
  float* w;        // [padded][16] a batch
  float* e;        // same: correction of a column, then its error w - w'
  uint8_t* codes;  // same
  float* s;        // [padded / group_size][16] a batch, whole numbers
  float* m;
  float* innovation;     // [kPanelColumns][16] a batch
  float *low_w, *low_e;  // [rank][16] a batch: G^T w, G^T e
  // of one batch
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
  // Up to kPanelTiles tiles; gives a moe_status.
  int32_t (*panel)(const RefitJob&, int64_t tile_begin, int64_t tile_end, uint8_t* out, int64_t stride,
                   RefitResult* results);
};

extern const RefitKernels kRefitPortable;
#if defined(MOE_X86)
extern const RefitKernels kRefitAvx2;
extern const RefitKernels kRefitAvx512;
#endif

}  // namespace moe
