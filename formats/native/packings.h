// The list of tile packings (docs/format.md, "Packings") for all native code, on CPU and GPU. The order gives the ids,
// which belong to the C ABI, not to the file format: files and Python use the names.
// tests/formats/test_formats_native_header.py compares the list with formats/packing.py. No includes: NVRTC reads this
// file too.
#pragma once

// X(id, part of kernel names, name, bits of a code, columns that share S and M, bits of S and of M, chunks)
// S and M of 4 bits are unsigned nibbles; of 8 bits, S is unsigned and M signed. Columns of a chunk share code bytes.
#define MOE_PACKINGS(X)                                   \
  X(kQ2G16S4, q2_g16_s4, "tile32-q2-g16-s4", 2, 16, 4, 4) \
  X(kQ2G16S8, q2_g16_s8, "tile32-q2-g16-s8", 2, 16, 8, 4) \
  X(kQ3G32S4, q3_g32_s4, "tile32-q3-g32-s4", 3, 32, 4, 2) \
  X(kQ3G64S8, q3_g64_s8, "tile32-q3-g64-s8", 3, 64, 8, 1) \
  X(kQ4G64S8, q4_g64_s8, "tile32-q4-g64-s8", 4, 64, 8, 2)
