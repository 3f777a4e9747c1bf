// The entry points: arguments checked, scratch taken, work shared out among threads; the arithmetic is the path's.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <new>

#if defined(HB_STD_THREADS)
#include <thread>
#include <vector>
#else
#include <omp.h>
#endif

#include "halfbyte.h"
#include "nearest.h"
#include "path.h"

namespace hb {

#if defined(HB_X86)
namespace amx { extern const Path PATH; }
namespace avx512_bf16 { extern const Path PATH; }
namespace avx512 { extern const Path PATH; }
namespace avx2 { extern const Path PATH; }
#endif
namespace portable { extern const Path PATH; }

const Path* const* all_paths(int* count) {
    static const Path* const paths[] = {
#if defined(HB_X86)
        &amx::PATH, &avx512_bf16::PATH, &avx512::PATH, &avx2::PATH,
#endif
        &portable::PATH,
    };
    *count = int(sizeof paths / sizeof *paths);
    return paths;
}

namespace {

thread_local char error_text[256];

__attribute__((format(printf, 2, 3))) int32_t fail(Status status, const char* format, ...) {
    va_list parts;
    va_start(parts, format);
    std::vsnprintf(error_text, sizeof error_text, format, parts);
    va_end(parts);
    return status;
}

std::atomic<const Path*> chosen{nullptr};

const Path& path() {
    const Path* now = chosen.load(std::memory_order_acquire);
    if (now) return *now;
    int count;
    const Path* const* paths = all_paths(&count);
    for (int i = 0; i < count; i++)
        if (paths[i]->runs_here()) {
            chosen.store(paths[i], std::memory_order_release);
            return *paths[i];
        }
    return portable::PATH;
}

// --- checks -------------------------------------------------------------------------------------------------------------

constexpr int64_t MOST = int64_t(1) << 46;  // elements of anything; products of two extents are checked against it

int64_t size_of(int32_t dtype) { return dtype == HB_F32 ? 4 : 2; }

struct Span {
    const char* name;
    const void* start;
    int64_t count, size;  // elements, bytes each
};

int32_t check_span(const Span& s) {
    if (s.count < 0 || s.count > MOST) return fail(HB_BAD_ARGUMENT, "%s has an impossible size: %lld", s.name, (long long)s.count);
    if (s.count && !s.start) return fail(HB_BAD_ARGUMENT, "%s is a null pointer", s.name);
    if (uintptr_t(s.start) % uintptr_t(s.size)) return fail(HB_BAD_ARGUMENT, "%s is not aligned to its %d-byte elements", s.name, int(s.size));
    if (uintptr_t(s.start) > UINTPTR_MAX - uintptr_t(s.count * s.size)) return fail(HB_BAD_ARGUMENT, "%s reaches past the address space", s.name);
    return HB_OK;
}

bool overlap(const Span& a, const Span& b) {
    uintptr_t a0 = uintptr_t(a.start), b0 = uintptr_t(b.start);
    return a.count && b.count && a.start && b.start && a0 < b0 + uintptr_t(b.count * b.size) && b0 < a0 + uintptr_t(a.count * a.size);
}

// every span is sound and no written one (the last `written`) touches another
template <size_t N>
int32_t check_spans(const Span (&spans)[N], size_t written) {
    for (const Span& s : spans)
        if (int32_t bad = check_span(s)) return bad;
    for (size_t i = N - written; i < N; i++)
        for (size_t j = 0; j < i; j++)
            if (overlap(spans[i], spans[j])) return fail(HB_BAD_ARGUMENT, "%s and %s overlap", spans[i].name, spans[j].name);
    return HB_OK;
}

int32_t check_dtype(int32_t dtype) {
    return dtype == HB_F32 || dtype == HB_BF16 || dtype == HB_F16 ? HB_OK : fail(HB_BAD_ARGUMENT, "unknown dtype %d", dtype);
}

int32_t check_threads(int32_t threads) {
    return threads >= 1 && threads <= 4096 ? HB_OK : fail(HB_BAD_ARGUMENT, "threads must be 1 or more, got %d", threads);
}

int32_t check_block_size(int64_t size) {
    return size >= 32 && size <= 4096 && !(size & (size - 1)) ? HB_OK : fail(HB_BAD_ARGUMENT, "block_size must be a power of two in 32..4096, got %lld", (long long)size);
}

int32_t check_count(const char* name, int64_t found, int64_t expected) {
    return found == expected ? HB_OK : fail(HB_BAD_ARGUMENT, "%s must have %lld elements, got %lld", name, (long long)expected, (long long)found);
}

int32_t check_product(const char* name, int64_t a, int64_t b) {
    int64_t product;
    if (a < 0 || b < 0 || __builtin_mul_overflow(a, b, &product) || product > MOST)
        return fail(HB_BAD_ARGUMENT, "%s has an impossible size: %lld x %lld", name, (long long)a, (long long)b);
    return HB_OK;
}

#define CHECK(call) \
    if (int32_t bad = (call)) return bad

int32_t check_weight(const hb_fourbit* q, int64_t numel) {
    if (!q) return fail(HB_BAD_ARGUMENT, "weight is a null pointer");
    CHECK(check_block_size(q->block_size));
    CHECK(check_count("weight", q->numel, numel));
    if (numel < 0 || numel > MOST) return fail(HB_BAD_ARGUMENT, "weight has an impossible size: %lld", (long long)numel);
    const int64_t blocks = ceil_div(numel, q->block_size);
    CHECK(check_count("packed", q->packed_count, ceil_div(numel, 2)));
    CHECK(check_count("absmax", q->absmax_count, blocks));
    const bool nested = q->nested_absmax != nullptr;
    if (nested && q->nested_block_size < 1) return fail(HB_BAD_ARGUMENT, "nested_block_size must be at least 1, got %d", q->nested_block_size);
    if (nested) CHECK(check_count("nested_absmax", q->nested_count, ceil_div(blocks, q->nested_block_size)));
    const Span spans[] = {
        {"packed", q->packed, q->packed_count, 1},
        {"absmax", q->absmax, q->absmax_count, nested ? 1 : 4},
        {"quant_map", q->quant_map, 16, 4},
        {"nested_absmax", q->nested_absmax, nested ? q->nested_count : 0, 4},
        {"nested_quant_map", q->nested_quant_map, nested ? 256 : 0, 4},
        {"nested_offset", q->nested_offset, nested ? 1 : 0, 4},
    };
    return check_spans(spans, 0);
}

// --- scratch ------------------------------------------------------------------------------------------------------------

// Memory a thread keeps from call to call, so that the steady state allocates nothing.
struct Buffer {
    void* start = nullptr;
    size_t size = 0;
    ~Buffer() { std::free(start); }
    void* take(int64_t bytes) {
        size_t wanted = std::max<size_t>(4096, (size_t(bytes) + 4095) / 4096 * 4096);
        if (wanted > size) {
            std::free(start);
            start = std::aligned_alloc(4096, wanted);
            size = start ? wanted : 0;
        }
        return start;
    }
};
thread_local Buffer shared_operand, own_panel, own_sums;

// --- sharing out --------------------------------------------------------------------------------------------------------

// body(me, of) on `threads` threads. All threads of this library come from here. HB_STD_THREADS: without OpenMP, whose
// waiting a thread sanitizer cannot see (tests only).
template <class Body>
void parallel(int threads, Body body) {
    if (threads <= 1) return body(0, 1);
#if defined(HB_STD_THREADS)
    std::vector<std::thread> all;
    for (int me = 0; me < threads; me++) all.emplace_back(body, me, threads);
    for (auto& thread : all) thread.join();
#else
#pragma omp parallel num_threads(threads)
    body(omp_get_thread_num(), omp_get_num_threads());
#endif
}

// body(first, last) over [0, count), one contiguous part a thread, at multiples of `grain`
template <class Body>
void in_parts(int64_t count, int64_t grain, int threads, Body body) {
    const int64_t grains = ceil_div(count, grain);
    parallel(int(min64(grains, threads)), [&](int64_t me, int64_t of) {
        const int64_t first = grains * me / of * grain, last = min64(count, grains * (me + 1) / of * grain);
        if (first < last) body(first, last);
    });
}

// body(i) for i in [0, count), taken as threads get free
template <class Body>
void one_by_one(int64_t count, int threads, Body body) {
    std::atomic<int64_t> next{0};
    parallel(int(min64(count, threads)), [&](int, int) {
        for (int64_t i; (i = next.fetch_add(1)) < count;) body(i);
    });
}

// body(first, last) over [0, count) in pieces, taken as threads get free
template <class Body>
void in_pieces(int64_t count, int64_t piece, int threads, Body body) {
    one_by_one(ceil_div(count, piece), threads, [&](int64_t i) { body(i * piece, min64(count, (i + 1) * piece)); });
}

double seconds_now() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// --- tables -------------------------------------------------------------------------------------------------------------

// The search tables of a level table, kept: there are two or three in a process. Null where memory is out.
const Nearest* nearest_of(const float* levels) {
    static std::mutex mutex;
    struct Node {
        Nearest nearest;
        Node* next;
    };
    static Node* nodes = nullptr;
    static int count = 0;
    std::lock_guard<std::mutex> guard(mutex);
    for (Node* node = nodes; node; node = node->next)
        if (!std::memcmp(node->nearest.levels, levels, sizeof node->nearest.levels)) return &node->nearest;
    if (count >= 4096) return nullptr;  // a gigabyte of tables
    Node* node = new (std::nothrow) Node;
    if (!node) return nullptr;
    build(node->nearest, levels);
    node->next = nodes;
    nodes = node;
    count++;
    return &node->nearest;
}

// midpoints of the sorted table, and the code of each rank (stable: of equal levels the first)
void sorted_levels(const float* map, float* bounds, uint8_t* codes) {
    for (int i = 0; i < 16; i++) {
        int at = i;
        for (; at > 0 && map[codes[at - 1]] > map[i]; at--) codes[at] = codes[at - 1];
        codes[at] = uint8_t(i);
    }
    for (int i = 0; i < 15; i++) bounds[i] = (map[codes[i + 1]] + map[codes[i]]) / 2;
}

// --- linear -------------------------------------------------------------------------------------------------------------

// C [tokens, columns] = A [tokens, depth] B + bias + A2 [tokens, rank] B2, B of 4-bit weights: W^T (forward) or W.
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
};

struct Operand {  // a row-major matrix, packed in strips
    const void* rows;
    int64_t depth, padded;
    char* packed;
};

char* at(void* p, int64_t bytes) { return static_cast<char*>(p) + bytes; }
const char* at(const void* p, int64_t bytes) { return static_cast<const char*>(p) + bytes; }

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

void multiply_block(const Products& p, const Path& path, const Job& job, const Operand* operands, int count, const Block& block,
                    char* panel_start, float* sums, int64_t sums_stride) {
    const int64_t groups = ceil_div(block.columns, GROUP), tile_groups = p.columns / GROUP;
    bool first = true;
    for (int o = 0; o < count; o++) {
        const Operand& a = operands[o];
        for (int64_t k = 0; k < a.padded; k += p.panel_depth) {
            const int64_t padded = min64(p.panel_depth, a.padded - k), depth = min64(padded, a.depth - k);
            const Panel panel = {panel_start, __builtin_ctzll((unsigned long long)tile_groups), padded * p.columns * p.element};
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
    const int64_t sums_size = rows * widest * 4;
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
            multiply_block(p, path, job, operands, count, {row, min64(rows, job.tokens - row), column, end - column}, panel, sums, widest);
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
    return job.tokens <= few ? multiply_few(now, p, job, threads) : multiply(now, p, job, threads);
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

int32_t hb_abi() { return HB_ABI; }

const char* hb_error() { return error_text; }

const char* hb_path() { return path().name; }

const char* hb_paths() {
    static const struct Names {
        char text[128] = "";
        Names() {
            int count;
            const Path* const* paths = all_paths(&count);
            for (int i = 0; i < count; i++)
                if (paths[i]->runs_here()) {
                    if (*text) std::strcat(text, " ");
                    std::strcat(text, paths[i]->name);
                }
        }
    } names;
    return names.text;
}

int32_t hb_choose(const char* name) {
    if (!name) return fail(HB_BAD_ARGUMENT, "the path's name is a null pointer");
    int count;
    const Path* const* paths = all_paths(&count);
    for (int i = 0; i < count; i++)
        if (!std::strcmp(paths[i]->name, name)) {
            if (!paths[i]->runs_here()) return fail(HB_UNSUPPORTED, "this processor cannot run the %s path", name);
            chosen.store(paths[i], std::memory_order_release);
            return HB_OK;
        }
    return fail(HB_UNSUPPORTED, "there is no path %.64s", name);
}

int32_t hb_quantize(const void* weight, int32_t dtype, int64_t numel, const float* quant_map, int32_t block_size,
                    uint8_t* packed, int64_t packed_count, float* absmax, int64_t absmax_count, int32_t threads) {
    CHECK(check_dtype(dtype));
    CHECK(check_threads(threads));
    CHECK(check_block_size(block_size));
    if (numel < 0 || numel > MOST) return fail(HB_BAD_ARGUMENT, "weight has an impossible size: %lld", (long long)numel);
    CHECK(check_count("packed", packed_count, ceil_div(numel, 2)));
    CHECK(check_count("absmax", absmax_count, ceil_div(numel, block_size)));
    const Span spans[] = {{"weight", weight, numel, size_of(dtype)},
                          {"quant_map", quant_map, 16, 4},
                          {"packed", packed, packed_count, 1},
                          {"absmax", absmax, absmax_count, 4}};
    CHECK(check_spans(spans, 2));
    float bounds[15];
    uint8_t codes[16];
    sorted_levels(quant_map, bounds, codes);
    const Path& now = path();
    in_pieces(absmax_count, std::max<int64_t>(1, (1 << 18) / block_size), threads, [&](int64_t first, int64_t last) {
        now.quantize(weight, DType(dtype), numel, bounds, codes, block_size, first, last, packed, absmax);
    });
    return HB_OK;
}

int32_t hb_quantize_absmax(const float* absmax, int64_t blocks, const float* nested_quant_map, int32_t nested_block_size,
                           uint8_t* codes, float* nested_absmax, int64_t groups, float* nested_offset, int32_t threads) {
    CHECK(check_threads(threads));
    if (blocks < 0 || blocks > MOST) return fail(HB_BAD_ARGUMENT, "absmax has an impossible size: %lld", (long long)blocks);
    if (nested_block_size < 1) return fail(HB_BAD_ARGUMENT, "nested_block_size must be at least 1, got %d", nested_block_size);
    CHECK(check_count("nested_absmax", groups, ceil_div(blocks, nested_block_size)));
    const Span spans[] = {{"absmax", absmax, blocks, 4},      {"nested_quant_map", nested_quant_map, 256, 4},
                          {"codes", codes, blocks, 1},        {"nested_absmax", nested_absmax, groups, 4},
                          {"nested_offset", nested_offset, 1, 4}};
    CHECK(check_spans(spans, 3));
    *nested_offset = 0;
    if (!blocks) return HB_OK;
    const Nearest* nearest = nearest_of(nested_quant_map);
    // the mean: a zero-padded halving tree of additions (ops/fourbit.py, tree_sum)
    int64_t half = 1;
    while (half * 2 < blocks) half *= 2;
    float* tree = static_cast<float*>(shared_operand.take(half * 4));
    if (!nearest || !tree) return fail(HB_OUT_OF_MEMORY, "no memory for %lld bytes of sums", (long long)half * 4);
    in_parts(half, 1 << 14, threads, [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; i++) tree[i] = absmax[i < blocks ? i : 0] + (i + half < blocks ? absmax[i + half] : 0.0f);
    });
    while (half > 1) {
        half /= 2;
        for (int64_t i = 0; i < half; i++) tree[i] = tree[i] + tree[i + half];
    }
    const float offset = *nested_offset = tree[0] / float(blocks);
    in_parts(groups, 16, threads, [&](int64_t first, int64_t last) {
        for (int64_t g = first; g < last; g++) {
            const int64_t start = g * nested_block_size, stop = min64(blocks, start + nested_block_size);
            uint32_t most = 0;
            for (int64_t i = start; i < stop; i++) {
                uint32_t bits = to_bits(absmax[i] - offset) & 0x7fffffff;
                most = bits > most ? bits : most;
            }
            nested_absmax[g] = from_bits(most);
            const float inverse = 1.0f / (nested_absmax[g] < TINY ? TINY : nested_absmax[g]);
            for (int64_t i = start; i < stop; i++) codes[i] = rank(*nearest, (absmax[i] - offset) * inverse);
        }
    });
    return HB_OK;
}

int32_t hb_dequantize(const hb_fourbit* weight, void* out, int32_t dtype, int64_t out_count, int32_t threads) {
    CHECK(check_dtype(dtype));
    CHECK(check_threads(threads));
    CHECK(check_weight(weight, out_count));
    const Span spans[] = {{"packed", weight->packed, weight->packed_count, 1},
                          {"absmax", weight->absmax, weight->absmax_count, weight->nested_absmax ? 1 : 4},
                          {"quant_map", weight->quant_map, 16, 4},
                          {"nested_absmax", weight->nested_absmax, weight->nested_absmax ? weight->nested_count : 0, 4},
                          {"out", out, out_count, size_of(dtype)}};
    CHECK(check_spans(spans, 1));
    const Path& now = path();
    // results beyond the second-level cache are not read again soon
    const bool stream = out_count * size_of(dtype) > (4 << 20);
    in_pieces(out_count, 1 << 16, threads, [&](int64_t first, int64_t last) {
        now.dequantize(*weight, first, last - first, DType(dtype), false, stream, at(out, first * size_of(dtype)));
    });
    return HB_OK;
}

int32_t hb_dropout_mask(uint8_t* out, int64_t count, int32_t threshold, uint64_t seed, uint32_t step, uint32_t micro_batch,
                        uint32_t layer, int32_t threads) {
    CHECK(check_threads(threads));
    if (threshold < 0 || threshold > 65535) return fail(HB_BAD_ARGUMENT, "threshold must be in 0..65535, got %d", threshold);
    CHECK(check_span({"out", out, count, 1}));
    if (count > (int64_t(1) << 35)) return fail(HB_BAD_ARGUMENT, "a mask has at most 2^35 elements, got %lld", (long long)count);
    const uint32_t counter[3] = {layer, micro_batch, step}, key[2] = {uint32_t(seed), uint32_t(seed >> 32)};
    const Path& now = path();
    in_parts(ceil_div(count, 8), 1 << 12, threads, [&](int64_t first, int64_t last) {
        now.dropout_mask(out, count, first, last, uint32_t(threshold), counter, key);
    });
    return HB_OK;
}

int32_t hb_linear(const void* x, int64_t tokens, int64_t in_features, int64_t out_features, const hb_fourbit* weight,
                  const void* bias, const void* u, const void* b, int64_t rank, void* y, int32_t dtype, int32_t threads) {
    const Job job = {x, weight, bias, u, b, y, tokens, in_features, out_features, rank, DType(dtype), true};
    CHECK(check_job(job, dtype, threads, out_features, in_features));
    return run(job, threads);
}

int32_t hb_linear_input_grad(const void* dy, int64_t tokens, int64_t out_features, int64_t in_features,
                             const hb_fourbit* weight, const void* du, const void* a, int64_t rank, void* dx, int32_t dtype,
                             int32_t threads) {
    const Job job = {dy, weight, nullptr, du, a, dx, tokens, out_features, in_features, rank, DType(dtype), false};
    CHECK(check_job(job, dtype, threads, out_features, in_features));
    return run(job, threads);
}

int32_t hb_adamw_8bit(float* const* params, const float* const* grads, const int64_t* sizes, int64_t count, uint8_t* m_codes,
                      uint8_t* v_codes, float* m_absmax, float* v_absmax, int64_t arena, const float* m_map,
                      const float* v_map, float step_size, float beta1, float one_less_beta1, float beta2,
                      float one_less_beta2, float eps, float shrink, int32_t threads) {
    CHECK(check_threads(threads));
    if (count < 0 || count > (1 << 24)) return fail(HB_BAD_ARGUMENT, "impossible number of tensors: %lld", (long long)count);
    if (count && (!params || !grads || !sizes)) return fail(HB_BAD_ARGUMENT, "the lists of tensors are null pointers");
    int64_t total = 0;
    for (int64_t i = 0; i < count; i++) {
        const Span spans[] = {{"grad", grads[i], sizes[i], 4}, {"param", params[i], sizes[i], 4}};
        CHECK(check_spans(spans, 1));
        total += round_up(sizes[i], MOMENT_BLOCK);
        if (total > MOST) return fail(HB_BAD_ARGUMENT, "the arena has an impossible size");
    }
    CHECK(check_count("arena", arena, total));
    const Span spans[] = {{"m_map", m_map, 256, 4},
                          {"v_map", v_map, 256, 4},
                          {"m_codes", m_codes, arena, 1},
                          {"v_codes", v_codes, arena, 1},
                          {"m_absmax", m_absmax, arena / MOMENT_BLOCK, 4},
                          {"v_absmax", v_absmax, arena / MOMENT_BLOCK, 4}};
    CHECK(check_spans(spans, 4));
    if (!count) return HB_OK;
    const Nearest *m_nearest = nearest_of(m_map), *v_nearest = nearest_of(v_map);
    if (!m_nearest || !v_nearest) return fail(HB_OUT_OF_MEMORY, "no memory for the search tables");
    const float numbers[7] = {step_size, beta1, one_less_beta1, beta2, one_less_beta2, eps, shrink};
    const Path& now = path();
    in_parts(arena / MOMENT_BLOCK, 64, threads, [&](int64_t first, int64_t last) {
        int64_t tensor = 0, start = 0;  // the tensor that block `first` lies in, and the block it starts at
        while (start + ceil_div(sizes[tensor], MOMENT_BLOCK) <= first) start += ceil_div(sizes[tensor++], MOMENT_BLOCK);
        for (int64_t block = first; block < last; block++) {
            while (start + ceil_div(sizes[tensor], MOMENT_BLOCK) <= block) start += ceil_div(sizes[tensor++], MOMENT_BLOCK);
            const int64_t offset = (block - start) * MOMENT_BLOCK;
            now.adamw(params[tensor] + offset, grads[tensor] + offset, min64(MOMENT_BLOCK, sizes[tensor] - offset),
                      m_codes + block * MOMENT_BLOCK, v_codes + block * MOMENT_BLOCK, m_absmax + block, v_absmax + block,
                      m_map, v_map, *m_nearest, *v_nearest, numbers);
        }
    });
    return HB_OK;
}

int32_t hb_product_peak(int32_t dtype, int32_t threads, double* flops_per_second) {
    CHECK(check_dtype(dtype));
    CHECK(check_threads(threads));
    if (!flops_per_second) return fail(HB_BAD_ARGUMENT, "the result is a null pointer");
    const Path& now = path();
    std::atomic<int64_t> flops{0};
    const double began = seconds_now();
    parallel(threads, [&](int, int) { flops += int64_t(now.peak(DType(dtype), 4000000)); });
    *flops_per_second = double(flops) / (seconds_now() - began);
    return HB_OK;
}
