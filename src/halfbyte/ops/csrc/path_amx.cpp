// AMX tiles for bf16 (Sapphire Rapids): 16 x 16 sums of 32 products in one instruction.
//
// A strip is 32 rows as tiles of 16 x 32, two side by side at each depth; B's groups are the tiles' second operand as they
// are. A tile of C is 32 x 32: four accumulators, so that each operand loaded is used twice.
#define HB_ROUNDS_BF16   // AVX512-BF16 and VBMI are this path's own, whatever all files are compiled with
#define HB_SHIFTS_BYTES
#include "path_avx512.h"
#include "tiles.h"

namespace hb::amx {
#include "kernels.inl"
#include "bf16.inl"

constexpr int64_t TILE_ROWS = 16, TILE_DEPTH = 32, TILE = TILE_ROWS * TILE_DEPTH;

void pack_a_tiles(const void* a, DType dtype, int64_t rows, int64_t depth, int64_t stride, void* packed) {
    (void)dtype;
    const uint16_t* from = static_cast<const uint16_t*>(a);
    uint16_t* out = static_cast<uint16_t*>(packed);
    for (int64_t k = 0; k < depth; k += TILE_DEPTH, out += 2 * TILE) {
        const int64_t here = min64(TILE_DEPTH, depth - k);
        const __mmask32 mask = __mmask32(0xffffffffu >> (TILE_DEPTH - here));
        for (int64_t m = 0; m < 2 * TILE_ROWS; m++)
            _mm512_storeu_si512(out + m * TILE_DEPTH, m < rows ? _mm512_maskz_loadu_epi16(mask, from + m * stride + k) : _mm512_setzero_si512());
    }
}

void pack_a_transposed_tiles(const void* a, DType dtype, int64_t rows, int64_t depth, int64_t stride, void* packed) {
    (void)dtype;
    const uint16_t* from = static_cast<const uint16_t*>(a);
    uint16_t* out = static_cast<uint16_t*>(packed);
    for (int64_t k = 0; k < depth; k += TILE_DEPTH, out += 2 * TILE)
        for (int64_t i = 0; i < TILE_DEPTH; i++)
            for (int64_t m = 0; m < 2 * TILE_ROWS; m++) out[m * TILE_DEPTH + i] = m < rows && k + i < depth ? from[(k + i) * stride + m] : 0;
}

constexpr int64_t TILE_GROUPS = 2, PAIR_BYTES = TILE_GROUPS * GROUP_BYTES, B_STEP = TILE_DEPTH / 2 * PAIR_BYTES;

void tile_amx(const void* a, int rows, const char* b, int groups, int64_t depth, float* c, int64_t c_stride, bool first) {
    const uint16_t* left = static_cast<const uint16_t*>(a);
    const char* right = b;
    const bool lower = rows > TILE_ROWS, second = groups > 1;
    const int64_t row_bytes = c_stride * 4;
    float* c10 = c + TILE_ROWS * c_stride;
    if (first) {
        tile_zero(0);
        tile_zero(1);
        tile_zero(2);
        tile_zero(3);
    } else {
        tile_load(0, c, row_bytes);
        if (second) tile_load(1, c + GROUP, row_bytes);
        if (lower) tile_load(2, c10, row_bytes);
        if (lower && second) tile_load(3, c10 + GROUP, row_bytes);
    }
    if (lower && second)
        for (int64_t k = 0; k < depth; k += TILE_DEPTH, left += 2 * TILE, right += B_STEP) {
            tile_load(4, left, 64);
            tile_load(6, right, PAIR_BYTES);
            tile_multiply(0, 4, 6);
            tile_load(7, right + GROUP_BYTES, PAIR_BYTES);
            tile_multiply(1, 4, 7);
            tile_load(5, left + TILE, 64);
            tile_multiply(2, 5, 6);
            tile_multiply(3, 5, 7);
        }
    else
        for (int64_t k = 0; k < depth; k += TILE_DEPTH, left += 2 * TILE, right += B_STEP) {
            tile_load(4, left, 64);
            tile_load(6, right, PAIR_BYTES);
            tile_multiply(0, 4, 6);
            if (second) {
                tile_load(7, right + GROUP_BYTES, PAIR_BYTES);
                tile_multiply(1, 4, 7);
            }
            if (lower) {
                tile_load(5, left + TILE, 64);
                tile_multiply(2, 5, 6);
            }
        }
    tile_store(0, c, row_bytes);
    if (second) tile_store(1, c + GROUP, row_bytes);
    if (lower) tile_store(2, c10, row_bytes);
    if (lower && second) tile_store(3, c10 + GROUP, row_bytes);
}

constexpr Products PRODUCTS_BF16 = {
    2 * TILE_ROWS, TILE_GROUPS * GROUP, 2, TILE_DEPTH, 2048, 512, 256, FEW_BF16, FEW_BF16_BACKWARD,
    pack_a_tiles, pack_forward_bf16, pack_backward_bf16, pack_forward_plain_bf16, pack_backward_plain_bf16,
    pack_a_transposed_tiles, tile_amx, tiles_begin, tiles_end, few_forward_bf16, few_backward_bf16,
};

static_assert(PRODUCTS_BF16.panel_rows % PRODUCTS_BF16.strip == 0, "blocks begin with a strip");

double peak(DType dtype, int64_t rounds) {
    if (dtype != HB_BF16) return peak_f32(rounds);
    alignas(64) static const char zeros[1024] = {};
    tiles_begin();
    tile_zero(0);
    tile_zero(1);
    tile_zero(2);
    tile_zero(3);
    tile_load(4, zeros, 64);
    tile_load(5, zeros, 64);
    tile_load(6, zeros, 64);
    tile_load(7, zeros, 64);
    rounds /= 4;
    for (int64_t i = 0; i < rounds; i++) {
        tile_multiply(0, 4, 6);
        tile_multiply(1, 4, 7);
        tile_multiply(2, 5, 6);
        tile_multiply(3, 5, 7);
    }
    tiles_end();
    return double(rounds) * 4 * TILE_ROWS * GROUP * TILE_DEPTH * 2;
}

bool runs_here() { return avx512_here() && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi") && tiles_here(); }

extern const Path PATH = {TILES_NAME, runs_here, quantize, dequantize, dropout_mask, drop, add_kept, finish, rms_norm, rms_norm_grad, gated,
                          gated_grad, rotate, softmax_row, softmax_grad_row, scale_row, dot_rows, cross_entropy, adamw, peak,
                          {&PRODUCTS_F32, &PRODUCTS_BF16, &PRODUCTS_F32}};
}  // namespace hb::amx
