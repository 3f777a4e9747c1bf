// Dropout from counters (ops/dropout.py).

// Philox4x32-7 (ops/dropout.py): counters [first, last) give eight elements each, 1 where one is kept
void dropout_mask(uint8_t* out, int64_t numel, int64_t first, int64_t last, uint32_t threshold, const uint32_t* counter,
                  const uint32_t* key) {
    constexpr int LANES = 64;
    alignas(64) uint32_t c0[LANES], c1[LANES], c2[LANES], c3[LANES];
    alignas(64) uint16_t halves[LANES * 8];
    for (int64_t start = first; start < last; start += LANES) {
        for (int i = 0; i < LANES; i++) c0[i] = uint32_t(start + i), c1[i] = counter[0], c2[i] = counter[1], c3[i] = counter[2];
        uint32_t k0 = key[0], k1 = key[1];
        for (int round = 0; round < 7; round++) {
            for (int i = 0; i < LANES; i++) {
                const uint64_t p0 = uint64_t(c0[i]) * 0xD2511F53u, p1 = uint64_t(c2[i]) * 0xCD9E8D57u;
                c0[i] = uint32_t(p1 >> 32) ^ c1[i] ^ k0;
                c2[i] = uint32_t(p0 >> 32) ^ c3[i] ^ k1;
                c1[i] = uint32_t(p1);
                c3[i] = uint32_t(p0);
            }
            k0 += 0x9E3779B9u;
            k1 += 0xBB67AE85u;
        }
        for (int i = 0; i < LANES; i++) {
            const uint32_t words[4] = {c0[i], c1[i], c2[i], c3[i]};
            for (int w = 0; w < 4; w++) {
                halves[i * 8 + 2 * w] = uint16_t(words[w]);
                halves[i * 8 + 2 * w + 1] = uint16_t(words[w] >> 16);
            }
        }
        const int64_t count = min64(min64(last, start + LANES) * 8, numel) - start * 8;
        const uint16_t least = uint16_t(threshold);
        for (int64_t i = 0; i < count; i++) out[start * 8 + i] = halves[i] >= least;
    }
}
