// AMX tile registers, or, with HB_EMULATE_TILES, plain C++ that does what they do: so the path's logic is proved on
// machines that have none (tests only).
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#if defined(HB_EMULATE_TILES)

#define TILES_NAME "amx-emulated"

namespace hb {
struct Tiles {
    float sums[8][16][16];
    uint16_t pairs[8][16][32];
};
static thread_local Tiles tiles;

static inline float tile_float(uint16_t bits) {
    uint32_t wide = uint32_t(bits) << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
}
static inline void tile_multiply(int c, int a, int b) {
    for (int m = 0; m < 16; m++)
        for (int n = 0; n < 16; n++)
            for (int k = 0; k < 32; k++) tiles.sums[c][m][n] += tile_float(tiles.pairs[a][m][k]) * tile_float(tiles.pairs[b][k / 2][2 * n + k % 2]);
}
static inline void tile_zero(int t) { std::memset(tiles.sums[t], 0, sizeof tiles.sums[t]); }
static inline void tile_load(int t, const void* p, int64_t stride) {
    for (int m = 0; m < 16; m++) {
        const char* row = static_cast<const char*>(p) + m * stride;
        if (t < 4) std::memcpy(tiles.sums[t][m], row, 64);
        else std::memcpy(tiles.pairs[t][m], row, 64);
    }
}
static inline void tile_store(int t, void* p, int64_t stride) {
    for (int m = 0; m < 16; m++) std::memcpy(static_cast<char*>(p) + m * stride, tiles.sums[t][m], 64);
}
static inline void tiles_begin() {}
static inline void tiles_end() {}
static inline bool tiles_here() { return true; }
}  // namespace hb

#else

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#define TILES_NAME "amx"

#define tile_multiply(c, a, b) _tile_dpbf16ps(c, a, b)
#define tile_zero(t) _tile_zero(t)
#define tile_load(t, p, stride) _tile_loadd(t, p, stride)
#define tile_store(t, p, stride) _tile_stored(t, p, stride)

namespace hb {
// the kernel gives a process its tile registers on request (x86 arch_prctl: ARCH_REQ_XCOMP_PERM, XTILEDATA)
static inline bool tiles_here() {
#if defined(__linux__)
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
    const bool tile = d >> 24 & 1, bf16 = d >> 22 & 1;
    return tile && bf16 && syscall(SYS_arch_prctl, 0x1023, 18) == 0;
#else
    return false;
#endif
}

static inline void tiles_begin() {
    struct alignas(64) {
        uint8_t palette = 1, start_row = 0, reserved[14] = {};
        uint16_t row_bytes[16] = {};
        uint8_t rows[16] = {};
    } shape;
    for (int i = 0; i < 8; i++) {
        shape.row_bytes[i] = 64;
        shape.rows[i] = 16;
    }
    asm volatile("" ::"r"(&shape) : "memory");  // GCC 12's _tile_loadconfig claims to read 8 bytes only
    _tile_loadconfig(&shape);
}
static inline void tiles_end() { _tile_release(); }
}  // namespace hb

#endif
