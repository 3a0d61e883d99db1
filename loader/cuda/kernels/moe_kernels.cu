// All kernels, one translation unit: what loader/cuda compiles for the GPU it finds.
#include "common.cuh"
#include "quantize.cuh"
