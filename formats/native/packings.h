// The tile packings (docs/format.md, "Packings"): the only list in native code, for CPU and GPU. The order gives the
// ids. Ids belong to the C ABI, not to the file format: files and Python use names.
// tests/formats/test_formats_native_header.py compares the list with formats/packing.py. NVRTC reads this file, so it
// has no includes.
#pragma once

// X(id, suffix of kernel names, name, bits of a code, group size in columns, bits of S and of M, chunks)
// S and M: unsigned with 4 bits; with 8 bits, S is unsigned and M is signed. The columns of a chunk share code bytes.
#define MOE_PACKINGS(X)                                   \
  X(kQ2G16S4, q2_g16_s4, "tile32-q2-g16-s4", 2, 16, 4, 4) \
  X(kQ2G16S8, q2_g16_s8, "tile32-q2-g16-s8", 2, 16, 8, 4) \
  X(kQ3G32S4, q3_g32_s4, "tile32-q3-g32-s4", 3, 32, 4, 2) \
  X(kQ3G64S8, q3_g64_s8, "tile32-q3-g64-s8", 3, 64, 8, 1) \
  X(kQ4G64S8, q4_g64_s8, "tile32-q4-g64-s8", 4, 64, 8, 2)
