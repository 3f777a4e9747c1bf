// Every kernel that is written once for all instruction sets. Included by each path_*.cpp inside its own namespace;
// HB_WIDTH is the number of fp32 lanes. In the operations whose every bit is defined (quantize, dequantize, dropout, the
// optimizer) each multiplication and addition is rounded by itself (-ffp-contract=off), as the plain-PyTorch meaning does
// it, so all paths give the same bits.
#include "convert.inl"
#include "quantize.inl"
#include "dequantize.inl"
#include "dropout.inl"
#include "adamw.inl"
#include "passes.inl"
#include "products.inl"
