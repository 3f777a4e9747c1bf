// What every entry point is made of: arguments checked, scratch taken, work shared out among threads.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#if defined(HB_X86)
#include <immintrin.h>
#endif
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

const Path& path();  // the one in use

inline thread_local char error_text[256];

__attribute__((format(printf, 2, 3))) inline int32_t fail(Status status, const char* format, ...) {
    va_list parts;
    va_start(parts, format);
    std::vsnprintf(error_text, sizeof error_text, format, parts);
    va_end(parts);
    return status;
}

// --- checks -------------------------------------------------------------------------------------------------------------

constexpr int64_t MOST = int64_t(1) << 46;  // elements of anything; products of two extents are checked against it

inline int64_t size_of(int32_t dtype) { return dtype == HB_F32 ? 4 : 2; }

struct Span {
    const char* name;
    const void* start;
    int64_t count, size;  // elements, bytes each
};

inline int32_t check_span(const Span& s) {
    if (s.count < 0 || s.count > MOST) return fail(HB_BAD_ARGUMENT, "%s has an impossible size: %lld", s.name, (long long)s.count);
    if (s.count && !s.start) return fail(HB_BAD_ARGUMENT, "%s is a null pointer", s.name);
    if (uintptr_t(s.start) % uintptr_t(s.size)) return fail(HB_BAD_ARGUMENT, "%s is not aligned to its %d-byte elements", s.name, int(s.size));
    if (uintptr_t(s.start) > UINTPTR_MAX - uintptr_t(s.count * s.size)) return fail(HB_BAD_ARGUMENT, "%s reaches past the address space", s.name);
    return HB_OK;
}

inline bool overlap(const Span& a, const Span& b) {
    uintptr_t a0 = uintptr_t(a.start), b0 = uintptr_t(b.start);
    return a.count && b.count && a.start && b.start && a0 < b0 + uintptr_t(b.count * b.size) && b0 < a0 + uintptr_t(a.count * a.size);
}

// every span is sound and no written one (the last `written`) touches another
template <size_t N>
inline int32_t check_spans(const Span (&spans)[N], size_t written) {
    for (const Span& s : spans)
        if (int32_t bad = check_span(s)) return bad;
    for (size_t i = N - written; i < N; i++)
        for (size_t j = 0; j < i; j++)
            if (overlap(spans[i], spans[j])) return fail(HB_BAD_ARGUMENT, "%s and %s overlap", spans[i].name, spans[j].name);
    return HB_OK;
}

inline int32_t check_dtype(int32_t dtype) {
    return dtype == HB_F32 || dtype == HB_BF16 || dtype == HB_F16 ? HB_OK : fail(HB_BAD_ARGUMENT, "unknown dtype %d", dtype);
}

inline int32_t check_threads(int32_t threads) {
    return threads >= 1 && threads <= 4096 ? HB_OK : fail(HB_BAD_ARGUMENT, "threads must be 1 or more, got %d", threads);
}

inline int32_t check_block_size(int64_t size) {
    return size >= 32 && size <= 4096 && !(size & (size - 1)) ? HB_OK : fail(HB_BAD_ARGUMENT, "block_size must be a power of two in 32..4096, got %lld", (long long)size);
}

inline int32_t check_count(const char* name, int64_t found, int64_t expected) {
    return found == expected ? HB_OK : fail(HB_BAD_ARGUMENT, "%s must have %lld elements, got %lld", name, (long long)expected, (long long)found);
}

inline int32_t check_product(const char* name, int64_t a, int64_t b) {
    int64_t product;
    if (a < 0 || b < 0 || __builtin_mul_overflow(a, b, &product) || product > MOST)
        return fail(HB_BAD_ARGUMENT, "%s has an impossible size: %lld x %lld", name, (long long)a, (long long)b);
    return HB_OK;
}

inline int32_t check_dropout(const hb_dropout* dropout, int64_t count) {
    if (!dropout) return HB_OK;
    if (dropout->threshold < 0 || dropout->threshold > 65535) return fail(HB_BAD_ARGUMENT, "threshold must be in 0..65535, got %d", dropout->threshold);
    constexpr int64_t most = int64_t(1) << 35;
    if (count > most || dropout->first < 0 || dropout->first > most - count)
        return fail(HB_BAD_ARGUMENT, "a mask has elements 0 to 2^35, got %lld from %lld on", (long long)count, (long long)dropout->first);
    return HB_OK;
}

#define CHECK(call) \
    if (int32_t bad = (call)) return bad

inline int32_t check_weight(const hb_fourbit* q, int64_t numel) {
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
inline thread_local Buffer shared_operand, own_panel, own_sums;

// --- sharing out --------------------------------------------------------------------------------------------------------

// Within its block subnormal numbers are numbers, whatever the calling thread (or a library built with -ffast-math) has set:
// scales of nothing but zeros are compared with one, and quantized bytes are the same everywhere.
struct AllNumbers {
#if defined(HB_X86)
    unsigned before = _mm_getcsr();
    AllNumbers() { _mm_setcsr(before & ~0x8040u); }  // flush to zero, denormals are zero
    ~AllNumbers() { _mm_setcsr(before); }
#elif defined(__aarch64__)
    uint64_t before;
    AllNumbers() {
        __asm__ volatile("mrs %0, fpcr" : "=r"(before));
        __asm__ volatile("msr fpcr, %0" : : "r"(before & ~(uint64_t(1) << 24)));
    }
    ~AllNumbers() { __asm__ volatile("msr fpcr, %0" : : "r"(before)); }
#endif
};


// body(me, of) on `threads` threads. All threads of this library come from here. HB_STD_THREADS: without OpenMP, whose
// waiting a thread sanitizer cannot see (tests only).
template <class Body>
void parallel(int threads, Body body) {
    auto exactly = [&](int me, int of) {
        AllNumbers here;
        body(me, of);
    };
    if (threads <= 1) return exactly(0, 1);
#if defined(HB_STD_THREADS)
    std::vector<std::thread> all;
    for (int me = 0; me < threads; me++) all.emplace_back(exactly, me, threads);
    for (auto& thread : all) thread.join();
#else
#pragma omp parallel num_threads(threads)
    exactly(omp_get_thread_num(), omp_get_num_threads());
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

inline char* at(void* p, int64_t bytes) { return static_cast<char*>(p) + bytes; }
inline const char* at(const void* p, int64_t bytes) { return static_cast<const char*>(p) + bytes; }

}  // namespace hb
