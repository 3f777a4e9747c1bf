"""Compile every Triton kernel for a GPU that is not there, as it would be launched. Run by
test_triton.py, by itself: where kernels are interpreted they cannot be compiled.

    python tests/compile_kernels.py [capability, such as 90]
"""

import json
import sys
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from halfbyte import nf4, ops
from halfbyte.ops import gpu, gpu_calls

TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.uint8: "u8",
    torch.int8: "i8",
    torch.int32: "i32",
    torch.int64: "i64",
}


def described(argument: Any) -> tuple[str, bool]:
    """Triton's name of an argument's type, and whether it is known to be a multiple of 16."""
    if isinstance(argument, Tensor):
        return "*" + TYPES[argument.dtype], argument.data_ptr() % 16 == 0
    if isinstance(argument, float):
        return "fp32", False
    kind = "i32" if -(2**31) <= argument < 2**31 else "i64" if argument < 2**63 else "u64"
    return kind, argument % 16 == 0


class Launches:
    """In place of `gpu_calls._launch`: what would be compiled."""

    def __init__(self) -> None:
        self.found: dict[str, tuple[Any, Any, dict[str, Any]]] = {}

    def __call__(
        self, kernel: Any, grid: Any, *args: Any, warps: int = 4, **constants: Any
    ) -> None:
        assert all(0 < size < (65536 if place else 2**31) for place, size in enumerate(grid)), grid
        names, signature, attributes, fixed = kernel.arg_names, {}, {}, dict(constants)
        for place, (name, argument) in enumerate(zip(names, args, strict=False)):
            specialized = (
                not isinstance(argument, Tensor) and not kernel.params[place].do_not_specialize
            )
            if specialized and isinstance(argument, int) and argument == 1:
                fixed[name] = 1
                continue
            signature[name], divisible = described(argument)
            if divisible and (isinstance(argument, Tensor) or specialized):
                attributes[(place,)] = [["tt.divisibility", 16]]
        signature |= dict.fromkeys(fixed, "constexpr")
        ordered = {name: signature[name] for name in names}
        source = ASTSource(
            kernel, ordered, {(names.index(k),): v for k, v in fixed.items()}, attributes
        )
        key = f"{kernel.__name__} {ordered} {fixed} {sorted(attributes)} {warps}"
        self.found[key] = (kernel, source, {"num_warps": warps, "enable_fp_fusion": False})


def launches() -> Launches:
    """Of every operation on its own small case in bf16, and of the sizes that models have."""
    found = Launches()
    gpu_calls._launch = found
    plain = gpu.sample
    gpu.sample = lambda *args, wide=False, seed=0: plain(*args, wide=wide, seed=seed).to(
        torch.float32 if wide else torch.bfloat16
    )
    here = torch.device("cpu")
    for name, (_, ours, cases) in gpu.REGISTERED.items():
        if name not in ("attention", "attention_grad"):
            for case in cases:
                ours(*case(here))
    narrow = torch.bfloat16
    for double in (True, False):
        weight = nf4.quantize(torch.ones(256, 512), double_quant=double)
        gpu_calls.dequantize_4bit(*weight.parts, torch.empty(256 * 512, dtype=narrow))
        gpu_calls.matvec(torch.ones(1, 512, dtype=narrow), tuple(weight.parts), 256)
    wide, x = torch.ones(2, 8192, dtype=narrow), torch.ones(8192, dtype=narrow)
    _, inverse = gpu_calls.rms_norm(wide, x, 1e-6, 1.0, False)
    gpu_calls.rms_norm_grad(wide, wide, x, inverse, 1.0)
    logits = torch.ones(2, 128256, dtype=narrow)
    gpu_calls.cross_entropy(logits, torch.tensor([0, 1]), torch.empty_like(logits))
    for activation in (1, 2):
        gpu_calls.gated(wide, wide, activation)
        gpu_calls.gated_grad(wide, wide, wide, activation)
    for first in (0, 2**34):
        numbers = list(ops.Dropout(100, (1 << 62) + 5, 3, 0, 17, first))
        gpu_calls.drop(wide, numbers)
        gpu_calls.add_dropped(wide, wide, numbers)
    gpu_calls.rotate(
        torch.ones(4, 8, 128, dtype=narrow),
        torch.ones(4, 128, dtype=narrow),
        torch.ones(4, 128),
        True,
    )
    return found


def main() -> None:
    target = GPUTarget("cuda", int(sys.argv[1]) if len(sys.argv) > 1 else 90, 32)
    wrong, kernels = [], set()
    for key, (kernel, source, options) in launches().found.items():
        kernels.add(kernel.__name__)
        try:
            code = triton.compile(source, target=target, options=options).asm["ptx"]
        except Exception as error:
            wrong.append(f"{key}: {type(error).__name__}: {str(error)[-300:]}")
            continue
        exact = kernel.__name__ in (
            "quantize",
            "quantize_scales",
            "dequantize",
            "adamw_8bit",
            "drop",
            "dropout_mask",
        )
        if exact and any(sign in code for sign in ("fma.rn.f32", "div.full", ".ftz", ".f64")):
            wrong.append(f"{key}: not the arithmetic of its meaning")
    print(json.dumps({"kernels": sorted(kernels), "wrong": wrong}))


if __name__ == "__main__":
    main()
