"""What a program must come to, by tools that share no code with halfbyte: transformers, PEFT,
bitsandbytes and torch.

A training is done twice, in fp32 and in fp64: what lies between the two is what rounding does, and
how far anything else may be from the second.
"""

import itertools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import datasets
import peft
import torch
import trl
from bitsandbytes.nn import Linear4bit
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    get_scheduler,
)
from transformers.pytorch_utils import Conv1D

from .program import LLAMA, MIXTURES, TOOL, Adapter, Model, Program, Row, messages_of


@dataclass(frozen=True)
class Ids:
    """A row's ids, and which of them are trained."""

    ids: tuple[int, ...]
    trained: tuple[bool, ...]

    def cut(self, length: int) -> "Ids":
        return Ids(self.ids[:length], self.trained[:length])

    @property
    def supervised(self) -> int:
        return sum(self.trained[1:])


class Unclear(Exception):
    """The program is none that an oracle can judge."""


# --- rows -----------------------------------------------------------------------------------------


def _within(offsets: list[tuple[int, int]], spans: list[tuple[int, int]]) -> tuple[bool, ...]:
    return tuple(
        any(start >= first and stop <= last and stop > start for first, last in spans)
        for start, stop in offsets
    )


def _conversation(
    tokenizer: Any, turns: list[dict[str, Any]], tools: list[Any] | None, every: bool
) -> list[Ids]:
    """A conversation turn by turn: what each answer adds, up to its end. Where a template writes
    earlier turns anew, a row of each answer."""

    def shown(count: int, asking: bool = False) -> str:
        return tokenizer.apply_chat_template(
            turns[:count], tools=tools, tokenize=False, add_generation_prompt=asking
        )

    def row(text: str, spans: list[tuple[int, int]]) -> Ids:
        coded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        trained = _within(coded["offset_mapping"], spans)
        return Ids(tuple(coded["input_ids"]), tuple(True for _ in trained) if every else trained)

    spans, whole = [], shown(len(turns))
    apart: list[Ids] = []
    for place, turn in enumerate(turns):
        if turn["role"] == "assistant":
            before, after = shown(place, True), shown(place + 1)
            if not after.startswith(before):
                raise Unclear("an answer does not begin with what asks for it")
            end = after.rfind(tokenizer.eos_token) + len(tokenizer.eos_token)
            spans.append((len(before), end))
            apart.append(row(after, [(len(before), end)]))
    follows = all(whole.startswith(shown(place + 1)) for place in range(len(turns)))
    return [row(whole, spans)] if follows or every else apart


def rows_of(row: Row, tokenizer: Any, program: Program) -> list[Ids]:
    """The ids of a row, or of the rows that it makes."""
    match row.form:
        case "text":
            ids = [*tokenizer(row.turns[0][1])["input_ids"], tokenizer.eos_token_id]
            return [Ids(tuple(ids), (True,) * len(ids))]
        case "prompt":
            asked, said = row.turns[0][1], row.turns[1][1]
            ids = [*tokenizer(asked + said)["input_ids"], tokenizer.eos_token_id]
            before = tokenizer(asked)["input_ids"]
            if ids[: len(before)] != before:
                raise Unclear("prompt and answer share a token")
            return [Ids(tuple(ids), tuple(i >= len(before) for i in range(len(ids))))]
        case "ids":
            return [ready(row, tokenizer)]
        case _:
            tools = [TOOL] if row.tools else None
            return _conversation(tokenizer, messages_of(row), tools, not program.assistant_only)


def ready(row: Row, tokenizer: Any) -> Ids:
    """Ids as somebody's own script makes them: prompt masked, answer and end trained."""
    asked, said = (tokenizer(text, add_special_tokens=False)["input_ids"] for _, text in row.turns)
    ids = [*asked, *said, tokenizer.eos_token_id]
    return Ids(tuple(ids), tuple(i >= len(asked) for i in range(len(ids))))


# --- model and adapter ----------------------------------------------------------------------------


def in_4bit(weight: Tensor, model: Model) -> Tensor:
    """A weight as bitsandbytes holds it: its codes, scales and tables, put together by torch. Its
    CPU code looks scales of scales up in steps of 2^-16, so that near ties go another way than on
    its GPUs, and takes the wrong scales where a block is longer than a row."""
    packed, state = bnb.quantize_4bit(
        weight.contiguous(),
        blocksize=model.blocksize,
        compress_statistics=False,
        quant_type=model.quant_type,
    )
    if model.double_quant:
        table = bnb.create_dynamic_map().double()
        offset = _mean(state.absmax)
        groups = (state.absmax - offset).split(256)
        largest = [group.abs().max() for group in groups]
        nearest = [
            ((group / most).double().unsqueeze(1) - table).abs().argmin(1)
            for group, most in zip(groups, largest, strict=True)
        ]
        parts = [
            table[code].float() * most + offset for code, most in zip(nearest, largest, strict=True)
        ]
        state.absmax = torch.cat(parts)
    return _values(packed, state)[: weight.numel()].view(weight.shape)


def _mean(values: Tensor) -> Tensor:
    """In the order that docs/format.md fixes: a zero-padded halving tree. Another order's last bit
    decides near ties of scales."""
    padded = torch.zeros(1 << max(0, values.numel() - 1).bit_length())
    padded[: values.numel()] = values
    while padded.numel() > 1:
        half = padded.numel() // 2
        padded = padded[:half] + padded[half:]
    return padded[0] / torch.tensor(float(values.numel()))


def _values(packed: Tensor, state: Any) -> Tensor:
    absmax = state.absmax
    if state.nested:
        inner = state.state2
        scales = inner.absmax.repeat_interleave(inner.blocksize)[: absmax.numel()]
        absmax = inner.code[absmax.long()] * scales + state.offset
    codes = packed.view(-1)
    values = state.code[torch.stack((codes >> 4, codes & 15), 1).view(-1).long()]
    return values * absmax.repeat_interleave(state.blocksize)[: values.numel()]


def base(path: Path, model: Model, whole: tuple[str, ...] = ()) -> Any:
    """The model in fp32, its linear layers but the head as 4 bits hold them."""
    made: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    head = made.get_output_embeddings()
    if model.bits == 4:
        for name, part in made.named_modules():
            if name.rpartition(".")[2] in whole or part is head:
                continue
            if isinstance(part, Conv1D):  # stored the other way around
                part.weight.data = in_4bit(part.weight.data.T, model).T.contiguous()
            elif isinstance(part, nn.Linear):
                part.weight.data = in_4bit(part.weight.data, model)
            elif hasattr(
                part, "is_transposed"
            ):  # a mixture's experts, each of their matrices alone
                for name, p in part.named_parameters(recurse=False):
                    each = 2 if name == "gate_up_proj" else 1
                    matrices = [m for expert in p.data for m in expert.chunk(each)]
                    p.data = torch.cat([in_4bit(m, model) for m in matrices]).view(p.shape)
    return eager(made)


def eager(model: Any) -> Any:
    """A model whose experts, if it has any, are run one by one: grouped products have no fp64."""
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    return model.eval()


def dequantized(model: Any) -> Any:
    """A model that bitsandbytes holds, its layers made ordinary ones: in its own bytes, which its
    CPU code reads wrong where a block is longer than a row."""
    for parent in list(model.modules()):
        for name, part in parent.named_children():
            if isinstance(part, Linear4bit):
                plain = nn.Linear(part.in_features, part.out_features, bias=part.bias is not None)
                state: Any = part.weight.quant_state
                plain.weight.data = _values(part.weight.data, state).view(state.shape)
                if part.bias is not None:
                    plain.bias.data = part.bias.data.float()
                setattr(parent, name, plain)
    for p in model.parameters():
        p.data = p.data.float()
    return eager(model)


EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")


def lora_config(adapter: Adapter, tied: bool, linear: tuple[str, ...] | None) -> peft.LoraConfig:
    return peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=adapter.r,
        lora_alpha=adapter.alpha,
        use_rslora=adapter.rslora,
        use_dora=adapter.dora,
        # PEFT's "all-linear" takes the experts of some families as well
        target_modules=list(adapter.targets or linear or ()) or "all-linear",
        rank_pattern=dict([adapter.rank]) if adapter.rank else {},
        alpha_pattern=dict([adapter.alpha_of]) if adapter.alpha_of else {},
        target_parameters=list(EXPERTS) if adapter.experts else None,
        modules_to_save=list(adapter.whole) or None,
        ensure_weight_tying=tied and bool(adapter.whole),
        lora_dropout=0.0,
    )


def adapted(path: Path, program: Program) -> Any:
    """The base with an adapter of random values."""
    made = base(path, program.model, program.adapter.whole)
    torch.manual_seed(1)
    family = program.model.family
    linear = LLAMA[:4] if family in MIXTURES else None
    made = peft.get_peft_model(made, lora_config(program.adapter, program.model.tied, linear))
    for name, p in made.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.05)
        elif "magnitude" in name:
            p.data *= 1 + 0.05 * torch.randn_like(p)
    return made


def with_adapter(path: Path, program: Program, saved: Path) -> Any:
    """The base with an adapter that somebody saved, to be trained on."""
    made = base(path, program.model, program.adapter.whole)
    return peft.PeftModel.from_pretrained(made, str(saved), is_trainable=True)


def in_bf16(model: Any) -> Any:
    """What is not trained in bf16, as scripts hold it."""
    for p in model.parameters():
        if not p.requires_grad:
            p.data = p.data.bfloat16()
    return model


# --- a training -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Seen:
    """What a step said of itself: supervised tokens, mean loss, norm of the gradients before it is
    clipped, learning rate."""

    supervised: int
    loss: float
    norm: float
    rate: float


def row_loss(model: Any, row: Ids) -> Tensor:
    """The sum over a row's trained tokens."""
    logits = model(input_ids=torch.tensor([row.ids])).logits[0, :-1]
    wanted = torch.tensor(
        [i if flag else -100 for i, flag in zip(row.ids, row.trained, strict=True)]
    )[1:]
    return nn.functional.cross_entropy(logits, wanted, ignore_index=-100, reduction="sum")


class Training:
    """A training by torch's AdamW, whose steps take the rows that another took."""

    def __init__(self, model: Any, program: Program, total: int, in_bf16: bool = False) -> None:
        self.model, self.program, self.in_bf16 = model.train(), program, in_bf16
        kept = set(Trainer.get_decay_parameter_names(Any, model))  # type: ignore[arg-type]
        groups = ([], [])
        for name, p in model.named_parameters():
            if p.requires_grad:
                groups[name not in kept].append(p)
        self.trained = [p for group in groups for p in group]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": groups[0], "weight_decay": program.weight_decay},
                {"params": groups[1], "weight_decay": 0.0},
            ],
            lr=program.learning_rate,
            betas=(0.9, program.beta2),
            eps=program.epsilon,
        )
        self.schedule = get_scheduler(
            program.schedule,
            self.optimizer,
            num_warmup_steps=program.warmup,
            num_training_steps=total,
        )

    def precision(self) -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16, enabled=self.in_bf16)

    def losses(self, rows: list[Ids]) -> list[float]:
        with torch.no_grad(), self.precision():
            return [float(row_loss(self.model, row)) for row in rows]

    def mean_loss(self, rows: list[Ids]) -> float:
        """Per trained token, as held-out rows are judged."""
        self.model.eval()
        found = sum(self.losses(rows)) / sum(row.supervised for row in rows)
        self.model.train()
        return found

    def step(self, rows: list[Ids]) -> Seen:
        """A step over rows: the mean over all their trained tokens."""
        supervised = sum(row.supervised for row in rows)
        self.optimizer.zero_grad()
        total = 0.0
        for row in rows:
            with self.precision():
                loss = row_loss(self.model, row) / supervised
            loss.backward()
            total += float(loss)
        limit = self.program.max_norm or math.inf
        norm = float(nn.utils.clip_grad_norm_(self.trained, limit))
        rate = self.schedule.get_last_lr()[0]
        self.optimizer.step()
        self.schedule.step()
        return Seen(supervised, total, norm, rate)


def by_trl(
    model: Any, program: Program, rows: list[Ids], path: Path, place: Path, in_bf16: bool
) -> list[Seen]:
    """What TRL's trainer tells of a training, step by step."""
    data = datasets.Dataset.from_list(
        [
            {
                "input_ids": list(row.ids),
                "labels": [i if t else -100 for i, t in zip(row.ids, row.trained, strict=True)],
            }
            for row in rows
        ]
    )
    trainer = trl.SFTTrainer(
        model,
        args=trl.SFTConfig(
            output_dir=str(place),
            per_device_train_batch_size=program.batch,
            gradient_accumulation_steps=program.accumulation,
            max_steps=program.steps,
            learning_rate=program.learning_rate,
            lr_scheduler_type=program.schedule,
            warmup_steps=program.warmup,
            weight_decay=program.weight_decay,
            adam_beta2=program.beta2,
            adam_epsilon=program.epsilon,
            max_grad_norm=program.max_norm,
            optim="adamw_torch",
            max_length=program.max_length,
            gradient_checkpointing=program.checkpointing,
            bf16=in_bf16,
            logging_steps=1,
            save_strategy="no",
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
        ),
        train_dataset=data,
        processing_class=tokenizer_of(path),
    )
    trainer.train()
    return [
        Seen(0, line["loss"], line["grad_norm"], line["learning_rate"])
        for line in trainer.state.log_history
        if "loss" in line
    ]


def chosen(losses: list[float], rows: list[Ids], seen: Seen, count: int | None) -> tuple[int, ...]:
    """The rows a step took, by what it said of them: of those with as many trained tokens the ones
    whose loss is nearest.

    Args:
        count: how many rows it must have taken, where that is known.
    """
    best: tuple[float, tuple[int, ...]] | None = None
    for size in range(1, len(rows) + 1) if count is None else [count]:
        for places in itertools.combinations(range(len(rows)), size):
            tokens = sum(rows[i].supervised for i in places)
            if tokens == seen.supervised:
                far = abs(sum(losses[i] for i in places) / tokens - seen.loss)
                if best is None or far < best[0]:
                    best = far, places
    if best is None:
        raise LookupError(f"no rows have {seen.supervised} trained tokens")
    return best[1]


def tokenizer_of(path: Path) -> Any:
    # as its file is: an automatic class would be another one's for some model types
    return PreTrainedTokenizerFast.from_pretrained(path)
