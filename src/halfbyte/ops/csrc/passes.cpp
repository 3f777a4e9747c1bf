// Entry points of the passes over rows (ops/passes.py).
#include "entry.h"

namespace hb {
namespace {

int32_t check_rows(int64_t rows, int64_t width, int32_t dtype, int32_t threads) {
    CHECK(check_dtype(dtype));
    CHECK(check_threads(threads));
    return check_product("input", rows, width);
}

int32_t check_gate(int64_t rows, int64_t width, int64_t gate_stride, int64_t up_stride, int32_t activation, int32_t dtype, int32_t threads) {
    CHECK(check_rows(rows, width, dtype, threads));
    CHECK(check_product("gate", rows, gate_stride));
    CHECK(check_product("up", rows, up_stride));
    if (gate_stride < width || up_stride < width) return fail(HB_BAD_ARGUMENT, "rows of gate or up overlap");
    if (activation < HB_SILU || activation > HB_GELU) return fail(HB_BAD_ARGUMENT, "unknown activation %d", activation);
    return HB_OK;
}

int64_t extent(int64_t rows, int64_t stride, int64_t width) { return rows ? (rows - 1) * stride + width : 0; }

}  // namespace
}  // namespace hb

using namespace hb;

int32_t hb_rms_norm(const void* x, const void* weight, int64_t rows, int64_t width, float eps, float offset, int32_t cast_first,
                    void* y, float* inverse, int32_t dtype, int32_t threads) {
    CHECK(check_rows(rows, width, dtype, threads));
    const int64_t size = size_of(dtype);
    const Span spans[] = {{"input", x, rows * width, size}, {"weight", weight, width, size}, {"result", y, rows * width, size}, {"inverse", inverse, rows, 4}};
    CHECK(check_spans(spans, 2));
    const Path& now = path();
    in_parts(rows, 1, threads, [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; i++)
            now.rms_norm(at(x, i * width * size), weight, width, eps, offset, cast_first != 0, DType(dtype), at(y, i * width * size), inverse + i);
    });
    return HB_OK;
}

int32_t hb_rms_norm_grad(const void* dy, const void* x, const void* weight, const float* inverse, int64_t rows, int64_t width,
                         float offset, void* dx, int32_t dtype, int32_t threads) {
    CHECK(check_rows(rows, width, dtype, threads));
    const int64_t size = size_of(dtype);
    const Span spans[] = {{"gradient", dy, rows * width, size}, {"input", x, rows * width, size}, {"weight", weight, width, size},
                          {"inverse", inverse, rows, 4},        {"result", dx, rows * width, size}};
    CHECK(check_spans(spans, 1));
    const Path& now = path();
    in_parts(rows, 1, threads, [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; i++)
            now.rms_norm_grad(at(dy, i * width * size), at(x, i * width * size), weight, inverse[i], width, offset, DType(dtype), at(dx, i * width * size));
    });
    return HB_OK;
}

int32_t hb_rotate(const void* x, const void* cos, const void* sin, int64_t tokens, int64_t heads, int64_t dim, int32_t back,
                  void* y, int32_t dtype, int32_t threads) {
    CHECK(check_dtype(dtype));
    CHECK(check_threads(threads));
    if (heads < 0 || dim < 0 || dim % 2) return fail(HB_BAD_ARGUMENT, "heads and an even dim are needed, got %lld and %lld", (long long)heads, (long long)dim);
    CHECK(check_product("heads", heads, dim));
    CHECK(check_product("input", tokens, heads * dim));
    CHECK(check_product("angles", tokens, dim));
    const int64_t size = size_of(dtype), row = heads * dim;
    const Span spans[] = {{"input", x, tokens * row, size}, {"cos", cos, tokens * dim, size}, {"sin", sin, tokens * dim, size}, {"result", y, tokens * row, size}};
    CHECK(check_spans(spans, 1));
    if (row == 0) return HB_OK;
    const Path& now = path();
    in_parts(tokens, 1, threads, [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; i++)
            now.rotate(at(x, i * row * size), at(cos, i * dim * size), at(sin, i * dim * size), heads, dim, back != 0, DType(dtype), at(y, i * row * size));
    });
    return HB_OK;
}

int32_t hb_gated(const void* gate, int64_t gate_stride, const void* up, int64_t up_stride, int64_t rows, int64_t width,
                 int32_t activation, void* y, int32_t dtype, int32_t threads) {
    CHECK(check_gate(rows, width, gate_stride, up_stride, activation, dtype, threads));
    const int64_t size = size_of(dtype);
    const Span spans[] = {{"gate", gate, extent(rows, gate_stride, width), size}, {"up", up, extent(rows, up_stride, width), size}, {"result", y, rows * width, size}};
    CHECK(check_spans(spans, 1));
    const Path& now = path();
    in_parts(rows, 1, threads, [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; i++)
            now.gated(at(gate, i * gate_stride * size), at(up, i * up_stride * size), width, activation, DType(dtype), at(y, i * width * size));
    });
    return HB_OK;
}

int32_t hb_gated_grad(const void* dy, const void* gate, int64_t gate_stride, const void* up, int64_t up_stride, int64_t rows,
                      int64_t width, int32_t activation, void* dgate, void* dup, int32_t dtype, int32_t threads) {
    CHECK(check_gate(rows, width, gate_stride, up_stride, activation, dtype, threads));
    const int64_t size = size_of(dtype);
    const Span spans[] = {{"gradient", dy, rows * width, size},
                          {"gate", gate, extent(rows, gate_stride, width), size},
                          {"up", up, extent(rows, up_stride, width), size},
                          {"gate's gradient", dgate, rows * width, size},
                          {"up's gradient", dup, rows * width, size}};
    CHECK(check_spans(spans, 2));
    const Path& now = path();
    in_parts(rows, 1, threads, [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; i++)
            now.gated_grad(at(dy, i * width * size), at(gate, i * gate_stride * size), at(up, i * up_stride * size), width, activation,
                           DType(dtype), at(dgate, i * width * size), at(dup, i * width * size));
    });
    return HB_OK;
}

int32_t hb_cross_entropy(const void* logits, const int64_t* labels, int64_t rows, int64_t width, float* losses, void* grad,
                         int32_t dtype, int32_t threads) {
    CHECK(check_rows(rows, width, dtype, threads));
    const int64_t size = size_of(dtype);
    const Span spans[] = {{"logits", logits, rows * width, size}, {"labels", labels, rows, 8}, {"losses", losses, rows, 4}, {"gradient", grad, rows * width, size}};
    CHECK(check_spans(spans, 2));
    const Path& now = path();
    in_pieces(rows, 1, threads, [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; i++) {
            void* to = at(grad, i * width * size);
            if (labels[i] >= 0 && labels[i] < width) {
                losses[i] = now.cross_entropy(at(logits, i * width * size), width, labels[i], DType(dtype), to);
            } else {
                losses[i] = 0;
                std::memset(to, 0, size_t(width * size));
            }
        }
    });
    return HB_OK;
}
