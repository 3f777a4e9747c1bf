// Any processor: the compiler's own vectors of four (SSE2 on x86-64, NEON on arm64).
#include <cmath>
#include <cstring>
#include <type_traits>
#if defined(__ARM_NEON)
#include <arm_neon.h>
#elif defined(__SSE2__)
#include <immintrin.h>
#endif

#include "nearest.h"
#include "path.h"

#define HB_WIDTH 4

namespace hb::portable {
#include "kernels.inl"

double peak(DType, int64_t rounds) { return peak_f32(rounds); }

bool runs_here() { return true; }

#if defined(__ARM_NEON)
constexpr const char* NAME = "neon";
#else
constexpr const char* NAME = "portable";
#endif

extern const Path PATH = {NAME, runs_here, quantize, dequantize, dropout_mask, drop, add_kept, finish, rms_norm, rms_norm_grad, gated,
                          gated_grad, rotate, softmax_row, softmax_grad_row, scale_row, dot_rows, cross_entropy, adamw, peak,
                          {&PRODUCTS_F32, &PRODUCTS_F32, &PRODUCTS_F32}};
}  // namespace hb::portable
