// 8-bit AdamW (ops/adamw8bit.py).

// least: the code that a value which is not zero has at least
inline void encode_moment(const float* values, uint8_t* codes, float* absmax, const Nearest& nearest, uint8_t least) {
    int32_t most = 0;
    for (int i = 0; i < MOMENT_BLOCK; i++) {
        int32_t bits = int32_t(to_bits(values[i]) & 0x7fffffff);
        most = bits > most ? bits : most;
    }
    *absmax = from_bits(uint32_t(most));
    float inverse = 1.0f / (*absmax < TINY ? TINY : *absmax);
    for (int i = 0; i < MOMENT_BLOCK; i++) codes[i] = rank(nearest, values[i] * inverse);
    for (int i = 0; i < MOMENT_BLOCK; i++) {
        uint8_t floor = (to_bits(values[i]) & 0x7fffffff) != 0 ? least : 0;
        codes[i] = codes[i] < floor ? floor : codes[i];
    }
}

// numbers: step_size, beta1, 1 - beta1, beta2, 1 - beta2, eps, shrink
void adamw(float* p, const float* g, int64_t count, uint8_t* m_codes, uint8_t* v_codes, float* m_absmax, float* v_absmax,
           const float* m_map, const float* v_map, const Nearest& m_nearest, const Nearest& v_nearest, const float* numbers) {
    alignas(64) float m[MOMENT_BLOCK], v[MOMENT_BLOCK], grad[MOMENT_BLOCK], change[MOMENT_BLOCK];
    std::memcpy(grad, g, size_t(count) * 4);
    std::memset(grad + count, 0, size_t(MOMENT_BLOCK - count) * 4);
    const float step_size = numbers[0], beta1 = numbers[1], less1 = numbers[2], beta2 = numbers[3], less2 = numbers[4];
    const float eps = numbers[5], shrink = numbers[6], m_scale = *m_absmax, v_scale = *v_absmax;
    for (int i = 0; i < MOMENT_BLOCK; i++) {
        m[i] = m_map[m_codes[i]];
        v[i] = v_map[v_codes[i]];
    }
    for (int i = 0; i < MOMENT_BLOCK; i++) {
        m[i] = m[i] * m_scale * beta1 + grad[i] * less1;
        v[i] = v[i] * v_scale * beta2 + grad[i] * grad[i] * less2;
        change[i] = m[i] * step_size / (std::sqrt(v[i]) + eps);
    }
    for (int64_t i = 0; i < count; i++) p[i] = p[i] * shrink - change[i];
    encode_moment(m, m_codes, m_absmax, m_nearest, 0);
    encode_moment(v, v_codes, v_absmax, v_nearest, 1);
}
