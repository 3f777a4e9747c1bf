// The products of the linear layers: blocked, packed, shared out; the register tiles are the path's.
#include "entry.h"

namespace hb {
namespace {

// C [tokens, columns] = A [tokens, depth] B + bias + drop(A2 [tokens, rank] B2), B of 4-bit weights: W^T (forward) or W.
struct Job {
    const void* a;
    const hb_fourbit* q;
    const void* bias;
    const void* a2;
    const void* b2;
    void* c;
    int64_t tokens, depth, columns, rank;
    DType dtype;
    bool forward;
    const Dropout* dropout;

    bool drops() const { return rank && dropout && dropout->threshold; }
};

struct Operand {  // a row-major matrix, packed in strips
    const void* rows;
    int64_t depth, padded;
    char* packed;
};

void pack_strips(const Products& p, const Job& job, const Operand& a, int64_t first, int64_t last) {
    for (int64_t strip = first; strip < last; strip++) {
        int64_t row = strip * p.strip, rows = min64(p.strip, job.tokens - row);
        char* to = a.packed + strip * p.strip * a.padded * p.element;
        p.pack_a(at(a.rows, row * a.depth * size_of(job.dtype)), job.dtype, rows, a.depth, a.depth, to);
    }
}

// columns [column, column + count) of B or B2, rows [k, k + depth)
void pack_panel(const Products& p, const Job& job, bool low_rank, int64_t column, int64_t count, int64_t k, int64_t depth,
                int64_t padded, const Panel& panel) {
    const int64_t size = size_of(job.dtype), total = low_rank ? job.rank : job.depth;
    if (job.forward)
        for (int64_t j = 0; j < count; j += GROUP) {
            char* group = group_of(panel, j / GROUP);
            const int64_t rows = min64(GROUP, count - j);
            if (low_rank)
                p.pack_forward_plain(at(job.b2, ((column + j) * total + k) * size), job.dtype, rows, total, depth, padded, group, row_bytes(panel));
            else
                p.pack_forward(*job.q, job.dtype, column + j, rows, total, k, depth, padded, group, row_bytes(panel));
        }
    else if (low_rank)
        p.pack_backward_plain(at(job.b2, (k * job.columns + column) * size), job.dtype, depth, padded, job.columns, count, panel);
    else
        p.pack_backward(*job.q, job.dtype, k, depth, padded, job.columns, column, count, panel);
}

struct Block {  // of C
    int64_t row, rows, column, columns;
};

// sums += drop(A2 B2), strip by strip while a strip is in the first-level cache
void add_dropped(const Products& p, const Path& path, const Job& job, const Operand& a, const Block& block, char* panel_start,
                 float* sums, int64_t sums_stride, float* strip_sums) {
    const int64_t groups = ceil_div(block.columns, GROUP), tile_groups = p.columns / GROUP;
    for (int64_t k = 0; k < a.padded; k += p.panel_depth) {
        const int64_t padded = min64(p.panel_depth, a.padded - k), depth = min64(padded, a.depth - k);
        const Panel panel = panel_of(p, panel_start, padded);
        pack_panel(p, job, true, block.column, block.columns, k, depth, padded, panel);
        for (int64_t row = block.row; row < block.row + block.rows; row += p.strip) {
            const char* strip = a.packed + (row * a.padded + k * p.strip) * p.element;
            const int rows = int(min64(p.strip, job.tokens - row));
            for (int64_t g = 0; g < groups; g += tile_groups)
                p.tile(strip, rows, group_of(panel, g), int(min64(tile_groups, groups - g)), padded, strip_sums + g * GROUP, sums_stride, true);
            for (int64_t m = 0; m < rows; m++)
                path.add_kept(sums + (row + m - block.row) * sums_stride, strip_sums + m * sums_stride,
                              (row + m) * job.columns + block.column, block.columns, *job.dropout);
        }
    }
}

void multiply_block(const Products& p, const Path& path, const Job& job, const Operand* operands, int count, const Block& block,
                    char* panel_start, float* sums, int64_t sums_stride, float* strip_sums) {
    const int64_t groups = ceil_div(block.columns, GROUP), tile_groups = p.columns / GROUP;
    bool first = true;
    for (int o = 0; o < (job.drops() ? 1 : count); o++) {
        const Operand& a = operands[o];
        for (int64_t k = 0; k < a.padded; k += p.panel_depth) {
            const int64_t padded = min64(p.panel_depth, a.padded - k), depth = min64(padded, a.depth - k);
            const Panel panel = panel_of(p, panel_start, padded);
            pack_panel(p, job, o == 1, block.column, block.columns, k, depth, padded, panel);
            for (int64_t row = block.row; row < block.row + block.rows; row += p.strip) {
                const char* strip = a.packed + (row * a.padded + k * p.strip) * p.element;
                const int rows = int(min64(p.strip, job.tokens - row));
                float* c = sums + (row - block.row) * sums_stride;
                for (int64_t g = 0; g < groups; g += tile_groups)
                    p.tile(strip, rows, group_of(panel, g), int(min64(tile_groups, groups - g)), padded, c + g * GROUP, sums_stride, first);
            }
            first = false;
        }
    }
    if (first)  // nothing to add up
        for (int64_t row = 0; row < block.rows; row++) std::memset(sums + row * sums_stride, 0, size_t(block.columns) * 4);
    if (job.drops()) add_dropped(p, path, job, operands[1], block, panel_start, sums, sums_stride, strip_sums);
    const int64_t size = size_of(job.dtype);
    path.finish(sums, sums_stride, job.bias ? at(job.bias, block.column * size) : nullptr, job.dtype, block.rows,
                block.columns, at(job.c, (block.row * job.columns + block.column) * size), job.columns);
}

int32_t multiply(const Path& path, const Products& p, const Job& job, int threads) {
    const int64_t strips = ceil_div(job.tokens, p.strip);
    Operand operands[2] = {{job.a, job.depth, round_up(job.depth, p.depth_multiple), nullptr},
                           {job.a2, job.rank, round_up(job.rank, p.depth_multiple), nullptr}};
    const int count = job.rank ? 2 : 1;
    const int64_t first_size = round_up(strips * p.strip * operands[0].padded * p.element, 64);
    const int64_t second_size = job.rank ? strips * p.strip * operands[1].padded * p.element : 0;
    char* packed = static_cast<char*>(shared_operand.take(first_size + second_size));
    if (!packed) return fail(HB_OUT_OF_MEMORY, "no memory for %lld bytes of packed input", (long long)(first_size + second_size));
    operands[0].packed = packed;
    operands[1].packed = packed + first_size;
    // blocks of C: panels of about equal width, a whole number for each thread where there are enough
    const int64_t tiles = ceil_div(job.columns, p.columns);
    int64_t panels = ceil_div(job.columns, p.panel_columns);
    panels = min64(tiles, round_up(panels, threads));
    const int64_t widest = ceil_div(tiles, panels) * p.columns;
    const int64_t rows = min64(round_up(job.tokens, p.strip), p.panel_rows), row_blocks = ceil_div(job.tokens, rows);
    const int64_t panel_size = min64(p.panel_depth, std::max(operands[0].padded, operands[1].padded)) * widest * p.element;
    const int64_t sums_size = (rows + p.strip) * widest * 4;
    for (int o = 0; o < count; o++)
        in_parts(strips, 1, threads, [&](int64_t first, int64_t last) { pack_strips(p, job, operands[o], first, last); });
    std::atomic<bool> starved{false};
    std::atomic<int64_t> next{0};
    parallel(int(min64(panels * row_blocks, threads)), [&](int, int) {
        char* panel = static_cast<char*>(own_panel.take(panel_size));
        float* sums = static_cast<float*>(own_sums.take(sums_size));
        if (!panel || !sums) {
            starved = true;
            return;
        }
        p.enter();
        for (int64_t i; (i = next.fetch_add(1)) < panels * row_blocks;) {
            const int64_t number = i / row_blocks, row = i % row_blocks * rows;
            const int64_t column = tiles * number / panels * p.columns;
            const int64_t end = min64(job.columns, tiles * (number + 1) / panels * p.columns);
            multiply_block(p, path, job, operands, count, {row, min64(rows, job.tokens - row), column, end - column}, panel, sums, widest, sums + rows * widest);
        }
        p.leave();
    });
    return starved ? fail(HB_OUT_OF_MEMORY, "no memory for %lld bytes of panels", (long long)(panel_size + sums_size)) : HB_OK;
}

float element(const void* p, DType dtype, int64_t i) {
    if (dtype == HB_F32) return static_cast<const float*>(p)[i];
    uint16_t bits = static_cast<const uint16_t*>(p)[i];
    if (dtype == HB_BF16) return from_bits(uint32_t(bits) << 16);
    _Float16 half;
    std::memcpy(&half, &bits, 2);
    return float(half);
}

// sums += A2 B2, of a few tokens
void add_low_rank(const Job& job, float* sums, int64_t first, int64_t last) {
    for (int64_t m = 0; m < job.tokens; m++)
        for (int64_t r = 0; r < job.rank; r++) {
            const float value = element(job.a2, job.dtype, m * job.rank + r);
            float* to = sums + m * job.columns;
            if (job.forward)
                for (int64_t j = first; j < last; j++) to[j] += value * element(job.b2, job.dtype, j * job.rank + r);
            else
                for (int64_t j = first; j < last; j++) to[j] += value * element(job.b2, job.dtype, r * job.columns + j);
        }
}

int32_t multiply_few(const Path& path, const Products& p, const Job& job, int threads) {
    float* sums = static_cast<float*>(shared_operand.take(job.tokens * job.columns * 4));
    if (!sums) return fail(HB_OUT_OF_MEMORY, "no memory for %lld sums", (long long)(job.tokens * job.columns));
    const int64_t work_size = job.tokens * (std::max(job.depth, job.columns) + 1) * 4, size = size_of(job.dtype);
    std::atomic<bool> starved{false};
    in_parts(job.columns, 64, threads, [&](int64_t first, int64_t last) {
        void* work = own_panel.take(work_size);
        if (!work) {
            starved = true;
            return;
        }
        if (job.forward)
            p.few_forward(job.a, job.dtype, job.tokens, *job.q, job.depth, first, last, sums, job.columns, work);
        else
            p.few_backward(job.a, job.dtype, job.tokens, *job.q, job.depth, job.columns, first, last, sums, job.columns, work);
        if (job.rank) add_low_rank(job, sums, first, last);
        path.finish(sums + first, job.columns, job.bias ? at(job.bias, first * size) : nullptr, job.dtype, job.tokens, last - first,
                    at(job.c, first * size), job.columns);
    });
    return starved ? fail(HB_OUT_OF_MEMORY, "no memory for %lld bytes of operands", (long long)work_size) : HB_OK;
}

int32_t run(const Job& job, int threads) {
    if (!job.tokens || !job.columns) return HB_OK;
    const Path& now = path();
    const Products& p = *now.products[job.dtype];
    const int64_t few = job.forward ? p.few_to_forward : p.few_to_backward;
    return job.tokens <= few && !job.drops() ? multiply_few(now, p, job, threads) : multiply(now, p, job, threads);
}

int32_t check_job(const Job& job, int32_t dtype, int32_t threads, int64_t out_features, int64_t in_features) {
    CHECK(check_dtype(dtype));
    CHECK(check_threads(threads));
    CHECK(check_product("weight", out_features, in_features));
    CHECK(check_product("input", job.tokens, job.depth));
    CHECK(check_product("result", job.tokens, job.columns));
    CHECK(check_product("low-rank input", job.tokens, job.rank));
    CHECK(check_product("low-rank weight", std::max(out_features, in_features), job.rank));
    CHECK(check_weight(job.q, out_features * in_features));
    CHECK(check_dropout(job.dropout, job.tokens * job.columns));
    if (job.rank && (!job.a2 || !job.b2)) return fail(HB_BAD_ARGUMENT, "a low-rank part needs both its input and its weight");
    const int64_t size = size_of(dtype);
    const Span spans[] = {
        {"input", job.a, job.tokens * job.depth, size},
        {"bias", job.bias, job.bias ? job.columns : 0, size},
        {"low-rank input", job.a2, job.tokens * job.rank, size},
        {"low-rank weight", job.b2, job.columns * job.rank, size},
        {"packed", job.q->packed, job.q->packed_count, 1},
        {"absmax", job.q->absmax, job.q->absmax_count, job.q->nested_absmax ? 1 : 4},
        {"nested_absmax", job.q->nested_absmax, job.q->nested_absmax ? job.q->nested_count : 0, 4},
        {"result", job.c, job.tokens * job.columns, size},
    };
    return check_spans(spans, 1);
}

}  // namespace
}  // namespace hb

using namespace hb;

int32_t hb_linear(const void* x, int64_t tokens, int64_t in_features, int64_t out_features, const hb_fourbit* weight,
                  const void* bias, const void* u, const void* b, int64_t rank, void* y, int32_t dtype, int32_t threads) {
    const Job job = {x, weight, bias, u, b, y, tokens, in_features, out_features, rank, DType(dtype), true, nullptr};
    CHECK(check_job(job, dtype, threads, out_features, in_features));
    return run(job, threads);
}

int32_t hb_linear_input_grad(const void* dy, int64_t tokens, int64_t out_features, int64_t in_features,
                             const hb_fourbit* weight, const void* du, const void* a, int64_t rank,
                             const hb_dropout* dropout, void* dx, int32_t dtype, int32_t threads) {
    const Job job = {dy, weight, nullptr, du, a, dx, tokens, out_features, in_features, rank, DType(dtype), false, dropout};
    CHECK(check_job(job, dtype, threads, out_features, in_features));
    return run(job, threads);
}
