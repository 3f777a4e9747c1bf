"""Cross-entropy that never holds all logits.

A vocabulary of 128,000 costs 1.3 MB of logits and gradients per token; a row of 2,048 tokens 2.6
GB. So the hidden states of supervised positions go through the head in chunks: each chunk's logits,
loss and gradient with respect to the hidden states are computed at once and the logits dropped. The
backward pass then only scales the stored gradient. Positions that are not supervised never see the
head.

The head is the model's own: a shallow copy of the causal LM whose base returns the given hidden
states, so scaled, divided or soft-capped logits are what they are in the model (`output_head`).
"""

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .. import ops
from ..data.formats import IGNORE
from ..ledger import Part, counted_as
from ..ops.library import ROW_MULTIPLE, device_type, first_order

SCALED_ELEMENTS = 1 << 20
CHUNK_BYTES = {"cpu": 16 << 20, "cuda": 128 << 20}
"""fp32 logits held at once, bytes. On a CPU small enough that the allocator reuses the memory
instead of faulting it in anew; on a GPU enough rows for a product with a head of 128,000 (a guess,
until bench/gpu.py has measured it)."""


class _HiddenStates(nn.Module):
    """Stands for the base model, and for the part of it that holds the layers: returns what it is
    given as ``inputs_embeds``. Whatever else a head asks of the base is the base's."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self._base = (base,)  # not one of its modules

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            found = getattr(self.__dict__["_base"][0], name)
            parts = found.children() if isinstance(found, nn.Module) else ()
            return self if any(isinstance(part, nn.ModuleList) for part in parts) else found

    def forward(self, *args: Any, inputs_embeds: Tensor, **kwargs: Any) -> Any:
        return _outputs()(last_hidden_state=inputs_embeds)


@functools.cache
def _outputs() -> Any:
    """What a base model gives: hidden states, and nothing of whatever else a head looks for."""
    from transformers.modeling_outputs import MoeModelOutputWithPast

    class Outputs(MoeModelOutputWithPast):
        def __getattr__(self, name: str) -> None:
            if name.startswith("__"):
                raise AttributeError(name)

    return Outputs


def output_head(model: Any) -> Callable[[Tensor], Tensor]:
    """Hidden states [n, d] to logits [n, vocabulary], exactly as the model computes them."""
    head = copy.copy(model)
    head._modules = dict(model._modules)
    head._modules[model.base_model_prefix] = _HiddenStates(model.base_model)

    def logits(hidden: Tensor) -> Tensor:
        return head(inputs_embeds=hidden.unsqueeze(0), use_cache=False).logits.squeeze(0)

    return logits


def chunk_rows(vocabulary: int, device: str = "cpu") -> int:
    """Positions per chunk on this kind of device."""
    rows = CHUNK_BYTES[device] // (4 * vocabulary)
    return max(ROW_MULTIPLE, rows - rows % ROW_MULTIPLE)


def supervised_loss(
    hidden: Tensor,
    labels: Tensor,
    head: Callable[[Tensor], Tensor],
    parameters: list[nn.Parameter],
    rows: int,
) -> Tensor:
    """Summed cross-entropy of the supervised positions, fp32 [].

    Args:
        hidden: [T, d] of a sequence; position t predicts labels[t].
        labels: [T], already shifted, `IGNORE` where the position is not supervised, else an index
            of the vocabulary.
        head: from `output_head`.
        parameters: those of the head that are trained.
        rows: positions per chunk (`chunk_rows`).
    """
    chosen = (labels != IGNORE).nonzero().squeeze(1)
    lack = -len(chosen) % ROW_MULTIPLE
    targets = functional.pad(labels[chosen], (0, lack), value=IGNORE)
    selected = hidden.index_select(0, functional.pad(chosen, (0, lack)))
    with counted_as(Part.LOGITS):
        return _ChunkedLoss.apply(selected, targets, head, rows, *parameters)  # pyright: ignore[reportReturnType]


def sequence_loss(
    model: Any,
    head: Callable[[Tensor], Tensor],
    parameters: list[nn.Parameter],
    input_ids: Tensor,
    position_ids: Tensor,
    labels: Tensor,
    cu_seqlens: Tensor | None,
) -> Tensor:
    """Summed loss of one sequence of rows laid end to end, fp32 [].

    Args:
        input_ids, position_ids, labels: int64 [T].
        cu_seqlens: int32 [rows + 1] under `model.attention.packed`, None for a single row under the
            model's own attention.
        head, parameters: as for `supervised_loss`.
    """
    hidden = hidden_states(model, input_ids, position_ids, cu_seqlens)
    embedding = model.get_output_embeddings().weight
    rows = chunk_rows(embedding.shape[0], device_type(embedding))
    if parameters:  # each chunk makes a gradient of the whole head
        rows *= 8
    return supervised_loss(hidden, labels, head, parameters, rows)


def hidden_states(
    model: Any, input_ids: Tensor, position_ids: Tensor, cu_seqlens: Tensor | None
) -> Tensor:
    """What the output head is given for one sequence [T] of rows laid end to end: [T, d]."""
    inputs: dict[str, Any] = {"input_ids": input_ids[None], "position_ids": position_ids[None]}
    if cu_seqlens is not None:
        inputs["cu_seq_lens_q"] = cu_seqlens
    return model.base_model(**inputs, use_cache=False).last_hidden_state[0]


def causal_lm_loss(
    logits: Tensor,
    labels: Tensor,
    vocab_size: int,
    num_items_in_batch: Any = None,
    ignore_index: int = IGNORE,
    shift_labels: Tensor | None = None,
    **ignored: Any,
) -> Tensor:
    """transformers' loss of causal language models, of logits that its caller has made: fp32 [].

    No fp32 copy of the logits is made; the gradient is computed with the loss, in the type of the
    logits.

    Args:
        logits: [.., vocab_size].
        labels: [.., ], position t+1 is what t predicts;
        shift_labels: the same, shifted.
        num_items_in_batch: what the sum is divided by; None: the number of positions whose label is
            not ignore_index.

    Raises:
        IndexError: a label that is not in the vocabulary.
    """
    if shift_labels is None:
        shift_labels = functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    targets = shift_labels.reshape(-1).to(logits.device)
    counted = targets != ignore_index
    if bool((counted & ((targets < 0) | (targets >= vocab_size))).any()):
        raise IndexError(f"a label is not in the vocabulary of {vocab_size}")
    total = _WholeLoss.apply(
        logits.reshape(-1, vocab_size), targets.where(counted, targets.new_full((), IGNORE))
    )
    items = counted.sum() if num_items_in_batch is None else num_items_in_batch
    return total / (items.to(logits.device) if isinstance(items, Tensor) else items)  # pyright: ignore[reportOptionalOperand]


class _WholeLoss(torch.autograd.Function):
    """Summed loss of logits that are there anyway; its gradient is made with it."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        losses, ctx.grad_logits = ops.cross_entropy(logits, labels)
        return losses.sum()

    @staticmethod
    @first_order
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        return _scaled(ctx.grad_logits, upstream[0]), None


def _scaled(grad: Tensor, scale: Tensor) -> Tensor:
    """grad times a number, rounded once: the number itself, 1 / tokens, is not rounded to the type
    of grad."""
    out = torch.empty_like(grad)
    rows_at_once = max(1, SCALED_ELEMENTS // max(1, grad.shape[-1]))
    for rows, scaled in zip(grad.split(rows_at_once), out.split(rows_at_once), strict=True):
        scaled.copy_(rows.float() * scale)
    return out


class _ChunkedLoss(torch.autograd.Function):
    """Loss and gradients in one pass over chunks; backward scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        labels: Tensor,
        head: Callable[[Tensor], Tensor],
        rows: int,
        *parameters: Tensor,
    ) -> Tensor:
        needs_hidden = ctx.needs_input_grad[0]
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grads = [torch.zeros_like(p, dtype=torch.float32) for p in parameters]
        grad_logits = None
        for start in range(0, hidden.shape[0], rows):
            piece = hidden[start : start + rows].detach().requires_grad_(needs_hidden)
            with torch.enable_grad():
                logits = head(piece)
            place = None if grad_logits is None else grad_logits[: logits.shape[0]]
            losses, grad_here = ops.cross_entropy(
                logits.detach(), labels[start : start + rows], place
            )
            # one buffer for all chunks
            grad_logits = grad_here if grad_logits is None else grad_logits
            total += losses.sum()
            wanted = [*([piece] if needs_hidden else []), *parameters]
            if wanted:
                got = list(torch.autograd.grad(logits, wanted, grad_here))
                if grad_hidden is not None:
                    grad_hidden[start : start + rows] = got.pop(0)
                for sum_of_parts, part in zip(grads, got, strict=True):
                    sum_of_parts += part
            del logits  # before the next chunk's are made
        ctx.grad_hidden, ctx.grads = grad_hidden, grads
        ctx.dtypes = [p.dtype for p in parameters]
        return total

    @staticmethod
    @first_order
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        (scale,) = upstream
        hidden = None if ctx.grad_hidden is None else _scaled(ctx.grad_hidden, scale)
        return (
            hidden,
            None,
            None,
            None,
            *[(g * scale).to(d) for g, d in zip(ctx.grads, ctx.dtypes, strict=True)],
        )
