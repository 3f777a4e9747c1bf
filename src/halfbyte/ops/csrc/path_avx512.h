#pragma once
#include <immintrin.h>

#include <cmath>
#include <cstring>
#include <type_traits>

#include "nearest.h"
#include "path.h"

#define HB_WIDTH 16

namespace hb {
static inline bool avx512_here() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("f16c") && __builtin_cpu_supports("fma");
}
}  // namespace hb
