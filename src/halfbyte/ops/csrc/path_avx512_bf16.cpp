// AVX-512 with dpbf16 and VBMI (Zen 4, Sapphire Rapids): bf16 products two at a time.
#define HB_ROUNDS_BF16   // AVX512-BF16 and VBMI are this path's own, whatever all files are compiled with
#define HB_SHIFTS_BYTES
#include "path_avx512.h"

namespace hb::avx512_bf16 {
#include "kernels.inl"
#include "bf16.inl"

// where the pairs of six rows of 16 pairs go: pair j of row m to place 6 j + m, taken from two rows at a time
struct StripOrder {
    alignas(64) int32_t index[6][3][16] = {};
    __mmask16 mask[6][3] = {};
    StripOrder() {
        for (int place = 0; place < 96; place++) {
            const int j = place / 6, m = place % 6;
            index[place / 16][m / 2][place % 16] = j + m % 2 * 16;
            mask[place / 16][m / 2] |= __mmask16(1 << place % 16);
        }
    }
};

void pack_a_bf16(const void* a, DType dtype, int64_t rows, int64_t depth, int64_t stride, void* packed) {
    (void)dtype;
    const uint16_t* from = static_cast<const uint16_t*>(a);
    uint16_t* out = static_cast<uint16_t*>(packed);
    static_assert(STRIP == 6, "the order below is of six rows");
    static const StripOrder order;
    int64_t done = 0;
    if (rows == STRIP)
        for (; done + 32 <= depth; done += 32) {
            __m512i r[STRIP];
#pragma GCC unroll 6
            for (int m = 0; m < STRIP; m++) r[m] = _mm512_loadu_si512(from + m * stride + done);
#pragma GCC unroll 6
            for (int o = 0; o < STRIP; o++) {
                __m512i v = _mm512_permutex2var_epi32(r[0], _mm512_load_si512(order.index[o][0]), r[1]);
                v = _mm512_mask_mov_epi32(v, order.mask[o][1], _mm512_permutex2var_epi32(r[2], _mm512_load_si512(order.index[o][1]), r[3]));
                v = _mm512_mask_mov_epi32(v, order.mask[o][2], _mm512_permutex2var_epi32(r[4], _mm512_load_si512(order.index[o][2]), r[5]));
                _mm512_storeu_si512(out + done * STRIP + o * 32, v);
            }
        }
    for (int64_t m = 0; m < rows; m++) {
        const uint16_t* row = from + m * stride;
        for (int64_t k = done; k + 1 < depth; k += 2) std::memcpy(out + k * STRIP + m * 2, row + k, 4);
        if (depth % 2) {
            out[(depth - 1) * STRIP + m * 2] = row[depth - 1];
            out[(depth - 1) * STRIP + m * 2 + 1] = 0;
        }
    }
}

void pack_a_transposed_bf16(const void* a, DType dtype, int64_t rows, int64_t depth, int64_t stride, void* packed) {
    (void)dtype;
    const uint16_t* from = static_cast<const uint16_t*>(a);
    uint16_t* out = static_cast<uint16_t*>(packed);
    const __mmask8 mask = __mmask8((1 << rows) - 1);
    for (int64_t k = 0; k < depth; k += 2, out += 2 * STRIP) {
        const __m128i upper = _mm_maskz_loadu_epi16(mask, from + k * stride);
        const __m128i lower = k + 1 < depth ? _mm_maskz_loadu_epi16(mask, from + (k + 1) * stride) : _mm_setzero_si128();
        const __m256i pairs = _mm256_or_si256(_mm256_cvtepu16_epi32(upper), _mm256_slli_epi32(_mm256_cvtepu16_epi32(lower), 16));
        _mm256_mask_storeu_epi32(out, 0x3f, pairs);
    }
}

constexpr int TILE_GROUPS = 4;  // 24 accumulators

template <int ROWS, int GROUPS>
void tile_rows_bf16(const uint16_t* a, const char* b, int64_t depth, float* c, int64_t c_stride, bool first) {
    __m512 sums[ROWS][GROUPS];
#pragma GCC unroll 8
    for (int m = 0; m < ROWS; m++)
#pragma GCC unroll 8
        for (int g = 0; g < GROUPS; g++) sums[m][g] = first ? _mm512_setzero_ps() : _mm512_loadu_ps(c + m * c_stride + g * GROUP);
    for (int64_t k = 0; k < depth; k += 2, b += TILE_GROUPS * GROUP_BYTES, a += 2 * STRIP) {
        __m512bh columns[GROUPS];
#pragma GCC unroll 8
        for (int g = 0; g < GROUPS; g++) columns[g] = (__m512bh)_mm512_load_si512(b + g * GROUP_BYTES);
#pragma GCC unroll 8
        for (int m = 0; m < ROWS; m++) {
            int32_t pair;
            std::memcpy(&pair, a + 2 * m, 4);
            __m512bh value = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 8
            for (int g = 0; g < GROUPS; g++) sums[m][g] = _mm512_dpbf16_ps(sums[m][g], value, columns[g]);
        }
    }
#pragma GCC unroll 8
    for (int m = 0; m < ROWS; m++)
#pragma GCC unroll 8
        for (int g = 0; g < GROUPS; g++) _mm512_storeu_ps(c + m * c_stride + g * GROUP, sums[m][g]);
}

template <int GROUPS>
inline void tile_groups_bf16(const uint16_t* a, int rows, const char* b, int64_t depth, float* c, int64_t c_stride, bool first) {
    switch (rows) {
        case 1: return tile_rows_bf16<1, GROUPS>(a, b, depth, c, c_stride, first);
        case 2: return tile_rows_bf16<2, GROUPS>(a, b, depth, c, c_stride, first);
        case 3: return tile_rows_bf16<3, GROUPS>(a, b, depth, c, c_stride, first);
        case 4: return tile_rows_bf16<4, GROUPS>(a, b, depth, c, c_stride, first);
        case 5: return tile_rows_bf16<5, GROUPS>(a, b, depth, c, c_stride, first);
        default: return tile_rows_bf16<6, GROUPS>(a, b, depth, c, c_stride, first);
    }
}

void tile_bf16(const void* a, int rows, const char* b, int groups, int64_t depth, float* c, int64_t c_stride, bool first) {
    const uint16_t* left = static_cast<const uint16_t*>(a);
    if (groups == TILE_GROUPS) return tile_groups_bf16<TILE_GROUPS>(left, rows, b, depth, c, c_stride, first);
    for (int g = 0; g < groups; g++) tile_groups_bf16<1>(left, rows, b + g * GROUP_BYTES, depth, c + g * GROUP, c_stride, first);
}

constexpr Products PRODUCTS_BF16 = {
    STRIP, TILE_GROUPS * GROUP, 2, 2, 516, 256, DEPTH, FEW_BF16, FEW_BF16_BACKWARD,
    pack_a_bf16, pack_forward_bf16, pack_backward_bf16, pack_forward_plain_bf16, pack_backward_plain_bf16,
    pack_a_transposed_bf16, tile_bf16, nothing, nothing, few_forward_bf16, few_backward_bf16,
};

static_assert(PRODUCTS_BF16.panel_rows % PRODUCTS_BF16.strip == 0, "blocks begin with a strip");

double peak(DType dtype, int64_t rounds) {
    if (dtype != HB_BF16) return peak_f32(rounds);
    __m512 sums[12];
    for (int j = 0; j < 12; j++) sums[j] = _mm512_set1_ps(float(j));
    __m512bh value = (__m512bh)_mm512_set1_epi32(0x3f803f80);
    for (int64_t i = 0; i < rounds; i++)
#pragma GCC unroll 12
        for (int j = 0; j < 12; j++) sums[j] = _mm512_dpbf16_ps(sums[j], value, value);
    float total = 0;
    for (auto& s : sums) total += _mm512_reduce_add_ps(s);
    asm volatile("" ::"m"(total));  // or the loop above would be left out
    return double(rounds) * 12 * 64;
}

bool runs_here() { return avx512_here() && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi"); }

extern const Path PATH = {"avx512_bf16", runs_here, quantize, dequantize, dropout_mask, drop, add_kept, finish, rms_norm, rms_norm_grad, gated,
                          gated_grad, rotate, softmax_row, softmax_grad_row, scale_row, dot_rows, cross_entropy, adamw, peak,
                          {&PRODUCTS_F32, &PRODUCTS_BF16, &PRODUCTS_F32}};
}  // namespace hb::avx512_bf16
