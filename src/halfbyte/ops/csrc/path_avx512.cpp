// AVX-512 without bf16 instructions (Skylake): products in fp32.
#include "path_avx512.h"

namespace hb::avx512 {
#include "kernels.inl"

double peak(DType, int64_t rounds) { return peak_f32(rounds); }

extern const Path PATH = {"avx512", avx512_here, quantize, dequantize, dropout_mask, drop, add_kept, finish, rms_norm, rms_norm_grad, gated,
                          gated_grad, rotate, softmax_row, softmax_grad_row, scale_row, dot_rows, cross_entropy, adamw, peak,
                          {&PRODUCTS_F32, &PRODUCTS_F32, &PRODUCTS_F32}};
}  // namespace hb::avx512
