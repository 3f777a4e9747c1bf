// Dropout from counters (ops/dropout.py): Philox4x32-7, a bit for each element.

// keep bits of elements [8 first, 8 first + 128 batches), lowest bit first
#if HB_WIDTH == 16
template <int N>
inline void philox_512(uint32_t first, const Dropout& d, uint32_t* bits) {
    // lane 4 L + k of a register holds counter 4 k + L: the words of four counters then fall into order below
    const __m512i order = _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
    const __m512i m0 = _mm512_set1_epi64(0xD2511F53), m1 = _mm512_set1_epi64(0xCD9E8D57);
    __m512i c0[N], c1[N], c2[N], c3[N];
#pragma GCC unroll 4
    for (int j = 0; j < N; j++) {
        c0[j] = _mm512_add_epi32(order, _mm512_set1_epi32(int32_t(first + 16 * j)));
        c1[j] = _mm512_set1_epi32(int32_t(d.layer));
        c2[j] = _mm512_set1_epi32(int32_t(d.micro_batch));
        c3[j] = _mm512_set1_epi32(int32_t(d.step));
    }
    uint32_t k0 = uint32_t(d.seed), k1 = uint32_t(d.seed >> 32);
#pragma GCC unroll 7
    for (int round = 0; round < 7; round++) {
        const __m512i key0 = _mm512_set1_epi32(int32_t(k0)), key1 = _mm512_set1_epi32(int32_t(k1));
#pragma GCC unroll 4
        for (int j = 0; j < N; j++) {
            const __m512i even0 = _mm512_mul_epu32(c0[j], m0), odd0 = _mm512_mul_epu32(_mm512_srli_epi64(c0[j], 32), m0);
            const __m512i even1 = _mm512_mul_epu32(c2[j], m1), odd1 = _mm512_mul_epu32(_mm512_srli_epi64(c2[j], 32), m1);
            const __m512i high0 = _mm512_mask_blend_epi32(0xaaaa, _mm512_srli_epi64(even0, 32), odd0);
            const __m512i high1 = _mm512_mask_blend_epi32(0xaaaa, _mm512_srli_epi64(even1, 32), odd1);
            const __m512i low0 = _mm512_mask_blend_epi32(0xaaaa, even0, _mm512_slli_epi64(odd0, 32));
            const __m512i low1 = _mm512_mask_blend_epi32(0xaaaa, even1, _mm512_slli_epi64(odd1, 32));
            c0[j] = _mm512_ternarylogic_epi32(high1, c1[j], key0, 0x96);  // a ^ b ^ c
            c2[j] = _mm512_ternarylogic_epi32(high0, c3[j], key1, 0x96);
            c1[j] = low1;
            c3[j] = low0;
        }
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    const __m512i least = _mm512_set1_epi16(int16_t(d.threshold));
#pragma GCC unroll 4
    for (int j = 0; j < N; j++) {
        const __m512i a = _mm512_unpacklo_epi32(c0[j], c1[j]), b = _mm512_unpackhi_epi32(c0[j], c1[j]);
        const __m512i c = _mm512_unpacklo_epi32(c2[j], c3[j]), e = _mm512_unpackhi_epi32(c2[j], c3[j]);
        bits[4 * j] = _mm512_cmpge_epu16_mask(_mm512_unpacklo_epi64(a, c), least);
        bits[4 * j + 1] = _mm512_cmpge_epu16_mask(_mm512_unpackhi_epi64(a, c), least);
        bits[4 * j + 2] = _mm512_cmpge_epu16_mask(_mm512_unpacklo_epi64(b, e), least);
        bits[4 * j + 3] = _mm512_cmpge_epu16_mask(_mm512_unpackhi_epi64(b, e), least);
    }
}

inline void keep_bits(int64_t first, int64_t batches, const Dropout& d, uint32_t* bits) {
    int64_t i = 0;
    for (; i + 2 <= batches; i += 2) philox_512<2>(uint32_t(first + 16 * i), d, bits + 4 * i);
    if (i < batches) philox_512<1>(uint32_t(first + 16 * i), d, bits + 4 * i);
}
#else
inline void keep_bits(int64_t first, int64_t batches, const Dropout& d, uint32_t* bits) {
    constexpr int LANES = 16;
    alignas(64) uint32_t c0[LANES], c1[LANES], c2[LANES], c3[LANES];
    const uint32_t threshold = uint32_t(d.threshold);
    for (int64_t batch = 0; batch < batches; batch++, bits += 4) {
        for (int i = 0; i < LANES; i++) c0[i] = uint32_t(first + batch * LANES + i), c1[i] = d.layer, c2[i] = d.micro_batch, c3[i] = d.step;
        uint32_t k0 = uint32_t(d.seed), k1 = uint32_t(d.seed >> 32);
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
        for (int group = 0; group < 4; group++) {
            uint32_t word = 0;
            for (int i = 3; i >= 0; i--) {
                const uint32_t words[4] = {c0[4 * group + i], c1[4 * group + i], c2[4 * group + i], c3[4 * group + i]};
                uint32_t byte = 0;
                for (int w = 0; w < 4; w++)
                    byte |= uint32_t((words[w] & 0xffff) >= threshold) << 2 * w | uint32_t((words[w] >> 16) >= threshold) << (2 * w + 1);
                word = word << 8 | byte;
            }
            bits[group] = word;
        }
    }
}
#endif

// body(offset, bits, from, count) over elements [start, start + count) in runs: bit `from` belongs to element `offset`
template <class Body>
inline void in_runs(int64_t start, int64_t count, const Dropout& d, Body body) {
    constexpr int64_t RUN = 8192;  // elements
    uint32_t bits[RUN / 32 + 5];
    for (int64_t i = 0; i < count;) {
        const int64_t place = d.first + start + i, from = place % 8, here = min64(count - i, RUN - from);
        keep_bits(place / 8, ceil_div(from + here, 128), d, bits);
        body(i, bits, from, here);
        i += here;
    }
}

inline bool kept(const uint32_t* bits, int64_t i) { return bits[i / 32] >> (i % 32) & 1; }

inline uint32_t word_at(const uint32_t* bits, int64_t i) {  // from bit i, a multiple of 8, on
    uint32_t word;
    std::memcpy(&word, reinterpret_cast<const char*>(bits) + i / 8, 4);
    return word;
}

// out [count] = 1 where elements [start, start + count) are kept
void dropout_mask(uint8_t* out, int64_t start, int64_t count, const Dropout& d) {
    in_runs(start, count, d, [&](int64_t offset, const uint32_t* bits, int64_t from, int64_t here) {
        for (int64_t i = 0; i < here; i++) out[offset + i] = kept(bits, from + i);
    });
}

// out [count] = elements [start, start + count) of x where kept, else zero
void drop(const void* x, DType dtype, int64_t start, int64_t count, const Dropout& d, void* out) {
    in_runs(start, count, d, [&](int64_t offset, const uint32_t* bits, int64_t from, int64_t here) {
        int64_t i = 0;
        if (dtype == HB_F32) {
            const float* source = static_cast<const float*>(x) + start + offset;
            float* to = static_cast<float*>(out) + offset;
#if HB_WIDTH == 16
            if (from == 0)
                for (; i + 16 <= here; i += 16) _mm512_storeu_ps(to + i, _mm512_maskz_loadu_ps(__mmask16(word_at(bits, i)), source + i));
#endif
            for (; i < here; i++) to[i] = kept(bits, from + i) ? source[i] : 0.0f;
            return;
        }
        const uint16_t* source = static_cast<const uint16_t*>(x) + start + offset;
        uint16_t* to = static_cast<uint16_t*>(out) + offset;
#if HB_WIDTH == 16
        if (from == 0)
            for (; i + 32 <= here; i += 32) _mm512_storeu_si512(to + i, _mm512_maskz_loadu_epi16(word_at(bits, i), source + i));
#endif
        for (; i < here; i++) to[i] = kept(bits, from + i) ? source[i] : 0;
    });
}

// c [count] += d [count] where elements [start, start + count) are kept
void add_kept(float* c, const float* more, int64_t start, int64_t count, const Dropout& d) {
    in_runs(start, count, d, [&](int64_t offset, const uint32_t* bits, int64_t from, int64_t here) {
        int64_t i = 0;
#if HB_WIDTH == 16
        if (from == 0)
            for (; i + 16 <= here; i += 16) {
                const __m512 sum = _mm512_loadu_ps(c + offset + i);
                const __m512 both = _mm512_mask_add_ps(sum, __mmask16(word_at(bits, i)), sum, _mm512_loadu_ps(more + offset + i));
                _mm512_storeu_ps(c + offset + i, both);
            }
#endif
        for (; i < here; i++)
            if (kept(bits, from + i)) c[offset + i] += more[offset + i];
    });
}
