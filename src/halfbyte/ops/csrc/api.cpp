// The choice of a path, and the entry points of the operations whose every bit is defined.
#include <chrono>
#include <cmath>
#include <mutex>
#include <new>

#include "entry.h"

namespace hb {

#if defined(HB_AMX)
namespace amx { extern const Path PATH; }
#endif
#if defined(HB_AVX512_BF16)
namespace avx512_bf16 { extern const Path PATH; }
#endif
#if defined(HB_AVX512)
namespace avx512 { extern const Path PATH; }
#endif
#if defined(HB_AVX2)
namespace avx2 { extern const Path PATH; }
#endif
namespace portable { extern const Path PATH; }

const Path* const* all_paths(int* count) {
    static const Path* const paths[] = {
#if defined(HB_AMX)
        &amx::PATH,
#endif
#if defined(HB_AVX512_BF16)
        &avx512_bf16::PATH,
#endif
#if defined(HB_AVX512)
        &avx512::PATH,
#endif
#if defined(HB_AVX2)
        &avx2::PATH,
#endif
        &portable::PATH,
    };
    *count = int(sizeof paths / sizeof *paths);
    return paths;
}

static std::atomic<const Path*> chosen{nullptr};

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

namespace {

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
    AllNumbers here;
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

int32_t hb_dropout_mask(uint8_t* out, int64_t count, const hb_dropout* dropout, int32_t threads) {
    CHECK(check_threads(threads));
    CHECK(check_span({"out", out, count, 1}));
    if (!dropout) return fail(HB_BAD_ARGUMENT, "dropout is a null pointer");
    CHECK(check_dropout(dropout, count));
    const Path& now = path();
    in_parts(count, 1 << 15, threads, [&](int64_t first, int64_t last) { now.dropout_mask(out + first, first, last - first, *dropout); });
    return HB_OK;
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
