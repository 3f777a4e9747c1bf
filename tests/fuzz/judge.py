"""A program run by halfbyte beside what the oracle makes of it, and the verdict.

"equal": every figure lies within a bound of the oracle's in fp64, which is derived from the
oracle's own distance between fp32 and fp64. "refused": halfbyte said by name why not, before it
began. Anything else is a `Finding`.
"""

import contextlib
import gc
import hashlib
import json
import logging
import math
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import halfbyte
from halfbyte.errors import HalfbyteError

from . import oracle
from .checkpoints import checkpoint
from .oracle import Ids, Seen, Training, Unclear
from .program import Program, write_rows, written

FLOOR = {"float32": 1e-5, "bfloat16": 2.0**-5}
"""Of a figure's size, over two layers."""
TIMES = {"float32": 30, "bfloat16": 8}
"""The oracle's own distance: products in another order, in another form."""
EIGHT_BITS = 0.05
"""Of a loss, once moments in 8 bits have made a step."""


class Finding(AssertionError):
    """Something differs, or ended unforeseen."""


@dataclass
class Verdict:
    """how: equal, refused or unclear. why: of a refusal. compared: figures that were held equal,
    and the worst of each as a share of its bound."""

    how: str
    why: str = ""
    compared: dict[str, float] = field(default_factory=dict)


class Comparison:
    """Figures beside the oracle's; the worst share of a bound is kept."""

    def __init__(self, dtype: str) -> None:
        self.dtype = dtype
        self.worst: dict[str, float] = {}

    def near(
        self, what: str, found: Tensor | float, exact: Tensor | float, other: Tensor | float
    ) -> None:
        """Raise a `Finding` unless ``found`` is as near to ``exact`` as rounding allows; ``other``
        is what the oracle has in the dtype of the program."""
        mine, wide, narrow = (
            torch.as_tensor(t, dtype=torch.float64) for t in (found, exact, other)
        )
        if not bool(torch.isfinite(wide).all()):
            raise Unclear(f"{what}: the oracle's own is not finite")
        if mine.shape != wide.shape:
            raise Finding(f"{what}: shape {tuple(mine.shape)}, the oracle's {tuple(wide.shape)}")
        size = float(wide.abs().max()) if wide.numel() else 0.0
        bound = FLOOR[self.dtype] * max(size, 1e-3) + TIMES[self.dtype] * _largest(narrow - wide)
        far = _largest(mine - wide)
        share = far / bound if math.isfinite(far) else math.inf
        self.worst[what] = max(self.worst.get(what, 0.0), share)
        if not share <= 1:
            raise Finding(f"{what}: {far:.3g} from the oracle's {size:.6g}, allowed {bound:.3g}")

    def within(self, dtype: str) -> "Comparison":
        """The same comparison, of figures that were computed in another dtype."""
        other = Comparison(dtype)
        other.worst = self.worst
        return other

    def same(self, what: str, found: Any, expected: Any) -> None:
        if found != expected:
            raise Finding(f"{what}: {found!r}, the oracle has {expected!r}")
        self.worst.setdefault(what, 0.0)


def _largest(values: Tensor) -> float:
    return float(values.abs().max()) if values.numel() else 0.0


def judge(program: Program, home: Path) -> Verdict:
    """Run a program; models are kept below ``home`` for the next.

    Raises:
        Finding: it ended otherwise than equal or refused by name.
    """
    path = checkpoint(program.model, home / "models")
    place = home / "program"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    compared = Comparison(program.dtype)
    try:
        with _quiet():
            rows = _prepared(path, program)
            {"train": _train, "optimize": _optimize, "trl": _trl}[program.way](
                path, program, rows, place, compared
            )
    except Unclear as error:
        return Verdict("unclear", str(error))
    except HalfbyteError as error:
        return Verdict("refused", f"{type(error).__name__}: {error.what}")
    except Finding:
        raise
    except Exception as error:
        raise Finding(f"unforeseen {type(error).__name__}: {error}") from error
    finally:
        gc.collect()
    return Verdict("equal", compared=compared.worst)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _prepared(path: Path, program: Program) -> list[Ids]:
    """The rows as they should be trained, cut to their length."""
    tokenizer = oracle.tokenizer_of(path)
    found = []
    for row in program.rows:
        for ids in oracle.rows_of(row, tokenizer, program):
            if row.form == "text":  # of a longer text every part is a row
                starts = range(0, len(ids.ids), program.max_length)
                parts = [
                    Ids(
                        ids.ids[i : i + program.max_length], ids.trained[i : i + program.max_length]
                    )
                    for i in starts
                ]
            else:
                parts = [ids.cut(program.max_length)]
            found += [part for part in parts if part.supervised]
    if not found or len(found) > 9:
        raise Unclear(f"{len(found)} rows")
    if any(len(row.ids) < 3 for row in found):
        # gradients of q and k that are nothing but rounding, which Adam makes large
        raise Unclear("a row in which attention has nothing to choose")
    if program.dtype != "float32" and program.batch * program.accumulation < len(found):
        raise Unclear("which rows a step took cannot be told in 16 bits")
    return found


# --- our own loop ---------------------------------------------------------------------------------


def _options(path: Path, program: Program, place: Path, start: Path | None) -> dict[str, Any]:
    adapter, model = program.adapter, program.model
    rows = []
    for row in program.rows:
        if row.form == "ids":
            ids = oracle.ready(row, oracle.tokenizer_of(path))
            labels = [i if flag else -100 for i, flag in zip(ids.ids, ids.trained, strict=True)]
            rows.append({"input_ids": list(ids.ids), "labels": labels})
        else:
            rows.append(written(row))
    write_rows(rows, place / "rows.jsonl")
    options: dict[str, Any] = {
        "model": str(path),
        "data": str(place / "rows.jsonl"),
        "dtype": program.dtype,
        "load_in_4bit": model.bits == 4,
        "bnb_4bit_quant_type": model.quant_type,
        "bnb_4bit_use_double_quant": model.double_quant,
        "bnb_4bit_blocksize": model.blocksize,
        "allow_low_coverage": True,
        "max_length": program.max_length,
        "packing": program.packing,
        "assistant_only_loss": program.assistant_only,
        "per_device_train_batch_size": program.batch,
        "gradient_accumulation_steps": program.accumulation,
        "max_steps": program.steps,
        "learning_rate": program.learning_rate,
        "lr_scheduler_type": program.schedule,
        "warmup_steps": program.warmup,
        "weight_decay": program.weight_decay,
        "adam_beta2": program.beta2,
        "adam_epsilon": program.epsilon,
        "max_grad_norm": program.max_norm,
        "optim": program.optimizer,
        "kept_activations": program.kept,
        "gradient_checkpointing": program.checkpointing,
        "tokens_per_pass": program.tokens_per_pass,
        "logging_steps": 1,
        "save_steps": 1,
        "save_total_limit": 10,
        "eval_split": program.held_out,
        "eval_steps": 1,
        "num_samples": 0,
        "judge": False,
        "rehearse": False,
    }
    if adapter.kind == "full":
        return {**options, "full": True}
    if start is not None:
        return {**options, "adapter_name_or_path": str(start)}
    return {
        **options,
        "lora_r": adapter.r,
        "lora_alpha": adapter.alpha,
        "lora_dropout": 0.0,
        "use_rslora": adapter.rslora,
        "use_dora": adapter.dora,
        "target_experts": adapter.experts,
        "target_modules": ",".join(adapter.targets) or "all-linear",
        "rank_pattern": dict([adapter.rank]) if adapter.rank else {},
        "alpha_pattern": dict([adapter.alpha_of]) if adapter.alpha_of else {},
        "modules_to_save": ",".join(adapter.whole),
    }


def _train(
    path: Path, program: Program, rows: list[Ids], place: Path, compared: Comparison
) -> None:
    start = None
    if program.adapter.kind == "lora" and not program.adapter.fresh:
        start = place / "start"
        oracle.adapted(path, program).save_pretrained(start)
    options = _options(path, program, place, start)
    run = halfbyte.train(**options, output_dir=str(place / "run"))
    told = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    seen = [Seen(m["supervised_tokens"], m["loss"], m["grad_norm"], m["lr"]) for m in told]
    compared.same("steps", len(seen), program.steps)
    if program.adapter.kind == "lora" and start is None:
        start = _initial(options, place)
    trained = _both(path, program, start)
    held_out = _held_out(trained[0], rows, run.path) if program.held_out else None
    _steps(program, trained, rows, seen, compared, held_out)
    if program.resume_at:
        _resumed(program, options, run.path, place, compared)
    _result(path, program, trained, rows, run.path, compared)


def _initial(options: dict[str, Any], place: Path) -> Path:
    """The adapter a training begins with: what it is after a step of next to no length."""
    options = {**options, "max_steps": 1, "learning_rate": 1e-30, "weight_decay": 0.0}
    run = halfbyte.train(
        **{**options, "lr_scheduler_type": "constant", "warmup_steps": 0},
        output_dir=str(place / "initial"),
    )
    return run.path / "adapter"


@dataclass(frozen=True)
class HeldOut:
    """rows, and the losses a run told of them: before the first step and after each."""

    rows: list[Ids]
    losses: list[float]


def _held_out(training: Training, rows: list[Ids], run: Path) -> HeldOut:
    """What a run says of the rows it held out, which are then no longer among ``rows``."""
    told = [json.loads(line) for line in (run / "eval.jsonl").read_text().splitlines()]
    seen = Seen(told[0]["tokens"], told[0]["loss"], 0.0, 0.0)
    try:
        places = oracle.chosen(training.losses(rows), rows, seen, None)
    except LookupError as error:
        raise Finding(f"held out: {error}") from error
    kept = [rows[i] for i in places]
    rows[:] = [row for i, row in enumerate(rows) if i not in places]
    return HeldOut(kept, [row["loss"] for row in told])


def _both(path: Path, program: Program, start: Path | None) -> list[Training]:
    """The same training in fp64 and in the program's dtype."""
    made = []
    for dtype in (torch.float64, torch.float32):
        if start is None:
            model = oracle.base(path, program.model)
        else:
            model = oracle.with_adapter(path, program, start)
        half = dtype is torch.float32 and program.dtype == "bfloat16"
        model = oracle.in_bf16(model) if half else model.to(dtype)
        made.append(Training(model, program, program.steps, in_bf16=half))
    return made


def _steps(
    program: Program,
    trained: list[Training],
    rows: list[Ids],
    seen: list[Seen],
    compared: Comparison,
    held_out: HeldOut | None,
) -> None:
    """Each step beside the oracle's on the rows it took; in an epoch every row is taken once."""

    def judge_held_out(step: int) -> None:
        if held_out is not None and not (rough and step):
            wide, narrow = (each.mean_loss(held_out.rows) for each in trained)
            compared.near("loss of held-out rows", held_out.losses[step], wide, narrow)

    if held_out is not None:
        compared.same("evaluations", len(held_out.losses), program.steps + 1)
    left = list(rows)
    rough = "8bit" in program.optimizer
    judge_held_out(0)
    for number, mine in enumerate(seen):
        count = None if program.packing else min(len(left), program.batch * program.accumulation)
        losses = trained[0].losses(left)
        try:
            places = oracle.chosen(losses, left, mine, count)
        except LookupError as error:
            raise Finding(f"step {number + 1}: {error}, of {len(left)} left") from error
        taken = [left[i] for i in places]
        left = [row for i, row in enumerate(left) if i not in places] or list(rows)
        wide, narrow = (each.step(taken) for each in trained)
        compared.near("learning rate", mine.rate, wide.rate, wide.rate)
        if rough and number:
            if abs(mine.loss - wide.loss) > EIGHT_BITS * max(wide.loss, 1):
                raise Finding(f"loss of step {number + 1}: {mine.loss}, the oracle {wide.loss}")
        else:
            compared.near("loss", mine.loss, wide.loss, narrow.loss)
            compared.near("norm of gradients", mine.norm, wide.norm, narrow.norm)
        judge_held_out(number + 1)


def _resumed(
    program: Program, options: dict[str, Any], run: Path, place: Path, compared: Comparison
) -> None:
    """The same run as a kill behind a checkpoint leaves it, gone on with."""
    cut = place / "resumed"
    shutil.copytree(run, cut)
    for step in range(program.resume_at + 1, program.steps + 1):
        shutil.rmtree(cut / "checkpoints" / f"step-{step:08d}")
    shutil.rmtree(cut / "adapter")
    halfbyte.train(**options, output_dir=str(cut), resume_from_checkpoint="auto")
    compared.same("bytes of a resumed result", _digest(cut), _digest(run))


def _digest(run: Path) -> dict[str, str]:
    return {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted((run / "adapter").glob("*.safetensors"))
    }


def _logits(model: Any, rows: list[Ids], in_bf16: bool = False) -> Tensor:
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=in_bf16):
        found = [model(input_ids=torch.tensor([row.ids])).logits[0] for row in rows]
    return torch.cat(found).double()


def _result(
    path: Path,
    program: Program,
    trained: list[Training],
    rows: list[Ids],
    run: Path,
    compared: Comparison,
) -> None:
    """The result as other tools open it, as we do, and merged."""
    expected, other = (_logits(each.model.eval(), rows, each.in_bf16) for each in trained)
    if program.adapter.kind == "full":
        theirs: Any = oracle.eager(
            AutoModelForCausalLM.from_pretrained(run / "adapter", dtype=torch.float32)
        )
    else:
        theirs = oracle.with_adapter(path, program, run / "adapter")
    opened = _logits(theirs.eval().double(), rows)
    if "8bit" not in program.optimizer:
        compared.near("logits of the result", opened, expected, other)
    compared = compared.within("float32")  # what is opened in it
    model, _ = halfbyte.load(run, dtype="float32", device="cpu")
    narrow = _logits(theirs.float(), rows)
    compared.near("logits as we load it", _logits(model, rows), opened, narrow)
    if program.after.startswith("onto") and program.adapter.kind == "lora":
        _merged(path, program, rows, run, compared)
    if program.after == "bnb-4bit" and program.adapter.kind == "lora" and program.model.bits == 4:
        halfbyte.export(run, place := run.parent / "exported", "bnb-4bit")
        theirs = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)
        theirs = oracle.dequantized(theirs)
        theirs = peft.PeftModel.from_pretrained(theirs, str(place / "adapter")).eval()
        compared.near("logits in bitsandbytes", _logits(theirs, rows), opened, narrow)


def _merged(path: Path, program: Program, rows: list[Ids], run: Path, compared: Comparison) -> None:
    """A merged model's weights beside PEFT's merge in fp64, up to rounding where they are kept."""
    onto = program.after.rpartition(" ")[2]
    target = run.parent / "merged"
    halfbyte.merge(run, target, onto=onto)
    model = program.model
    if onto == "original":
        model = type(model)(model.family, model.template, model.tied, model.stored, bits=16)
    begun = oracle.base(path, model, program.adapter.whole).double()
    both = peft.PeftModel.from_pretrained(begun, str(run / "adapter")).merge_and_unload()
    found: Any = AutoModelForCausalLM.from_pretrained(target, dtype="auto")
    # each name of a tied tensor: PEFT merges into copies
    merged, expected = (dict(m.named_parameters(remove_duplicate=False)) for m in (found, both))
    compared.same("merged tensors", sorted(merged), sorted(expected))
    for name, p in merged.items():
        half = torch.finfo(p.dtype).eps * expected[name].abs() + 1e-7
        if bool(((p.double() - expected[name]).abs() > half).any()):
            far = _largest(p.double() - expected[name])
            raise Finding(f"merged {onto}, {name}: {far:.3g} from PEFT's merge")
    compared.worst[f"merged onto {onto}"] = 0.0


# --- PEFT's model in somebody's loop --------------------------------------------------------------


class Padded(Training):
    """A loop as people write it: rows padded to a batch, with an attention mask."""

    def step(self, rows: list[Ids]) -> Seen:
        supervised = sum(row.supervised for row in rows)
        self.optimizer.zero_grad()
        total = 0.0
        for first in range(0, len(rows), self.program.batch):
            some = rows[first : first + self.program.batch]
            longest = max(len(row.ids) for row in some)
            ids, mask, labels = [], [], []
            for row in some:
                empty = longest - len(row.ids)
                ids.append([*row.ids, *[0] * empty])
                mask.append([1] * len(row.ids) + [0] * empty)
                wanted = [i if t else -100 for i, t in zip(row.ids, row.trained, strict=True)]
                labels.append([*wanted, *[-100] * empty])
            with self.precision():
                loss = self.model(
                    input_ids=torch.tensor(ids),
                    attention_mask=torch.tensor(mask),
                    labels=torch.tensor(labels),
                    num_items_in_batch=supervised,
                ).loss
            loss.backward()
            total += float(loss)
        norm = float(nn.utils.clip_grad_norm_(self.trained, self.program.max_norm or math.inf))
        rate = self.schedule.get_last_lr()[0]
        self.optimizer.step()
        self.schedule.step()
        return Seen(supervised, total, norm, rate)


def _peft_model(path: Path, program: Program, start: Path) -> Any:
    """As people's scripts make it: the base in 4 bits of a `BitsAndBytesConfig`, PEFT's adapter."""
    given: dict[str, Any] = {"dtype": getattr(torch, program.dtype)}
    if program.adapter.dora and program.dtype != "float32":
        raise Unclear("PEFT's norms of a 4-bit base in 16 bits are six times the noise of its own")
    if program.model.bits == 4:
        if program.model.blocksize != 64:
            raise Unclear("a block size that BitsAndBytesConfig does not have")
        given["quantization_config"] = halfbyte.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=program.model.quant_type,
            bnb_4bit_use_double_quant=program.model.double_quant,
            bnb_4bit_compute_dtype=given["dtype"],
        )
    model: Any = AutoModelForCausalLM.from_pretrained(path, **given)
    model = peft.PeftModel.from_pretrained(model, str(start), is_trainable=True)
    if program.second:
        model.load_adapter(str(start), "second")
        for name, p in model.named_parameters():
            if ".second." in name and "lora_" in name:
                p.data.zero_()
    return model


def _untouched(model: Any) -> bool:
    """Whether the adapter that was not trained is as it was."""
    second = [p for n, p in model.named_parameters() if ".second." in n and "lora_" in n]
    return all(not bool(p.any()) for p in second)


def _optimize(
    path: Path, program: Program, rows: list[Ids], place: Path, compared: Comparison
) -> None:
    start = place / "start"
    oracle.adapted(path, program).save_pretrained(start)
    model = _peft_model(path, program, start)
    if program.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    model = halfbyte.optimize(model, say=lambda line: None)
    mine = Padded(model, program, program.steps, in_bf16=program.dtype == "bfloat16")
    wide, narrow = _both(path, program, start)
    each = program.batch * program.accumulation
    for number in range(program.steps):
        first = number * each % len(rows)
        taken = rows[first : first + each]
        found, exact, other = (training.step(taken) for training in (mine, wide, narrow))
        compared.near("loss", found.loss, exact.loss, other.loss)
        compared.near("norm of gradients", found.norm, exact.norm, other.norm)
    _saved(path, program, model, (wide.model, narrow.model), rows, place, compared)


def _saved(
    path: Path,
    program: Program,
    model: Any,
    others: tuple[Any, Any],
    rows: list[Ids],
    place: Path,
    compared: Comparison,
) -> None:
    """What a script saved of its model; others: the oracle's in fp64 and in the dtype."""
    half = program.dtype == "bfloat16"
    compared.same("the adapter that is not trained", _untouched(model), True)
    saved = place / "saved"
    model.save_pretrained(saved, selected_adapters=["default"])
    wide, narrow = others
    expected, other = _logits(wide.eval(), rows), _logits(narrow.eval(), rows, half)
    opened = _logits(oracle.with_adapter(path, program, saved).eval().double(), rows)
    compared.near("logits of the result", opened, expected, other)
    compared.near("logits under optimize", _logits(model.eval(), rows, half), expected, other)


def _trl(path: Path, program: Program, rows: list[Ids], place: Path, compared: Comparison) -> None:
    """TRL's trainer over `optimize`, and over the oracle's models: the same seed, the same rows."""
    start = place / "start"
    oracle.adapted(path, program).save_pretrained(start)
    mine = halfbyte.optimize(_peft_model(path, program, start), say=lambda line: None)
    half = program.dtype == "bfloat16"
    wide, narrow = (oracle.with_adapter(path, program, start) for _ in range(2))
    others = wide.double(), oracle.in_bf16(narrow) if half else narrow
    if program.model.bits == 4:  # TRL makes the adapter of such a base one of bf16
        half, compared = True, compared.within("bfloat16")
        for other in others:
            for p in other.parameters():
                if p.requires_grad:
                    half_p = p.data.bfloat16()
                    p.data = half_p.double() if other is others[0] else half_p
    told = [
        oracle.by_trl(model, program, rows, path, place / f"trl-{i}", in_bf16=half and i != 1)
        for i, model in enumerate((mine, *others))
    ]
    for found, exact, other in zip(*told, strict=True):
        compared.near("learning rate", found.rate, exact.rate, exact.rate)
        # the loss is rounded to four places in the log
        compared.near("loss", found.loss, exact.loss, other.loss + 1e-5)
        compared.near("norm of gradients", found.norm, exact.norm, other.norm)
    _saved(path, program, mine, (others[0], others[1]), rows, place, compared)
