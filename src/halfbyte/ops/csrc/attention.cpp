// Causal attention of rows laid end to end, forward and backward (ops/attention.py).
//
// The scores of one strip of queries fit in cache at any length met in practice, so each row's softmax is taken whole,
// from its true greatest score; nothing is rescaled, and only the logarithm of the denominator is kept for the backward
// pass, which computes the scores again (Dao et al. 2022, arXiv:2205.14135, section 3.1). A thread works on one head of
// one row of tokens; backward, on all query heads of one key head, so that no sum is shared between threads.
#include <cmath>

#include "entry.h"

namespace hb {
namespace {

struct Head {  // of one segment
    const char *q, *k, *v;
    int64_t length;
};

// Memory of one thread, taken piece by piece: measured on a first walk (start null), handed out on a second.
struct Room {
    char* start;
    int64_t used = 0;
    char* take(int64_t bytes) {
        char* piece = start ? start + used : nullptr;
        used += round_up(bytes, 64);
        return piece;
    }
};

struct Sizes {
    const Products& p;
    int64_t dim, padded_dim, length, padded_length, width, span;  // width: of rows of O; span: of rows of scores
    DType element;

    Sizes(const Products& products, const hb_attention& job, int64_t longest, int64_t rows)
        : p(products), dim(job.dim), padded_dim(round_up(job.dim, p.depth_multiple)), length(longest),
          padded_length(round_up(longest, p.depth_multiple)), width(round_up(job.dim, GROUP)),
          span(round_up(job.window ? min64(longest, job.window + rows + p.columns) : longest, p.columns)),
          element(p.element == 2 ? HB_BF16 : HB_F32) {}
    int64_t keys_bytes() const { return panel_bytes(p, padded_dim, length); }
    int64_t values_bytes() const { return panel_bytes(p, padded_length, dim); }
    int64_t strip_bytes(int64_t depth) const { return p.strip * round_up(depth, p.depth_multiple) * p.element; }
};

void pack_keys(const Products& p, const void* k, DType dtype, int64_t length, int64_t dim, int64_t stride, const Panel& panel) {
    for (int64_t j = 0; j < length; j += GROUP)
        p.pack_forward_plain(at(k, j * stride * size_of(dtype)), dtype, min64(GROUP, length - j), stride, dim,
                             round_up(dim, p.depth_multiple), group_of(panel, j / GROUP), row_bytes(panel));
}

// columns [from, to) of a strip times a panel of keys -> c; `from` begins a tile
void tiles(const Products& p, const char* strip, int64_t rows, const Panel& panel, int64_t from, int64_t to, int64_t depth, float* c, int64_t c_stride) {
    const int64_t end = ceil_div(to, GROUP), tile_groups = p.columns / GROUP;
    for (int64_t g = from / GROUP; g < end; g += tile_groups)
        p.tile(strip, int(rows), group_of(panel, g), int(min64(tile_groups, end - g)), depth, c + g * GROUP - from, c_stride, true);
}

// a strip times rows [from, from + depth) of a panel of `columns` columns
void times_rows(const Products& p, const char* strip, int64_t rows, const Panel& panel, int64_t from, int64_t depth, int64_t columns, float* c,
                int64_t c_stride, bool first) {
    const int64_t groups = ceil_div(columns, GROUP), tile_groups = p.columns / GROUP;
    for (int64_t g = 0; g < groups; g += tile_groups)
        p.tile(strip, int(rows), group_of(panel, g) + from * p.columns * p.element, int(min64(tile_groups, groups - g)),
               round_up(depth, p.depth_multiple), c + g * GROUP, c_stride, first);
}

// the first key a query sees
int64_t first_seen(const hb_attention& job, int64_t query) { return job.window ? std::max<int64_t>(0, query - job.window + 1) : 0; }

struct Forward {
    const hb_attention& job;
    const Path& path;
    const Products& p;
    DType dtype;
    Sizes sizes;
    char *keys, *values, *query, *weights, *packed;
    float *scores, *sums;

    Forward(const hb_attention& j, const Path& now, DType type, int64_t longest)
        : job(j), path(now), p(*now.products[type]), dtype(type), sizes(p, j, longest, p.strip) {}

    int64_t lay_out(char* start) {
        Room room{start};
        keys = room.take(sizes.keys_bytes());
        values = room.take(sizes.values_bytes());
        query = room.take(sizes.strip_bytes(sizes.dim));
        weights = room.take(p.strip * sizes.span * 4);
        packed = room.take(sizes.strip_bytes(sizes.span));
        scores = reinterpret_cast<float*>(room.take(p.strip * sizes.span * 4));
        sums = reinterpret_cast<float*>(room.take(p.strip * sizes.width * 4));
        return room.used;
    }

    void run(const Head& head, char* out, int64_t out_row, float* lse) {
        const int64_t size = size_of(dtype), padded = round_up(head.length, p.depth_multiple), span = sizes.span;
        const Panel k = panel_of(p, keys, sizes.padded_dim), v = panel_of(p, values, padded);
        pack_keys(p, head.k, dtype, head.length, job.dim, job.k_row, k);
        p.pack_backward_plain(head.v, dtype, head.length, padded, job.v_row, job.dim, v);
        for (int64_t row = 0; row < head.length; row += p.strip) {
            const int64_t rows = min64(p.strip, head.length - row), to = row + rows;
            const int64_t from = first_seen(job, row) / p.columns * p.columns, count = to - from;
            p.pack_a(head.q + row * job.q_row * size, dtype, rows, job.dim, job.q_row, query);
            tiles(p, query, rows, k, from, to, sizes.padded_dim, scores, span);
            float inverse[64];  // a strip has 32 rows at most
            for (int64_t m = 0; m < rows; m++) {
                float top;
                const float sum = path.softmax_row(scores + m * span, first_seen(job, row + m) - from, row + m + 1 - from, count, job.scale,
                                                   job.softcap, sizes.element, weights + m * span * p.element, &top);
                inverse[m] = 1.0f / sum;
                lse[row + m] = top + std::log(sum);
            }
            p.pack_a(weights, sizes.element, rows, count, span, packed);
            times_rows(p, packed, rows, v, from, count, job.dim, sums, sizes.width, true);
            for (int64_t m = 0; m < rows; m++)
                path.scale_row(sums + m * sizes.width, job.dim, inverse[m], dtype, out + (row + m) * out_row * size);
        }
    }
};

struct Gradients {
    const char *out, *dout;  // of one query head
    int64_t out_row, dout_row;
    const float* lse;
    char* dq;
};

struct Backward {
    const hb_attention& job;
    const Path& path;
    const Products& p;
    DType dtype;
    int64_t block;  // queries whose contributions to keys and values are added together
    Sizes sizes;
    char *keys, *values, *key_rows, *query_rows, *dout_rows, *query, *dout, *weights, *changes, *packed;
    float *scores, *slopes, *sums, *dk, *dv;

    Backward(const hb_attention& j, const Path& now, DType type, int64_t longest)
        : job(j), path(now), p(*now.products[type]), dtype(type),
          block(round_up(48, p.strip % p.depth_multiple ? p.strip * p.depth_multiple : p.strip)), sizes(p, j, longest, block) {}

    int64_t lay_out(char* start) {
        Room room{start};
        keys = room.take(sizes.keys_bytes());
        values = room.take(sizes.keys_bytes());
        key_rows = room.take(sizes.values_bytes());
        query_rows = room.take(panel_bytes(p, block, sizes.dim));
        dout_rows = room.take(panel_bytes(p, block, sizes.dim));
        query = room.take(sizes.strip_bytes(sizes.dim));
        dout = room.take(sizes.strip_bytes(sizes.dim));
        weights = room.take(block * sizes.span * p.element);
        changes = room.take(block * sizes.span * p.element);
        packed = room.take(sizes.strip_bytes(std::max(sizes.span, block)));
        scores = reinterpret_cast<float*>(room.take(p.strip * sizes.span * 4));
        slopes = reinterpret_cast<float*>(room.take(p.strip * sizes.span * 4));
        sums = reinterpret_cast<float*>(room.take(p.strip * sizes.width * 4));
        dk = reinterpret_cast<float*>(room.take(round_up(sizes.length, p.strip) * sizes.width * 4));
        dv = reinterpret_cast<float*>(room.take(round_up(sizes.length, p.strip) * sizes.width * 4));
        return room.used;
    }

    // once for a key head
    void begin(const Head& head) {
        pack_keys(p, head.k, dtype, head.length, job.dim, job.k_row, panel_of(p, keys, sizes.padded_dim));
        pack_keys(p, head.v, dtype, head.length, job.dim, job.v_row, panel_of(p, values, sizes.padded_dim));
        const int64_t padded = round_up(head.length, p.depth_multiple);
        p.pack_backward_plain(head.k, dtype, head.length, padded, job.k_row, job.dim, panel_of(p, key_rows, padded));
        std::memset(dk, 0, size_t(round_up(head.length, p.strip) * sizes.width) * 4);
        std::memset(dv, 0, size_t(round_up(head.length, p.strip) * sizes.width) * 4);
    }

    // once for each query head that reads it
    void add(const Head& head, const Gradients& g) {
        const int64_t size = size_of(dtype);
        for (int64_t start = 0; start < head.length; start += block) {
            const int64_t stop = min64(head.length, start + block);
            const int64_t from = first_seen(job, start) / p.columns * p.columns;
            for (int64_t row = start; row < stop; row += p.strip) strip(head, g, row, start, stop, from);
            const int64_t depth = stop - start, padded = round_up(depth, p.depth_multiple);
            const Panel q = panel_of(p, query_rows, padded), d = panel_of(p, dout_rows, padded);
            p.pack_backward_plain(head.q + start * job.q_row * size, dtype, depth, padded, job.q_row, job.dim, q);
            p.pack_backward_plain(g.dout + start * g.dout_row * size, dtype, depth, padded, g.dout_row, job.dim, d);
            for (int64_t key = from; key < stop; key += p.strip) to_keys(key, start, stop, from, q, d);
        }
    }

    // probabilities and score gradients of queries [row, row + strip), and with them dq
    void strip(const Head& head, const Gradients& g, int64_t row, int64_t start, int64_t stop, int64_t from) {
        const int64_t size = size_of(dtype), rows = min64(p.strip, stop - row), to = row + rows, span = sizes.span;
        const int64_t padded = round_up(head.length, p.depth_multiple);
        p.pack_a(head.q + row * job.q_row * size, dtype, rows, job.dim, job.q_row, query);
        p.pack_a(g.dout + row * g.dout_row * size, dtype, rows, job.dim, g.dout_row, dout);
        tiles(p, query, rows, panel_of(p, keys, sizes.padded_dim), from, to, sizes.padded_dim, scores, span);
        tiles(p, dout, rows, panel_of(p, values, sizes.padded_dim), from, to, sizes.padded_dim, slopes, span);
        char* changes_here = changes + (row - start) * span * p.element;
        for (int64_t m = 0; m < rows; m++) {
            const float delta = path.dot_rows(g.dout + (row + m) * g.dout_row * size, g.out + (row + m) * g.out_row * size, job.dim, dtype);
            path.softmax_grad_row(scores + m * span, slopes + m * span, first_seen(job, row + m) - from, row + m + 1 - from, stop - from,
                                  job.scale, job.softcap, g.lse[row + m], delta, sizes.element,
                                  weights + (row + m - start) * span * p.element, changes_here + m * span * p.element);
        }
        p.pack_a(changes_here, sizes.element, rows, to - from, span, packed);
        times_rows(p, packed, rows, panel_of(p, key_rows, padded), from, to - from, job.dim, sums, sizes.width, true);
        path.finish(sums, sizes.width, nullptr, dtype, rows, job.dim, g.dq + row * job.heads * job.dim * size, job.heads * job.dim);
    }

    // what queries [start, stop) add to keys and values [key, key + strip)
    void to_keys(int64_t key, int64_t start, int64_t stop, int64_t from, const Panel& q, const Panel& d) {
        const int64_t rows = min64(p.strip, stop - key);
        const int64_t first = std::max<int64_t>(0, key - start) / p.depth_multiple * p.depth_multiple;  // those before see none of them
        const int64_t last = job.window ? min64(stop - start, key + rows - 1 + job.window - start) : stop - start;
        if (last <= first) return;
        const int64_t offset = (first * sizes.span + key - from) * p.element;
        p.pack_a_transposed(weights + offset, sizes.element, rows, last - first, sizes.span, packed);
        times_rows(p, packed, rows, d, first, last - first, job.dim, dv + key * sizes.width, sizes.width, false);
        p.pack_a_transposed(changes + offset, sizes.element, rows, last - first, sizes.span, packed);
        times_rows(p, packed, rows, q, first, last - first, job.dim, dk + key * sizes.width, sizes.width, false);
    }

    void end(const Head& head, char* dk_out, char* dv_out) {
        const int64_t row = job.kv_heads * job.dim;
        path.finish(dk, sizes.width, nullptr, dtype, head.length, job.dim, dk_out, row);
        path.finish(dv, sizes.width, nullptr, dtype, head.length, job.dim, dv_out, row);
    }
};

int64_t extent(const hb_attention& job, int64_t heads, int64_t row, int64_t head) {
    return job.tokens && heads ? (job.tokens - 1) * row + (heads - 1) * head + job.dim : 0;
}

int32_t check_strides(const char* name, int64_t tokens, int64_t heads, int64_t row, int64_t head) {
    CHECK(check_product(name, tokens, row));
    return check_product(name, heads, head);
}

int32_t check_attention(const hb_attention* job, int32_t dtype, int32_t threads) {
    if (!job) return fail(HB_BAD_ARGUMENT, "the job is a null pointer");
    CHECK(check_dtype(dtype));
    CHECK(check_threads(threads));
    if (job->kv_heads < 1 || job->heads < 1 || job->heads % job->kv_heads)
        return fail(HB_BAD_ARGUMENT, "%lld heads are not shared evenly by %lld key heads", (long long)job->heads, (long long)job->kv_heads);
    if (job->dim < 1 || job->dim > (1 << 16)) return fail(HB_BAD_ARGUMENT, "impossible head dimension: %lld", (long long)job->dim);
    if (job->segments < 0 || job->tokens < 0 || job->tokens > (1 << 30)) return fail(HB_BAD_ARGUMENT, "impossible number of tokens or segments");
    if (job->window < 0) return fail(HB_BAD_ARGUMENT, "the window must not be negative");
    if (!(job->scale > 0) || !std::isfinite(job->scale) || !(job->softcap >= 0) || !std::isfinite(job->softcap)) return fail(HB_BAD_ARGUMENT, "scale must be positive and softcap not negative");
    CHECK(check_product("heads", job->heads, job->dim));
    CHECK(check_product("input", job->tokens, job->heads * job->dim));
    CHECK(check_product("lse", job->tokens, job->heads));
    CHECK(check_strides("q", job->tokens, job->heads, job->q_row, job->q_head));
    CHECK(check_strides("k", job->tokens, job->kv_heads, job->k_row, job->k_head));
    CHECK(check_strides("v", job->tokens, job->kv_heads, job->v_row, job->v_head));
    CHECK(check_span({"bounds", job->bounds, job->segments + 1, 4}));
    if (job->bounds[0] != 0 || job->bounds[job->segments] != job->tokens) return fail(HB_BAD_ARGUMENT, "bounds must run from 0 to %lld", (long long)job->tokens);
    for (int64_t i = 0; i < job->segments; i++)
        if (job->bounds[i + 1] < job->bounds[i]) return fail(HB_BAD_ARGUMENT, "bounds descend at %lld", (long long)i);
    return HB_OK;
}

int64_t longest_of(const hb_attention& job) {
    int64_t longest = 0;
    for (int64_t i = 0; i < job.segments; i++) longest = std::max<int64_t>(longest, job.bounds[i + 1] - job.bounds[i]);
    return longest;
}

// body(worker, unit) for each unit, with a worker of its own for each thread
template <class Worker, class Body>
int32_t on_workers(const Worker& kind, int64_t units, int threads, Body body) {
    Worker measure = kind;
    const int64_t bytes = measure.lay_out(nullptr);
    std::atomic<bool> starved{false};
    std::atomic<int64_t> next{0};
    parallel(int(min64(units, threads)), [&](int, int) {
        Worker worker = kind;
        char* start = static_cast<char*>(own_panel.take(bytes));
        if (!start) {
            starved = true;
            return;
        }
        worker.lay_out(start);
        worker.p.enter();
        for (int64_t i; (i = next.fetch_add(1)) < units;) body(worker, i);
        worker.p.leave();
    });
    return starved ? fail(HB_OUT_OF_MEMORY, "no memory for %lld bytes of attention", (long long)bytes) : HB_OK;
}

// a window as long as everything is none; what is added to it below then cannot overflow
hb_attention windowed(const hb_attention& given) {
    hb_attention job = given;
    if (job.window >= job.tokens) job.window = 0;
    return job;
}

Head head_of(const hb_attention& job, int64_t segment, int64_t head, int64_t size) {
    const int64_t first = job.bounds[segment], kv = head / (job.heads / job.kv_heads);
    return {at(job.q, (first * job.q_row + head * job.q_head) * size), at(job.k, (first * job.k_row + kv * job.k_head) * size),
            at(job.v, (first * job.v_row + kv * job.v_head) * size), job.bounds[segment + 1] - first};
}

}  // namespace
}  // namespace hb

using namespace hb;

int32_t hb_attention_forward(const hb_attention* given, void* out, float* lse, int32_t dtype, int32_t threads) {
    CHECK(check_attention(given, dtype, threads));
    const hb_attention now = windowed(*given), *job = &now;
    const int64_t size = size_of(dtype), row = job->heads * job->dim;
    const Span spans[] = {{"q", job->q, extent(*job, job->heads, job->q_row, job->q_head), size},
                          {"k", job->k, extent(*job, job->kv_heads, job->k_row, job->k_head), size},
                          {"v", job->v, extent(*job, job->kv_heads, job->v_row, job->v_head), size},
                          {"out", out, job->tokens * row, size},
                          {"lse", lse, job->tokens * job->heads, 4}};
    CHECK(check_spans(spans, 2));
    if (!job->tokens) return HB_OK;
    return on_workers(Forward(*job, path(), DType(dtype), longest_of(*job)), job->segments * job->heads, threads, [&](Forward& worker, int64_t i) {
        const int64_t segment = i / job->heads, head = i % job->heads, first = job->bounds[segment];
        worker.run(head_of(*job, segment, head, size), at(out, (first * row + head * job->dim) * size), row, lse + head * job->tokens + first);
    });
}

int32_t hb_attention_backward(const hb_attention* given, const void* dout, int64_t dout_row, int64_t dout_head, const void* out,
                              const float* lse, void* dq, void* dk, void* dv, int32_t dtype, int32_t threads) {
    CHECK(check_attention(given, dtype, threads));
    const hb_attention now = windowed(*given), *job = &now;
    CHECK(check_strides("dout", job->tokens, job->heads, dout_row, dout_head));
    const int64_t size = size_of(dtype), row = job->heads * job->dim, kv_row = job->kv_heads * job->dim, shared = job->heads / job->kv_heads;
    const Span spans[] = {{"q", job->q, extent(*job, job->heads, job->q_row, job->q_head), size},
                          {"k", job->k, extent(*job, job->kv_heads, job->k_row, job->k_head), size},
                          {"v", job->v, extent(*job, job->kv_heads, job->v_row, job->v_head), size},
                          {"dout", dout, extent(*job, job->heads, dout_row, dout_head), size},
                          {"out", out, job->tokens * row, size},
                          {"lse", lse, job->tokens * job->heads, 4},
                          {"dq", dq, job->tokens * row, size},
                          {"dk", dk, job->tokens * kv_row, size},
                          {"dv", dv, job->tokens * kv_row, size}};
    CHECK(check_spans(spans, 3));
    if (!job->tokens) return HB_OK;
    return on_workers(Backward(*job, path(), DType(dtype), longest_of(*job)), job->segments * job->kv_heads, threads, [&](Backward& worker, int64_t i) {
        const int64_t segment = i / job->kv_heads, kv = i % job->kv_heads, first = job->bounds[segment];
        if (job->bounds[segment + 1] == first) return;
        worker.begin(head_of(*job, segment, kv * shared, size));
        for (int64_t h = kv * shared; h < (kv + 1) * shared; h++) {
            const Gradients gradients = {at(out, (first * row + h * job->dim) * size), at(dout, (first * dout_row + h * dout_head) * size),
                                         row, dout_row, lse + h * job->tokens + first, at(dq, (first * row + h * job->dim) * size)};
            worker.add(head_of(*job, segment, h, size), gradients);
        }
        worker.end(head_of(*job, segment, kv * shared, size), at(dk, (first * kv_row + kv * job->dim) * size), at(dv, (first * kv_row + kv * job->dim) * size));
    });
}
