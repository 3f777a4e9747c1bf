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

constexpr int32_t HB_ABI = 1;

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

// out [count] = 1 where an element is kept, 0 where it is dropped; threshold of 65536 (ops/dropout.py)
HB_API int32_t hb_dropout_mask(uint8_t* out, int64_t count, int32_t threshold, uint64_t seed, uint32_t step,
                               uint32_t micro_batch, uint32_t layer, int32_t threads);

// y [tokens, out_features] = x [tokens, in_features] W^T + bias + u [tokens, rank] B^T; bias, u and B may be null.
// W is [out_features, in_features]; bias and B [out_features, rank] are of `dtype`, like x, u and y.
HB_API int32_t hb_linear(const void* x, int64_t tokens, int64_t in_features, int64_t out_features,
                         const hb_fourbit* weight, const void* bias, const void* u, const void* b, int64_t rank,
                         void* y, int32_t dtype, int32_t threads);

// dx [tokens, in_features] = dy [tokens, out_features] W + du [tokens, rank] A; du and A [rank, in_features] may be null
HB_API int32_t hb_linear_input_grad(const void* dy, int64_t tokens, int64_t out_features, int64_t in_features,
                                    const hb_fourbit* weight, const void* du, const void* a, int64_t rank, void* dx,
                                    int32_t dtype, int32_t threads);

// One AdamW step of `count` tensors whose moments are 8-bit codes in one arena (ops/adamw8bit.py).
HB_API int32_t hb_adamw_8bit(float* const* params, const float* const* grads, const int64_t* sizes, int64_t count,
                             uint8_t* m_codes, uint8_t* v_codes, float* m_absmax, float* v_absmax, int64_t arena,
                             const float* m_map, const float* v_map, float step_size, float beta1, float one_less_beta1,
                             float beta2, float one_less_beta2, float eps, float shrink, int32_t threads);

// For `halfbyte bench`: the rate of the products a path is built on, out of registers alone.
HB_API int32_t hb_product_peak(int32_t dtype, int32_t threads, double* flops_per_second);
