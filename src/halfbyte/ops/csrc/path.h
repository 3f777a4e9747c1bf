// One spelling of the kernels per instruction set; `api.cpp` chooses one at run time and does everything around them
// (checks, threads, blocking). Each path_*.cpp is compiled with its own flags and must not be entered on a lesser machine.
//
// The linear layers are products C [M, J] = A [M, R] B [R, J], R the reduced dimension. A path says in which form it
// wants the operands:
//   A: strips of `strip` rows, packed by `pack_a`;
//   B: panels (below), packed from 16 rows of W along R (forward) or from rows across R (backward).
// Operands are fp32, or bf16 in pairs along R, as dpbf16 and AMX take them: 16 columns of B are 64 bytes either way.
#pragma once
#include <cstddef>
#include <cstdint>

#include "halfbyte.h"

namespace hb {

constexpr int GROUP = 16;  // columns of B that lie together
constexpr int64_t GROUP_BYTES = 64;
constexpr float TINY = 1e-38f;
constexpr int64_t MOMENT_BLOCK = 256;

// B in the order in which tiles read it: tile after tile of 1 << `shift` groups of 16 columns, each [R / unit][groups][64
// bytes], so that every read is the next one.
struct Panel {
    char* start;
    int shift;
    int64_t tile_bytes;
};
static inline int64_t row_bytes(const Panel& panel) { return GROUP_BYTES << panel.shift; }
static inline char* group_of(const Panel& panel, int64_t number) {
    return panel.start + (number >> panel.shift) * panel.tile_bytes + (number & ((1 << panel.shift) - 1)) * GROUP_BYTES;
}

// What a kernel needs of a table of at most 256 levels to find the nearest one exactly (see nearest.h).
struct Nearest;

using Dropout = hb_dropout;

struct Products {
    int64_t strip;                                   // rows of a tile
    int64_t columns;                                 // of a tile, a multiple of GROUP
    int64_t element;                                 // bytes of one operand: 2 or 4
    int64_t depth_multiple;                          // the reduced dimension is padded with zeros to a multiple of this
    int64_t panel_rows, panel_columns, panel_depth;  // of a block of C, and of B that stays in the second-level cache
    int64_t few_to_forward, few_to_backward;         // up to so many tokens `few_*` are faster than tiles

    void (*pack_a)(const void* a, DType dtype, int64_t rows, int64_t depth, int64_t stride, void* packed);
    // 16 (or `rows` < 16) rows of 4-bit weight, elements [column, column + depth) of each -> one group, zero padded
    void (*pack_forward)(const hb_fourbit& q, DType dtype, int64_t row, int64_t rows, int64_t width, int64_t column,
                         int64_t depth, int64_t padded, char* group, int64_t row_bytes);
    // rows [row, row + depth) of 4-bit weight, columns [column, column + count) -> all groups
    void (*pack_backward)(const hb_fourbit& q, DType dtype, int64_t row, int64_t depth, int64_t padded, int64_t width,
                          int64_t column, int64_t count, const Panel& panel);
    // the same of an ordinary matrix (LoRA's)
    void (*pack_forward_plain)(const void* w, DType dtype, int64_t rows, int64_t stride, int64_t depth, int64_t padded,
                               char* group, int64_t row_bytes);
    void (*pack_backward_plain)(const void* w, DType dtype, int64_t depth, int64_t padded, int64_t stride, int64_t count,
                                const Panel& panel);
    // strips of the transpose: element (row, k) lies at a[k * stride + row]
    void (*pack_a_transposed)(const void* a, DType dtype, int64_t rows, int64_t depth, int64_t stride, void* packed);
    // C [rows <= strip, columns] (+)= a strip of A times the first `groups` groups of a tile of B
    void (*tile)(const void* a, int rows, const char* b, int groups, int64_t depth, float* c, int64_t c_stride, bool first);
    void (*enter)();  // per thread, before and after tiles (AMX configuration)
    void (*leave)();

    // a few tokens at once: C [tokens, columns first..last) fp32; work: 4 bytes for each element of the longer operand
    void (*few_forward)(const void* x, DType dtype, int64_t tokens, const hb_fourbit& q, int64_t width, int64_t first,
                        int64_t last, float* c, int64_t c_stride, void* work);
    void (*few_backward)(const void* dy, DType dtype, int64_t tokens, const hb_fourbit& q, int64_t rows, int64_t width,
                         int64_t first, int64_t last, float* c, int64_t c_stride, void* work);
};

struct Path {
    const char* name;
    bool (*runs_here)();

    // blocks [first, last) of a flattened weight; the last block of the tensor may be short
    void (*quantize)(const void* weight, DType dtype, int64_t numel, const float* bounds, const uint8_t* code_of_rank,
                     int64_t block_size, int64_t first, int64_t last, uint8_t* packed, float* absmax);
    // elements [start, start + count) as `dtype`, or, with `widen`, rounded to `dtype` and stored as fp32.
    // `stream`: past the caches, where alignment allows
    void (*dequantize)(const hb_fourbit& q, int64_t start, int64_t count, DType dtype, bool widen, bool stream, void* out);

    // of elements [start, start + count): which are kept; x where kept; c += more where kept
    void (*dropout_mask)(uint8_t* out, int64_t start, int64_t count, const Dropout& d);
    void (*drop)(const void* x, DType dtype, int64_t start, int64_t count, const Dropout& d, void* out);
    void (*add_kept)(float* c, const float* more, int64_t start, int64_t count, const Dropout& d);

    // y [rows, columns] of `dtype` = c + bias
    void (*finish)(const float* c, int64_t c_stride, const void* bias, DType dtype, int64_t rows, int64_t columns,
                   void* y, int64_t y_stride);

    // one row of each (passes.inl)
    void (*rms_norm)(const void* x, const void* weight, int64_t width, float eps, float offset, bool cast_first, DType dtype,
                     void* y, float* inverse);
    void (*rms_norm_grad)(const void* dy, const void* x, const void* weight, float inverse, int64_t width, float offset,
                          DType dtype, void* dx);
    void (*gated)(const void* gate, const void* up, int64_t count, int32_t kind, DType dtype, void* y);
    void (*gated_grad)(const void* dy, const void* gate, const void* up, int64_t count, int32_t kind, DType dtype, void* dgate,
                       void* dup);
    void (*rotate)(const void* x, const void* cos, const void* sin, int64_t heads, int64_t dim, bool back, DType dtype, void* y);
    float (*softmax_row)(float* s, int64_t first, int64_t last, int64_t count, float scale, float cap, DType element, void* p,
                         float* top);
    void (*softmax_grad_row)(const float* s, const float* dp, int64_t first, int64_t last, int64_t count, float scale, float cap,
                             float lse, float delta, DType element, void* p, void* ds);
    void (*scale_row)(const float* c, int64_t count, float factor, DType dtype, void* out);
    float (*dot_rows)(const void* a, const void* b, int64_t count, DType dtype);
    float (*cross_entropy)(const void* logits, int64_t count, int64_t label, DType dtype, void* grad);

    // one block of at most 256 parameters
    void (*adamw)(float* p, const float* g, int64_t count, uint8_t* m_codes, uint8_t* v_codes, float* m_absmax,
                  float* v_absmax, const float* m_map, const float* v_map, const Nearest& m_nearest,
                  const Nearest& v_nearest, const float* numbers);
    double (*peak)(DType dtype, int64_t rounds);  // flops done in registers alone

    const Products* products[3];  // by DType
};

const Path* const* all_paths(int* count);  // best first

static inline Panel panel_of(const Products& p, char* start, int64_t padded) {
    return {start, __builtin_ctzll((unsigned long long)(p.columns / GROUP)), padded * p.columns * p.element};
}
static inline int64_t panel_bytes(const Products& p, int64_t padded, int64_t columns) {
    return (columns + p.columns - 1) / p.columns * p.columns * padded * p.element;
}

// static: these are compiled once per path, each with its own instructions, and must not be merged by the linker
static inline int64_t ceil_div(int64_t a, int64_t b) { return a / b + (a % b != 0); }
static inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
static inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }

}  // namespace hb
