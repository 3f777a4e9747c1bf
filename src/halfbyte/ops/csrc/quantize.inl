// Weights to 4-bit codes and scales (ops/fourbit.py).

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
