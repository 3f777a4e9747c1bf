"""A model and what one optimizer step adds to it: trained parameters, their gradients and states,
an output head.

The training loop (`training.step`) drives it on numbers, a memory plan (`planning.dry_run`) on the
``meta`` device, where the same lines run on shapes alone: what a plan promises is what these lines
allocate.
"""

import contextlib
import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.experts import fused_of, of_experts
from ..adapters.lora import AdapterConfig, DropoutClock, LoraLinear, attach_lora, target_names
from ..adapters.modules_to_save import make_modules_trainable, train_every_parameter
from ..config.options import TrainConfig
from ..data.batches import MicroBatch
from ..errors import ModelError, UsageError
from ..ledger import Part, counted_as
from ..memory.recompute import Recompute
from ..model import fusion
from ..model.base_dropout import base_dropout, masks_of, silence
from ..model.host_embedding import host_table, keep_on_host, why_not
from ..model.rope import pass_kind
from ..ops import cpu
from ..ops.dequantized import BUFFERS
from ..ops.library import device_type
from .adamw8bit import AdamW8bit
from .loss import output_head, sequence_loss
from .paged_optimizers import PagedAdamW, PagedAdamW8bit
from .selftest import Abilities, checkpoint_layers

Note = Callable[[str, str], None]


@dataclass
class LossScale:
    """What a loss is multiplied by before its backward pass, so that gradients in fp16 do not round
    to zero.

    A power of two (Micikevicius et al. 2018, arXiv:1710.03740, section 3.2): gradients are divided
    by it exactly. It is halved until a step's gradients are finite, for the same rows, and doubled
    after so many steps in which they were.
    """

    active: bool
    value: float = 65536.0
    good: int = 0

    def lower(self) -> bool:
        """Halve it; False where there is nothing to halve."""
        if not self.active or self.value <= 1:
            return False
        self.value, self.good = self.value / 2, 0
        return True

    def stay(self) -> None:
        """A step went well."""
        self.good += 1
        if self.good == GROWTH_STEPS:
            self.value, self.good = min(self.value * 2, LARGEST_SCALE), 0


NOT_DECAYED = re.compile(r"bias|layernorm|rmsnorm|(^|\.)norm($|\.)|_norm($|\.)")
"""Of names of parameters, as transformers has it."""
GROWTH_STEPS, LARGEST_SCALE = 500, 2.0**24


class Learner:
    """What `accumulate`, `clip` and `update` need, made in this order, each piece by the code that
    uses it."""

    def __init__(self, model: Any, config: TrainConfig, abilities: Abilities, note: Note) -> None:
        """Make a frozen base trainable, in place.

        Args:
            abilities: from `selftest.self_test`.
            note: called with a short name and a line for people.

        Raises:
            ModelError: this model cannot be trained as the options say.
        """
        self.model, self.config, self.abilities = model, config, abilities
        self._refuse_unable()
        computes_in = fusion.compute_dtype(model)
        if config.full:
            train_every_parameter(model)
            self.clock = DropoutClock(config.seed)
        else:
            self.clock = self._attach()
        if config.embedding_offloading == "always" and host_table(model) is None:
            if why := why_not(model):
                raise UsageError(
                    f"--embedding_offloading always cannot move the embedding table: {why}",
                    ways_out=["--embedding_offloading auto"],
                )
            keep_on_host(model)
        model.config.use_cache = False
        model.train()
        self.drops = self._base_dropout(note)
        self.recompute: Recompute | None = None
        if config.gradient_checkpointing:
            self._checkpoint(note)
        self.tokens_per_pass, self.tokens_per_tile = config.tokens_per_pass, 0
        if config.tokens_per_tile and not self.tile(config.tokens_per_tile):
            note("tiles", "MLPs run on all tokens at once: none is of a form that is fused here")
        self.scale = LossScale(computes_in == torch.float16)
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.head = output_head(model)
        embedding = model.get_output_embeddings()
        self.head_parameters = [p for p in embedding.parameters() if p.requires_grad]
        self.optimizer = self._make_optimizer()
        self.gradients = hold_gradients(self.trained)
        # PyTorch's own 16-bit products on a CPU: a kernel is compiled and kept for every shape
        self.compiles_per_shape = not config.load_in_4bit and device_type(self.trained[0]) == "cpu"
        self.dequant_buffer = BUFFERS[config.dequantized_weights]()
        self.pass_kind = pass_kind(model.config)
        self.updates = 0
        self.since_logged: list[float | None] = []  # losses of steps that are in no row yet

    def _refuse_unable(self) -> None:
        abilities = self.abilities
        if not abilities.chunked_head:
            raise ModelError(
                "the output head of this model cannot be applied to chunks of its hidden states",
                found=f"logits differ by {abilities.head_error:.2g} (relative)",
                expected="differences within rounding",
            )
        self._refuse_useless_buffer()
        if self.config.packing and not abilities.packing:
            raise ModelError(
                "this model lets packed rows see each other",
                found=f"logits differ by {abilities.packing_error:.2g} (relative) from those of "
                "separate rows",
                ways_out=["train without --packing"],
            )

    def _refuse_useless_buffer(self) -> None:
        """Raise UsageError where ``dequantized_weights`` could change nothing."""
        c, weight = self.config, next(self.model.parameters())
        if c.dequantized_weights == "product":
            return
        on, why = device_type(weight), ""
        if not c.load_in_4bit:
            why = "no weight is in 4 bits"
        elif cpu.serves(weight):
            why = "the C++ library reads 4-bit weights as it multiplies"
        elif c.dequantized_weights == "ahead" and on != "cuda":
            why = "there is no second stream to dequantize in"
        elif c.dequantized_weights == "layer" and not c.gradient_checkpointing:
            why = "no layer is run again"
        if why:
            raise UsageError(
                f"--dequantized_weights {c.dequantized_weights} has no use here: {why}",
                found=f"device {on}",
                ways_out=["--dequantized_weights product"],
            )

    def _attach(self) -> DropoutClock:
        c = self.config
        numbers = (
            c.lora_r,
            c.lora_alpha,
            c.lora_dropout,
            c.use_rslora,
            c.rank_pattern,
            c.alpha_pattern,
            c.use_dora,
        )
        adapter = AdapterConfig(*numbers)
        whole = [name.strip() for name in c.modules_to_save.split(",") if name.strip()]
        names = target_names(self.model, c.target_modules, c.target_experts)
        if c.target_experts:
            adapter = of_experts(adapter, self.model)
        if c.target_modules == "all-linear":
            names = [name for name in names if not any(name.endswith(each) for each in whole)]
        attach_lora(self.model, adapter, names, seed=c.seed)
        make_modules_trainable(self.model, whole)
        fused = fused_of(self.model, names)
        for pattern in (*c.rank_pattern, *c.alpha_pattern):
            if not any(re.match(rf"(.*\.)?({pattern})$", name) for name in (*names, *fused)):
                raise UsageError(
                    f"rank_pattern or alpha_pattern has {pattern!r}, which matches no adapted "
                    "layer",
                    expected=f"the end of a path such as {names[0]}",
                )
        first = self.model.get_submodule(names[0])
        assert isinstance(first, LoraLinear)
        return first.clock

    def _base_dropout(self, note: Note) -> bool:
        """Whether the base drops something of its own."""
        found = base_dropout(self.model)
        if not found:
            return False
        named = ", ".join(f"{name} {p:g}" for name, p in sorted(found.items()))
        if self.config.base_dropout == "off":
            silence(self.model)
            note("base dropout", f"the base's own dropout ({named}) is left out")
            return False
        note(
            "base dropout",
            f"the base has dropout of its own ({named}), as its configuration says; --base_dropout "
            "off leaves it out",
        )
        return True

    def _checkpoint(self, note: Note) -> None:
        c = self.config
        keep = "none" if c.kept_activations == "auto" else c.kept_activations
        away = self.directory if c.activation_offloading == "always" else None
        line, self.recompute = checkpoint_layers(
            self.model, keep, self.abilities.packing, c.kept_layers, away
        )
        if self.recompute is None and (away is not None or keep != "none"):
            line += "; nothing else is kept, and layer inputs stay in memory"
        note("recomputed", line)
        if c.dequantized_weights == "layer" and self.recompute is None:
            raise UsageError(
                "--dequantized_weights layer has no use here: this model's layers are run again "
                "by PyTorch",
                ways_out=["--dequantized_weights product"],
            )

    @property
    def directory(self) -> Path:
        """The directory of files that take what leaves memory."""
        return Path(self.config.output_dir).expanduser()

    def _make_optimizer(self) -> torch.optim.Optimizer:
        c = self.config
        paging: dict[str, Any] = {"paged": c.paging == "always", "directory": self.directory}
        numbers = (c.learning_rate, (c.adam_beta1, c.adam_beta2), c.adam_epsilon, c.weight_decay)
        groups = self._groups()
        if c.optim == "adamw_torch":
            return torch.optim.AdamW(groups, *numbers)
        if c.optim == "paged_adamw_32bit":
            return PagedAdamW(groups, *numbers, **paging)
        wide: dict[str, Any] = {"in_32bit": list(self._tables())}
        if c.optim == "adamw_8bit":
            return AdamW8bit(groups, *numbers, **wide)
        return PagedAdamW8bit(groups, *numbers, **paging, **wide)

    def _groups(self) -> list[dict[str, Any]]:
        """What is trained, for the optimizer: norms and biases apart, which are not decayed (as in
        transformers' Trainer.get_decay_parameter_names)."""
        plain: list[nn.Parameter] = []
        if self.config.weight_decay:
            names = {id(p): name for name, p in self.model.named_parameters()}
            inside = {
                id(p)
                for module in self.model.modules()
                if isinstance(module, nn.LayerNorm)
                for p in module.parameters()
            }
            plain = [
                p
                for p in self.trained
                if id(p) in inside or NOT_DECAYED.search(names[id(p)].lower())
            ]
        apart = {id(p) for p in plain}
        decayed = [p for p in self.trained if id(p) not in apart]
        groups = [{"params": decayed}, {"params": plain, "weight_decay": 0.0}]
        return [group for group in groups if group["params"]]

    def _tables(self) -> Iterator[nn.Parameter]:
        """Trained parameters of embeddings and of the head, whose rows are met as tokens are."""
        for module in self.model.modules():
            if isinstance(module, nn.Embedding) or module is self.model.get_output_embeddings():
                yield from (p for p in module.parameters() if p.requires_grad)

    def tile(self, tokens: int) -> bool:
        """Run MLPs on so many tokens at a time; False where no MLP can be."""
        if not fusion.tile_mlps(self.model, tokens):
            return False
        self.tokens_per_tile = tokens
        return True

    @property
    def device(self) -> torch.device:
        """Where a batch has to lie. A model on the ``meta`` device takes real ids: they decide what
        is computed."""
        device = self.model.device
        return torch.device("cpu") if device.type == "meta" else device

    def loss(self, batch: MicroBatch) -> Tensor:
        """Summed loss of a micro-batch, fp32 []."""
        batch = batch.padded(self.compiles_per_shape) if self.abilities.packing else batch
        cu_seqlens = batch.cu_seqlens if self.abilities.packing else None
        return sequence_loss(
            self.model,
            self.head,
            self.head_parameters,
            batch.input_ids,
            batch.position_ids,
            batch.labels,
            cu_seqlens,
        )

    def accumulate(
        self, batch: MicroBatch, supervised: int, step: int, number: int
    ) -> list[Tensor]:
        """Add the gradient of a micro-batch.

        Args:
            supervised: tokens the step's loss is divided by.
            step, number: what dropout is a function of.

        Returns:
            The summed loss of each part it was computed in.
        """
        losses = []
        for first, part in self.parts(batch):
            self.clock.step, self.clock.micro_batch, self.clock.first = step, number, first
            masks = contextlib.nullcontext()
            if self.drops:
                masks = masks_of(self.device, self.clock.seed, step, number, first)
            with self.dequant_buffer.in_use(), masks:
                loss = self.loss(part.to(self.device))
                mean = loss / supervised
                (mean * self.scale.value if self.scale.active else mean).backward()
            losses.append(loss.detach())
        self.clock.first = 0
        return losses

    def parts(self, batch: MicroBatch) -> list[tuple[int, MicroBatch]]:
        """What of a micro-batch goes through the model together, and the token each part begins
        with: all of it, or whole rows of at most ``tokens_per_pass``; rows that the model rotates
        differently apart; single rows where the model does not keep rows apart.

        Dropout masks are those of the whole, and losses are sums: the gradient is the same up to
        its last bits.
        """
        most = self.tokens_per_pass or len(batch.input_ids)
        return batch.split(most if self.abilities.packing else 1, self.pass_kind)

    def clip(self) -> Tensor:
        """The gradients' norm, before they are scaled down to max_grad_norm; not finite where they
        are not."""
        if self.scale.active:
            for buffer in self.gradients:
                buffer.mul_(1 / self.scale.value)
        grads = [p.grad for p in self.trained if p.grad is not None]
        norm = nn.utils.get_total_norm(grads)
        if self.config.max_grad_norm:
            nn.utils.clip_grads_with_norm_(self.trained, self.config.max_grad_norm, norm)
        return norm

    def update(self, rate: float) -> None:
        """One step of the optimizer."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        with counted_as(Part.OPTIMIZER):
            self.optimizer.step()
        self.updates += 1

    def is_finite(self) -> bool:
        """Whether every parameter is, after an update, and its square."""
        return all_finite(self.trained, SQUARED)

    def forget(self) -> None:
        """Set the gradients to zero."""
        for buffer in self.gradients:
            buffer.zero_()


@torch.no_grad()
def all_finite(tensors: Iterable[Tensor], most: float = math.inf) -> bool:
    """Whether no element is infinite, NaN, or beyond ``most``; each tensor is read once, and the
    device is waited for once."""
    chosen = [t for t in tensors if t.numel() and t.is_floating_point()]
    largest = float(nn.utils.get_total_norm(chosen, math.inf))
    return math.isfinite(largest) and largest <= most


SQUARED = 2.0**63
"""Whose square is the largest that fp32 holds."""


def hold_gradients(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    """Give parameters zero gradients that stay, in one buffer for each dtype and device; the
    buffers, to be zeroed.

    A parameter that takes no part in a step then has a gradient of zero instead of none.
    """
    by_kind: dict[tuple[torch.dtype, torch.device], list[nn.Parameter]] = {}
    for p in parameters:
        by_kind.setdefault((p.dtype, p.device), []).append(p)
    buffers = []
    for (dtype, device), members in by_kind.items():
        buffer = torch.zeros(sum(p.numel() for p in members), dtype=dtype, device=device)
        for p, part in zip(members, buffer.split([p.numel() for p in members]), strict=True):
            p.grad = part.view_as(p)
        buffers.append(buffer)
    return buffers
