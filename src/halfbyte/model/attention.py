"""Attention over several rows laid end to end, each seeing only itself, through transformers'
attention registry.

A micro-batch is one sequence [1, T] of whole rows, without padding: no token is wasted and a packed
batch is the same thing as an unpacked one. What keeps the rows apart is ``cu_seq_lens_q``, the row
boundaries, which transformers hands to the attention function; position ids restart with each row.
The registered mask function returns None: there is no mask to build or to hold. On a CPU with the
C++ library, and on a GPU whose flash attention does what it should, the rows go through one
operation (`ops.attention`); elsewhere each is a separate causal call of PyTorch's own attention.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from types import BuiltinFunctionType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .. import ops
from ..memory import recompute
from ..ops import cpu, gpu_calls
from ..ops.library import ROW_MULTIPLE, first_order
from .recognize import is_function_of

NAME = "halfbyte"
CAUSAL = "halfbyte_causal"
"""Name of transformers' own scaled dot product attention with `causal_attention` in its place where
that serves."""


def segment_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    cu_seq_lens_q: Tensor | None = None,
    s_aux: Tensor | None = None,
    **ignored: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each segment.

    Args:
        query: [1, heads, T, d];
        key, value: [1, kv_heads, T, d].
        cu_seq_lens_q: int [segments + 1], from 0 to T.
        sliding_window: a query sees this many tokens at most, itself included.
        softcap: scores become c * tanh(score / c).
        s_aux: one more logit per head that takes part in the softmax only.

    Returns:
        [1, T, heads, d] (and no weights).

    Raises:
        ValueError: no segment boundaries: the caller did not pass them through.
    """
    if cu_seq_lens_q is None:
        raise ValueError(
            "the model does not hand cu_seq_lens_q to its attention, so rows cannot be packed"
        )
    plain = s_aux is None and not dropout
    if plain and (
        _is_fusable(query, key, value, softcap) or _stands_for_fused(query, sliding_window, softcap)
    ):
        params = ops.AttentionParams(
            query.shape[3] ** -0.5 if scaling is None else scaling,
            sliding_window or 0,
            softcap or 0.0,
        )
        return _Attention.apply(query, key, value, cu_seq_lens_q, params), None  # pyright: ignore[reportReturnType]
    recompute.pass_attention()
    lengths = (cu_seq_lens_q[1:] - cu_seq_lens_q[:-1]).tolist()
    # split, not slices: the gradient of a split is one concatenation, of a slice a zero-filled copy
    # of the whole
    rows = zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True)
    pieces = [
        _causal(q, k, v, scaling, dropout, sliding_window, softcap, s_aux) for q, k, v in rows
    ]
    joined = pieces[0] if len(pieces) == 1 else torch.cat(pieces, 2)
    return joined.transpose(1, 2), None


def causal_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **more: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention of whole rows without padding, whose mask is therefore None, by the fused
    operation; all else by transformers' own.

    Args:
        query: [B, heads, T, d];
        key, value: [B, kv_heads, T, d].
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    rows, _, length, _ = query.shape
    plain = (
        attention_mask is None and causal and not dropout and length == key.shape[2] and length > 1
    )
    q, k, v = (_end_to_end(t) for t in (query, key, value)) if plain else (query, key, value)
    special = any(
        more.get(name) is not None for name in ("s_aux", "softcap", "position_bias", "cache")
    )
    if not plain or special or not _is_fusable(q, k, v):
        return sdpa_attention_forward(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            is_causal=is_causal,
            **more,
        )
    cu_seqlens = torch.arange(0, rows * length + 1, length, dtype=torch.int32)
    params = ops.AttentionParams(query.shape[3] ** -0.5 if scaling is None else scaling, 0, 0.0)
    out: Tensor = _Attention.apply(q, k, v, cu_seqlens, params)  # pyright: ignore[reportAssignmentType]
    return out.view(rows, length, *out.shape[2:]), None


def is_replaced() -> bool:
    """Whether another package computes attention, or makes its mask, in the place of transformers'
    and PyTorch's own scaled dot product attention."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    attends, masks = ALL_ATTENTION_FUNCTIONS["sdpa"], ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]
    return not (
        is_function_of(
            attends, "transformers.integrations.sdpa_attention", "sdpa_attention_forward"
        )
        and is_function_of(masks, "transformers.masking_utils", "sdpa_mask")
        # PyTorch's is built in; what a package put in its place is a function of Python
        and isinstance(functional.scaled_dot_product_attention, BuiltinFunctionType)
    )


def _end_to_end(t: Tensor) -> Tensor:
    """[B, heads, T, d] to [1, heads, B T, d]."""
    return t if t.shape[0] == 1 else t.transpose(1, 2).flatten(0, 1).unsqueeze(0).transpose(1, 2)


def _is_fusable(query: Tensor, key: Tensor, value: Tensor, softcap: float | None = None) -> bool:
    whole = query.shape[0] == 1 and key.shape == value.shape
    return whole and (cpu.serves(query) or gpu_calls.attends(query, softcap))


def _stands_for_fused(query: Tensor, window: int | None, softcap: float | None) -> bool:
    """Whether a plan may count the fused operation where PyTorch's attention computes: it keeps as
    little, but for the mask of a window."""
    if not query.is_meta or softcap is not None or query.shape[0] != 1:
        return False
    if window is not None and window < query.shape[2]:
        query.new_empty((query.shape[2], query.shape[2]), dtype=torch.bool)
    return True


class _Attention(torch.autograd.Function):
    """`ops.attention` on transformers' layout: [1, heads, T, d] in, [1, T, heads, d] out."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cu_seqlens: Tensor,
        params: ops.AttentionParams,
    ) -> Tensor:
        q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))
        cu_seqlens = cu_seqlens.to("cpu", torch.int32)
        out, lse = recompute.attention_result(lambda: ops.attention(q, k, v, cu_seqlens, params))
        ctx.save_for_backward(q, k, v, cu_seqlens, out, lse)
        ctx.params = params
        return out.unsqueeze(0)

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> Any:
        q, k, v, cu_seqlens, out, lse = ctx.saved_tensors
        found = ops.attention_grad(grads[0][0], q, k, v, cu_seqlens, out, lse, ctx.params)
        return *(t.transpose(0, 1).unsqueeze(0) for t in found), None, None


def _causal(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scaling: float | None,
    dropout: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    length = q.shape[2]
    if softcap is None and sinks is None:
        # keys past the end are seen by no query of the row; PyTorch keeps a compiled kernel for
        # every length on a CPU
        lack = -length % ROW_MULTIPLE if q.device.type == "cpu" else 0
        q, k, v = (functional.pad(t, (0, 0, 0, lack)) for t in (q, k, v)) if lack else (q, k, v)
        total = length + lack
        narrow = _band(total, window, q.device) if window is not None and window < total else None
        out = functional.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=narrow,
            dropout_p=dropout,
            is_causal=narrow is None,
            scale=scaling,
            enable_gqa=True,
        )
        return out[:, :, :length]
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = q @ k.transpose(2, 3) * (q.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~_band(length, window, q.device), float("-inf"))
    if sinks is not None:
        sink = sinks.view(1, -1, 1, 1).expand(q.shape[0], -1, length, 1).to(scores.dtype)
        scores = torch.cat((scores, sink), -1)
    weights = scores.softmax(-1, dtype=torch.float32).to(q.dtype)[..., :length]
    return functional.dropout(weights, dropout) @ v


def _band(length: int, window: int | None, device: torch.device) -> Tensor:
    """bool [length, length]: True where a query (row) sees a key (column)."""
    mask = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    return mask if window is None else mask.triu(1 - window)


def register() -> None:
    """Make the names known to transformers; done once, on first use."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(NAME, segment_attention)
    AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)
    AttentionInterface.register(CAUSAL, causal_attention)
    AttentionMaskInterface.register(CAUSAL, sdpa_mask)


def _choose(model: Any, name: str) -> None:
    """Have the attention of this name computed in a model; of a wrapper, in its text model."""
    config = model.config
    text = config.get_text_config()
    inside = [key for key in config.sub_configs or {} if getattr(config, key, None) is text]
    model.set_attn_implementation({"": name, inside[0]: name} if inside else name)


@contextmanager
def packed(model: Any, enabled: bool = True) -> Iterator[None]:
    """Within this block rows that lie end to end do not see each other; after it, attention is as
    it was.

    Args:
        enabled: False changes nothing: rows go through the model one at a time.
    """
    if not enabled:
        yield
        return
    register()
    before = model.config._attn_implementation
    _choose(model, NAME)
    try:
        yield
    finally:
        _choose(model, before)
