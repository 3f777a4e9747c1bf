// 4-bit codes to values (ops/fourbit.py).

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
#ifdef HB_ROUNDS_BF16
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
#ifdef HB_SHIFTS_BYTES
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
