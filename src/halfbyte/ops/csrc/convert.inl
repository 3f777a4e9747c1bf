// Lanes of fp32, and conversions to and from the 16-bit types. Included by kernels.inl.

typedef float vf __attribute__((vector_size(HB_WIDTH * 4), aligned(4), may_alias));
typedef int32_t vi __attribute__((vector_size(HB_WIDTH * 4), aligned(4), may_alias));
typedef uint32_t vu __attribute__((vector_size(HB_WIDTH * 4), aligned(4), may_alias));
typedef uint16_t vh __attribute__((vector_size(HB_WIDTH * 2), aligned(2), may_alias));
constexpr int W = HB_WIDTH;

inline float to_float(const void* p, DType dtype, int64_t i) {
    if (dtype == HB_F32) return static_cast<const float*>(p)[i];
    uint16_t bits = static_cast<const uint16_t*>(p)[i];
    if (dtype == HB_BF16) return from_bits(uint32_t(bits) << 16);
    _Float16 half;
    std::memcpy(&half, &bits, 2);
    return float(half);
}

inline uint16_t bf16_bits(float value) {  // to nearest, ties to even, NaN stays one
    uint32_t bits = to_bits(value);
    if ((bits & 0x7fffffff) > 0x7f800000) return uint16_t(bits >> 16 | 0x40);
    return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline uint16_t f16_bits(float value) {
    _Float16 half = _Float16(value);
    uint16_t bits;
    std::memcpy(&bits, &half, 2);
    return bits;
}

inline void store_as(void* p, DType dtype, int64_t i, float value) {
    if (dtype == HB_F32) static_cast<float*>(p)[i] = value;
    else static_cast<uint16_t*>(p)[i] = dtype == HB_BF16 ? bf16_bits(value) : f16_bits(value);
}

inline float rounded(float value, DType dtype) {
    if (dtype == HB_F32) return value;
    if (dtype == HB_BF16) return from_bits(uint32_t(bf16_bits(value)) << 16);
    return float(_Float16(value));
}

// by intrinsics: GCC 12 copies 32 bytes in two halves through the stack
inline vf load_floats(const float* p) {
#if HB_WIDTH == 16
    return (vf)_mm512_loadu_ps(p);
#elif HB_WIDTH == 8
    return (vf)_mm256_loadu_ps(p);
#else
    vf v;
    std::memcpy(&v, p, sizeof v);
    return v;
#endif
}

inline void store_floats(float* p, vf value) {
#if HB_WIDTH == 16
    _mm512_storeu_ps(p, (__m512)value);
#elif HB_WIDTH == 8
    _mm256_storeu_ps(p, (__m256)value);
#else
    std::memcpy(p, &value, sizeof value);
#endif
}

template <DType D>
inline vf load(const void* p, int64_t i) {
    if constexpr (D == HB_F32) {
        return load_floats(static_cast<const float*>(p) + i);
    } else if constexpr (D == HB_BF16) {
#if HB_WIDTH == 16  // GCC 12 splits the conversion below in two
        return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(static_cast<const uint16_t*>(p) + i))), 16);
#else
        vh v;
        std::memcpy(&v, static_cast<const uint16_t*>(p) + i, sizeof v);
        return (vf)(__builtin_convertvector(v, vu) << 16);
#endif
    } else {
#if HB_WIDTH == 16
        return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)(static_cast<const uint16_t*>(p) + i)));
#elif HB_WIDTH == 8
        return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(static_cast<const uint16_t*>(p) + i)));
#else
        vf v;
        for (int j = 0; j < W; j++) v[j] = to_float(p, HB_F16, i + j);
        return v;
#endif
    }
}

inline vu bf16_lanes(vf value) {  // bf16 bits in the low half of each lane
    vu bits = (vu)value;
    vu out = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    vi nan = (bits & 0x7fffffff) > 0x7f800000;
    return ((vu)nan & (bits >> 16 | 0x40)) | (~(vu)nan & out);
}

template <DType D>
inline void store(void* p, int64_t i, vf value) {
    if constexpr (D == HB_F32) {
        store_floats(static_cast<float*>(p) + i, value);
    } else if constexpr (D == HB_BF16) {
        vh v = __builtin_convertvector(bf16_lanes(value), vh);
        std::memcpy(static_cast<uint16_t*>(p) + i, &v, sizeof v);
    } else {
#if HB_WIDTH == 16
        _mm256_storeu_si256((__m256i*)(static_cast<uint16_t*>(p) + i), _mm512_cvtps_ph((__m512)value, 0));
#elif HB_WIDTH == 8
        _mm_storeu_si128((__m128i*)(static_cast<uint16_t*>(p) + i), _mm256_cvtps_ph((__m256)value, 0));
#else
        for (int j = 0; j < W; j++) static_cast<uint16_t*>(p)[i + j] = f16_bits(value[j]);
#endif
    }
}

// calls body(std::integral_constant<DType, D>) for the dtype at hand
template <class Body>
inline void by_dtype(DType dtype, Body body) {
    if (dtype == HB_F32) body(std::integral_constant<DType, HB_F32>());
    else if (dtype == HB_BF16) body(std::integral_constant<DType, HB_BF16>());
    else body(std::integral_constant<DType, HB_F16>());
}

inline vf multiply_add(vf a, vf b, vf c) {
#if HB_WIDTH == 16
    return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif HB_WIDTH == 8
    return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__ARM_NEON)
    return (vf)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
    return a * b + c;
#endif
}

inline vf all(float value) { return value - vf{}; }

inline float sum_of(vf v) {
    float total = 0;
    for (int j = 0; j < W; j++) total += v[j];
    return total;
}

#if HB_WIDTH == 16
// 16 x 16 dwords
inline void transpose_16(__m512i* r) {
    __m512i t[16];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
        t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
        r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
        r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
    }
}
#endif
