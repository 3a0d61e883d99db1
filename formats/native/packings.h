// The tile packings (docs/format.md, "Packings"): the one list of native code, on CPU and GPU. The order gives the ids,
// which are part of the C ABI, not of the file format: files and Python name packings by their names.
// tests/formats/test_formats_native_header.py compares the list with formats/packing.py. No includes: NVRTC reads it, too.
#pragma once

// X(id, part of kernels' names, name, bits of a code, columns that share S and M, bits of S and of M, chunks)
// 4 bits: S and M are unsigned nibbles; 8: S is unsigned, M signed. A chunk's columns share bytes of codes.
#define MOE_PACKINGS(X)                                   \
  X(kQ2G16S4, q2_g16_s4, "tile32-q2-g16-s4", 2, 16, 4, 4) \
  X(kQ2G16S8, q2_g16_s8, "tile32-q2-g16-s8", 2, 16, 8, 4) \
  X(kQ3G32S4, q3_g32_s4, "tile32-q3-g32-s4", 3, 32, 4, 2) \
  X(kQ3G64S8, q3_g64_s8, "tile32-q3-g64-s8", 3, 64, 8, 1) \
  X(kQ4G64S8, q4_g64_s8, "tile32-q4-g64-s8", 4, 64, 8, 2)
