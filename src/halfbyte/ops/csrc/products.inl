// The products of the 4-bit linear layers: how 4-bit weights become packed operands in cache, and the register tiles
// that multiply them.

constexpr int64_t DEPTH = 512;  // rows of B in a panel; temporaries on the stack are this long

// --- fp32 operands --------------------------------------------------------------------------------------------------------

constexpr int64_t STRIP = 6;

void pack_a_f32(const void* a, DType dtype, int64_t rows, int64_t depth, int64_t stride, void* packed) {
    float* out = static_cast<float*>(packed);
    for (int64_t m = 0; m < rows; m++)
        for (int64_t k = 0; k < depth; k++) out[k * STRIP + m] = to_float(a, dtype, m * stride + k);
}

void pack_a_transposed_f32(const void* a, DType dtype, int64_t rows, int64_t depth, int64_t stride, void* packed) {
    float* out = static_cast<float*>(packed);
    for (int64_t k = 0; k < depth; k++)
        for (int64_t m = 0; m < rows; m++) out[k * STRIP + m] = to_float(a, dtype, k * stride + m);
}

inline float* f32_row(char* group, int64_t row_bytes, int64_t k) { return reinterpret_cast<float*>(group + k * row_bytes); }

// rows [16][depth] -> depth rows of a group
inline void transpose_f32(const float* rows, int64_t depth, char* group, int64_t row_bytes) {
    int64_t k = 0;
#if HB_WIDTH == 16
    for (; k + 16 <= depth; k += 16) {
        __m512i r[16];
        for (int i = 0; i < 16; i++) r[i] = _mm512_loadu_si512(rows + i * depth + k);
        transpose_16(r);
        for (int i = 0; i < 16; i++) _mm512_storeu_si512(f32_row(group, row_bytes, k + i), r[i]);
    }
#elif HB_WIDTH == 8
    for (; k + 8 <= depth; k += 8)
        for (int half = 0; half < 16; half += 8) {
            __m256 r[8], t[8];
            for (int i = 0; i < 8; i++) r[i] = _mm256_loadu_ps(rows + (half + i) * depth + k);
            for (int i = 0; i < 4; i++) {
                t[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
                t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
            }
            for (int i = 0; i < 8; i += 4)
                for (int j = 0; j < 2; j++) {
                    r[i + 2 * j] = _mm256_shuffle_ps(t[i + j], t[i + 2 + j], 0x44);
                    r[i + 2 * j + 1] = _mm256_shuffle_ps(t[i + j], t[i + 2 + j], 0xee);
                }
            for (int i = 0; i < 4; i++) {
                _mm256_storeu_ps(f32_row(group, row_bytes, k + i) + half, _mm256_permute2f128_ps(r[i], r[i + 4], 0x20));
                _mm256_storeu_ps(f32_row(group, row_bytes, k + i + 4) + half, _mm256_permute2f128_ps(r[i], r[i + 4], 0x31));
            }
        }
#endif
    for (; k < depth; k++)
        for (int i = 0; i < GROUP; i++) f32_row(group, row_bytes, k)[i] = rows[i * depth + k];
}

void pack_forward_f32(const hb_fourbit& q, DType dtype, int64_t row, int64_t rows, int64_t width, int64_t column,
                      int64_t depth, int64_t padded, char* group, int64_t row_bytes) {
    alignas(64) float temporary[GROUP * DEPTH];
    for (int64_t i = 0; i < GROUP; i++) {
        if (i < rows) dequantize(q, (row + i) * width + column, depth, dtype, true, false, temporary + i * depth);
        else std::memset(temporary + i * depth, 0, size_t(depth) * 4);
    }
    (void)padded;
    transpose_f32(temporary, depth, group, row_bytes);
}

void pack_forward_plain_f32(const void* w, DType dtype, int64_t rows, int64_t stride, int64_t depth, int64_t padded,
                            char* group, int64_t row_bytes) {
    (void)padded;
    for (int64_t k = 0; k < depth; k++)
        for (int64_t i = 0; i < GROUP; i++) f32_row(group, row_bytes, k)[i] = i < rows ? to_float(w, dtype, i * stride + k) : 0.0f;
}

// row k of the groups from number `first` on
inline void spread_f32(const float* row, int64_t count, const Panel& panel, int64_t first, int64_t k) {
    for (int64_t j = 0; j < count; j += GROUP) {
        float* to = f32_row(group_of(panel, first + j / GROUP), row_bytes(panel), k);
        int64_t here = min64(GROUP, count - j);
        std::memcpy(to, row + j, size_t(here) * 4);
        for (int64_t i = here; i < GROUP; i++) to[i] = 0;
    }
}

void pack_backward_f32(const hb_fourbit& q, DType dtype, int64_t row, int64_t depth, int64_t padded, int64_t width,
                       int64_t column, int64_t count, const Panel& panel) {
    alignas(64) float temporary[DEPTH];
    (void)padded;
    for (int64_t k = 0; k < depth; k++)
        for (int64_t j = 0; j < count; j += DEPTH) {
            int64_t here = min64(DEPTH, count - j);
            dequantize(q, (row + k) * width + column + j, here, dtype, true, false, temporary);
            spread_f32(temporary, here, panel, j / GROUP, k);
        }
}

void pack_backward_plain_f32(const void* w, DType dtype, int64_t depth, int64_t padded, int64_t stride, int64_t count,
                             const Panel& panel) {
    (void)padded;
    for (int64_t k = 0; k < depth; k++)
        for (int64_t j = 0; j < round_up(count, GROUP); j++)
            f32_row(group_of(panel, j / GROUP), row_bytes(panel), k)[j % GROUP] = j < count ? to_float(w, dtype, k * stride + j) : 0.0f;
}

constexpr int GROUPS_F32 = HB_WIDTH == 16 ? 4 : 1;  // of a tile: 24 or 12 accumulators

template <int ROWS, int GROUPS>
void tile_rows_f32(const float* a, const char* b, int64_t depth, float* c, int64_t c_stride, bool first) {
    constexpr int PER = GROUP / W, N = GROUPS * PER;
    vf sums[ROWS][N];
#pragma GCC unroll 32
    for (int m = 0; m < ROWS; m++)
#pragma GCC unroll 32
        for (int j = 0; j < N; j++) sums[m][j] = first ? vf{} : load<HB_F32>(c + m * c_stride, j * W);
    for (int64_t k = 0; k < depth; k++) {
        vf columns[N];
#pragma GCC unroll 32
        for (int j = 0; j < N; j++) columns[j] = load<HB_F32>(b + k * (GROUPS_F32 * GROUP_BYTES), j * W);
#pragma GCC unroll 32
        for (int m = 0; m < ROWS; m++) {
            vf value = all(a[k * STRIP + m]);
#pragma GCC unroll 32
            for (int j = 0; j < N; j++) sums[m][j] = multiply_add(value, columns[j], sums[m][j]);
        }
    }
#pragma GCC unroll 32
    for (int m = 0; m < ROWS; m++)
#pragma GCC unroll 32
        for (int j = 0; j < N; j++) store<HB_F32>(c + m * c_stride, j * W, sums[m][j]);
}

template <int GROUPS>
inline void tile_groups_f32(const float* a, int rows, const char* b, int64_t depth, float* c, int64_t c_stride, bool first) {
    switch (rows) {
        case 1: return tile_rows_f32<1, GROUPS>(a, b, depth, c, c_stride, first);
        case 2: return tile_rows_f32<2, GROUPS>(a, b, depth, c, c_stride, first);
        case 3: return tile_rows_f32<3, GROUPS>(a, b, depth, c, c_stride, first);
        case 4: return tile_rows_f32<4, GROUPS>(a, b, depth, c, c_stride, first);
        case 5: return tile_rows_f32<5, GROUPS>(a, b, depth, c, c_stride, first);
        default: return tile_rows_f32<6, GROUPS>(a, b, depth, c, c_stride, first);
    }
}

void tile_f32(const void* a, int rows, const char* b, int groups, int64_t depth, float* c, int64_t c_stride, bool first) {
    const float* left = static_cast<const float*>(a);
    if (groups == GROUPS_F32) return tile_groups_f32<GROUPS_F32>(left, rows, b, depth, c, c_stride, first);
    for (int g = 0; g < groups; g++) tile_groups_f32<1>(left, rows, b + g * GROUP_BYTES, depth, c + g * GROUP, c_stride, first);
}

// --- a few tokens ---------------------------------------------------------------------------------------------------------

constexpr int64_t FEW = 4;

void few_forward_any(const void* x, DType dtype, int64_t tokens, const hb_fourbit& q, int64_t width, int64_t first,
                     int64_t last, float* c, int64_t c_stride, void*) {
    alignas(64) float row[DEPTH];
    by_dtype(dtype, [&](auto d) {
        for (int64_t n = first; n < last; n++) {
            vf sums[FEW] = {};
            float rest[FEW] = {};
            for (int64_t k = 0; k < width; k += DEPTH) {
                int64_t here = min64(DEPTH, width - k);
                dequantize(q, n * width + k, here, dtype, true, false, row);
                for (int64_t m = 0; m < tokens; m++) {
                    int64_t i = 0;
                    for (; i + W <= here; i += W)
                        sums[m] = multiply_add(load<HB_F32>(row, i), load<d.value>(x, m * width + k + i), sums[m]);
                    for (; i < here; i++) rest[m] += row[i] * to_float(x, dtype, m * width + k + i);
                }
            }
            for (int64_t m = 0; m < tokens; m++) c[m * c_stride + n] = sum_of(sums[m]) + rest[m];
        }
    });
}

void few_backward_any(const void* dy, DType dtype, int64_t tokens, const hb_fourbit& q, int64_t rows, int64_t width,
                      int64_t first, int64_t last, float* c, int64_t c_stride, void*) {
    alignas(64) float row[DEPTH];
    for (int64_t m = 0; m < tokens; m++) std::memset(c + m * c_stride + first, 0, size_t(last - first) * 4);
    for (int64_t k = first; k < last; k += DEPTH) {
        int64_t here = min64(DEPTH, last - k);
        for (int64_t n = 0; n < rows; n++) {
            dequantize(q, n * width + k, here, dtype, true, false, row);
            for (int64_t m = 0; m < tokens; m++) {
                float* to = c + m * c_stride + k;
                const float scalar = to_float(dy, dtype, m * rows + n);
                const vf value = all(scalar);
                int64_t i = 0;
                for (; i + W <= here; i += W)
                    store<HB_F32>(to, i, multiply_add(value, load<HB_F32>(row, i), load<HB_F32>(to, i)));
                for (; i < here; i++) to[i] += scalar * row[i];
            }
        }
    }
}

void finish(const float* c, int64_t c_stride, const void* bias, DType dtype, int64_t rows, int64_t columns, void* y,
            int64_t y_stride) {
    by_dtype(dtype, [&](auto d) {
        for (int64_t m = 0; m < rows; m++) {
            const float* from = c + m * c_stride;
            int64_t j = 0;
            for (; j + W <= columns; j += W) {
                vf value = load<HB_F32>(from, j);
                if (bias) value += load<d.value>(bias, j);
                store<d.value>(y, m * y_stride + j, value);
            }
            for (; j < columns; j++)
                store_as(y, dtype, m * y_stride + j, from[j] + (bias ? to_float(bias, dtype, j) : 0.0f));
        }
    });
}

void nothing() {}

constexpr Products PRODUCTS_F32 = {
    STRIP, GROUP * GROUPS_F32, 4, 1, 384, 256, DEPTH, FEW, FEW,
    pack_a_f32, pack_forward_f32, pack_backward_f32, pack_forward_plain_f32, pack_backward_plain_f32,
    pack_a_transposed_f32, tile_f32, nothing, nothing, few_forward_any, few_backward_any,
};

static_assert(PRODUCTS_F32.panel_rows % PRODUCTS_F32.strip == 0, "blocks begin with a strip");

// --- the peak -------------------------------------------------------------------------------------------------------------

inline double peak_f32(int64_t rounds) {
    vf sums[8], value = all(1e-9f);
    for (int j = 0; j < 8; j++) sums[j] = all(float(j));  // or the compiler sees that all chains are one
    for (int64_t i = 0; i < rounds; i++)
#pragma GCC unroll 8
        for (int j = 0; j < 8; j++) sums[j] = multiply_add(sums[j], value, value);
    float total = 0;
    for (auto& s : sums) total += sum_of(s);
    asm volatile("" ::"m"(total));  // or the loop above would be left out
    return double(rounds) * 8 * 2 * W;
}
