// Operations on eight rows of 32 bits in an AVX2 register, for the packings' AVX2 parts. Included inside an anonymous
// namespace (see elementwise.inc.h).

typedef __m256i I;
typedef __m256 F;

inline I load(const void* p) { return _mm256_loadu_si256((const __m256i*)p); }
inline I load_codes(const uint8_t* p) {
  I v = load(p);
  asm("" : "+x"(v));
  return v;
}
inline I broadcast4(const void* p) {
  int32_t v;
  __builtin_memcpy(&v, p, 4);
  return _mm256_set1_epi32(v);
}
inline I zero() { return _mm256_setzero_si256(); }
inline I bytes8_u(const uint8_t* p) { return _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)); }
inline I bytes8_i(const uint8_t* p) { return _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)); }
inline I select4(I low, I l, I high, I h) {
  return _mm256_or_si256(_mm256_and_si256(low, l), _mm256_and_si256(high, h));
}

// Byte v of each 32-bit lane, zero-extended, in both 16-bit halves.
inline I pair_of_byte(I lanes, int v) {
  const char b = char(v);
  return _mm256_shuffle_epi8(lanes, _mm256_broadcastsi128_si256(_mm_setr_epi8(
                                        b, -128, b, -128, char(b + 4), -128, char(b + 4), -128, char(b + 8), -128,
                                        char(b + 8), -128, char(b + 12), -128, char(b + 12), -128)));
}
// Bytes a and b of each lane as two 16-bit halves.
inline I two_bytes(I lanes, int a, int b) {
  const char c = char(a), d = char(b);
  return _mm256_shuffle_epi8(lanes, _mm256_broadcastsi128_si256(_mm_setr_epi8(
                                        c, -128, d, -128, char(c + 4), -128, char(d + 4), -128, char(c + 8), -128,
                                        char(d + 8), -128, char(c + 12), -128, char(d + 12), -128)));
}

struct Sums {  // 8 rows
  F s, m;
  inline void add(I a, I b, float d) {
    const F dv = _mm256_set1_ps(d);
    s = _mm256_fmadd_ps(_mm256_cvtepi32_ps(a), dv, s);
    m = _mm256_fmadd_ps(_mm256_cvtepi32_ps(b), dv, m);
  }
  inline void add64(I dot, F sf, F mf, float d, float u) {
    s = _mm256_fmadd_ps(_mm256_mul_ps(_mm256_cvtepi32_ps(dot), sf), _mm256_set1_ps(d), s);
    m = _mm256_fmadd_ps(mf, _mm256_set1_ps(u), m);
  }
};

inline F halves8(const uint8_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
