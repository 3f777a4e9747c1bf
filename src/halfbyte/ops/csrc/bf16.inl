// Products of bf16 pairs, for processors with dpbf16 (AVX512_BF16) or AMX. A dword of B
// holds the two weights that are multiplied with a pair of A. Included after kernels.inl.

// whether chunks of 64 weights never straddle a block nor begin at an odd place, for rows of `width`
inline bool regular(const hb_fourbit& q, int64_t width, int64_t column) {
    return q.block_size % 64 == 0 && width % 64 == 0 && column % 64 == 0;
}

// scales of the 64-chunks of elements [start, start + 64 * count)
inline void chunk_scales(const hb_fourbit& q, int64_t start, int64_t count, float* out) {
    if (q.block_size == 64) return scales_of(q, start / 64, count, out);
    for (int64_t i = 0; i < count; i++) out[i] = scale_of(q, (start + i * 64) / q.block_size);
}

// a panel is a narrow strip of the weight, and its rows are far apart: the processor does not foresee the next
inline void prefetch(const uint8_t* p) { _mm_prefetch((const char*)p, _MM_HINT_T0); }
constexpr int64_t AHEAD = 8;

inline uint16_t* pair_row(char* group, int64_t row_bytes, int64_t k) {
    return reinterpret_cast<uint16_t*>(group + k / 2 * row_bytes);
}

// `rows` rows at `stride` -> the pairs of one group
inline void transpose_pairs(const uint16_t* from, int64_t rows, int64_t stride, int64_t depth, int64_t padded, char* group,
                            int64_t row_bytes) {
    int64_t k = 0;
    for (; k + 32 <= depth; k += 32) {
        __m512i r[GROUP];
#pragma GCC unroll 16
        for (int i = 0; i < GROUP; i++) r[i] = i < rows ? _mm512_loadu_si512(from + i * stride + k) : _mm512_setzero_si512();
        transpose_16(r);
#pragma GCC unroll 16
        for (int i = 0; i < GROUP; i++) _mm512_store_si512(pair_row(group, row_bytes, k + 2 * i), r[i]);
    }
    for (; k < padded; k += 2)
        for (int64_t i = 0; i < GROUP; i++) {
            uint16_t* to = pair_row(group, row_bytes, k) + 2 * i;
            to[0] = i < rows && k < depth ? from[i * stride + k] : 0;
            to[1] = i < rows && k + 1 < depth ? from[i * stride + k + 1] : 0;
        }
}

void pack_forward_bf16(const hb_fourbit& q, DType dtype, int64_t row, int64_t rows, int64_t width, int64_t column,
                       int64_t depth, int64_t padded, char* group, int64_t row_bytes) {
    if (!(regular(q, width, column) && depth % 64 == 0)) {
        alignas(64) uint16_t temporary[GROUP * DEPTH];
        for (int64_t i = 0; i < rows; i++)
            dequantize(q, (row + i) * width + column, depth, dtype, false, false, temporary + i * depth);
        transpose_pairs(temporary, rows, depth, depth, padded, group, row_bytes);
        return;
    }
    Levels levels(q);
    float scales[GROUP][DEPTH / 64];
    for (int64_t i = 0; i < rows; i++) chunk_scales(q, (row + i) * width + column, depth / 64, scales[i]);
    const uint8_t* packed[GROUP];
    for (int64_t i = 0; i < rows; i++) packed[i] = q.packed + ((row + i) * width + column) / 2;
    for (int64_t k = 0; k < depth; k += 64) {
        __m256i tables[GROUP];
        for (int64_t i = 0; i < rows; i++) {
            tables[i] = levels.narrowed16(scales[i][k / 64], HB_BF16);
            prefetch(packed[i] + k / 2 + GROUP * width / 2);
        }
        for (int64_t half = k; half < k + 64; half += 32) {
            __m512i weights[GROUP];
            if (rows == GROUP) {
#pragma GCC unroll 16
                for (int i = 0; i < GROUP; i++) weights[i] = look_up_32(packed[i] + half / 2, _mm512_broadcast_i64x4(tables[i]));
            } else {
                for (int i = 0; i < GROUP; i++)
                    weights[i] = i < rows ? look_up_32(packed[i] + half / 2, _mm512_broadcast_i64x4(tables[i])) : _mm512_setzero_si512();
            }
            transpose_16(weights);
#pragma GCC unroll 16
            for (int i = 0; i < GROUP; i++) _mm512_store_si512(pair_row(group, row_bytes, half + 2 * i), weights[i]);
        }
    }
}

void pack_forward_plain_bf16(const void* w, DType dtype, int64_t rows, int64_t stride, int64_t depth, int64_t padded,
                             char* group, int64_t row_bytes) {
    (void)dtype;
    transpose_pairs(static_cast<const uint16_t*>(w), rows, stride, depth, padded, group, row_bytes);
}

inline __m512i interleave_low() {
    return _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37, 5, 36, 4, 35, 3,
                            34, 2, 33, 1, 32, 0);
}

// two rows of `count` (the second may be missing) -> row k of the groups from number `first` on
inline void interleave(const uint16_t* upper, const uint16_t* lower, int64_t count, const Panel& panel, int64_t first, int64_t k) {
    int64_t j = 0;
    const __m512i low = interleave_low(), high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    for (; j + 32 <= count && lower; j += 32) {
        const __m512i a = _mm512_loadu_si512(upper + j), b = _mm512_loadu_si512(lower + j);
        _mm512_store_si512(pair_row(group_of(panel, first + j / GROUP), row_bytes(panel), k), _mm512_permutex2var_epi16(a, low, b));
        _mm512_store_si512(pair_row(group_of(panel, first + j / GROUP + 1), row_bytes(panel), k), _mm512_permutex2var_epi16(a, high, b));
    }
    for (; j < count; j += GROUP) {
        uint16_t* to = pair_row(group_of(panel, first + j / GROUP), row_bytes(panel), k);
        for (int64_t i = 0; i < GROUP; i++) {
            to[2 * i] = j + i < count ? upper[j + i] : 0;
            to[2 * i + 1] = j + i < count && lower ? lower[j + i] : 0;
        }
    }
}

inline void zero_pairs(int64_t depth, int64_t padded, int64_t count, const Panel& panel) {
    for (int64_t k = round_up(depth, 2); k < padded; k += 2)
        for (int64_t j = 0; j < count; j += GROUP) std::memset(pair_row(group_of(panel, j / GROUP), row_bytes(panel), k), 0, GROUP_BYTES);
}

void pack_backward_bf16(const hb_fourbit& q, DType dtype, int64_t row, int64_t depth, int64_t padded, int64_t width,
                        int64_t column, int64_t count, const Panel& panel) {
    zero_pairs(depth, padded, count, panel);
    const bool fast = regular(q, width, column) && count % 64 == 0;
    Levels levels(q);
    const __m512i low = interleave_low(), high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    for (int64_t j = 0; j < count; j += DEPTH) {
        const int64_t here = min64(DEPTH, count - j);
        for (int64_t k = 0; k < depth; k += 2) {
            const int64_t upper = (row + k) * width + column + j, lower = upper + width;
            const bool two = k + 1 < depth;
            if (!(fast && two)) {
                alignas(64) uint16_t temporary[2][DEPTH];
                dequantize(q, upper, here, dtype, false, false, temporary[0]);
                if (two) dequantize(q, lower, here, dtype, false, false, temporary[1]);
                interleave(temporary[0], two ? temporary[1] : nullptr, here, panel, j / GROUP, k);
                continue;
            }
            float scales[2][DEPTH / 64];
            chunk_scales(q, upper, here / 64, scales[0]);
            chunk_scales(q, lower, here / 64, scales[1]);
            for (int64_t i = 0; i < here; i += 64) {
                const __m512i one = _mm512_broadcast_i64x4(levels.narrowed16(scales[0][i / 64], HB_BF16));
                const __m512i other = _mm512_broadcast_i64x4(levels.narrowed16(scales[1][i / 64], HB_BF16));
                const uint8_t *above = q.packed + (upper + i) / 2, *below = q.packed + (lower + i) / 2;
                prefetch(above + AHEAD * width);  // AHEAD * 2 rows on
                prefetch(below + AHEAD * width);
#pragma GCC unroll 2
                for (int half = 0; half < 2; half++) {
                    const __m512i a = look_up_32(above + half * 16, one), b = look_up_32(below + half * 16, other);
                    char* to = group_of(panel, (j + i) / GROUP + 2 * half);  // a tile has two groups or more
                    _mm512_store_si512(pair_row(to, row_bytes(panel), k), _mm512_permutex2var_epi16(a, low, b));
                    _mm512_store_si512(pair_row(to + GROUP_BYTES, row_bytes(panel), k), _mm512_permutex2var_epi16(a, high, b));
                }
            }
        }
    }
}

void pack_backward_plain_bf16(const void* w, DType dtype, int64_t depth, int64_t padded, int64_t stride, int64_t count,
                              const Panel& panel) {
    (void)dtype;
    const uint16_t* from = static_cast<const uint16_t*>(w);
    zero_pairs(depth, padded, count, panel);
    for (int64_t k = 0; k < depth; k += 2)
        interleave(from + k * stride, k + 1 < depth ? from + (k + 1) * stride : nullptr, count, panel, 0, k);
}

// --- a few tokens ---------------------------------------------------------------------------------------------------------
//
// One or a few tokens read each weight once, so nothing is packed: 16 words of codes give, shifted by 0, 4, 8 and 12 bits,
// the indices of every fourth weight (a 256-bit permutation reads only four bits of each), and x is brought into that
// order once: of each 64 elements first those at 4 i + 1, then 4 i, 4 i + 3, 4 i + 2.

constexpr int64_t FEW_BF16 = 4, FEW_BF16_BACKWARD = 2;
constexpr int PHASE[4] = {1, 0, 3, 2};

inline void shuffle_x(const uint16_t* x, int64_t width, uint16_t* out) {
    for (int64_t k = 0; k < width; k += 64)
        for (int phase = 0; phase < 4; phase++)
            for (int i = 0; i < 16; i++) out[k + phase * 16 + i] = x[k + 4 * i + PHASE[phase]];
}

template <int TOKENS>
void few_forward_rows(const uint16_t* x, const hb_fourbit& q, int64_t width, int64_t first, int64_t last, float* c, int64_t c_stride) {
    Levels levels(q);
    float scales[DEPTH / 8];
    for (int64_t n = first; n < last; n++) {
        __m256 sums[TOKENS][4];  // each is a chain of additions; with fewer the processor waits for them
#pragma GCC unroll 8
        for (int m = 0; m < TOKENS; m++)
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) sums[m][i] = _mm256_setzero_ps();
        for (int64_t k = 0; k < width; k += 64 * (DEPTH / 8)) {
            int64_t blocks = min64(DEPTH / 8, (width - k) / 64);
            chunk_scales(q, n * width + k, blocks, scales);
            const uint8_t* packed = q.packed + (n * width + k) / 2;
            for (int64_t b = 0; b < blocks; b++) {
                __m256i table = levels.narrowed16(scales[b], HB_BF16);
                __m256i codes = _mm256_loadu_si256((const __m256i*)(packed + b * 32));
                __m256i weights[4] = {
                    _mm256_permutexvar_epi16(codes, table),
                    _mm256_permutexvar_epi16(_mm256_srli_epi16(codes, 4), table),
                    _mm256_permutexvar_epi16(_mm256_srli_epi16(codes, 8), table),
                    _mm256_permutexvar_epi16(_mm256_srli_epi16(codes, 12), table),
                };
#pragma GCC unroll 8
                for (int m = 0; m < TOKENS; m++) {
                    const __m256i* at = (const __m256i*)(x + m * width + k + b * 64);
#pragma GCC unroll 4
                    for (int i = 0; i < 4; i++)
                        sums[m][i] = _mm256_dpbf16_ps(sums[m][i], (__m256bh)weights[i], (__m256bh)_mm256_loadu_si256(at + i));
                }
            }
        }
#pragma GCC unroll 8
        for (int m = 0; m < TOKENS; m++) {
            __m256 sum = _mm256_add_ps(_mm256_add_ps(sums[m][0], sums[m][1]), _mm256_add_ps(sums[m][2], sums[m][3]));
            __m128 half = _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps(sum, 1));
            half = _mm_add_ps(half, _mm_movehl_ps(half, half));
            c[m * c_stride + n] = _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
        }
    }
}

// calls body(std::integral_constant<int, tokens>) for 1..4
template <class Body>
inline void by_tokens(int64_t tokens, Body body) {
    switch (tokens) {
        case 1: return body(std::integral_constant<int, 1>());
        case 2: return body(std::integral_constant<int, 2>());
        case 3: return body(std::integral_constant<int, 3>());
        default: return body(std::integral_constant<int, 4>());
    }
}

void few_forward_bf16(const void* x, DType dtype, int64_t tokens, const hb_fourbit& q, int64_t width, int64_t first,
                      int64_t last, float* c, int64_t c_stride, void* work) {
    if (!regular(q, width, 0)) {
        few_forward_any(x, dtype, tokens, q, width, first, last, c, c_stride, work);
        return;
    }
    uint16_t* shuffled = static_cast<uint16_t*>(work);
    for (int64_t m = 0; m < tokens; m++)
        shuffle_x(static_cast<const uint16_t*>(x) + m * width, width, shuffled + m * width);
    by_tokens(tokens, [&](auto n) { few_forward_rows<n.value>(shuffled, q, width, first, last, c, c_stride); });
}

// Rows of W are taken in pairs and their weights interleaved, so that dpbf16 adds two of them at once; sums stay in
// cache in the order of the look-up and are sorted at the end.
template <int TOKENS>
void few_backward_rows(const uint32_t* pairs, int64_t rows, const hb_fourbit& q, int64_t width, int64_t first, int64_t last,
                       float* c, int64_t c_stride) {
    constexpr int64_t PAIRS = 4;
    Levels levels(q);
    for (int64_t k = first; k < last; k += 64 * 8) {
        const int64_t blocks = min64(8, (last - k) / 64);
        for (int64_t n = 0; n < rows; n += 2 * PAIRS) {
            const int64_t here = min64(PAIRS, (rows - n + 1) / 2);
            float scales[2 * PAIRS][8];
            for (int64_t r = 0; r < 2 * here; r++) {
                if (n + r < rows) chunk_scales(q, (n + r) * width + k, blocks, scales[r]);
                else std::memset(scales[r], 0, sizeof scales[r]);
            }
            for (int64_t b = 0; b < blocks; b++) {
                __m256 sums[TOKENS][8];
#pragma GCC unroll 8
                for (int m = 0; m < TOKENS; m++)
#pragma GCC unroll 8
                    for (int i = 0; i < 8; i++) sums[m][i] = _mm256_loadu_ps(c + m * c_stride + k + b * 64 + i * 8);
                for (int64_t p = 0; p < here; p++) {
                    const int64_t row = n + 2 * p, next = min64(row + 1, rows - 1);
                    __m256i one = levels.narrowed16(scales[2 * p][b], HB_BF16), other = levels.narrowed16(scales[2 * p + 1][b], HB_BF16);
                    __m256i u = _mm256_loadu_si256((const __m256i*)(q.packed + (row * width + k + b * 64) / 2));
                    __m256i l = _mm256_loadu_si256((const __m256i*)(q.packed + (next * width + k + b * 64) / 2));
#pragma GCC unroll 4
                    for (int phase = 0; phase < 4; phase++) {
                        __m256i a = _mm256_permutexvar_epi16(_mm256_srli_epi16(u, 4 * phase), one);
                        __m256i z = _mm256_permutexvar_epi16(_mm256_srli_epi16(l, 4 * phase), other);
                        __m256i low = _mm256_unpacklo_epi16(a, z), high = _mm256_unpackhi_epi16(a, z);
#pragma GCC unroll 8
                        for (int m = 0; m < TOKENS; m++) {
                            __m256bh pair = (__m256bh)_mm256_set1_epi32(int32_t(pairs[m * ((rows + 1) / 2) + row / 2]));
                            sums[m][2 * phase] = _mm256_dpbf16_ps(sums[m][2 * phase], (__m256bh)low, pair);
                            sums[m][2 * phase + 1] = _mm256_dpbf16_ps(sums[m][2 * phase + 1], (__m256bh)high, pair);
                        }
                    }
                }
#pragma GCC unroll 8
                for (int m = 0; m < TOKENS; m++)
#pragma GCC unroll 8
                    for (int i = 0; i < 8; i++) _mm256_storeu_ps(c + m * c_stride + k + b * 64 + i * 8, sums[m][i]);
            }
        }
    }
}

// 64 sums from the order of the look-up: register 2 phase + high holds, in lanes 0..3 and 4..7, words 0..3 (+ 4 if high)
// and 8..11 (+ 4) of that phase
inline void sort_sums(float* c) {
    float out[64];
    for (int i = 0; i < 64; i++) {
        int phase = i / 16, high = i / 8 % 2, lane = i % 8;
        int word = lane % 4 + 4 * high + 8 * (lane / 4);
        out[4 * word + PHASE[phase]] = c[i];
    }
    std::memcpy(c, out, sizeof out);
}

void few_backward_bf16(const void* dy, DType dtype, int64_t tokens, const hb_fourbit& q, int64_t rows, int64_t width,
                       int64_t first, int64_t last, float* c, int64_t c_stride, void* work) {
    const uint16_t* grads = static_cast<const uint16_t*>(dy);
    if (!regular(q, width, first) || (last - first) % 64) {
        few_backward_any(dy, dtype, tokens, q, rows, width, first, last, c, c_stride, work);
        return;
    }
    uint32_t* pairs = static_cast<uint32_t*>(work);
    const int64_t half = (rows + 1) / 2;
    for (int64_t m = 0; m < tokens; m++) {
        std::memset(c + m * c_stride + first, 0, size_t(last - first) * 4);
        for (int64_t p = 0; p < half; p++)
            pairs[m * half + p] = grads[m * rows + 2 * p] | uint32_t(2 * p + 1 < rows ? grads[m * rows + 2 * p + 1] : 0) << 16;
    }
    if (tokens == 2) few_backward_rows<2>(pairs, rows, q, width, first, last, c, c_stride);
    else few_backward_rows<1>(pairs, rows, q, width, first, last, c, c_stride);
    for (int64_t m = 0; m < tokens; m++)
        for (int64_t k = first; k < last; k += 64) sort_sums(c + m * c_stride + k);
}
