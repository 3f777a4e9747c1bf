// The skinny products of an adapter (ops/lora.py). B operands are small enough to be packed whole; x and dy are read once
// where they lie, and their dropped elements are zeroed on the way.
#include "entry.h"

namespace hb {
namespace {

struct Left {  // strips of A, packed whole
    char* packed;
    int64_t padded;
    const char* strip(const Products& p, int64_t row, int64_t k) const { return packed + (row * padded + k * p.strip) * p.element; }
};

int64_t left_bytes(const Products& p, int64_t rows, int64_t padded) { return round_up(rows, p.strip) * padded * p.element; }

// strips of M^T for M [depth, rows] row-major
void pack_transposed(const Products& p, const void* m, DType dtype, int64_t depth, int64_t rows, const Left& left) {
    for (int64_t row = 0; row < rows; row += p.strip)
        p.pack_a_transposed(at(m, row * size_of(dtype)), dtype, min64(p.strip, rows - row), depth, rows, left.packed + row * left.padded * p.element);
}

struct Skinny {  // C [tokens, rank] = drop(A [tokens, depth]) B
    const void* a;
    const void* b;
    void* c;
    int64_t tokens, depth, rank;
    DType dtype;
    bool transposed;  // B is [rank, depth] in memory
    const Dropout* dropout;
};

bool skinny(const Path& path, const Products& p, const Skinny& job, int threads) {
    const int64_t size = size_of(job.dtype), padded = round_up(job.depth, p.depth_multiple), groups = ceil_div(job.rank, GROUP);
    char* start = static_cast<char*>(shared_operand.take(panel_bytes(p, padded, job.rank)));
    if (!start) return false;
    const Panel panel = panel_of(p, start, padded);
    if (job.transposed)
        for (int64_t g = 0; g < groups; g++)
            p.pack_forward_plain(at(job.b, g * GROUP * job.depth * size), job.dtype, min64(GROUP, job.rank - g * GROUP), job.depth,
                                 job.depth, padded, group_of(panel, g), row_bytes(panel));
    else
        p.pack_backward_plain(job.b, job.dtype, job.depth, padded, job.rank, job.rank, panel);
    const int64_t tile_groups = p.columns / GROUP, sums_stride = groups * GROUP;
    const int64_t strip_size = round_up(p.strip * padded * p.element, 64), sums_size = p.strip * sums_stride * 4;
    std::atomic<bool> starved{false};
    in_parts(ceil_div(job.tokens, p.strip), 1, threads, [&](int64_t first, int64_t last) {
        char* strip = static_cast<char*>(own_panel.take(strip_size + p.strip * job.depth * size));
        float* sums = static_cast<float*>(own_sums.take(sums_size));
        if (!strip || !sums) {
            starved = true;
            return;
        }
        p.enter();
        for (int64_t row = first * p.strip; row < min64(last * p.strip, job.tokens); row += p.strip) {
            const int64_t rows = min64(p.strip, job.tokens - row);
            const void* from = at(job.a, row * job.depth * size);
            if (job.dropout) {
                path.drop(job.a, job.dtype, row * job.depth, rows * job.depth, *job.dropout, strip + strip_size);
                from = strip + strip_size;
            }
            p.pack_a(from, job.dtype, rows, job.depth, job.depth, strip);
            for (int64_t g = 0; g < groups; g += tile_groups)
                p.tile(strip, int(rows), group_of(panel, g), int(min64(tile_groups, groups - g)), padded, sums + g * GROUP, sums_stride, true);
            path.finish(sums, sums_stride, nullptr, job.dtype, rows, job.rank, at(job.c, row * job.rank * size), job.rank);
        }
        p.leave();
    });
    return !starved;
}

struct Outer {  // [rank, width] = L^T drop(X), L [tokens, rank] packed, X [tokens, width]
    Left left;
    const void* x;
    int64_t width;
    const Dropout* dropout;
};

constexpr int64_t BLOCK_COLUMNS = 256, BLOCK_DEPTH = 128;  // of X at a time: it stays in the second-level cache

// columns [column, column + count) of an outer product -> sums [rank, BLOCK_COLUMNS]
void outer_block(const Path& path, const Products& p, const Outer& job, int64_t tokens, int64_t rank, DType dtype,
                 int64_t column, int64_t count, char* panel_start, void* dropped, float* sums) {
    const int64_t size = size_of(dtype), groups = ceil_div(count, GROUP), tile_groups = p.columns / GROUP;
    for (int64_t k = 0; k < job.left.padded; k += BLOCK_DEPTH) {
        const int64_t padded = min64(BLOCK_DEPTH, job.left.padded - k), depth = min64(padded, tokens - k);
        const Panel panel = panel_of(p, panel_start, padded);
        const void* from = at(job.x, (k * job.width + column) * size);
        int64_t stride = job.width;
        if (job.dropout) {
            for (int64_t t = 0; t < depth; t++)
                path.drop(job.x, dtype, (k + t) * job.width + column, count, *job.dropout, at(dropped, t * count * size));
            from = dropped;
            stride = count;
        }
        p.pack_backward_plain(from, dtype, depth, padded, stride, count, panel);
        for (int64_t row = 0; row < rank; row += p.strip)
            for (int64_t g = 0; g < groups; g += tile_groups)
                p.tile(job.left.strip(p, row, k), int(min64(p.strip, rank - row)), group_of(panel, g), int(min64(tile_groups, groups - g)),
                       padded, sums + row * BLOCK_COLUMNS + g * GROUP, BLOCK_COLUMNS, k == 0);
    }
}

const Dropout* if_dropping(const Dropout* dropout) { return dropout && dropout->threshold ? dropout : nullptr; }

int32_t check_shapes(int64_t tokens, int64_t in_features, int64_t out_features, int64_t rank, int32_t dtype, int32_t threads,
                     const Dropout* dropout) {
    CHECK(check_dtype(dtype));
    CHECK(check_threads(threads));
    CHECK(check_product("input", tokens, in_features));
    CHECK(check_product("gradient", tokens, out_features));
    CHECK(check_product("low-rank input", tokens, rank));
    CHECK(check_product("low-rank weight", std::max(in_features, out_features), rank));
    return check_dropout(dropout, tokens * in_features);
}

}  // namespace
}  // namespace hb

using namespace hb;

int32_t hb_lora_input(const void* x, int64_t tokens, int64_t in_features, const void* a, int64_t rank, const hb_dropout* dropout,
                      void* u, int32_t dtype, int32_t threads) {
    CHECK(check_shapes(tokens, in_features, 0, rank, dtype, threads, dropout));
    const int64_t size = size_of(dtype);
    const Span spans[] = {{"input", x, tokens * in_features, size}, {"A", a, rank * in_features, size}, {"u", u, tokens * rank, size}};
    CHECK(check_spans(spans, 1));
    if (!tokens || !rank) return HB_OK;
    const Path& now = path();
    const Skinny job = {x, a, u, tokens, in_features, rank, DType(dtype), true, if_dropping(dropout)};
    return skinny(now, *now.products[dtype], job, threads) ? HB_OK : fail(HB_OUT_OF_MEMORY, "no memory for packed operands");
}

int32_t hb_lora_grads(const void* dy, const void* x, const void* u, const void* b, int64_t tokens, int64_t in_features,
                      int64_t out_features, int64_t rank, float scale, const hb_dropout* dropout, void* du, float* da, float* db,
                      int32_t dtype, int32_t threads) {
    CHECK(check_shapes(tokens, in_features, out_features, rank, dtype, threads, dropout));
    const int64_t size = size_of(dtype);
    const Span spans[] = {{"gradient", dy, tokens * out_features, size}, {"input", x, tokens * in_features, size},
                          {"u", u, tokens * rank, size},                 {"B", b, out_features * rank, size},
                          {"du", du, tokens * rank, size},               {"dA", da, rank * in_features, 4},
                          {"dB", db, out_features * rank, 4}};
    CHECK(check_spans(spans, 3));
    if (!rank) return HB_OK;
    if (!tokens) {
        if (in_features) std::memset(da, 0, size_t(rank * in_features) * 4);
        if (out_features) std::memset(db, 0, size_t(rank * out_features) * 4);
        return HB_OK;
    }
    const Path& now = path();
    const Products& p = *now.products[dtype];
    const DType type = DType(dtype);
    if (!skinny(now, p, {dy, b, du, tokens, out_features, rank, type, false, nullptr}, threads))
        return fail(HB_OUT_OF_MEMORY, "no memory for packed operands");
    const int64_t padded = round_up(tokens, p.depth_multiple), each = round_up(left_bytes(p, rank, padded), 64);
    char* lefts = static_cast<char*>(shared_operand.take(2 * each));
    if (!lefts) return fail(HB_OUT_OF_MEMORY, "no memory for packed operands");
    const Outer outers[2] = {{{lefts, padded}, x, in_features, if_dropping(dropout)}, {{lefts + each, padded}, dy, out_features, nullptr}};
    pack_transposed(p, du, type, tokens, rank, outers[0].left);
    pack_transposed(p, u, type, tokens, rank, outers[1].left);
    const int64_t blocks = ceil_div(in_features, BLOCK_COLUMNS), more = ceil_div(out_features, BLOCK_COLUMNS);
    const int64_t panel_size = round_up(panel_bytes(p, min64(BLOCK_DEPTH, padded), BLOCK_COLUMNS), 64);
    std::atomic<bool> starved{false};
    std::atomic<int64_t> next{0};
    parallel(int(min64(blocks + more, threads)), [&](int, int) {
        char* panel = static_cast<char*>(own_panel.take(panel_size + BLOCK_DEPTH * BLOCK_COLUMNS * size));
        float* sums = static_cast<float*>(own_sums.take(round_up(rank, p.strip) * BLOCK_COLUMNS * 4));
        if (!panel || !sums) {
            starved = true;
            return;
        }
        p.enter();
        for (int64_t i; (i = next.fetch_add(1)) < blocks + more;) {
            const bool second = i >= blocks;
            const Outer& outer = outers[second];
            const int64_t column = (second ? i - blocks : i) * BLOCK_COLUMNS, count = min64(BLOCK_COLUMNS, outer.width - column);
            outer_block(now, p, outer, tokens, rank, type, column, count, panel, panel + panel_size, sums);
            for (int64_t r = 0; r < rank; r++)
                for (int64_t j = 0; j < count; j++) {
                    const float value = sums[r * BLOCK_COLUMNS + j];
                    if (second) db[(column + j) * rank + r] = value * scale;
                    else da[r * in_features + column + j] = value;
                }
        }
        p.leave();
    });
    return starved ? fail(HB_OUT_OF_MEMORY, "no memory for panels") : HB_OK;
}
