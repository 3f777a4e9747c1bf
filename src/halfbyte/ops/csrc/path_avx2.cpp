// AVX2 with FMA and F16C (Haswell, Zen): products in fp32.
#include <immintrin.h>

#include <cmath>
#include <cstring>
#include <type_traits>

#include "nearest.h"
#include "path.h"

#define HB_WIDTH 8

namespace hb::avx2 {
#include "kernels.inl"

double peak(DType, int64_t rounds) { return peak_f32(rounds); }

bool runs_here() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

extern const Path PATH = {"avx2", runs_here, quantize, dequantize, dropout_mask, drop, add_kept, finish, rms_norm, rms_norm_grad, gated,
                          gated_grad, rotate, softmax_row, softmax_grad_row, scale_row, dot_rows, cross_entropy, adamw, peak,
                          {&PRODUCTS_F32, &PRODUCTS_F32, &PRODUCTS_F32}};
}  // namespace hb::avx2
