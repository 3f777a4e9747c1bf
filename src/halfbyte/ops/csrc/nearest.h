// Functions are static: each path compiles its own, and the linker must not merge them.
//
// The nearest of up to 256 levels by the first 16 bits of a float: exact, two loads and a comparison (ops/nearest.py).
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

namespace hb {

static inline float from_bits(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

static inline uint32_t to_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}

struct Nearest {
    float levels[256];
    float bounds[255];      // midpoints of neighbouring levels, ascending
    float own[1 << 16];     // per cell: the least bound not below it
    uint8_t below[1 << 16]; // per cell: bounds strictly below its least value
    bool exact;              // no cell holds two bounds; else `rank` searches
};

static inline int search(const Nearest& nearest, float value) {  // bounds strictly below
    int low = 0, high = 255;
    while (low < high) {
        int middle = (low + high) / 2;
        if (nearest.bounds[middle] < value) low = middle + 1;
        else high = middle;
    }
    return low;
}

static inline uint8_t rank(const Nearest& nearest, float value) {
    if (!nearest.exact) return uint8_t(search(nearest, value));
    uint32_t cell = to_bits(value) >> 16;
    return uint8_t(nearest.below[cell] + (value > nearest.own[cell]));
}

static inline void build(Nearest& nearest, const float* table) {
    std::memcpy(nearest.levels, table, sizeof nearest.levels);
    for (int i = 0; i < 255; i++) nearest.bounds[i] = (table[i + 1] + table[i]) / 2;
    nearest.exact = true;
    for (uint32_t cell = 0; cell < (1u << 16); cell++) {
        float one = from_bits(cell << 16), other = from_bits(cell << 16 | 0xffff);
        if (!std::isfinite(one) || !std::isfinite(other)) one = other = 0;
        int first = search(nearest, one < other ? one : other);
        if (search(nearest, one < other ? other : one) > first + 1) nearest.exact = false;
        nearest.below[cell] = uint8_t(first);
        nearest.own[cell] = first < 255 ? nearest.bounds[first] : INFINITY;
    }
}

}  // namespace hb
