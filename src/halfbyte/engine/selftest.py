"""What a model may be trained with, found out on a few tokens before the first step.

Rows laid end to end must not see each other, the output head must work on chunks, and layers that
are run again for their gradients must give the same ones. Each is tried on the model at hand
instead of believed of its kind.
"""

import contextlib
import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import HalfbyteError, ModelError, first_line, is_exhaustion
from ..memory.recompute import Keep, Recompute, recompute_layers
from ..model.attention import packed
from ..model.experts import fused_experts
from ..model.fp32 import as_near, distance, model_in_fp32, typical_distance
from ..model.rope import border
from .loss import output_head


@dataclass(frozen=True)
class Abilities:
    """What a model may be trained with, as measured at load."""

    packing: bool
    chunked_head: bool
    packing_error: float
    head_error: float


TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}
"""Relative difference (norm over norm) above which rounding alone is not believed: about eight
units of the last place, times the growth over a deep network. Tokens that leak between rows change
the logits by several times as much."""
LEAK = 0.01
"""Of hidden states, what another token behind them may move: nothing but roundings, where the rows
of a batch share a kernel; a model that looks ahead moves by several times as much."""
FAILURES = (ValueError, TypeError, KeyError, AttributeError, RuntimeError)
"""What a model raises that cannot be run as it is asked to."""
SLACK = 4
"""Times the tolerance that rounding may cause in fp32, where nothing finer tells how much it
does."""


@torch.no_grad()
def self_test(model: Any) -> Abilities:
    """Packed rows equal separate rows, and the chunked head equals the full logits, on a few
    tokens.

    Packed rows may be as far from separate rows in fp32 as separate rows in the model's own dtype
    are, up to `fp32.ALLOWANCE`; where that is far, they must demonstrably not see each other. The
    caller refuses packing, or training, by name where it does not hold.
    """
    was_training = model.training
    model.eval()
    # a long pass may be rotated otherwise than a short one
    starts = [0] if (far := border(model.config)) is None else [0, far]
    try:
        try:
            apart = [_apart(model, start) for start in starts]
        except FAILURES as error:
            _pass_on(error)
            raise ModelError(
                f"{type(model).__name__} does not run here as a language model is trained",
                found=first_line(error)[:300],
                ways_out=["use another model", "or report this: docs/families.md lists what runs"],
            ) from error
        try:
            found = [
                _try_packing(model, start, *each) for start, each in zip(starts, apart, strict=True)
            ]
            packing = all(works for works, _ in found)
            packing_error = max(error for _, error in found)
        except FAILURES as error:
            _pass_on(error)
            packing, packing_error = False, math.inf
        try:
            ids, _, length = _tokens(model)
            logits = model(input_ids=ids[None, :length], use_cache=False).logits[0]
            chunks = torch.cat([output_head(model)(part) for part in apart[0][0].split(5)])
            head_error = distance(chunks, logits)
        except FAILURES as error:
            _pass_on(error)
            head_error = math.inf
    finally:
        model.train(was_training)
    return Abilities(
        packing, head_error <= TOLERANCE[model.config.dtype], packing_error, head_error
    )


def _try_packing(model: Any, start: int, *apart: Tensor) -> tuple[bool, float]:
    """Whether rows whose positions begin at ``start`` may be packed, and how far packed ones are
    from fp32. apart: hidden states [n, d] of each row by itself."""
    ids, position, length = _tokens(model, start)
    dtype, exact = model.config.dtype, apart
    if dtype != torch.float32:
        with model_in_fp32(model):
            exact = _apart(model, start)
    packed = _packed(model, ids, position, length)
    error = _largest(packed.split(length), exact)
    if fused_experts(model):  # rounding may choose other experts
        return _see_only_themselves(model, packed, start), error
    near = (
        error <= SLACK * TOLERANCE[dtype]
        if dtype == torch.float32
        else as_near(error, _largest(apart, exact), dtype)
    )
    return near and (error <= TOLERANCE[dtype] or _see_only_themselves(model, packed, start)), error


def _largest(found: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """Of two rows, how far the further one is from fp32."""
    return max(typical_distance(*pair) for pair in zip(found, exact, strict=True))


def _apart(model: Any, start: int) -> tuple[Tensor, ...]:
    """Hidden states [n, d] of two rows that share a pass as a batch, where nothing is packed: a
    model that lies in files is read once for both, and for the first row with another end.

    Raises:
        ModelError: that end changes what comes before it.
    """
    ids, position, length = _tokens(model, start)
    given: dict[str, Any] = {"position_ids": position[:length][None]} if start else {}
    rows = torch.cat((ids.view(2, length), ids[None, :length]))
    rows[2, -1] = rows[1, -1]
    found = model.base_model(input_ids=rows, use_cache=False, **given).last_hidden_state
    one, two, other = found.unbind()
    moved = distance(other[:-1], one[:-1])
    if moved > LEAK:
        raise ModelError(
            f"{type(model).__name__} reads the tokens that come after one, too: it is no causal "
            "language model, and would learn to copy what it is to predict",
            found=f"another last token moves what comes before it by {moved:.1%}",
            ways_out=["use a model that is causal"],
        )
    return one, two


def _packed(model: Any, ids: Tensor, position: Tensor, length: int) -> Tensor:
    """Hidden states [2 n, d] of two rows laid end to end."""
    cu_seqlens = torch.tensor([0, length, 2 * length], dtype=torch.int32)
    with packed(model):
        found = model.base_model(
            input_ids=ids[None],
            position_ids=position[None],
            cu_seq_lens_q=cu_seqlens,
            use_cache=False,
        )
    return found.last_hidden_state[0]


def _see_only_themselves(model: Any, found: Tensor, start: int) -> bool:
    """Whether each of two rows has the same bits whatever the other one holds (of a mixture of
    experts: up to roundings)."""
    ids, position, length = _tokens(model, start)
    one, two = ids.split(length)
    other_first = _packed(model, torch.cat((one.flip(0), two)), position, length)
    other_second = _packed(model, torch.cat((one, two.flip(0))), position, length)
    pairs = ((other_first[length:], found[length:]), (other_second[:length], found[:length]))
    if fused_experts(model):
        # how many tokens an expert has may round its results otherwise, and a token may go to
        # another for that: most stay where they are
        return all(typical_distance(*pair) <= LEAK for pair in pairs)
    return all(torch.equal(*pair) for pair in pairs)


def _pass_on(error: Exception) -> None:
    """A lack of memory says nothing about the model."""
    if is_exhaustion(error):
        raise error


def _tokens(model: Any, start: int = 0) -> tuple[Tensor, Tensor, int]:
    """Ids [2 n] of two rows, their positions, and n."""
    vocabulary, device, length = model.get_input_embeddings().weight.shape[0], model.device, 12
    ids = (torch.arange(2 * length, device=device) * 7919 + 13) % vocabulary
    return ids, torch.arange(start, start + length, device=device).repeat(2), length


# --- layers run again -----------------------------------------------------------------------------


def checkpoint_layers(
    model: Any,
    keep: Keep,
    packing: bool,
    kept_layers: int = -1,
    away: Path | None = None,
) -> tuple[str, Recompute | None]:
    """Have the layers of a model keep what ``keep`` says and compute the rest again, if that gives
    the same gradients.

    Args:
        model: in training mode, with its trained parameters.
        packing: it keeps rows apart (`Abilities.packing`).
        kept_layers, away: as for `recompute.Recompute`.

    Returns:
        A line that says what was found, and what runs the layers. Where they cannot be run again by
            `recompute`, PyTorch's own checkpointing takes its place, which keeps nothing but the
            layers' inputs: then there is None.
    """
    if not getattr(model, "supports_gradient_checkpointing", True):
        return f"nothing is recomputed: {type(model).__name__} has no layers to run again", None
    # newer transformers renamed it, and warns at the older name
    enable = (
        getattr(model, "activation_checkpointing_enable", None)
        or model.gradient_checkpointing_enable
    )
    enable({"use_reentrant": False, "preserve_rng_state": False})
    run = Recompute(keep, layers := recompute_layers(model, None), kept_layers, away)
    if not layers:
        why = "this model's layers take no other function"
        return f"recomputed in the backward pass: whole layers (by PyTorch: {why})", None
    if hasattr(model, "_require_grads_hook") or hasattr(model, "_require_grads_hooks"):
        # our function takes inputs without gradients, and saves the first one's
        model.disable_input_require_grads()
    if next(
        model.parameters()
    ).is_meta:  # nothing to compare: a plan counts on what holds for the models we know
        recompute_layers(model, run)
        run.skip_last = run.skipped = True
        return recomputed_line(run), run
    with perturb_zeros(model):
        expected = trial_gradients(model, packing)
        recompute_layers(model, run)
        # NaN where the result of each layer's last product would be: if it mattered, it would show
        run.skip_last, run.fill = True, math.nan
        if expected is None or trial_gradients(model, packing) != expected:
            run.skip_last = False
            if expected is None or trial_gradients(model, packing) != expected:
                # whatever is random in such a model is PyTorch's to repeat
                enable({"use_reentrant": False, "preserve_rng_state": True})
                why = "run by halfbyte, gradients differ"
                return f"recomputed in the backward pass: whole layers (by PyTorch: {why})", None
        run.fill = None
    return recomputed_line(run), run


def recomputed_line(run: Recompute) -> str:
    """What is kept and what is computed twice, for people."""
    last = "not the last product, " if run.skip_last and run.skipped else ""
    some = (
        f" in the last {run.kept_layers} of {run.layers} layers"
        if 0 < run.kept_layers < run.layers
        else ""
    )
    where = (
        ""
        if run.inputs.away is None
        else f"; layer inputs wait {'in host memory' if run.inputs.staged else 'in a file'}"
    )
    return f"recomputed in the backward pass: {last}kept activations: {run.keep}{some}{where}"


@contextlib.contextmanager
def perturb_zeros(model: Any) -> Iterator[None]:
    """Within this block trained parameters that are zero (a new adapter's B) are not, so that every
    gradient depends on everything."""
    trained = (p for p in model.parameters() if p.requires_grad and not p.is_meta)
    zero = [p for p in trained if not bool(p.any())]
    generator = torch.Generator("cpu").manual_seed(0)
    try:
        with torch.no_grad():
            for p in zero:
                p.copy_(
                    torch.randn(p.shape, generator=generator, device="cpu", dtype=torch.float32)
                    * 0.01
                )
        yield
    finally:
        with torch.no_grad():
            for p in zero:
                p.zero_()


def trial_gradients(model: Any, packing: bool) -> str | None:
    """A digest of the gradients of a weighted sum of hidden states of a few tokens: two sets of
    gradients at once would take more memory than a training step. None where the model cannot be
    run like this."""
    trained = [p for p in model.parameters() if p.requires_grad]
    ids, position, length = _tokens(model)
    inputs: dict[str, Any] = {"input_ids": ids[None, :length]}
    if packing:
        cu_seqlens = torch.tensor([0, length, 2 * length], dtype=torch.int32)
        inputs = {
            "input_ids": ids[None],
            "position_ids": position[None],
            "cu_seq_lens_q": cu_seqlens,
        }
    try:
        attention = packed(model, packing)
        gpus = [model.device] if model.device.type == "cuda" else []  # manual_seed seeds those, too
        with attention, torch.enable_grad(), torch.random.fork_rng(devices=gpus):
            torch.manual_seed(0)
            hidden = model.base_model(**inputs, use_cache=False).last_hidden_state.float()
            weights = torch.linspace(
                -1, 1, hidden.numel(), device=hidden.device, dtype=torch.float32
            )
            (hidden.view(-1) * weights).sum().backward()
        digest = hashlib.blake2b()
        for p in trained:
            if p.grad is not None:
                digest.update(p.grad.cpu().contiguous().view(-1).view(torch.uint8).numpy())  # pyright: ignore
            digest.update(b"|")
        return digest.hexdigest()
    except (HalfbyteError, RuntimeError, TypeError, ValueError, AttributeError, KeyError) as error:
        _pass_on(error)
        return None
    finally:
        for p in trained:
            p.grad = None
