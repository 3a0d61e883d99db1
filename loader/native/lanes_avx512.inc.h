// Operations on sixteen rows of 32 bits in an AVX-512 register, for the packings' AVX-512 parts. Included inside an
// anonymous namespace (see elementwise.inc.h).

typedef __m512i I;
typedef __m512 F;

// The empty asm keeps gcc from folding one load into four memory operands and from reordering loads.
inline I load_codes(const uint8_t* p) {
  I v = _mm512_loadu_si512(p);
  asm volatile("" : "+v"(v));
  return v;
}
inline I broadcast4(const void* p) {
  int32_t v;
  __builtin_memcpy(&v, p, 4);
  return _mm512_set1_epi32(v);
}
inline I none() { return _mm512_setzero_si512(); }
inline I bytes(int v) { return _mm512_set1_epi8(char(v)); }
// vpdpbusd in place: with the builtin, gcc copies the accumulator.
inline I dot4(I sum, I codes, I x) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(codes), "v"(x));
  return sum;
}
// mask ? high : low
inline I select(I low, I high, I mask) { return _mm512_ternarylogic_epi32(low, high, mask, 0xd8); }
inline I low_or(I low, I high) {  // (low & 0xffff) | high
  return _mm512_ternarylogic_epi32(low, high, _mm512_set1_epi32(0xffff), 0xec);
}
inline F bytes_u8(const uint8_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)));
}
inline F bytes_i8(const uint8_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
}

struct Sums {  // one half of one token
  F s, m;
  inline void add(I a, I b, float d) {
    const F dv = _mm512_set1_ps(d);
    s = _mm512_fmadd_ps(_mm512_cvtepi32_ps(a), dv, s);
    m = _mm512_fmadd_ps(_mm512_cvtepi32_ps(b), dv, m);
  }
  inline void add64(I dot, F sf, F mf, float d, float u) {
    s = _mm512_fmadd_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(dot), sf), _mm512_set1_ps(d), s);
    m = _mm512_fmadd_ps(mf, _mm512_set1_ps(u), m);
  }
};

// The 16 outputs of one half.
inline void finish(const uint8_t* tile, int r, const Sums& a, float* y) {
  const F ds = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)(tile + 64 * r)));
  const F dm = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)(tile + 64 * r + 32)));
  _mm512_storeu_ps(y, _mm512_fmsub_ps(ds, a.s, _mm512_mul_ps(dm, a.m)));
}

typedef int32_t Aliased __attribute__((may_alias));

inline I dot4(I sum, I codes, const int8_t* x) {
  asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(codes), "m"(*(const Aliased*)x));
  return sum;
}
inline I dot2(I sum, I pairs, const int16_t* x) {
  asm("vpdpwssd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(pairs), "m"(*(const Aliased*)x));
  return sum;
}

// 64 columns of one half: code[k] holds columns 4k to 4k + 3. A 4-bit S is multiplied in: S * q <= 105 fits a byte.
struct Columns64 {
  I code[16];
  I s[2];  // q2-g16-s8: S of the groups (0, 1) and (2, 3) as 16-bit pairs
  F sf;    // groups of 64
};

// Bytes a and b of each 32-bit lane as two 16-bit halves.
inline I two_bytes(I lanes, int a, int b) {
  const char c = char(a), d = char(b);
  return _mm512_shuffle_epi8(
      lanes, _mm512_broadcast_i32x4(_mm_setr_epi8(c, -128, d, -128, char(c + 4), -128, char(d + 4), -128, char(c + 8),
                                                  -128, char(d + 8), -128, char(c + 12), -128, char(d + 12), -128)));
}

// Address of the scales of 64 columns, number b of the superblock at p, half r, and of the planes beside them.
template <Packing P>
inline const uint8_t* scales_at(const uint8_t* p, int b, int r) {
  constexpr PackingInfo kInfo = kPackingInfo[P];
  constexpr int kChunkBytes = kInfo.chunk_bytes(), kCodeBytes = kInfo.code_bytes(), kPlanes = kInfo.planes();
  constexpr int kBlocks = 4 / kInfo.chunks;  // blocks of 64 columns in a chunk
  p += kChunkBytes * (b / kBlocks) + kCodeBytes;
  if constexpr (kInfo.group_size == 64) return p + 32 * kPlanes * r + 16 * (b % kBlocks);
  return p + 16 * kInfo.scale_bits * r;
}

// True for 8-bit S and M of several groups: such an S is too large to be multiplied into the codes.
template <Packing P>
constexpr bool kHasWideScales = kPackingInfo[P].group_size < 64 && kPackingInfo[P].scale_bits == 8;

// Up to this many tokens, unpacking again for each four tokens is not slower than the GEMM, which reads cold weights
// out of order (measured at 5 to 128 tokens). For 4 bits it is never slower.
template <Packing P>
constexpr int kGemvTokens = 12;
