"""The one declaration of every option of a training: YAML keys, flags and the record in
``run.json`` come from here.

Names are Hugging Face's own; those of other tools are in `config.aliases`, the other verbs' in
`config.verbs`. No torch here: ``halfbyte --help`` reads this file.

One file because it is the one place where an option of a training is declared.
"""

import json
import math
import re
from pathlib import PurePath
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, field_validator, model_validator

from .aliases import TOGETHER
from .rules import ABSENT, option, rules_of


class Options(BaseModel):
    model_config = ConfigDict(
        extra="forbid", validate_assignment=True, protected_namespaces=(), allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _path(cls, value: Any) -> Any:
        return str(value) if isinstance(value, PurePath) else value


OptionsT = TypeVar("OptionsT", bound=Options)


GIVEN_TO_TEMPLATES = {"messages", "tools", "documents", "add_generation_prompt"}


def template_kwargs(value: Any) -> Any:
    """What a template may be given beside the conversation.

    Raises:
        ValueError: a name that is the conversation's.
    """
    value = as_mapping(value)
    if isinstance(value, dict) and (taken := sorted(GIVEN_TO_TEMPLATES & value.keys())):
        raise ValueError(f"{', '.join(taken)} is what a row says, or how it is asked")
    return value


def as_mapping(value: Any) -> Any:
    """A mapping that was written as JSON; anything else as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value or "{}")
    except ValueError as error:
        raise ValueError(f"must be a mapping, as in JSON: {error}") from None


class KernelOptions(Options):
    """What computes."""

    kernels: Literal["auto", "cpp", "torch"] = option(
        "auto",
        "what computes on a CPU: the C++ library, plain PyTorch, or auto: the library if it was "
        "built",
        resume="free",
    )


class FourBitOptions(Options):
    """How weights are stored in 4 bits."""

    bnb_4bit_quant_type: Literal["nf4", "fp4"] = option("nf4", "4-bit format", resume="named")
    bnb_4bit_use_double_quant: bool = option(
        True, "store the scales in 8 bits (double quantization)", resume="named"
    )
    bnb_4bit_blocksize: int = option(
        64, "weights per scale, a power of two in 32..4096", resume="named"
    )

    @field_validator("bnb_4bit_blocksize")
    @classmethod
    def _power_of_two(cls, value: int) -> int:
        if not (32 <= value <= 4096 and value & (value - 1) == 0):
            raise ValueError("must be a power of two in 32..4096")
        return value


SUBFOLDER_HELP = "the folder of a repository or directory that the model is in"


class ModelOptions(KernelOptions, FourBitOptions):
    """How the base model is held."""

    revision: str | None = option(None, "revision of a Hub model", resume="named")
    subfolder: str | None = option(
        None,
        SUBFOLDER_HELP,
        resume="named",
        added_later=None,
    )
    load_in_4bit: bool = option(
        True,
        "hold the linear layers in 4 bits; false keeps the base in 16 or 32 bits",
        resume="never",
    )
    tie_word_embeddings: bool = option(
        True,
        "false: an output head that the model's config.json ties to the embedding is a tensor of "
        "its own, as an adapter needs it that trained them apart",
        resume="never",
        of_adapter=True,
        added_later=True,
    )
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = option(
        "auto",
        "compute dtype; auto is bfloat16 where the hardware multiplies it, else float32",
        resume="named",
    )
    device: str = option("auto", "cpu, cuda or auto", resume="named")
    allow_other_base: bool = option(
        False, "use an adapter on another base than the one it was trained on", resume="free"
    )
    allow_low_coverage: bool = option(
        False,
        "accept a model of which under 90 % of the linear weights are in 4 bits",
        resume="named",
    )
    weight_streaming: Literal["auto", "always", "never"] = option(
        "auto",
        "on a CPU: 4-bit weights stay in a file (written once, kept in the cache) and are read as "
        "layers need them; auto: where a training does not fit otherwise",
        resume="free",
    )

    def holding(self) -> dict[str, Any]:
        """The options that say how a base is held, by name; what computes is for each call to
        say."""
        return {
            key: getattr(self, key)
            for key in ModelOptions.model_fields
            if key not in KernelOptions.model_fields
        }

    def same_quantization(self, other: "ModelOptions") -> bool:
        """Whether both hold a base in the same bytes."""
        keys = ["load_in_4bit"]
        if self.load_in_4bit:
            keys += ["bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "bnb_4bit_blocksize"]
        return all(getattr(self, key) == getattr(other, key) for key in keys)

    @field_validator("device")
    @classmethod
    def _known_device(cls, value: str) -> str:
        return known_device(value)

    @field_validator("weight_streaming", mode="before")
    @classmethod
    def _switch(cls, value: Any) -> Any:
        return as_policy(value)


def as_policy(value: Any) -> Any:
    """True and false, as other tools' switches have them, as always and never."""
    return {"true": "always", "false": "never"}.get(str(value).lower(), value)


def known_device(value: str) -> str:
    """The value, if it can name a device."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", value):
        raise ValueError("must be auto, cpu, cuda or cuda:N")
    return value


LARGEST_RANK = 1 << 16
"""No layer of a known model has as many inputs."""


class LoraOptions(Options):
    """The adapter (Hu et al. 2021, arXiv:2106.09685)."""

    lora_r: int = option(
        16, "rank of the adapter", ge=1, le=LARGEST_RANK, resume="never", of_adapter=True
    )
    lora_alpha: float = option(
        32, "the adapter's product is scaled by alpha / r", gt=0, resume="named", of_adapter=True
    )
    lora_dropout: float = option(
        0.05, "dropout on the adapter's input", ge=0.0, lt=1.0, resume="named", of_adapter=True
    )
    target_modules: str = option(
        "all-linear",
        "all-linear, names separated by commas (q_proj,v_proj), or a regular expression of whole "
        "paths",
        resume="never",
        of_adapter=True,
    )
    use_rslora: bool = option(
        False, "scale by alpha / sqrt(r) instead", resume="never", of_adapter=True
    )
    rank_pattern: dict[str, int] = option(
        {},
        'other ranks for some layers: {"down_proj": 32}, regular expressions of paths',
        resume="never",
        of_adapter=True,
        added_later={},
    )
    alpha_pattern: dict[str, float] = option(
        {},
        "other alphas for some layers, likewise",
        resume="named",
        of_adapter=True,
        added_later={},
    )
    use_dora: bool = option(
        False,
        "train the norms of the weights' rows, too (DoRA)",
        resume="never",
        of_adapter=True,
        added_later=False,
    )
    target_experts: bool = option(
        False,
        "adapt the experts of a mixture, too, each with rank lora_r / experts per token",
        resume="never",
        of_adapter=True,
        added_later=False,
    )
    modules_to_save: str = option(
        "",
        "modules trained whole beside the adapter (lm_head,embed_tokens): ends of paths, "
        "separated by commas",
        resume="never",
        of_adapter=True,
        added_later="",
    )
    adapter_name_or_path: str | None = option(
        None,
        "begin with this adapter, of PEFT or a run: rank, alpha and layers are its own",
        resume="named",
        of_adapter=True,
        added_later=None,
    )
    full: bool = option(
        False,
        "train every parameter instead of an adapter; needs load_in_4bit false",
        resume="never",
    )

    @field_validator("rank_pattern", "alpha_pattern", mode="before")
    @classmethod
    def _mapping(cls, value: Any) -> Any:
        value = as_mapping(value)
        for pattern in value if isinstance(value, dict) else ():
            try:
                re.compile(str(pattern))
            except re.error as error:
                raise ValueError(f"{pattern!r} is no valid regular expression: {error}") from None
        return value

    @field_validator("lora_alpha")
    @classmethod
    def _whole_alpha(cls, value: float) -> float:
        return int(value) if value == math.floor(value) else value  # as it always was written

    @field_validator("rank_pattern", "alpha_pattern")
    @classmethod
    def _positive_values(cls, value: dict[str, float]) -> dict[str, float]:
        if any(not 0 < number < math.inf for number in value.values()):
            raise ValueError("every value must be above 0, and finite")
        return {name: int(n) if n == math.floor(n) else n for name, n in value.items()}


class DataOptions(Options):
    """What is trained on."""

    @field_validator("data", mode="before", check_fields=False)
    @classmethod
    def _sources(cls, value: Any) -> Any:
        """Several sources are one string, a line each."""
        if isinstance(value, list | tuple) and all(isinstance(v, str | PurePath) for v in value):
            return TOGETHER.join(map(str, value))
        return value

    @field_validator("chat_template_kwargs", mode="before")
    @classmethod
    def _switches(cls, value: Any) -> Any:
        return template_kwargs(value)

    max_length: int = option(
        1024,
        "longest row in tokens; capped at the model's context",
        ge=2,
        resume="named",
        fit_to="last",
        in_trainer=True,
    )
    over_length: Literal["truncate", "drop", "error"] = option(
        "truncate", "what happens to a longer row (counted)", resume="named"
    )
    completion_only_loss: bool = option(
        True, "prompt/completion rows: train the completion only", resume="named", in_trainer=True
    )
    assistant_only_loss: bool = option(
        True, "conversations: train the assistant's turns only", resume="named", in_trainer=True
    )
    packing: bool = option(
        False,
        "fill each sequence of max_length with several rows, kept apart by the attention",
        resume="named",
        in_trainer=True,
    )
    chat_template: str | None = option(
        None, "a Jinja file used instead of the tokenizer's own template", resume="named"
    )
    chat_template_kwargs: dict[str, Any] = option(
        {},
        'what the template is given beside the conversation: {"enable_thinking": false}',
        resume="named",
        added_later={},
    )
    turns: Literal["whole", "each", "last"] = option(
        "whole",
        "a conversation as one row where its template allows it, as a row for each answer, or its "
        "last answer only",
        resume="named",
        added_later="whole",
    )
    drop_roles: str = option(
        "",
        "messages of these roles are left out, e.g. system,tool",
        resume="named",
        added_later="",
    )
    parse_control_tokens: bool = option(
        False,
        "control tokens in plain texts, prompts and completions are control tokens, not letters",
        resume="named",
        added_later=False,
    )
    eval_split: float | None = option(
        None,
        "held out and evaluated: a share of the rows below 1, or that many rows, or 0; not given: "
        "16 to 64 of a hundred rows or more, to judge the training by",
        ge=0,
        resume="named",
    )
    skip_bad: int = option(
        0,
        "up to this many bad rows are left out (and listed); one more is an error",
        ge=0,
        resume="free",
    )
    dataset_config: str | None = option(None, "configuration of a Hub data set", resume="named")
    dataset_train_split: str = option(
        "train", "split of a Hub data set, or of a folder of files named for theirs", resume="named"
    )
    seed: int = option(
        42, "everything random is a function of it", ge=0, lt=2**63, resume="named", in_trainer=True
    )


class TrainingOptions(Options):
    """How it is trained."""

    output_dir: str = option("runs/halfbyte", "the run directory", resume="free", in_trainer=True)
    num_train_epochs: float = option(
        1.0, "passes over the data", gt=0, le=1e6, resume="named", in_trainer=True
    )
    max_steps: int = option(
        -1, "stop after this many optimizer steps; -1: by epochs", resume="named", in_trainer=True
    )
    per_device_train_batch_size: int = option(
        1,
        "rows (with packing: packed sequences) per micro-batch",
        ge=1,
        resume="named",
        fit_to="searched",
        in_trainer=True,
    )
    gradient_accumulation_steps: int = option(
        16,
        "micro-batches per optimizer step",
        ge=1,
        resume="named",
        fit_to="searched",
        in_trainer=True,
    )
    learning_rate: float = option(2e-4, "peak learning rate", gt=0, resume="named", in_trainer=True)
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = option(
        "linear", "after the warm-up; constant has none", resume="named"
    )
    warmup_ratio: float = option(
        0.03, "share of the steps spent warming up", ge=0, lt=1, resume="named"
    )
    warmup_steps: int | None = option(
        None, "steps of warm-up, 0 for none; not given: by warmup_ratio", ge=0, resume="named"
    )
    weight_decay: float = option(
        0.0, "decoupled weight decay", ge=0, resume="named", in_trainer=True
    )
    adam_beta1: float = option(
        0.9, "decay of the first moment", ge=0, lt=1, resume="named", in_trainer=True
    )
    adam_beta2: float = option(
        0.999, "decay of the second moment", ge=0, lt=1, resume="named", in_trainer=True
    )
    adam_epsilon: float = option(1e-8, "AdamW's epsilon", gt=0, resume="named", in_trainer=True)
    base_dropout: Literal["keep", "off"] = option(
        "keep",
        "dropout that the base model has of its own (attention_dropout, resid_pdrop, ...): as its "
        "configuration says, or none",
        resume="named",
        added_later="keep",
    )
    max_grad_norm: float = option(
        1.0,
        "gradients are scaled down to this norm; 0: never",
        ge=0,
        resume="named",
        in_trainer=True,
    )
    optim: Literal["paged_adamw_8bit", "adamw_8bit", "paged_adamw_32bit", "adamw_torch"] = option(
        "paged_adamw_8bit",
        "optimizer states in 8 bits, or in fp32 (paged_adamw_32bit, adamw_torch); those of paged "
        "ones may leave memory",
        resume="never",
    )
    paging: Literal["auto", "always"] = option(
        "auto",
        "states of a paged optimizer lie in a file (on a GPU: in host memory) and come in pieces; "
        "auto: where the plan "
        "does not fit otherwise, or memory runs short. The numbers are the same",
        resume="free",
    )
    gradient_checkpointing: bool = option(
        True,
        "recompute each layer in the backward pass",
        resume="named",
        fit_to="searched",
        in_trainer=True,
    )
    kept_activations: Literal["auto", "none", "attention", "mlp_in", "all"] = option(
        "auto",
        "with gradient_checkpointing: what a layer keeps beside its input, so that less is "
        "recomputed. attention: what attention reads and gives; mlp_in: also what the MLP reads; "
        "all: the results of all products; auto: all, in as many layers as fit in half of the "
        "memory that is free (with fit_to: all of it). The numbers are the same",
        resume="free",
        fit_to="searched",
    )
    kept_layers: int = option(
        -1,
        "the last so many layers keep them; -1: every layer",
        ge=-1,
        resume="free",
        fit_to="searched",
    )
    activation_offloading: Literal["auto", "always", "never"] = option(
        "auto",
        "with gradient_checkpointing: layer inputs wait for the backward pass in a file (on a GPU: "
        "in host memory); auto: where the plan does not fit otherwise",
        resume="free",
        in_trainer=True,
    )
    embedding_offloading: Literal["auto", "always", "never"] = option(
        "auto",
        "on a GPU: the frozen embedding table lies in host memory, and the rows of a batch are "
        "copied; auto: where the plan does not fit otherwise. The numbers are the same",
        resume="free",
    )
    tokens_per_pass: int = option(
        0,
        "a micro-batch of more tokens goes forward and backward in parts of whole rows, for the "
        "same gradients; 0: only where memory is too short",
        ge=0,
        resume="free",
        reorders_sums=True,
    )
    tokens_per_tile: int = option(
        0,
        "MLPs of layers run on so many tokens at a time, for the same gradients in less memory; 0: "
        "only where memory is too short",
        ge=0,
        resume="free",
        reorders_sums=True,
    )
    dequantized_weights: Literal["product", "ahead", "layer"] = option(
        "product",
        "where products cannot read 4-bit weights (on a GPU): how long a dequantized one stays. "
        "product: for one product; ahead: likewise, and the next one is made meanwhile, in a "
        "second buffer; layer: from a layer's recomputation through its backward pass. The numbers "
        "are the same",
        resume="free",
    )
    logging_steps: int = option(
        1, "a line of metrics.jsonl every so many steps", ge=1, resume="free", in_trainer=True
    )
    save_steps: int = option(
        100,
        "a checkpoint every so many steps, and one at the end",
        ge=1,
        resume="free",
        in_trainer=True,
    )
    report_to: str = option(
        "none", "also log to: tensorboard, wandb, trackio (separated by commas)", resume="free"
    )
    project: str | None = option(
        None,
        "the project that trackers file the run under; else their own environment's, else halfbyte",
        resume="free",
        added_later=None,
    )
    run_name: str | None = option(
        None,
        "the run's name at trackers; else their own environment's, else the directory's",
        resume="free",
        in_trainer=True,
        added_later=None,
    )
    eval_steps: int = option(
        0,
        "with eval_split: evaluate every so many steps; 0: before and after only",
        ge=0,
        resume="free",
    )
    num_samples: int = option(
        3, "rows whose question is answered before and after training; 0: none", ge=0, resume="free"
    )
    judge: bool = option(
        True,
        "hold the finished run against the model it was made of, on held-out rows and neutral text",
        resume="free",
    )
    save_total_limit: int = option(
        2,
        "newest checkpoints kept, beside the best one (lowest held-out loss)",
        ge=2,
        resume="free",
        in_trainer=True,
    )
    on_nonfinite: Literal["stop", "skip"] = option(
        "stop",
        "a NaN or infinity in loss or gradients: stop, or leave that step's update out and "
        "count it",
        resume="free",
    )
    rehearse: bool = option(
        True,
        "before the first step, run the largest batch once through everything and put the state "
        "back, bit for bit",
        resume="free",
    )
    resume_from_checkpoint: str | None = option(
        None,
        "auto: continue from the newest valid checkpoint, or start where there is none; or the "
        "directory of one of the run's checkpoints: later ones are set aside",
        resume="free",
    )

    allow_change: str = option(
        "",
        "on resume: accept these changes (names separated by commas), and record them",
        resume="free",
    )

    @field_validator("resume_from_checkpoint", mode="before")
    @classmethod
    def _newest(cls, value: Any) -> Any:
        """True and false as transformers has them."""
        return {"true": "auto", "false": None, "": None}.get(str(value).lower(), value)

    @field_validator("output_dir")
    @classmethod
    def _somewhere(cls, value: str) -> str:
        if not value.strip():
            raise ValueError("must name a directory")
        return value

    @field_validator("activation_offloading", "embedding_offloading", mode="before")
    @classmethod
    def _switch_offloading(cls, value: Any) -> Any:
        return as_policy(value)

    @field_validator("max_steps")
    @classmethod
    def _positive_or_minus_one(cls, value: int) -> int:
        if value != -1 and value < 1:
            raise ValueError("must be -1 or at least 1")
        return value


class PublishOptions(Options):
    """Where the result goes besides this machine."""

    push_to_hub: bool = option(
        False, "also upload the result, with its card, to the Hugging Face Hub", resume="free"
    )
    hub_model_id: str | None = option(None, "its name there: owner/name", resume="free")
    hub_private_repo: bool = option(True, "a new repository is private", resume="free")

    @model_validator(mode="after")
    def _named(self) -> "PublishOptions":
        if self.push_to_hub and not self.hub_model_id:
            raise ValueError("push_to_hub needs a name: --hub_model_id owner/name")
        return self


class FitOptions(Options):
    """What it has to fit into."""

    fit_to: str | None = option(
        None,
        "24GiB, or the name of a card (rtx-4090): the fastest plan that fits, over micro-batch, "
        "accumulation and what is kept; the global batch stays",
        resume="free",
    )


class TrainConfig(
    ModelOptions, LoraOptions, DataOptions, TrainingOptions, PublishOptions, FitOptions
):
    """Everything ``halfbyte train`` reads."""

    model: str = option(
        ..., "a Hub id, a local directory, or `demo` for the built-in model", resume="free"
    )
    data: str = option(
        ...,
        "a .json, .jsonl, .csv, .tsv, .parquet, .arrow or .txt file (packed, too), a folder or "
        "pattern of them, or a Hub data set (owner/name); given several times, all of them",
        resume="free",
    )
    force: bool = option(False, "train although the plan says that it does not fit", resume="free")

    @model_validator(mode="after")
    def _consistent(self) -> "TrainConfig":
        beside = [
            name
            for name in ("use_dora", "modules_to_save", "adapter_name_or_path")
            if getattr(self, name)
        ]
        if self.full and beside:
            raise ValueError(
                f"full trains every parameter and no adapter: {', '.join(beside)} cannot go with it"
            )
        if self.full and self.load_in_4bit:
            raise ValueError(
                "full trains every parameter, which 4-bit weights cannot be: add --load_in_4bit "
                "false"
            )
        if self.paging == "always" and not self.optim.startswith("paged_"):
            raise ValueError(
                f"paging always needs paged_adamw_8bit or paged_adamw_32bit, not {self.optim}"
            )
        if self.activation_offloading == "always" and not self.gradient_checkpointing:
            raise ValueError(
                "activation_offloading moves the inputs that gradient_checkpointing keeps: it "
                "needs that"
            )
        if 0 < self.tokens_per_tile < 16:
            raise ValueError("tokens_per_tile must be 0, or at least 16")
        return self


class PlanConfig(TrainConfig):
    """Everything ``halfbyte plan`` reads: what ``halfbyte train`` reads, and no data is needed."""

    data: str = option(
        "", "its rows' lengths are planned for; without it, rows of max_length", resume="free"
    )


RULES = rules_of(TrainConfig)
FREE_ON_RESUME = frozenset(name for name, rules in RULES.items() if rules.resume == "free")
NEVER_ON_RESUME = frozenset(name for name, rules in RULES.items() if rules.resume == "never")
OF_ADAPTER = tuple(name for name, rules in RULES.items() if rules.of_adapter)
SEARCHED = tuple(name for name, rules in RULES.items() if rules.fit_to == "searched")
FITTED = (*SEARCHED, *(name for name, rules in RULES.items() if rules.fit_to == "last"))
REORDERING = tuple(name for name, rules in RULES.items() if rules.reorders_sums)
ADDED_LATER = {
    name: rules.added_later for name, rules in RULES.items() if rules.added_later is not ABSENT
}

UNPAGED = {"paged_adamw_8bit": "adamw_8bit", "paged_adamw_32bit": "adamw_torch"}
"""Optimizers whose numbers and saved states are another one's."""
