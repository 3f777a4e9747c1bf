"""Training: one optimizer step is one paragraph (`Trainer.step`).

The loss of a step is the sum of cross-entropy over all supervised tokens of the global batch, divided by their number:
how the batch is cut into micro-batches cannot change it. Whatever is random is a function of (seed, epoch, step,
micro-batch, layer), so a resumed run goes on exactly as it would have.

Everything that can fail for a reason outside the model (options, output directory, data, template) is checked before
the weights are read.
"""

import contextlib
import hashlib
import math
import platform
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import attention, checkpoint, hub
from .adamw8bit import AdamW8bit
from .batches import MicroBatch, Prepared, Schedule, collate, prepare
from .chat import Renderer, read_template
from .config import TrainConfig
from .errors import BusyError, DataError, Interrupted, ModelError, NonFiniteError
from .load import (
    Abilities,
    Progress,
    QuantReport,
    build_empty,
    choose_device,
    choose_dtype,
    load_base,
    no_progress,
    read_config,
    self_test,
)
from .lora import AdapterConfig, DropoutClock, LoraLinear, attach_lora, lora_layers, save_adapter, target_names
from .loss import chunk_rows, output_head, supervised_loss
from .rows import read_examples
from .run import Run

Say = Callable[[str], None]


@dataclass
class Reporter:
    """Where progress goes: lines of text, a bar over work, and a call per step."""

    say: Say = lambda line: None
    progress: Progress = no_progress
    on_step: Callable[[dict[str, Any], int], None] = lambda row, total: None


def train(config: TrainConfig | None = None, reporter: Reporter | None = None, **options: Any) -> Run:
    """Fine-tune a model as the configuration says; returns the run directory.

    Args:
        config: the options; or give them by name (model=..., data=..., ...).

    Raises:
        HalfbyteError: with the exit code of the command line.
    """
    config = config or TrainConfig(**options)
    reporter = reporter or Reporter()
    run = Run(Path(config.output_dir).expanduser())
    hub.check_writable(run.path)
    with run.locked():
        return Trainer(config, run, reporter).run_all()


class Trainer:
    """Sets the pieces up in the order in which they can fail, then loops."""

    def __init__(self, config: TrainConfig, run: Run, reporter: Reporter | None = None) -> None:
        self.config, self.run, self.reporter = config, run, reporter or Reporter()
        self.total_steps = config.max_steps

    def run_all(self) -> Run:
        config, say = self.config, self.reporter.say
        resumed = self._find_checkpoint()
        base_path = hub.resolve(config.model, config.revision)
        self.renderer, self.data = self._read_data(base_path)
        self.schedule = Schedule(
            self.data.rows,
            config.seed,
            config.per_device_train_batch_size,
            config.gradient_accumulation_steps,
            self.max_length if config.packing else None,
        )
        self.steps_per_epoch = len(self.schedule.epoch(0))
        if config.max_steps < 0:
            self.total_steps = math.ceil(config.num_train_epochs * self.steps_per_epoch)
        info = self._info(base_path)
        if resumed is not None:
            checkpoint.refuse_changes(checkpoint.read_state(resumed), info)
        self.info = info
        self.run.write_info(info)
        hub.write_json(self.run.path / "quant.json", self.build_model(base_path).as_dict())
        start = 0
        if resumed is not None:
            checkpoint.restore(resumed, self.model, self.optimizer)
            start = resumed.step
            say(f"resumed from step {start} ({resumed.path})")
        self.run.cut_metrics(start)
        checkpoint.remove_unfinished(self.run.checkpoints)
        self._loop(start)
        self._save_result()
        return self.run

    # --- before the model ---

    def _find_checkpoint(self) -> checkpoint.Found | None:
        """The checkpoint to go on from; refuses an older run's directory unless asked to resume."""
        found, damaged = checkpoint.newest(self.run.checkpoints)
        for line in damaged:
            self.reporter.say(f"skipped a damaged checkpoint: {line}")
        if self.config.resume_from_checkpoint is None:
            if found or damaged or self.run.adapter.exists():
                raise BusyError(
                    f"{self.run.path} already holds a run",
                    ways_out=[
                        "continue it with --resume_from_checkpoint auto",
                        "or choose another --output_dir; the older run is left as it is",
                    ],
                )
            return None
        return found

    def _read_data(self, base_path: Path) -> tuple[Renderer, Prepared]:
        config = self.config
        examples = read_examples(config.data)
        model_config = read_config(base_path)
        if not config.full:
            target_names(build_empty(model_config), config.target_modules)  # raises now rather than after loading
        tokenizer = hub.load_tokenizer(base_path)
        template = read_template(config.chat_template) if config.chat_template else None
        renderer = Renderer(
            tokenizer,
            template,
            assistant_only=config.assistant_only_loss,
            completion_only=config.completion_only_loss,
        )
        context = getattr(model_config.get_text_config(), "max_position_embeddings", None) or config.max_length
        self.max_length = min(config.max_length, context)
        if self.max_length < config.max_length:
            self.reporter.say(f"max_length {config.max_length} is capped at the model's context, {self.max_length}")
        batches = [examples[i : i + 256] for i in range(0, len(examples), 256)]
        rows = []
        for number in self.reporter.progress([str(i) for i in range(len(batches))], len(batches), "tokenizing"):
            rows += renderer.encode(batches[int(number)])
        vocabulary = model_config.get_text_config().vocab_size
        if (highest := max(max(row.input_ids) for row in rows)) >= vocabulary:
            raise DataError(
                f"the tokenizer gives id {highest}, but the model has {vocabulary} embeddings",
                ways_out=["use the tokenizer that belongs to the model"],
            )
        data = prepare(rows, self.max_length, config.over_length)
        for line in _data_lines(data, self.max_length):
            self.reporter.say(line)
        return renderer, data

    def _info(self, base_path: Path) -> dict[str, Any]:
        device = choose_device(self.config.device)
        return {
            "schema": 1,
            "config": self.config.model_dump(),
            "base": {"name": self.config.model, "path": str(base_path.resolve())},
            "compute_dtype": str(choose_dtype(self.config.dtype, device)).removeprefix("torch."),
            "data": {"sha256": hub.sha256_file(Path(self.config.data).expanduser()), **self.data.counts()},
            "template_sha256": self.renderer.template_sha256,
            "tokenizer_sha256": hashlib.sha256(self.renderer.tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
            "total_steps": self.total_steps,
            "versions": {name: metadata.version(name) for name in ("halfbyte", "torch", "transformers", "safetensors")},
            "machine": {
                "platform": platform.platform(),
                "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
                "threads": torch.get_num_threads(),
            },
        }

    # --- the model ---

    def build_model(self, base_path: Path) -> QuantReport:
        """Load, test, adapt: everything `step` needs."""
        self.model, report = load_base(base_path, self.config, self.reporter.progress)
        self.reporter.say(_loaded_line(self.model, report.coverage, self.config.load_in_4bit))
        self._check_abilities(self_test(self.model))
        self._make_trainable()
        self.optimizer = self._make_optimizer()
        return report

    def _check_abilities(self, abilities: Abilities) -> None:
        self.abilities = abilities
        if not abilities.chunked_head:
            raise ModelError(
                "the output head of this model cannot be applied to chunks of its hidden states",
                found=f"logits differ by {abilities.head_error:.2g} (relative)",
                expected="differences within rounding",
            )
        if abilities.packing:
            return
        if self.config.packing:
            raise ModelError(
                "this model lets packed rows see each other",
                found=f"logits differ by {abilities.packing_error:.2g} (relative) from those of separate rows",
                ways_out=["train without --packing"],
            )
        self.reporter.say("rows are run one at a time: this model does not keep rows of one sequence apart")

    def _make_trainable(self) -> None:
        config, model = self.config, self.model
        if config.full:
            for p in model.parameters():
                p.requires_grad_(True)
            self.clock = DropoutClock(config.seed)
        else:
            adapter = AdapterConfig(config.lora_r, config.lora_alpha, config.lora_dropout, config.use_rslora)
            names = attach_lora(model, adapter, config.target_modules, seed=config.seed)
            first = model.get_submodule(names[0])
            assert isinstance(first, LoraLinear)
            self.clock = first.clock
        model.config.use_cache = False
        if config.gradient_checkpointing:
            # newer transformers renamed it, and warns at the older name
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False, "preserve_rng_state": False})
        model.train()
        self.trained = [p for p in model.parameters() if p.requires_grad]
        head = output_head(model)
        embedding = model.get_output_embeddings()
        self.head, self.head_parameters = head, [p for p in embedding.parameters() if p.requires_grad]
        self.device = model.get_input_embeddings().weight.device
        count = sum(p.numel() for p in self.trained)
        self.reporter.say(f"training {count:,} parameters of {sum(p.numel() for p in model.parameters()):,}")

    def _make_optimizer(self) -> torch.optim.Optimizer:
        c = self.config
        betas = (c.adam_beta1, c.adam_beta2)
        if c.optim == "adamw_torch":
            return torch.optim.AdamW(
                self.trained, lr=c.learning_rate, betas=betas, eps=c.adam_epsilon, weight_decay=c.weight_decay
            )
        if any(p.dtype != torch.float32 for p in self.trained):
            raise ModelError(
                "8-bit AdamW updates fp32 parameters",
                found=", ".join(sorted({str(p.dtype) for p in self.trained})),
                ways_out=["--optim adamw_torch", "or --dtype float32"],
            )
        return AdamW8bit(self.trained, c.learning_rate, betas, c.adam_epsilon, c.weight_decay)

    # --- the loop ---

    def _loop(self, start: int) -> None:
        if start >= self.total_steps:
            self.reporter.say(f"nothing left to do: {start} of {self.total_steps} steps are done")
            return
        packed = attention.segments(self.model) if self.abilities.packing else contextlib.nullcontext()
        with packed, _Stop() as stop:
            epoch, steps = -1, []
            for step in range(start, self.total_steps):
                if step // self.steps_per_epoch != epoch:
                    epoch = step // self.steps_per_epoch
                    steps = self.schedule.epoch(epoch)
                batches = [collate(self.data.rows, rows) for rows in steps[step % self.steps_per_epoch]]
                row = self.step(step, batches)
                row["epoch"] = round((step + 1) / self.steps_per_epoch, 4)
                done = step + 1
                if done % self.config.logging_steps == 0 or done == self.total_steps:
                    self.run.append_metrics(row)
                self.reporter.on_step(row, self.total_steps)
                last = done == self.total_steps
                if done % self.config.save_steps == 0 or last or stop.signal:
                    self._save(done)
                if stop.signal and not last:
                    raise Interrupted(
                        f"interrupted after step {done}; the state is saved. "
                        "Repeat the command with --resume_from_checkpoint auto to go on",
                        stop.signal,
                    )

    def step(self, step: int, batches: list[MicroBatch]) -> dict[str, Any]:
        """One optimizer step over a global batch; returns its row of metrics.jsonl."""
        began = time.perf_counter()
        supervised = sum(batch.supervised for batch in batches)
        total = torch.zeros((), device=self.device)
        for number, batch in enumerate(batches):
            for part in [batch] if self.abilities.packing else batch.split_rows():
                self.clock.step, self.clock.micro_batch = step, number
                loss = self._loss(part.to(self.device))
                (loss / supervised).backward()
                total += loss.detach()
        mean_loss = float(total) / supervised
        norm = float(self._clip())
        self._refuse_non_finite(step, mean_loss, norm, batches)
        rate = learning_rate(self.config, step, self.total_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        seconds, tokens = time.perf_counter() - began, sum(len(batch.input_ids) for batch in batches)
        return {
            "step": step + 1,
            "loss": mean_loss,
            "lr": rate,
            "grad_norm": norm,
            "tokens": tokens,
            "supervised_tokens": supervised,
            "tokens_per_s": round(tokens / seconds, 2),
            "memory_bytes": memory_bytes(self.device),
        }

    def _loss(self, batch: MicroBatch) -> Tensor:
        """Summed loss of a micro-batch."""
        if self.abilities.packing:
            batch = batch.padded()
        inputs: dict[str, Any] = {"input_ids": batch.input_ids[None], "position_ids": batch.position_ids[None]}
        if self.abilities.packing:
            inputs["cu_seq_lens_q"] = batch.bounds
        hidden = self.model.base_model(**inputs, use_cache=False).last_hidden_state[0]
        rows = chunk_rows(self.model.get_output_embeddings().weight.shape[0])
        return supervised_loss(hidden, batch.labels, self.head, self.head_parameters, rows)

    def _clip(self) -> Tensor:
        """The gradients' norm, before they are scaled down to max_grad_norm."""
        grads = [p.grad for p in self.trained if p.grad is not None]
        norm = nn.utils.get_total_norm(grads)
        if self.config.max_grad_norm:
            nn.utils.clip_grads_with_norm_(self.trained, self.config.max_grad_norm, norm)
        return norm

    def _refuse_non_finite(self, step: int, loss: float, norm: float, batches: list[MicroBatch]) -> None:
        if math.isfinite(loss) and math.isfinite(norm):
            return
        rows = [where for batch in batches for where in batch.rows]
        raise NonFiniteError(
            f"step {step + 1} gave loss {loss} and gradient norm {norm}; the parameters were not updated",
            where=", ".join(rows[:8]) + (f" and {len(rows) - 8} more rows" if len(rows) > 8 else ""),
            ways_out=["lower --learning_rate", "look at these rows", "the last checkpoint is unharmed: resume from it"],
        )

    def _save(self, step: int) -> None:
        state = {"total_steps": self.total_steps, "fingerprint": checkpoint.fingerprint(self.info)}
        keep = self.config.save_total_limit
        checkpoint.save(self.run.checkpoints, step, self.model, self.optimizer, state, keep, self.config.model)

    def _save_result(self) -> None:
        """adapter/: what other tools load (a full fine-tuning: the whole model)."""
        target = self.run.adapter
        if any(True for _ in lora_layers(self.model)):
            save_adapter(self.model, target, self.config.model)
        else:
            self.model.save_pretrained(target)
        tokenizer = self.renderer.tokenizer
        tokenizer.chat_template = self.renderer.template
        tokenizer.save_pretrained(target)
        generation = self.model.generation_config
        generation.eos_token_id = self.renderer.stop_ids()
        generation.save_pretrained(target)


# --- small things -----------------------------------------------------------------------------------------------------


def learning_rate(config: TrainConfig, step: int, total: int) -> float:
    """The rate of step 0, 1, ...: a linear warm-up, then linear or half-cosine to zero, or constant."""
    warmup = config.warmup_steps or math.ceil(config.warmup_ratio * total)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    done = (step - warmup) / max(total - warmup, 1)
    if config.lr_scheduler_type == "constant":
        return config.learning_rate
    if config.lr_scheduler_type == "cosine":
        return config.learning_rate * 0.5 * (1 + math.cos(math.pi * done))
    return config.learning_rate * (1 - done)


def memory_bytes(device: torch.device) -> int:
    """Peak bytes of the CUDA allocator, or this process's anonymous resident memory (0 where the system hides it)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("RssAnon"):
                return int(line.split()[1]) * 1024
    return 0


class _Stop:
    """Notes SIGINT and SIGTERM, so that the step in progress ends and is saved; a second signal acts at once."""

    def __init__(self) -> None:
        self.signal = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "_Stop":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: Any) -> None:
        self.signal = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def __exit__(self, *exception: Any) -> None:
        self._restore()


def _loaded_line(model: Any, coverage: float, load_in_4bit: bool) -> str:
    count = sum(p.numel() for p in model.parameters())
    held = f"{coverage:.1%} of the weights in layers held in 4 bits" if load_in_4bit else "held unquantized"
    return f"{type(model).__name__}: {count:,} parameters, {held}, computing in {str(model.config.dtype)[6:]}"


def _data_lines(data: Prepared, max_length: int) -> Iterator[str]:
    yield f"{len(data.rows):,} rows, {data.tokens:,} tokens, {data.supervised:,} of them trained"
    if data.truncated:
        yield (
            f"{data.truncated} rows were cut at {max_length} tokens; {data.end_lost} of them lost trained tokens "
            "and their end (--max_length raises the limit, --over_length drop leaves such rows out)"
        )
    if data.dropped_long:
        yield f"{len(data.dropped_long)} rows longer than {max_length} tokens were left out"
    if data.dropped_unsupervised:
        yield f"{len(data.dropped_unsupervised)} rows without a trained token in {max_length} tokens were left out"
