# For both native libraries: MOE_IS_X86_64, and the compiler options of each instruction set.
# No -march=native: the instruction set is chosen at run time.
include(CheckCXXSourceCompiles)
check_cxx_source_compiles("
#if !defined(__x86_64__)
#error not x86-64
#endif
int main() { return 0; }" MOE_IS_X86_64)

set(MOE_AVX2_OPTIONS -mavx2 -mfma -mf16c)
set(MOE_AVX512_OPTIONS ${MOE_AVX2_OPTIONS} -mavx512f -mavx512bw -mavx512dq -mavx512vl -mprefer-vector-width=512)
set(MOE_VNNI_OPTIONS ${MOE_AVX512_OPTIONS} -mavx512vnni)
