"""The C++ library's interface: its structures, signatures and how it is opened and called
(`csrc/halfbyte.h`)."""

import ctypes
from ctypes import (
    POINTER,
    c_char_p,
    c_double,
    c_float,
    c_int32,
    c_int64,
    c_uint32,
    c_uint64,
    c_void_p,
)
from typing import Any

import torch
from torch import Tensor

ABI = 4
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class _FourBit(ctypes.Structure):
    """hb_fourbit of halfbyte.h."""

    _fields_ = [
        ("packed", c_void_p),
        ("absmax", c_void_p),
        ("quant_map", c_void_p),
        ("nested_absmax", c_void_p),
        ("nested_quant_map", c_void_p),
        ("nested_offset", c_void_p),
        ("numel", c_int64),
        ("packed_count", c_int64),
        ("absmax_count", c_int64),
        ("nested_count", c_int64),
        ("block_size", c_int32),
        ("nested_block_size", c_int32),
    ]


class _Dropout(ctypes.Structure):
    """hb_dropout of halfbyte.h."""

    _fields_ = [
        ("seed", c_uint64),
        ("first", c_int64),
        ("step", c_uint32),
        ("micro_batch", c_uint32),
        ("layer", c_uint32),
        ("threshold", c_int32),
    ]


class _Attention(ctypes.Structure):
    """hb_attention of halfbyte.h."""

    _fields_ = [
        *((name, c_void_p) for name in ("q", "k", "v")),
        *((name, c_int64) for name in ("q_row", "q_head", "k_row", "k_head", "v_row", "v_head")),
        ("cu_seqlens", c_void_p),
        *((name, c_int64) for name in ("segments", "tokens", "heads", "kv_heads", "dim", "window")),
        ("scale", c_float),
        ("softcap", c_float),
    ]


_p, _n, _i, _f = c_void_p, c_int64, c_int32, c_float
_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "hb_abi": (c_int32, []),
    "hb_error": (c_char_p, []),
    "hb_paths": (c_char_p, []),
    "hb_path": (c_char_p, []),
    "hb_choose": (c_int32, [c_char_p]),
    "hb_quantize": (c_int32, [_p, _i, _n, _p, _i, _p, _n, _p, _n, _i]),
    "hb_quantize_absmax": (c_int32, [_p, _n, _p, _i, _p, _p, _n, _p, _i]),
    "hb_dequantize": (c_int32, [POINTER(_FourBit), _p, _i, _n, _i]),
    "hb_dropout_mask": (c_int32, [_p, _n, POINTER(_Dropout), _i]),
    "hb_linear": (c_int32, [_p, _n, _n, _n, POINTER(_FourBit), _p, _p, _p, _n, _p, _i, _i]),
    "hb_linear_input_grad": (
        c_int32,
        [_p, _n, _n, _n, POINTER(_FourBit), _p, _p, _n, POINTER(_Dropout), _p, _i, _i],
    ),
    "hb_lora_input": (c_int32, [_p, _n, _n, _p, _n, POINTER(_Dropout), _p, _i, _i]),
    "hb_lora_grads": (
        c_int32,
        [_p, _p, _p, _p, _n, _n, _n, _n, _f, POINTER(_Dropout), _p, _p, _p, _i, _i],
    ),
    "hb_rms_norm": (c_int32, [_p, _p, _n, _n, _f, _f, _i, _p, _p, _i, _i]),
    "hb_rms_norm_grad": (c_int32, [_p, _p, _p, _p, _n, _n, _f, _p, _i, _i]),
    "hb_gated": (c_int32, [_p, _n, _p, _n, _n, _n, _i, _p, _i, _i]),
    "hb_gated_grad": (c_int32, [_p, _p, _n, _p, _n, _n, _n, _i, _p, _p, _i, _i]),
    "hb_rotate": (c_int32, [_p, _p, _p, _n, _n, _n, _i, _p, _i, _i]),
    "hb_cross_entropy": (c_int32, [_p, _p, _n, _n, _p, _p, _i, _i]),
    "hb_attention_forward": (c_int32, [POINTER(_Attention), _p, _p, _i, _i]),
    "hb_attention_backward": (
        c_int32,
        [POINTER(_Attention), _p, _n, _n, _p, _p, _p, _p, _p, _i, _i],
    ),
    "hb_adamw_8bit": (
        c_int32,
        [_p, _p, _p, _n, _p, _p, _p, _p, _n, _p, _p, _f, _f, _f, _f, _f, _f, _f, _i],
    ),
    "hb_product_peak": (c_int32, [_i, _i, POINTER(c_double)]),
}


def open_library(file: str) -> Any:
    """The functions of a built library.

    Raises:
        OSError: it cannot be loaded here, or speaks another version of the interface.
    """
    found = ctypes.CDLL(file)
    for name, (result, arguments) in _SIGNATURES.items():
        try:
            function = getattr(found, name)
        except AttributeError as error:
            raise OSError(f"{file} has no {name}: it belongs to another version") from error
        function.restype, function.argtypes = result, arguments
    if found.hb_abi() != ABI:
        raise OSError(
            f"{file} speaks version {found.hb_abi()} of the interface, not {ABI}: install the "
            "package again"
        )
    return found


# where this file's tensors are and what they hold, whatever torch's defaults are at the time
_FP32: dict[str, Any] = {"device": "cpu", "dtype": torch.float32}
_BYTES: dict[str, Any] = {"device": "cpu", "dtype": torch.uint8}


def call(library: Any, name: str, *arguments: Any) -> None:
    """Call a function of the library.

    Raises:
        ValueError: it refuses an argument.
        MemoryError: no memory for its scratch.
    """
    if code := getattr(library, name)(*arguments):
        message = library.hb_error().decode()
        raise (MemoryError if code == 2 else ValueError)(f"{name}: {message}")


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
