// Passes over rows: normalization, gated activations, softmax and its gradient, cross-entropy. Sums are fp32.

inline vf least(vf a, vf b) {
#if HB_WIDTH == 16
    return (vf)_mm512_min_ps((__m512)a, (__m512)b);
#elif HB_WIDTH == 8
    return (vf)_mm256_min_ps((__m256)a, (__m256)b);
#else
    vi smaller = a < b;
    return (vf)(((vi)a & smaller) | ((vi)b & ~smaller));
#endif
}
inline vf greatest(vf a, vf b) {
#if HB_WIDTH == 16
    return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif HB_WIDTH == 8
    return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#else
    vi greater = a > b;
    return (vf)(((vi)a & greater) | ((vi)b & ~greater));
#endif
}
inline float greatest_of(vf v) {
    float most = v[0];
    for (int j = 1; j < W; j++) most = v[j] > most ? v[j] : most;
    return most;
}

// to 16 bits as `store`, but subnormal numbers may become zero
template <DType D>
inline void store_result(void* p, int64_t i, vf value) {
#if defined(HB_ROUNDS_BF16)
    if constexpr (D == HB_BF16) {
        _mm256_storeu_si256((__m256i*)(static_cast<uint16_t*>(p) + i), (__m256i)_mm512_cvtneps_pbh((__m512)value));
        return;
    }
#endif
    store<D>(p, i, value);
}

template <DType D>
inline vf rounded_to(vf value) {
    if constexpr (D == HB_F32) return value;
    else if constexpr (D == HB_BF16) return (vf)(bf16_lanes(value) << 16);
    else {
        vf out;
#if HB_WIDTH == 16
        out = (vf)_mm512_cvtph_ps(_mm512_cvtps_ph((__m512)value, 0));
#else
        for (int j = 0; j < W; j++) out[j] = rounded(value[j], HB_F16);
#endif
        return out;
    }
}

// `count` < W values at i as a vector, the rest zero, and back
template <DType D>
inline vf load_some(const void* p, int64_t i, int64_t count) {
    vf v = {};
    for (int64_t j = 0; j < count; j++) v[j] = to_float(p, D, i + j);
    return v;
}
template <DType D>
inline void store_some(void* p, int64_t i, int64_t count, vf value) {
    for (int64_t j = 0; j < count; j++) store_as(p, D, i + j, value[j]);
}

// e^x to about two units of the last place; 0 below -87.3, cut off at e^88; NaN stays one
inline vf exp_of(vf x) {
    const vf low = all(-87.33654f), in = greatest(low, least(all(88.0f), x));  // of two, the second is taken where one is NaN
    const vf magic = all(12582912.0f);  // its last place is 1
    const vf shifted = multiply_add(in, all(1.44269504f), magic), n = shifted - magic;
    vf r = multiply_add(n, all(-0.693359375f), in);
    r = multiply_add(n, all(2.12194440e-4f), r);
    vf p = multiply_add(all(1.9875691500e-4f), r, all(1.3981999507e-3f));
    p = multiply_add(p, r, all(8.3334519073e-3f));
    p = multiply_add(p, r, all(4.1665795894e-2f));
    p = multiply_add(p, r, all(1.6666665459e-1f));
    p = multiply_add(p, r, all(5.0000001201e-1f));
    p = multiply_add(p, r * r, r) + all(1.0f);
    const vi power = ((vi)shifted - (vi)magic + 127) << 23;
    const vf result = p * (vf)power;
#if HB_WIDTH == 16
    return (vf)_mm512_maskz_mov_ps(_mm512_cmp_ps_mask((__m512)x, (__m512)low, _CMP_NLT_UQ), (__m512)result);
#else
    return (vf)((vi)result & ~(x < low));
#endif
}

inline vf sigmoid_of(vf x) { return all(1.0f) / (all(1.0f) + exp_of(-x)); }

// 1 - 2 / (e^2x + 1); near zero the series, where that loses digits
inline vf tanh_of(vf x) {
    const vf far = all(1.0f) - all(2.0f) / (exp_of(x + x) + all(1.0f));
    const vf square = x * x;
    vf near = multiply_add(all(-0.0538397f), square, all(0.1333333f));  // of x^7 (-17/315), x^5 (2/15), x^3
    near = multiply_add(near, square, all(-0.33333333f));
    near = multiply_add(near * square, x, x);
    const vi small = square < all(0.04f);
    return (vf)(((vi)near & small) | ((vi)far & ~small));
}

// erf by Abramowitz and Stegun 7.1.26, absolute error below 1.5e-7
inline vf erf_of(vf x) {
    const vi sign = (vi)x & int32_t(0x80000000);
    const vf size = (vf)((vi)x & 0x7fffffff);
    const vf t = all(1.0f) / multiply_add(size, all(0.3275911f), all(1.0f));
    vf p = multiply_add(all(1.061405429f), t, all(-1.453152027f));
    p = multiply_add(p, t, all(1.421413741f));
    p = multiply_add(p, t, all(-0.284496736f));
    p = multiply_add(p, t, all(0.254829592f));
    return (vf)((vi)(all(1.0f) - p * t * exp_of(-(size * size))) | sign);
}

// --- RMSNorm --------------------------------------------------------------------------------------------------------------

// y = x / sqrt(mean(x^2) + eps) (offset + weight); cast_first: the quotient is rounded to `dtype` before the product
void rms_norm(const void* x, const void* weight, int64_t width, float eps, float offset, bool cast_first, DType dtype, void* y,
              float* inverse) {
    by_dtype(dtype, [&](auto d) {
        constexpr DType D = d.value;
        const int64_t whole = width / W * W, rest = width - whole;
        vf sum = {}, more = {};
        int64_t i = 0;
        for (; i + 2 * W <= whole; i += 2 * W) {
            const vf a = load<D>(x, i), b = load<D>(x, i + W);
            sum = multiply_add(a, a, sum);
            more = multiply_add(b, b, more);
        }
        for (; i < whole; i += W) {
            const vf a = load<D>(x, i);
            sum = multiply_add(a, a, sum);
        }
        if (rest) {
            const vf a = load_some<D>(x, whole, rest);
            more = multiply_add(a, a, more);
        }
        const float scale = *inverse = 1.0f / std::sqrt(sum_of(sum + more) / float(width) + eps);
        auto value = [&](vf from, vf w) {
            const vf quotient = from * scale;
            return cast_first ? rounded_to<D>(quotient) * (w + offset) : quotient * (w + offset);
        };
        for (i = 0; i < whole; i += W) store_result<D>(y, i, value(load<D>(x, i), load<D>(weight, i)));
        if (rest) store_some<D>(y, whole, rest, value(load_some<D>(x, whole, rest), load_some<D>(weight, whole, rest)));
    });
}

// dx = inverse (g - n mean(g n)), g = dy (offset + weight), n = x inverse
void rms_norm_grad(const void* dy, const void* x, const void* weight, float inverse, int64_t width, float offset, DType dtype,
                   void* dx) {
    by_dtype(dtype, [&](auto d) {
        constexpr DType D = d.value;
        const int64_t whole = width / W * W, rest = width - whole;
        vf sum = {};
        for (int64_t i = 0; i < whole; i += W)
            sum = multiply_add(load<D>(dy, i) * (load<D>(weight, i) + offset), load<D>(x, i), sum);
        if (rest) sum += load_some<D>(dy, whole, rest) * (load_some<D>(weight, whole, rest) + offset) * load_some<D>(x, whole, rest);
        const float along = sum_of(sum) / float(width) * inverse * inverse;
        auto value = [&](vf g, vf w, vf from) { return (g * (w + offset) - from * along) * inverse; };
        for (int64_t i = 0; i < whole; i += W) store_result<D>(dx, i, value(load<D>(dy, i), load<D>(weight, i), load<D>(x, i)));
        if (rest)
            store_some<D>(dx, whole, rest,
                          value(load_some<D>(dy, whole, rest), load_some<D>(weight, whole, rest), load_some<D>(x, whole, rest)));
    });
}

// --- gated activations ----------------------------------------------------------------------------------------------------

// f(x) and f'(x)
template <int KIND>
inline vf activation(vf x, vf* slope) {
    if constexpr (KIND == HB_SILU) {
        const vf s = sigmoid_of(x);
        *slope = s * (all(1.0f) + x * (all(1.0f) - s));
        return x * s;
    } else if constexpr (KIND == HB_GELU_TANH) {
        const vf square = x * x;
        const vf t = tanh_of(x * multiply_add(square, all(0.7978845608f * 0.044715f), all(0.7978845608f)));
        const vf inner = multiply_add(square, all(3 * 0.7978845608f * 0.044715f), all(0.7978845608f));
        const vf half = (all(1.0f) + t) * 0.5f;
        *slope = half + x * 0.5f * (all(1.0f) - t * t) * inner;
        return x * half;
    } else {
        const vf half = (all(1.0f) + erf_of(x * 0.70710678f)) * 0.5f;
        *slope = half + x * exp_of(x * x * -0.5f) * 0.39894228f;
        return x * half;
    }
}

template <class Body>
inline void by_kind(int32_t kind, Body body) {
    if (kind == HB_SILU) body(std::integral_constant<int, HB_SILU>());
    else if (kind == HB_GELU_TANH) body(std::integral_constant<int, HB_GELU_TANH>());
    else body(std::integral_constant<int, HB_GELU>());
}

// y = f(gate) up
void gated(const void* gate, const void* up, int64_t count, int32_t kind, DType dtype, void* y) {
    by_dtype(dtype, [&](auto d) {
        by_kind(kind, [&](auto k) {
            constexpr DType D = d.value;
            vf slope;
            int64_t i = 0;
            for (; i + W <= count; i += W) store_result<D>(y, i, activation<k.value>(load<D>(gate, i), &slope) * load<D>(up, i));
            if (i < count) store_some<D>(y, i, count - i, activation<k.value>(load_some<D>(gate, i, count - i), &slope) * load_some<D>(up, i, count - i));
        });
    });
}

void gated_grad(const void* dy, const void* gate, const void* up, int64_t count, int32_t kind, DType dtype, void* dgate, void* dup) {
    by_dtype(dtype, [&](auto d) {
        by_kind(kind, [&](auto k) {
            constexpr DType D = d.value;
            vf slope;
            int64_t i = 0;
            for (; i + W <= count; i += W) {
                const vf g = load<D>(dy, i), u = load<D>(up, i), f = activation<k.value>(load<D>(gate, i), &slope);
                store_result<D>(dgate, i, g * u * slope);
                store_result<D>(dup, i, g * f);
            }
            if (const int64_t rest = count - i) {
                const vf g = load_some<D>(dy, i, rest), u = load_some<D>(up, i, rest);
                const vf f = activation<k.value>(load_some<D>(gate, i, rest), &slope);
                store_some<D>(dgate, i, rest, g * u * slope);
                store_some<D>(dup, i, rest, g * f);
            }
        });
    });
}

// --- rotary position embedding --------------------------------------------------------------------------------------------

// one token: all its heads by the same angles
void rotate(const void* x, const void* cos, const void* sin, int64_t heads, int64_t dim, bool back, DType dtype, void* y) {
    by_dtype(dtype, [&](auto d) {
        constexpr DType D = d.value;
        const int64_t half = dim / 2;
        for (int64_t head = 0; head < heads; head++) {
            const int64_t first = head * dim, second = first + half;
            int64_t i = 0;
            for (; i + W <= half; i += W) {
                const vf a = load<D>(x, first + i), b = load<D>(x, second + i), s1 = load<D>(sin, i), s2 = load<D>(sin, half + i);
                const vf one = a * load<D>(cos, i), two = b * load<D>(cos, half + i);
                store_result<D>(y, first + i, back ? one + b * s2 : one - b * s1);
                store_result<D>(y, second + i, back ? two - a * s1 : two + a * s2);
            }
            if (const int64_t rest = half - i) {
                const vf a = load_some<D>(x, first + i, rest), b = load_some<D>(x, second + i, rest);
                const vf s1 = load_some<D>(sin, i, rest), s2 = load_some<D>(sin, half + i, rest);
                const vf one = a * load_some<D>(cos, i, rest), two = b * load_some<D>(cos, half + i, rest);
                store_some<D>(y, first + i, rest, back ? one + b * s2 : one - b * s1);
                store_some<D>(y, second + i, rest, back ? two - a * s1 : two + a * s2);
            }
        }
    });
}

// --- attention's rows -----------------------------------------------------------------------------------------------------

inline vi counting() {
    vi v;
    for (int j = 0; j < W; j++) v[j] = j;
    return v;
}

inline vf where(vi condition, vf yes, vf no) { return (vf)(((vi)yes & condition) | ((vi)no & ~condition)); }

inline vi inside(int64_t j, int64_t first, int64_t last) {
    const vi at = counting() + int32_t(j);
    return (at >= int32_t(first)) & (at < int32_t(last));
}

// Scores [count, a multiple of W once rounded up] of one query, of which it sees [first, last): e^(score - greatest) as
// `element` and zero elsewhere. Returns their sum.
template <DType D>
inline float softmax_elements(float* s, int64_t first, int64_t last, int64_t count, float scale, float cap, void* p, float* greatest_score) {
    const int64_t begin = first / W * W, end = round_up(last, W);
    if (cap != 0) {
        for (int64_t j = begin; j < end; j += W) store_floats(s + j, tanh_of(load_floats(s + j) * (scale / cap)) * cap);
        scale = 1;
    }
    vf most = all(-INFINITY);
    for (int64_t j = begin; j < end; j += W) {
        const vf value = load_floats(s + j);
        most = greatest(most, j >= first && j + W <= last ? value : where(inside(j, first, last), value, all(-INFINITY)));
    }
    const float top = greatest_of(most) * scale;
    vf sum = {};
    for (int64_t j = 0; j < begin; j += W) store_result<D>(p, j, vf{});
    for (int64_t j = begin; j < end; j += W) {
        vf e = exp_of(multiply_add(load_floats(s + j), all(scale), all(-top)));
        if (j < first || j + W > last) e = where(inside(j, first, last), e, vf{});
        sum += e;
        store_result<D>(p, j, e);
    }
    for (int64_t j = end; j < count; j += W) store_result<D>(p, j, vf{});
    *greatest_score = top;
    return sum_of(sum);
}

float softmax_row(float* s, int64_t first, int64_t last, int64_t count, float scale, float cap, DType element, void* p, float* top) {
    return element == HB_BF16 ? softmax_elements<HB_BF16>(s, first, last, count, scale, cap, p, top)
                              : softmax_elements<HB_F32>(s, first, last, count, scale, cap, p, top);
}

// p = e^(score - lse); ds = p (dp - delta) times the score's derivative
template <DType D>
inline void softmax_grad_elements(const float* s, const float* dp, int64_t first, int64_t last, int64_t count, float scale, float cap,
                                  float lse, float delta, void* p, void* ds) {
    const int64_t begin = first / W * W, end = round_up(last, W);
    auto zero = [&](int64_t from, int64_t to) {
        for (int64_t j = from; j < to; j += W) {
            store_result<D>(p, j, vf{});
            store_result<D>(ds, j, vf{});
        }
    };
    zero(0, begin);
    for (int64_t j = begin; j < end; j += W) {
        vf score = load_floats(s + j) * scale, slope = all(scale);
        if (cap != 0) {
            const vf t = tanh_of(score / cap);
            score = t * cap;
            slope = slope * (all(1.0f) - t * t);
        }
        vf e = exp_of(score - lse), change = e * (load_floats(dp + j) - delta) * slope;
        if (j < first || j + W > last) {
            const vi seen = inside(j, first, last);
            e = where(seen, e, vf{});
            change = where(seen, change, vf{});
        }
        store_result<D>(p, j, e);
        store_result<D>(ds, j, change);
    }
    zero(end, count);
}

void softmax_grad_row(const float* s, const float* dp, int64_t first, int64_t last, int64_t count, float scale, float cap, float lse,
                      float delta, DType element, void* p, void* ds) {
    if (element == HB_BF16) softmax_grad_elements<HB_BF16>(s, dp, first, last, count, scale, cap, lse, delta, p, ds);
    else softmax_grad_elements<HB_F32>(s, dp, first, last, count, scale, cap, lse, delta, p, ds);
}

// out [count] of `dtype` = c factor
void scale_row(const float* c, int64_t count, float factor, DType dtype, void* out) {
    by_dtype(dtype, [&](auto d) {
        int64_t i = 0;
        for (; i + W <= count; i += W) store_result<d.value>(out, i, load_floats(c + i) * factor);
        for (; i < count; i++) store_as(out, dtype, i, c[i] * factor);
    });
}

float dot_rows(const void* a, const void* b, int64_t count, DType dtype) {
    float total = 0;
    by_dtype(dtype, [&](auto d) {
        constexpr DType D = d.value;
        vf sum = {};
        int64_t i = 0;
        for (; i + W <= count; i += W) sum = multiply_add(load<D>(a, i), load<D>(b, i), sum);
        if (i < count) sum += load_some<D>(a, i, count - i) * load_some<D>(b, i, count - i);
        total = sum_of(sum);
    });
    return total;
}

// --- cross-entropy --------------------------------------------------------------------------------------------------------

// log(sum(e^logit)) - logit[label]; grad = softmax - (1 at label)
float cross_entropy(const void* logits, int64_t count, int64_t label, DType dtype, void* grad) {
    float loss = 0;
    by_dtype(dtype, [&](auto d) {
        constexpr DType D = d.value;
        const int64_t whole = count / W * W, rest = count - whole;
        vf most = all(-INFINITY), sum = {};
        for (int64_t i = 0; i < whole; i += W) most = greatest(most, load<D>(logits, i));
        float top = greatest_of(most);
        for (int64_t i = whole; i < count; i++) top = to_float(logits, D, i) > top ? to_float(logits, D, i) : top;
        for (int64_t i = 0; i < whole; i += W) sum += exp_of(load<D>(logits, i) - top);
        const vf tail = rest ? exp_of(load_some<D>(logits, whole, rest) - top) : vf{};
        float total = sum_of(sum);
        for (int64_t j = 0; j < rest; j++) total += tail[j];
        loss = std::log(total) + (top - to_float(logits, D, label));
        const float inverse = 1.0f / total;
        for (int64_t i = 0; i < whole; i += W) store_result<D>(grad, i, exp_of(load<D>(logits, i) - top) * inverse);
        if (rest) store_some<D>(grad, whole, rest, tail * inverse);
        const float chance = exp_of(all(to_float(logits, D, label) - top))[0] * inverse;
        store_as(grad, dtype, label, chance - 1.0f);
    });
    return loss;
}
