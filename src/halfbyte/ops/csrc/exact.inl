// The operations whose every bit is defined: quantize, dequantize, the optimizer. Included by each path_*.cpp inside its
// own namespace; HB_WIDTH is the number of fp32 lanes. Each multiplication and addition is rounded by itself
// (-ffp-contract=off), as the plain-PyTorch meaning does it, so all paths give the same bits.

typedef float vf __attribute__((vector_size(HB_WIDTH * 4), aligned(4), may_alias));
typedef int32_t vi __attribute__((vector_size(HB_WIDTH * 4), aligned(4), may_alias));
typedef uint32_t vu __attribute__((vector_size(HB_WIDTH * 4), aligned(4), may_alias));
typedef uint16_t vh __attribute__((vector_size(HB_WIDTH * 2), aligned(2), may_alias));
constexpr int W = HB_WIDTH;

// --- conversions --------------------------------------------------------------------------------------------------------

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

// --- quantize -----------------------------------------------------------------------------------------------------------

// codes of HB_WIDTH scaled weights, one in each lane
struct Coder {
    float bounds[16];
    int32_t codes[16];
    bool sorted = true;
#if HB_WIDTH == 16
    __m512 middle;
    __m512 bound_lanes[3];  // from bound 3, 1 and 0 on: what the steps of 4, 2 and 1 look at
    __m512i code_lanes;
#endif

    Coder(const float* ascending, const uint8_t* code_of_rank) {
        for (int i = 0; i < 16; i++) {
            bounds[i] = i < 15 ? ascending[i] : INFINITY;
            codes[i] = code_of_rank[i];
            sorted = sorted && codes[i] == i;
        }
#if HB_WIDTH == 16
        middle = _mm512_set1_ps(bounds[7]);
        for (int step = 4, k = 0; step; step >>= 1, k++) {
            float shifted[16];
            for (int i = 0; i < 16; i++) shifted[i] = bounds[i + step - 1 < 15 ? i + step - 1 : 15];
            bound_lanes[k] = _mm512_loadu_ps(shifted);
        }
        code_lanes = _mm512_loadu_si512(codes);
#endif
    }

    int32_t operator()(float scaled) const {
        int rank = 0;
        for (int i = 0; i < 15; i++) rank += bounds[i] < scaled;
        return codes[rank];
    }

#if HB_WIDTH == 16
    // a binary search in each lane, of N registers side by side; a permutation reads the low four bits of an index
    template <int N>
    void codes_of(const __m512* scaled, __m512i* rank) const {
#pragma GCC unroll 4
        for (int j = 0; j < N; j++) rank[j] = _mm512_maskz_set1_epi32(_mm512_cmp_ps_mask(middle, scaled[j], _CMP_LT_OQ), 8);
#pragma GCC unroll 3
        for (int k = 0; k < 3; k++)
#pragma GCC unroll 4
            for (int j = 0; j < N; j++) {
                __mmask16 above = _mm512_cmp_ps_mask(_mm512_permutexvar_ps(rank[j], bound_lanes[k]), scaled[j], _CMP_LT_OQ);
                rank[j] = _mm512_mask_add_epi32(rank[j], above, rank[j], _mm512_set1_epi32(4 >> k));
            }
        if (!sorted)
#pragma GCC unroll 4
            for (int j = 0; j < N; j++) rank[j] = _mm512_permutexvar_epi32(rank[j], code_lanes);
    }
#else
    vi operator()(vf scaled) const {
        vi rank = {};
        for (int i = 0; i < 15; i++) rank -= (bounds[i] - vf{}) < scaled;
        if (sorted) return rank;
        vi out;
        for (int j = 0; j < W; j++) out[j] = codes[rank[j]];
        return out;
    }
#endif
};

// HB_WIDTH codes -> HB_WIDTH / 2 bytes
inline void pack_codes(vi codes, uint8_t* out) {
    typedef uint64_t vq __attribute__((vector_size(HB_WIDTH * 4), may_alias));
    vq both = (vq)codes;
    both = both << 4 | both >> 32;
#if HB_WIDTH == 16
    _mm_storel_epi64((__m128i*)out, _mm512_cvtepi64_epi8((__m512i)both));
#else
    for (int j = 0; j < W / 2; j++) out[j] = uint8_t(both[j]);
#endif
}

template <DType D>
inline float absolute_maximum(const void* w, int64_t start, int64_t count) {  // a NaN is the greatest
    int64_t i = 0;
    int32_t result = 0;
#if HB_WIDTH == 16
    __m512i most = _mm512_setzero_si512();
    for (; i + W <= count; i += W) most = _mm512_max_epi32(most, (__m512i)((vi)load<D>(w, start + i) & 0x7fffffff));
    if (i) result = _mm512_reduce_max_epi32(most);
#else
    vi most = {};
    for (; i + W <= count; i += W) {
        vi bits = (vi)load<D>(w, start + i) & 0x7fffffff;
        vi greater = bits > most;
        most = (bits & greater) | (most & ~greater);
    }
    for (int j = 0; j < W; j++) result = most[j] > result ? most[j] : result;
#endif
    for (; i < count; i++) {
        int32_t bits = int32_t(to_bits(to_float(w, D, start + i)) & 0x7fffffff);
        result = bits > result ? bits : result;
    }
    return from_bits(uint32_t(result));
}

#if HB_WIDTH == 16
// Blocks of bf16 weights without widening them. fl(x * inverse) grows with x, so the code is the number of thresholds
// below x, where the threshold of a bound is the greatest bf16 that does not exceed it when scaled. A bf16, its bits
// seen as a signed integer (negative ones reversed), orders like its value; a threshold is found by trying the
// two neighbours above an estimate that is at most two below. 32 weights are searched at once.
//
// One block is a long chain of dependent steps, so a batch of them goes through each step together.
struct Bf16Batch {
    static constexpr int64_t BLOCKS = 16;
    float scale[BLOCKS], inverse[BLOCKS];
    uint16_t thresholds[BLOCKS][32];  // 15, then the greatest number: the steps of a search look up to three further

    static __m512i order(__m512i bits) {  // of 32-bit lanes holding 16 bits, sign-extended
        return _mm512_xor_si512(bits, _mm512_and_si512(_mm512_srai_epi32(bits, 15), _mm512_set1_epi32(0x7fff)));
    }

    // false: a magnitude is out of the range this way is proved for
    bool run(const uint16_t* w, int64_t blocks, int64_t block_size, const Coder& coder, uint8_t* out, float* absmax) {
        bool in_range = true;
        for (int64_t b = 0; b < blocks; b++) {
            scale[b] = greatest(w + b * block_size, block_size);
            in_range = in_range && scale[b] >= 0x1p-100f && scale[b] <= 0x1p100f;
        }
        if (!in_range) return false;
        for (int64_t b = 0; b < blocks; b++) inverse[b] = 1.0f / scale[b];
        for (int64_t b = 0; b < blocks; b++) find_thresholds(coder, b);
        for (int64_t b = 0; b < blocks; b++)
            for (int64_t i = b * block_size; i < (b + 1) * block_size; i += 32) search(w + i, coder, thresholds[b], out + i / 2);
        std::memcpy(absmax, scale, size_t(blocks) * 4);
        return true;
    }

    static float greatest(const uint16_t* w, int64_t count) {
        __m512i most = _mm512_setzero_si512();
        for (int64_t i = 0; i < count; i += 32)
            most = _mm512_max_epu16(most, _mm512_and_si512(_mm512_loadu_si512(w + i), _mm512_set1_epi16(0x7fff)));
        __m256i half = _mm256_max_epu16(_mm512_castsi512_si256(most), _mm512_extracti64x4_epi64(most, 1));
        __m128i quarter = _mm_max_epu16(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
        __m128i least = _mm_minpos_epu16(_mm_xor_si128(quarter, _mm_set1_epi16(-1)));
        return from_bits(uint32_t(~_mm_cvtsi128_si32(least) & 0xffff) << 16);
    }

    void find_thresholds(const Coder& coder, int64_t b) {
        const __m512 bounds = _mm512_loadu_ps(coder.bounds), by = _mm512_set1_ps(inverse[b]);
        const __m512i one = _mm512_set1_epi32(1);
        const __m512i towards_zero = _mm512_srai_epi32((__m512i)_mm512_mul_ps(bounds, _mm512_set1_ps(scale[b])), 16);
        const __m512i at = _mm512_add_epi32(order(towards_zero), _mm512_srai_epi32(towards_zero, 31));
        __m512i found = _mm512_sub_epi32(at, one);
#pragma GCC unroll 2
        for (int i = 0; i < 2; i++) {
            __m512i candidate = order(_mm512_add_epi32(at, _mm512_set1_epi32(i)));
            __m512 value = _mm512_mul_ps((__m512)_mm512_slli_epi32(candidate, 16), by);
            found = _mm512_mask_add_epi32(found, _mm512_cmp_ps_mask(value, bounds, _CMP_LE_OQ), found, one);
        }
        found = _mm512_mask_set1_epi32(found, 0x8000, 0x7fff);
        _mm256_storeu_si256((__m256i*)thresholds[b], _mm512_cvtepi32_epi16(found));
        _mm256_storeu_si256((__m256i*)(thresholds[b] + 16), _mm256_set1_epi16(0x7fff));
    }

    static void search(const uint16_t* w, const Coder& coder, const uint16_t* thresholds, uint8_t* out) {
        const __m512i bits = _mm512_loadu_si512(w);
        const __m512i x = _mm512_xor_si512(bits, _mm512_srli_epi16(_mm512_srai_epi16(bits, 15), 1));
        // a bit of the rank is the sign of threshold - x
        __m512i rank = _mm512_srli_epi16(_mm512_subs_epi16(_mm512_set1_epi16(int16_t(thresholds[7])), x), 15);
        rank = _mm512_slli_epi16(rank, 3);
        rank = step<4>(rank, x, thresholds);
        rank = step<2>(rank, x, thresholds);
        rank = step<1>(rank, x, thresholds);
        if (!coder.sorted) rank = _mm512_permutexvar_epi16(rank, _mm512_castsi256_si512(_mm512_cvtepi32_epi16(coder.code_lanes)));
        const __m512i bytes = _mm512_madd_epi16(rank, _mm512_set1_epi32(1 << 16 | 16));
        _mm_storeu_si128((__m128i*)out, _mm512_cvtepi32_epi8(bytes));
    }

    template <int BIT>
    static __m512i step(__m512i rank, __m512i x, const uint16_t* thresholds) {
        const __m512i table = _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i*)(thresholds + BIT - 1)));
        const __m512i sign = _mm512_subs_epi16(_mm512_permutexvar_epi16(rank, table), x);
        constexpr int SHIFT = BIT == 4 ? 13 : BIT == 2 ? 14 : 15;
        return _mm512_ternarylogic_epi32(rank, _mm512_srli_epi16(sign, SHIFT), _mm512_set1_epi16(BIT), 0xf8);  // a | b & c
    }
};
#endif

#if HB_WIDTH == 16
template <DType D, int N>
inline void quantize_lanes(const void* w, int64_t i, __m512 inverse, const Coder& coder, uint8_t* out) {
    __m512 scaled[N];
    __m512i codes[N];
#pragma GCC unroll 4
    for (int j = 0; j < N; j++) scaled[j] = _mm512_mul_ps((__m512)load<D>(w, i + j * W), inverse);
    coder.codes_of<N>(scaled, codes);
#pragma GCC unroll 4
    for (int j = 0; j < N; j++) pack_codes((vi)codes[j], out + j * W / 2);
}
#endif

template <DType D>
inline void quantize_whole_block(const void* w, int64_t start, int64_t count, const Coder& coder, uint8_t* out, float* absmax) {
    float most = *absmax = absolute_maximum<D>(w, start, count);
    float inverse = 1.0f / (most < TINY ? TINY : most);
#if HB_WIDTH == 16
    int64_t i = 0;
    for (; i + 64 <= count; i += 64) quantize_lanes<D, 4>(w, start + i, _mm512_set1_ps(inverse), coder, out + i / 2);
    if (i < count) quantize_lanes<D, 2>(w, start + i, _mm512_set1_ps(inverse), coder, out + i / 2);
#else
    for (int64_t i = 0; i < count; i += W) pack_codes(coder(load<D>(w, start + i) * inverse), out + i / 2);
#endif
}

template <DType D>
inline void quantize_short_block(const void* w, int64_t start, int64_t count, const Coder& coder, uint8_t* out, float* absmax) {
    float most = absolute_maximum<D>(w, start, count);
    most = *absmax = most < TINY ? TINY : most;
    for (int64_t i = 0; i < count; i += 2) {
        int32_t high = coder(to_float(w, D, start + i) / most);
        int32_t low = coder(i + 1 < count ? to_float(w, D, start + i + 1) / most : 0.0f);
        out[i / 2] = uint8_t(high << 4 | low);
    }
}

void quantize(const void* w, DType dtype, int64_t numel, const float* bounds, const uint8_t* code_of_rank,
              int64_t block_size, int64_t first, int64_t last, uint8_t* packed, float* absmax) {
    Coder coder(bounds, code_of_rank);
    by_dtype(dtype, [&](auto d) {
        for (int64_t block = first; block < last; block++) {
#if HB_WIDTH == 16
            if constexpr (d.value == HB_BF16) {
                Bf16Batch batch;
                const int64_t whole = min64(last, numel / block_size), blocks = min64(Bf16Batch::BLOCKS, whole - block);
                const int64_t at = block * block_size;
                if (blocks > 0 && batch.run(static_cast<const uint16_t*>(w) + at, blocks, block_size, coder, packed + at / 2, absmax + block)) {
                    block += blocks - 1;
                    continue;
                }
            }
#endif
            int64_t start = block * block_size, count = min64(block_size, numel - start);
            if (count == block_size) quantize_whole_block<d.value>(w, start, count, coder, packed + start / 2, absmax + block);
            else quantize_short_block<d.value>(w, start, count, coder, packed + start / 2, absmax + block);
        }
    });
}

// --- dequantize ---------------------------------------------------------------------------------------------------------

inline float scale_of(const hb_fourbit& q, int64_t block) {
    if (!q.nested_absmax) return static_cast<const float*>(q.absmax)[block];
    float value = q.nested_quant_map[static_cast<const uint8_t*>(q.absmax)[block]];
    value = value * q.nested_absmax[block / q.nested_block_size];
    return value + *q.nested_offset;
}

// scales of blocks [first, first + count); the division by the group's size is not done for every block
inline void scales_of(const hb_fourbit& q, int64_t first, int64_t count, float* out) {
    if (!q.nested_absmax) {
        std::memcpy(out, static_cast<const float*>(q.absmax) + first, size_t(count) * 4);
        return;
    }
    const uint8_t* codes = static_cast<const uint8_t*>(q.absmax) + first;
    const float* map = q.nested_quant_map;
    const float offset = *q.nested_offset;
    int64_t group = first / q.nested_block_size, left = (group + 1) * q.nested_block_size - first;
    while (count > 0) {
        int64_t here = min64(left, count);
        const float absmax = q.nested_absmax[group];
        for (int64_t i = 0; i < here; i++) out[i] = map[codes[i]] * absmax + offset;
        codes += here, out += here, count -= here, group++;
        left = q.nested_block_size;
    }
}

inline int nibble(const hb_fourbit& q, int64_t i) { return i & 1 ? q.packed[i / 2] & 15 : q.packed[i / 2] >> 4; }

// any elements, one at a time: what is left over at the ends
inline void dequantize_singly(const hb_fourbit& q, int64_t start, int64_t count, DType dtype, bool widen, void* out) {
    for (int64_t i = 0; i < count; i++) {
        float value = q.quant_map[nibble(q, start + i)] * scale_of(q, (start + i) / q.block_size);
        if (widen) static_cast<float*>(out)[i] = rounded(value, dtype);
        else store_as(out, dtype, i, value);
    }
}

// The block's own 16 levels: level * scale, rounded to the result's type. Every weight then is one look-up.
struct Levels {
    const float* map;
    float safe;  // scales from here on give no subnormal level, which the bf16 instruction would flush to zero

    explicit Levels(const hb_fourbit& q) : map(q.quant_map) {
        float least = INFINITY;
        for (int i = 0; i < 16; i++)
            if (float size = std::fabs(map[i]); size > 0 && size < least) least = size;
        safe = 0x1p-120f / least;
    }

    void widened(float scale, DType dtype, float* out) const {
        for (int i = 0; i < 16; i++) out[i] = map[i] * scale;
        if (dtype != HB_F32)
            for (int i = 0; i < 16; i++) out[i] = rounded(out[i], dtype);
    }

    void narrowed(float scale, DType dtype, uint16_t* out) const {
        for (int i = 0; i < 16; i++) out[i] = dtype == HB_BF16 ? bf16_bits(map[i] * scale) : f16_bits(map[i] * scale);
    }

#if HB_WIDTH == 16
    __m512 widened16(float scale, DType dtype) const {
        __m512 values = _mm512_mul_ps(_mm512_loadu_ps(map), _mm512_set1_ps(scale));
        if (dtype == HB_F32) return values;
        if (dtype == HB_F16) return _mm512_cvtph_ps(_mm512_cvtps_ph(values, 0));
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bf16_16(scale, values)), 16));
    }

    __m256i narrowed16(float scale, DType dtype) const {
        __m512 values = _mm512_mul_ps(_mm512_loadu_ps(map), _mm512_set1_ps(scale));
        return dtype == HB_BF16 ? bf16_16(scale, values) : _mm512_cvtps_ph(values, 0);
    }

    __m256i bf16_16(float scale, __m512 values) const {
#ifdef __AVX512BF16__
        if (__builtin_expect(std::fabs(scale) >= safe, 1)) return (__m256i)_mm512_cvtneps_pbh(values);
#endif
        (void)scale;
        return _mm512_cvtepi32_epi16((__m512i)bf16_lanes((vf)values));
    }
#endif
};

// 32 weights (16 bytes of codes) of one block, in order
#if HB_WIDTH == 16
// 16-bit results: a dword 0x000000HL becomes the word indices (H, L); permutexvar reads five bits of each, and both
// halves of the table are equal
inline __m512i look_up_32(const uint8_t* packed, __m512i table) {
#ifdef __AVX512VBMI__
    // a qword of two bytes; multishift picks any eight of its bits for each byte of the result
    __m512i pairs = _mm512_cvtepu16_epi64(_mm_loadu_si128((const __m128i*)packed));
    return _mm512_permutexvar_epi16(_mm512_multishift_epi64_epi8(_mm512_set1_epi64(0x00'08'00'0c'00'00'00'04), pairs), table);
#else
    __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)packed));
    __m512i indices = _mm512_or_si512(_mm512_srli_epi32(bytes, 4), _mm512_slli_epi32(bytes, 16));
    return _mm512_permutexvar_epi16(indices, table);
#endif
}

inline void look_up_32(const uint8_t* packed, __m512 table, float* out) {
    __m128i bytes = _mm_loadu_si128((const __m128i*)packed), low = _mm_set1_epi8(15);
    __m128i high_nibbles = _mm_and_si128(_mm_srli_epi16(bytes, 4), low), low_nibbles = _mm_and_si128(bytes, low);
    __m512i first = _mm512_cvtepu8_epi32(_mm_unpacklo_epi8(high_nibbles, low_nibbles));
    __m512i second = _mm512_cvtepu8_epi32(_mm_unpackhi_epi8(high_nibbles, low_nibbles));
    _mm512_storeu_ps(out, _mm512_permutexvar_ps(first, table));
    _mm512_storeu_ps(out + 16, _mm512_permutexvar_ps(second, table));
}
#elif HB_WIDTH == 8
// byte shuffles look up each byte of the results by itself: planes[k] holds byte k of the 16 levels
inline void look_up_32(const uint8_t* packed, const __m128i* planes, int bytes_each, uint8_t* out) {
    __m128i bytes = _mm_loadu_si128((const __m128i*)packed), low = _mm_set1_epi8(15);
    __m128i high_nibbles = _mm_and_si128(_mm_srli_epi16(bytes, 4), low), low_nibbles = _mm_and_si128(bytes, low);
    __m128i order[2] = {_mm_unpacklo_epi8(high_nibbles, low_nibbles), _mm_unpackhi_epi8(high_nibbles, low_nibbles)};
    for (int half = 0; half < 2; half++) {
        __m128i p0 = _mm_shuffle_epi8(planes[0], order[half]), p1 = _mm_shuffle_epi8(planes[1], order[half]);
        __m128i lower = _mm_unpacklo_epi8(p0, p1), upper = _mm_unpackhi_epi8(p0, p1);
        __m128i* to = (__m128i*)(out + half * 16 * bytes_each);
        if (bytes_each == 2) {
            _mm_storeu_si128(to, lower);
            _mm_storeu_si128(to + 1, upper);
        } else {
            __m128i p2 = _mm_shuffle_epi8(planes[2], order[half]), p3 = _mm_shuffle_epi8(planes[3], order[half]);
            __m128i lower2 = _mm_unpacklo_epi8(p2, p3), upper2 = _mm_unpackhi_epi8(p2, p3);
            _mm_storeu_si128(to, _mm_unpacklo_epi16(lower, lower2));
            _mm_storeu_si128(to + 1, _mm_unpackhi_epi16(lower, lower2));
            _mm_storeu_si128(to + 2, _mm_unpacklo_epi16(upper, upper2));
            _mm_storeu_si128(to + 3, _mm_unpackhi_epi16(upper, upper2));
        }
    }
}

inline void planes_of(const void* levels, int bytes_each, __m128i* planes) {
    alignas(16) uint8_t bytes[4][16];
    for (int i = 0; i < 16; i++)
        for (int k = 0; k < bytes_each; k++) bytes[k][i] = static_cast<const uint8_t*>(levels)[i * bytes_each + k];
    for (int k = 0; k < bytes_each; k++) planes[k] = _mm_load_si128((const __m128i*)bytes[k]);
}
#endif

// `count` weights of one block, a multiple of 32, from an even element on
inline void dequantize_in_block(const uint8_t* packed, int64_t count, float scale, const Levels& levels, DType dtype,
                                bool wide, bool stream, void* out) {
#if HB_WIDTH == 16
    if (wide) {
        __m512 table = levels.widened16(scale, dtype);
        for (int64_t i = 0; i < count; i += 32) look_up_32(packed + i / 2, table, static_cast<float*>(out) + i);
    } else {
        __m512i table = _mm512_broadcast_i64x4(levels.narrowed16(scale, dtype));
        for (int64_t i = 0; i < count; i += 32) {
            __m512i values = look_up_32(packed + i / 2, table);
            __m512i* to = (__m512i*)(static_cast<uint16_t*>(out) + i);
            if (stream) _mm512_stream_si512(to, values);
            else _mm512_storeu_si512(to, values);
        }
    }
#else
    alignas(16) float wide_table[16];
    alignas(16) uint16_t narrow_table[16];
    if (wide) levels.widened(scale, dtype, wide_table);
    else levels.narrowed(scale, dtype, narrow_table);
    (void)stream;
#if HB_WIDTH == 8
    __m128i planes[4];
    const int each = wide ? 4 : 2;
    planes_of(wide ? (const void*)wide_table : narrow_table, each, planes);
    for (int64_t i = 0; i < count; i += 32) look_up_32(packed + i / 2, planes, each, static_cast<uint8_t*>(out) + i * each);
#else
    for (int64_t i = 0; i < count; i += 2) {
        int high = packed[i / 2] >> 4, low = packed[i / 2] & 15;
        if (wide) {
            static_cast<float*>(out)[i] = wide_table[high];
            static_cast<float*>(out)[i + 1] = wide_table[low];
        } else {
            static_cast<uint16_t*>(out)[i] = narrow_table[high];
            static_cast<uint16_t*>(out)[i + 1] = narrow_table[low];
        }
    }
#endif
#endif
}

void dequantize(const hb_fourbit& q, int64_t start, int64_t count, DType dtype, bool widen, bool stream, void* out) {
    const bool wide = widen || dtype == HB_F32;
    const int64_t size = wide ? 4 : 2;
    char* to = static_cast<char*>(out);
    int64_t ragged = min64(count, (32 - start % 32) % 32);  // blocks are multiples of 32
    dequantize_singly(q, start, ragged, dtype, widen, to);
    Levels levels(q);
    constexpr int64_t RUN = 512;
    float scales[RUN];
    int64_t i = ragged, end = start + count;
    while (end - (start + i) >= 32) {
        int64_t first = (start + i) / q.block_size;
        int64_t blocks = min64(RUN, (end - 1) / q.block_size - first + 1);
        scales_of(q, first, blocks, scales);
        for (int64_t b = 0; b < blocks; b++) {
            int64_t stop = min64(end, (first + b + 1) * q.block_size) - start;
            int64_t here = (stop - i) / 32 * 32;
            dequantize_in_block(q.packed + (start + i) / 2, here, scales[b], levels, dtype, wide,
                                stream && (uintptr_t(to + i * size) & 63) == 0, to + i * size);
            i += here;
        }
    }
    dequantize_singly(q, start + i, count - i, dtype, widen, to + i * size);
#if defined(__SSE2__)
    if (stream) _mm_sfence();
#endif
}

// --- dropout ------------------------------------------------------------------------------------------------------------

// Philox4x32-7 (ops/dropout.py): counters [first, last) give eight elements each, 1 where one is kept
void dropout_mask(uint8_t* out, int64_t numel, int64_t first, int64_t last, uint32_t threshold, const uint32_t* counter,
                  const uint32_t* key) {
    constexpr int LANES = 64;
    alignas(64) uint32_t c0[LANES], c1[LANES], c2[LANES], c3[LANES];
    alignas(64) uint16_t halves[LANES * 8];
    for (int64_t start = first; start < last; start += LANES) {
        for (int i = 0; i < LANES; i++) c0[i] = uint32_t(start + i), c1[i] = counter[0], c2[i] = counter[1], c3[i] = counter[2];
        uint32_t k0 = key[0], k1 = key[1];
        for (int round = 0; round < 7; round++) {
            for (int i = 0; i < LANES; i++) {
                const uint64_t p0 = uint64_t(c0[i]) * 0xD2511F53u, p1 = uint64_t(c2[i]) * 0xCD9E8D57u;
                c0[i] = uint32_t(p1 >> 32) ^ c1[i] ^ k0;
                c2[i] = uint32_t(p0 >> 32) ^ c3[i] ^ k1;
                c1[i] = uint32_t(p1);
                c3[i] = uint32_t(p0);
            }
            k0 += 0x9E3779B9u;
            k1 += 0xBB67AE85u;
        }
        for (int i = 0; i < LANES; i++) {
            const uint32_t words[4] = {c0[i], c1[i], c2[i], c3[i]};
            for (int w = 0; w < 4; w++) {
                halves[i * 8 + 2 * w] = uint16_t(words[w]);
                halves[i * 8 + 2 * w + 1] = uint16_t(words[w] >> 16);
            }
        }
        const int64_t count = min64(min64(last, start + LANES) * 8, numel) - start * 8;
        const uint16_t least = uint16_t(threshold);
        for (int64_t i = 0; i < count; i++) out[start * 8 + i] = halves[i] >= least;
    }
}

// --- AdamW --------------------------------------------------------------------------------------------------------------

inline void encode_moment(const float* values, uint8_t* codes, float* absmax, const Nearest& nearest) {
    int32_t most = 0;
    for (int i = 0; i < MOMENT_BLOCK; i++) {
        int32_t bits = int32_t(to_bits(values[i]) & 0x7fffffff);
        most = bits > most ? bits : most;
    }
    *absmax = from_bits(uint32_t(most));
    float inverse = 1.0f / (*absmax < TINY ? TINY : *absmax);
    for (int i = 0; i < MOMENT_BLOCK; i++) codes[i] = rank(nearest, values[i] * inverse);
}

// numbers: step_size, beta1, 1 - beta1, beta2, 1 - beta2, eps, shrink
void adamw(float* p, const float* g, int64_t count, uint8_t* m_codes, uint8_t* v_codes, float* m_absmax, float* v_absmax,
           const float* m_map, const float* v_map, const Nearest& m_nearest, const Nearest& v_nearest, const float* numbers) {
    alignas(64) float m[MOMENT_BLOCK], v[MOMENT_BLOCK], grad[MOMENT_BLOCK], change[MOMENT_BLOCK];
    std::memcpy(grad, g, size_t(count) * 4);
    std::memset(grad + count, 0, size_t(MOMENT_BLOCK - count) * 4);
    const float step_size = numbers[0], beta1 = numbers[1], less1 = numbers[2], beta2 = numbers[3], less2 = numbers[4];
    const float eps = numbers[5], shrink = numbers[6], m_scale = *m_absmax, v_scale = *v_absmax;
    for (int i = 0; i < MOMENT_BLOCK; i++) {
        m[i] = m_map[m_codes[i]];
        v[i] = v_map[v_codes[i]];
    }
    for (int i = 0; i < MOMENT_BLOCK; i++) {
        m[i] = m[i] * m_scale * beta1 + grad[i] * less1;
        v[i] = v[i] * v_scale * beta2 + grad[i] * grad[i] * less2;
        change[i] = m[i] * step_size / (std::sqrt(v[i]) + eps);
    }
    for (int64_t i = 0; i < count; i++) p[i] = p[i] * shrink - change[i];
    encode_moment(m, m_codes, m_absmax, m_nearest);
    encode_moment(v, v_codes, v_absmax, v_nearest);
}
