// The C interface of the CPU kernels: what Python's ctypes calls, and nothing else.
//
// Every function checks its arguments (null and misaligned pointers, sizes whose products would overflow, counts that do
// not belong together, buffers that overlap) before it reads a byte, and returns a Status; `hb_error` then has the text.
// Nothing aborts and no exception leaves the library. Threads are OpenMP's, as many as the call names.
#pragma once
#include <cstdint>

#define HB_API extern "C" __attribute__((visibility("default")))

enum Status : int32_t { HB_OK = 0, HB_BAD_ARGUMENT = 1, HB_OUT_OF_MEMORY = 2, HB_UNSUPPORTED = 3 };
enum DType : int32_t { HB_F32 = 0, HB_BF16 = 1, HB_F16 = 2 };

enum Activation : int32_t { HB_SILU = 0, HB_GELU_TANH = 1, HB_GELU = 2 };

constexpr int32_t HB_ABI = 4;

// A stored 4-bit tensor, as ops/fourbit.py describes it. Counts are those of the caller's tensors and are checked.
struct hb_fourbit {
    const uint8_t* packed;           // [packed_count], two codes a byte, the even element in the high nibble
    const void* absmax;              // [absmax_count], uint8 codes if nested_absmax is given, else fp32
    const float* quant_map;          // [16]
    const float* nested_absmax;      // [nested_count] or null
    const float* nested_quant_map;   // [256] or null
    const float* nested_offset;      // [1] or null
    int64_t numel;
    int64_t packed_count, absmax_count, nested_count;
    int32_t block_size, nested_block_size;
};

// Which elements of a tensor are dropped (ops/dropout.py); with j = first + i, element i has counter (j / 8, layer,
// micro_batch, step).
struct hb_dropout {
    uint64_t seed;
    int64_t first;
    uint32_t step, micro_batch, layer;
    int32_t threshold;  // of 65536; 0: nothing is dropped
};

HB_API int32_t hb_abi();
HB_API const char* hb_error();                 // of the last failed call on this thread
HB_API const char* hb_paths();                 // names this processor can run, best first, separated by spaces
HB_API const char* hb_path();                  // the one in use
HB_API int32_t hb_choose(const char* path);    // not while another call runs

// weight [numel] of `dtype` -> packed [ceil(numel / 2)], absmax fp32 [ceil(numel / block_size)]
HB_API int32_t hb_quantize(const void* weight, int32_t dtype, int64_t numel, const float* quant_map,
                           int32_t block_size, uint8_t* packed, int64_t packed_count, float* absmax,
                           int64_t absmax_count, int32_t threads);

// absmax fp32 [blocks] -> codes [blocks], nested_absmax [groups], nested_offset [1]
HB_API int32_t hb_quantize_absmax(const float* absmax, int64_t blocks, const float* nested_quant_map,
                                  int32_t nested_block_size, uint8_t* codes, float* nested_absmax, int64_t groups,
                                  float* nested_offset, int32_t threads);

// -> out [numel] of `dtype`
HB_API int32_t hb_dequantize(const hb_fourbit* weight, void* out, int32_t dtype, int64_t out_count, int32_t threads);

// out [count] = 1 where an element is kept, 0 where it is dropped
HB_API int32_t hb_dropout_mask(uint8_t* out, int64_t count, const hb_dropout* dropout, int32_t threads);

// y [tokens, out_features] = x [tokens, in_features] W^T + bias + u [tokens, rank] B^T; bias, u and B may be null.
// W is [out_features, in_features]; bias and B [out_features, rank] are of `dtype`, like x, u and y.
HB_API int32_t hb_linear(const void* x, int64_t tokens, int64_t in_features, int64_t out_features,
                         const hb_fourbit* weight, const void* bias, const void* u, const void* b, int64_t rank,
                         void* y, int32_t dtype, int32_t threads);

// dx [tokens, in_features] = dy [tokens, out_features] W + drop(du [tokens, rank] A); du and A [rank, in_features] may be
// null, so may `dropout`
HB_API int32_t hb_linear_input_grad(const void* dy, int64_t tokens, int64_t out_features, int64_t in_features,
                                    const hb_fourbit* weight, const void* du, const void* a, int64_t rank,
                                    const hb_dropout* dropout, void* dx, int32_t dtype, int32_t threads);

// LoRA (ops/lora.py): u [tokens, rank] = drop(x [tokens, in_features]) A^T, A [rank, in_features]
HB_API int32_t hb_lora_input(const void* x, int64_t tokens, int64_t in_features, const void* a, int64_t rank,
                             const hb_dropout* dropout, void* u, int32_t dtype, int32_t threads);

// du [tokens, rank] = dy [tokens, out_features] B; da fp32 [rank, in_features] = du^T drop(x); db fp32 [out_features, rank] =
// scale dy^T u
HB_API int32_t hb_lora_grads(const void* dy, const void* x, const void* u, const void* b, int64_t tokens,
                             int64_t in_features, int64_t out_features, int64_t rank, float scale,
                             const hb_dropout* dropout, void* du, float* da, float* db, int32_t dtype, int32_t threads);

// y [rows, width] = x / sqrt(mean(x^2) + eps) (offset + weight [width]), inverse fp32 [rows] = 1 / sqrt(mean(x^2) + eps);
// cast_first: the quotient is rounded to `dtype` before it is multiplied (ops/passes.py)
HB_API int32_t hb_rms_norm(const void* x, const void* weight, int64_t rows, int64_t width, float eps, float offset,
                           int32_t cast_first, void* y, float* inverse, int32_t dtype, int32_t threads);
HB_API int32_t hb_rms_norm_grad(const void* dy, const void* x, const void* weight, const float* inverse, int64_t rows,
                                int64_t width, float offset, void* dx, int32_t dtype, int32_t threads);

// y [rows, width] = activation(gate) up; rows of gate and up begin `gate_stride` and `up_stride` elements apart
HB_API int32_t hb_gated(const void* gate, int64_t gate_stride, const void* up, int64_t up_stride, int64_t rows, int64_t width,
                        int32_t activation, void* y, int32_t dtype, int32_t threads);
HB_API int32_t hb_gated_grad(const void* dy, const void* gate, int64_t gate_stride, const void* up, int64_t up_stride,
                             int64_t rows, int64_t width, int32_t activation, void* dgate, void* dup, int32_t dtype,
                             int32_t threads);

// rotary position embedding: with halves (a, b) of each head's `dim` elements, y = (a cos1 - b sin1, b cos2 + a sin2), or,
// back, (a cos1 + b sin2, b cos2 - a sin1); x, y [tokens, heads, dim], cos, sin [tokens, dim]; dim even (ops/rotary.py)
HB_API int32_t hb_rotate(const void* x, const void* cos, const void* sin, int64_t tokens, int64_t heads, int64_t dim,
                         int32_t back, void* y, int32_t dtype, int32_t threads);

// losses fp32 [rows], grad [rows, width] = d loss / d logits; both zero where a label is outside 0..width - 1
HB_API int32_t hb_cross_entropy(const void* logits, const int64_t* labels, int64_t rows, int64_t width, float* losses,
                                void* grad, int32_t dtype, int32_t threads);

// Causal attention of rows of tokens laid end to end, each seeing only itself (ops/attention.py). Element (token, head, i)
// of q lies at token * q_row + head * q_head + i; k and v have kv_heads heads, each read by heads / kv_heads of q's.
struct hb_attention {
    const void *q, *k, *v;
    int64_t q_row, q_head, k_row, k_head, v_row, v_head;
    const int32_t* bounds;  // [segments + 1], from 0 to tokens, not descending
    int64_t segments, tokens, heads, kv_heads, dim;
    int64_t window;  // tokens a query sees, itself included; 0: all before it
    float scale, softcap;  // softcap 0: none
};

// out [tokens, heads, dim], lse fp32 [heads, tokens] (the logarithm of the softmax's denominator)
HB_API int32_t hb_attention_forward(const hb_attention* job, void* out, float* lse, int32_t dtype, int32_t threads);

// dout as q, with its own strides; dq [tokens, heads, dim], dk and dv [tokens, kv_heads, dim]
HB_API int32_t hb_attention_backward(const hb_attention* job, const void* dout, int64_t dout_row, int64_t dout_head,
                                     const void* out, const float* lse, void* dq, void* dk, void* dv, int32_t dtype,
                                     int32_t threads);

// One AdamW step of `count` tensors whose moments are 8-bit codes in one arena (ops/adamw8bit.py).
HB_API int32_t hb_adamw_8bit(float* const* params, const float* const* grads, const int64_t* sizes, int64_t count,
                             uint8_t* m_codes, uint8_t* v_codes, float* m_absmax, float* v_absmax, int64_t arena,
                             const float* m_map, const float* v_map, float step_size, float beta1, float one_less_beta1,
                             float beta2, float one_less_beta2, float eps, float shrink, int32_t threads);

// For `halfbyte bench`: the rate of the products a path is built on, out of registers alone.
HB_API int32_t hb_product_peak(int32_t dtype, int32_t threads, double* flops_per_second);
