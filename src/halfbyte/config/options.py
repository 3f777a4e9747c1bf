"""The one declaration of every option: YAML keys, command-line flags and the record in ``run.json`` all come from here.

Names are Hugging Face's own. Names other tools use for the same thing are in `RENAMED` and taken with a notice; any
other key is an error that names the nearest one. No torch here: ``halfbyte --help`` reads this file.
"""

import difflib
import json
import re
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from ..errors import UsageError

RENAMED = {
    "max_seq_length": "max_length",
    "max_seq_len": "max_length",
    "cutoff_len": "max_length",
    "sequence_len": "max_length",
    "micro_batch_size": "per_device_train_batch_size",
    "train_batch_size": "per_device_train_batch_size",
    "batch_size": "per_device_train_batch_size",
    "num_epochs": "num_train_epochs",
    "epochs": "num_train_epochs",
    "lr": "learning_rate",
    "lr_scheduler": "lr_scheduler_type",
    "lora_rank": "lora_r",
    "r": "lora_r",
    "lora_target_modules": "target_modules",
    "lora_target": "target_modules",
    "use_double_quant": "bnb_4bit_use_double_quant",
    "bnb_4bit_compute_dtype": "dtype",
    "torch_dtype": "dtype",
    "sample_packing": "packing",
    "gradient_clipping": "max_grad_norm",
    "val_set_size": "eval_split",
    "val_size": "eval_split",
    "test_size": "eval_split",
    "dataset_split": "dataset_train_split",
    "split": "dataset_train_split",
    "train_file": "data",
    "dataset_path": "data",
    "datasets": "data",
    "train_on_responses_only": "assistant_only_loss",
    "optimizer": "optim",
    "lora_model_dir": "adapter_name_or_path",
    "peft_use_dora": "use_dora",
    "lora_modules_to_save": "modules_to_save",
    "model_name_or_path": "model",
    "base_model": "model",
    "dataset_name": "data",
    "dataset": "data",
}
"""Other tools' names for our options."""

NEGATED = {"train_on_inputs": ("completion_only_loss", "assistant_only_loss")}
"""Renamed options whose meaning is the opposite, of these options of ours."""

ADDING_TOKENS = (
    "adding tokens is not done here: add them with transformers (resize_token_embeddings), save the model, train that"
)
REFUSED = {
    **dict.fromkeys(("resize_token_embeddings", "additional_special_tokens", "added_tokens"), ADDING_TOKENS),
    "trust_remote_code": "code that comes with a model is never run",
    "load_in_8bit": "bases are held in 4 bits, or unquantized with load_in_4bit false",
}
"""Options of other tools that we know and do not have, and what to do instead."""

SWITCHES = {"bf16": {"dtype": "bfloat16"}, "fp16": {"dtype": "float16"}}
"""Switches of other tools and what they mean here when they are on."""

LEFT_OUT = {
    *("save_strategy", "eval_strategy", "evaluation_strategy", "logging_strategy", "overwrite_output_dir"),
    *(
        "load_best_model_at_end",
        "dataloader_num_workers",
        "remove_unused_columns",
        "group_by_length",
        "task_type",
        "bias",
    ),
    *("bias", "flash_attention", "gradient_checkpointing_kwargs", "tf32", "inference_mode", "do_train", "do_eval"),
    *(
        "run_name",
        "logging_dir",
        "lora_target_linear",
        "wandb_project",
        "strict",
        "dataset_prepared_path",
    ),
}
"""Keys of other tools' files that have no counterpart here and change nothing that is trained."""

TRUE, FALSE = ("true", "1", "yes", "on", ""), ("false", "0", "no", "off", "none", "[]")


def option(default: Any, help_text: str, **rules: Any) -> Any:
    return Field(default, description=help_text, **rules)


class Options(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_assignment=True, protected_namespaces=())


OptionsT = TypeVar("OptionsT", bound=Options)


class KernelOptions(Options):
    """What computes."""

    kernels: Literal["auto", "cpp", "torch"] = option(
        "auto", "what computes on a CPU: the C++ library, plain PyTorch, or auto: the library if it was built"
    )


class FourBitOptions(Options):
    """How weights are stored in 4 bits."""

    bnb_4bit_quant_type: Literal["nf4", "fp4"] = option("nf4", "4-bit format")
    bnb_4bit_use_double_quant: bool = option(True, "store the scales in 8 bits (double quantization)")
    bnb_4bit_blocksize: int = option(64, "weights per scale, a power of two in 32..4096")

    @field_validator("bnb_4bit_blocksize")
    @classmethod
    def _power_of_two(cls, value: int) -> int:
        if not (32 <= value <= 4096 and value & (value - 1) == 0):
            raise ValueError("must be a power of two in 32..4096")
        return value


class ModelOptions(KernelOptions, FourBitOptions):
    """How the base model is held."""

    revision: str | None = option(None, "revision of a Hub model")
    load_in_4bit: bool = option(True, "hold the linear layers in 4 bits; false keeps the base in 16 or 32 bits")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = option(
        "auto", "compute dtype; auto is bfloat16 where the hardware multiplies it, else float32"
    )
    device: str = option("auto", "cpu, cuda or auto")
    allow_other_base: bool = option(False, "use an adapter on another base than the one it was trained on")
    allow_low_coverage: bool = option(False, "accept a model of which under 90 % of the linear weights are in 4 bits")
    weight_streaming: Literal["auto", "always", "never"] = option(
        "auto",
        "on a CPU: 4-bit weights stay in a file (written once, kept in the cache) and are read as layers need them; "
        "auto: where a training does not fit otherwise",
    )

    def holding(self) -> dict[str, Any]:
        """The options that say how a base is held, by name; what computes is for each call to say."""
        return {key: getattr(self, key) for key in ModelOptions.model_fields if key not in KernelOptions.model_fields}

    def held_as(self, other: "ModelOptions") -> bool:
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


class LoraOptions(Options):
    """The adapter (Hu et al. 2021, arXiv:2106.09685)."""

    lora_r: int = option(16, "rank of the adapter", ge=1)
    lora_alpha: int = option(32, "the adapter's product is scaled by alpha / r", ge=1)
    lora_dropout: float = option(0.05, "dropout on the adapter's input", ge=0.0, lt=1.0)
    target_modules: str = option(
        "all-linear", "all-linear, names separated by commas (q_proj,v_proj), or a regular expression of whole paths"
    )
    use_rslora: bool = option(False, "scale by alpha / sqrt(r) instead")
    rank_pattern: dict[str, int] = option(
        {}, 'other ranks for some layers: {"down_proj": 32}, regular expressions of paths'
    )
    alpha_pattern: dict[str, int] = option({}, "other alphas for some layers, likewise")
    use_dora: bool = option(False, "train the norms of the weights' rows, too (DoRA)")
    modules_to_save: str = option(
        "", "modules trained whole beside the adapter (lm_head,embed_tokens): ends of paths, separated by commas"
    )
    adapter_name_or_path: str | None = option(
        None, "begin with this adapter, of PEFT or a run: rank, alpha and layers are its own"
    )
    full: bool = option(False, "train every parameter instead of an adapter; needs load_in_4bit false")

    @field_validator("rank_pattern", "alpha_pattern", mode="before")
    @classmethod
    def _mapping(cls, value: Any) -> Any:
        if isinstance(value, str):
            try:
                value = json.loads(value or "{}")
            except ValueError as error:
                raise ValueError(f"must be a mapping, as in JSON: {error}") from None
        for pattern in value if isinstance(value, dict) else ():
            try:
                re.compile(str(pattern))
            except re.error as error:
                raise ValueError(f"{pattern!r} is no valid regular expression: {error}") from None
        return value

    @field_validator("rank_pattern", "alpha_pattern")
    @classmethod
    def _positive_values(cls, value: dict[str, int]) -> dict[str, int]:
        if any(number < 1 for number in value.values()):
            raise ValueError("every value must be at least 1")
        return value


class DataOptions(Options):
    """What is trained on."""

    max_length: int = option(1024, "longest row in tokens; capped at the model's context", ge=2)
    over_length: Literal["truncate", "drop", "error"] = option("truncate", "what happens to a longer row (counted)")
    completion_only_loss: bool = option(True, "prompt/completion rows: train the completion only")
    assistant_only_loss: bool = option(True, "conversations: train the assistant's turns only")
    packing: bool = option(False, "fill each sequence of max_length with several rows, kept apart by the attention")
    chat_template: str | None = option(None, "a Jinja file used instead of the tokenizer's own template")
    eval_split: float = option(0.0, "held out and evaluated: a share of the rows below 1, or that many rows", ge=0)
    skip_bad: int = option(0, "up to this many bad rows are left out (and listed); one more is an error", ge=0)
    dataset_config: str | None = option(None, "configuration of a Hub data set")
    dataset_train_split: str = option("train", "split of a Hub data set")
    seed: int = option(42, "everything random is a function of it", ge=0, lt=2**63)


class TrainingOptions(Options):
    """How it is trained."""

    output_dir: str = option("runs/halfbyte", "the run directory")
    num_train_epochs: float = option(1.0, "passes over the data", gt=0, le=1e6)
    max_steps: int = option(-1, "stop after this many optimizer steps; -1: by epochs")
    per_device_train_batch_size: int = option(1, "rows (with packing: packed sequences) per micro-batch", ge=1)
    gradient_accumulation_steps: int = option(16, "micro-batches per optimizer step", ge=1)
    learning_rate: float = option(2e-4, "peak learning rate", gt=0)
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = option("linear", "after the warm-up")
    warmup_ratio: float = option(0.03, "share of the steps spent warming up", ge=0, lt=1)
    warmup_steps: int = option(0, "steps of warm-up; 0: by warmup_ratio", ge=0)
    weight_decay: float = option(0.0, "decoupled weight decay", ge=0)
    adam_beta1: float = option(0.9, "decay of the first moment", ge=0, lt=1)
    adam_beta2: float = option(0.999, "decay of the second moment", ge=0, lt=1)
    adam_epsilon: float = option(1e-8, "AdamW's epsilon", gt=0)
    max_grad_norm: float = option(1.0, "gradients are scaled down to this norm; 0: never", ge=0)
    optim: Literal["paged_adamw_8bit", "adamw_8bit", "paged_adamw_32bit", "adamw_torch"] = option(
        "paged_adamw_8bit",
        "optimizer states in 8 bits, or in fp32 (paged_adamw_32bit, adamw_torch); those of paged ones may leave memory",
    )
    paging: Literal["auto", "always"] = option(
        "auto",
        "states of a paged optimizer lie in a file (on a GPU: in host memory) and come in pieces; auto: where the plan "
        "does not fit otherwise, or memory runs short. The numbers are the same",
    )
    gradient_checkpointing: bool = option(True, "recompute each layer in the backward pass")
    kept_activations: Literal["auto", "none", "attention", "mlp_in", "all"] = option(
        "auto",
        "with gradient_checkpointing: what a layer keeps beside its input, so that less is recomputed. attention: what "
        "attention reads and gives; mlp_in: also what the MLP reads; all: the results of all products; auto: all, in "
        "as many layers as fit in half of the memory that is free (with fit_to: all of it). The numbers are the same",
    )
    kept_layers: int = option(-1, "the last so many layers keep them; -1: every layer", ge=-1)
    activation_offloading: Literal["auto", "always", "never"] = option(
        "auto",
        "with gradient_checkpointing: layer inputs wait for the backward pass in a file (on a GPU: in host memory); "
        "auto: where the plan does not fit otherwise",
    )
    embedding_offloading: Literal["auto", "always", "never"] = option(
        "auto",
        "on a GPU: the frozen embedding table lies in host memory, and the rows of a batch are copied; auto: where the "
        "plan does not fit otherwise. The numbers are the same",
    )
    tokens_per_pass: int = option(
        0,
        "a micro-batch of more tokens goes forward and backward in parts of whole rows, for the same gradients; 0: "
        "only where memory is too short",
        ge=0,
    )
    tokens_per_tile: int = option(
        0,
        "MLPs of layers run on so many tokens at a time, for the same gradients in less memory; 0: only where memory "
        "is too short",
        ge=0,
    )
    dequantized_weights: Literal["product", "ahead", "layer"] = option(
        "product",
        "where products cannot read 4-bit weights (on a GPU): how long a dequantized one stays. product: for one "
        "product; ahead: likewise, and the next one is made meanwhile, in a second buffer; layer: from a layer's "
        "recomputation through its backward pass. The numbers are the same",
    )
    logging_steps: int = option(1, "a line of metrics.jsonl every so many steps", ge=1)
    save_steps: int = option(100, "a checkpoint every so many steps, and one at the end", ge=1)
    report_to: str = option("none", "also log to: tensorboard, wandb, trackio (separated by commas)")
    eval_steps: int = option(0, "with eval_split: evaluate every so many steps; 0: before and after only", ge=0)
    num_samples: int = option(3, "rows whose question is answered before and after training; 0: none", ge=0)
    save_total_limit: int = option(2, "newest checkpoints kept, beside the best one (lowest held-out loss)", ge=2)
    on_nonfinite: Literal["stop", "skip"] = option(
        "stop", "a NaN or infinity in loss or gradients: stop, or leave that step's update out and count it"
    )
    rehearse: bool = option(
        True, "before the first step, run the largest batch once through everything and put the state back, bit for bit"
    )
    resume_from_checkpoint: str | None = option(
        None, "auto: continue from the newest valid checkpoint, or start where there is none"
    )

    allow_change: str = option("", "on resume: accept these changes (names separated by commas), and record them")

    @field_validator("resume_from_checkpoint")
    @classmethod
    def _auto_only(cls, value: str | None) -> str | None:
        if value is not None and value != "auto":
            raise ValueError('must be "auto": the newest valid checkpoint of output_dir is taken')
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

    push_to_hub: bool = option(False, "also upload the result, with its card, to the Hugging Face Hub")
    hub_model_id: str | None = option(None, "its name there: owner/name")
    hub_private_repo: bool = option(True, "a new repository is private")

    @model_validator(mode="after")
    def _named(self) -> "PublishOptions":
        if self.push_to_hub and not self.hub_model_id:
            raise ValueError("push_to_hub needs a name: --hub_model_id owner/name")
        return self


class FitOptions(Options):
    """What it has to fit into."""

    fit_to: str | None = option(
        None,
        "24GiB, or the name of a card (rtx-4090): the fastest plan that fits, over micro-batch, accumulation and what "
        "is kept; the global batch stays",
    )


class TrainConfig(ModelOptions, LoraOptions, DataOptions, TrainingOptions, PublishOptions, FitOptions):
    """Everything ``halfbyte train`` reads."""

    model: str = option(..., "a Hub id, a local directory, or `demo` for the built-in model")
    data: str = option(..., "a .json, .jsonl, .csv, .tsv or .parquet file, or a Hub data set (owner/name)")
    force: bool = option(False, "train although the plan says that it does not fit")

    @model_validator(mode="after")
    def _consistent(self) -> "TrainConfig":
        beside = [name for name in ("use_dora", "modules_to_save", "adapter_name_or_path") if getattr(self, name)]
        if self.full and beside:
            raise ValueError(f"full trains every parameter and no adapter: {', '.join(beside)} cannot go with it")
        if self.full and self.load_in_4bit:
            raise ValueError("full trains every parameter, which 4-bit weights cannot be: add --load_in_4bit false")
        if self.paging == "always" and not self.optim.startswith("paged_"):
            raise ValueError(f"paging always needs paged_adamw_8bit or paged_adamw_32bit, not {self.optim}")
        if self.activation_offloading == "always" and not self.gradient_checkpointing:
            raise ValueError("activation_offloading moves the inputs that gradient_checkpointing keeps: it needs that")
        if 0 < self.tokens_per_tile < 16:
            raise ValueError("tokens_per_tile must be 0, or at least 16")
        return self


class PlanConfig(TrainConfig):
    """Everything ``halfbyte plan`` reads: what ``halfbyte train`` reads, and no data is needed."""

    data: str = option("", "its rows' lengths are planned for; without it, rows of max_length")


MODEL_HELP = "a run directory, a Hub id, a local directory, or `demo` for the built-in model"


class EvalConfig(ModelOptions, DataOptions):
    """Everything ``halfbyte eval`` reads."""

    model: str = option(..., MODEL_HELP)
    data: str = option(..., "the rows to evaluate on: a file or a Hub data set")
    generate: bool = option(True, "answer each row's question and count exact matches")
    max_rows: int = option(0, "the first so many rows; 0: all", ge=0)


class DataCheckConfig(DataOptions):
    """Everything ``halfbyte data check`` reads."""

    data: str = option(..., "a file or a Hub data set")
    model: str = option("demo", "the model whose tokenizer and template are used, or a run directory")
    revision: str | None = option(None, "revision of a Hub model")
    rows: int = option(3, "rows shown", ge=0)


class CheckpointConfig(Options):
    """Everything ``halfbyte checkpoint list`` and ``verify`` read."""

    run: str = option(..., "a run directory")


class ExplainConfig(Options):
    """Everything ``halfbyte explain`` reads."""

    topic: str | None = option(None, "int4, nf4, double-quant, paged, memory, tokens, quiz, or the name of an option")
    model: str = option("demo", "for `tokens`: whose tokenizer and template")
    text: str = option("two large teas and a bun, no sugar", "for `tokens`: what is said")


class DoctorConfig(Options):
    """Everything ``halfbyte doctor`` reads."""


class BenchConfig(KernelOptions):
    """Everything ``halfbyte bench`` reads."""

    path: str | None = option(None, "an instruction set of the C++ library, instead of the best this processor has")


class DemoConfig(KernelOptions):
    """Everything ``halfbyte demo`` reads."""

    output_dir: str = option("demo", "where everything goes; a directory of an earlier demo is replaced")
    seed: int = option(42, "everything random is a function of it", ge=0, lt=2**63)
    compare: bool = option(False, "also train LoRA on the unquantized base, and every parameter, on the same rows")


class ChatConfig(ModelOptions):
    """Everything ``halfbyte chat`` reads."""

    model: str = option(..., MODEL_HELP)
    prompt: str | None = option(None, "one message; its answer is printed and the program ends")
    system: str | None = option(None, "system message")
    max_new_tokens: int = option(256, "longest answer in tokens", ge=1)
    temperature: float = option(0.0, "0: the likeliest token each time", ge=0)
    top_p: float = option(1.0, "sample from the likeliest tokens that make up this probability", gt=0, le=1)
    seed: int = option(42, "for sampling", ge=0, lt=2**63)


class QuantizeConfig(KernelOptions, FourBitOptions):
    """Everything ``halfbyte quantize`` reads."""

    model: str = option(..., "a Hub id, a local directory, or `demo` for the built-in model")
    output_dir: str = option(..., "where the quantized model goes")
    revision: str | None = option(None, "revision of a Hub model")


class MergeConfig(KernelOptions, PublishOptions):
    """Everything ``halfbyte merge`` reads."""

    run: str = option(..., "a run directory")
    onto: Literal["trained", "original"] = option(
        "trained", "the base the adapter is added to: the 4-bit weights it was trained on, or the original ones"
    )
    output_dir: str = option(..., "where the merged model goes")
    min_agreement: float = option(
        0.99, "share of positions where merged and adapted model must predict the same token", ge=0, le=1
    )
    requantize: bool = option(False, "write the merged weights in 4 bits, which erases part of what the adapter adds")
    min_survival: float = option(
        0.9, "with requantize: the share of the adapter's effect that must survive in the median layer", ge=0, le=1
    )
    device: str = option("auto", "cpu, cuda or auto")

    @field_validator("device")
    @classmethod
    def _known_device(cls, value: str) -> str:
        return known_device(value)


class ExportConfig(KernelOptions, PublishOptions):
    """Everything ``halfbyte export`` reads."""

    run: str = option(..., "a run directory")
    to: Literal["peft", "hf", "bnb-4bit"] = option(
        ...,
        "peft: the adapter; hf: one verified model in 16 bits; bnb-4bit: the base in the 4 bits of the training, and "
        "the adapter beside it",
    )
    output_dir: str = option(..., "where it goes")


VERBS: dict[str, type[Options]] = {
    "demo": DemoConfig,
    "doctor": DoctorConfig,
    "plan": PlanConfig,
    "train": TrainConfig,
    "chat": ChatConfig,
    "eval": EvalConfig,
    "merge": MergeConfig,
    "export": ExportConfig,
    "quantize": QuantizeConfig,
    "data check": DataCheckConfig,
    "checkpoint list": CheckpointConfig,
    "explain": ExplainConfig,
    "bench": BenchConfig,
}


def all_keys() -> set[str]:
    return {name for cls in VERBS.values() for name in cls.model_fields}


def nearest(key: str, known: set[str]) -> str | None:
    matches = difflib.get_close_matches(key, sorted(known), n=1, cutoff=0.5)
    return matches[0] if matches else None


def translate(key: str, value: Any, known: set[str], where: str) -> tuple[dict[str, Any], str | None]:
    """A key as the user wrote it, to ours: (our keys and values, notice or None).

    Raises:
        UsageError: the key is unknown; names the nearest, or says what to do instead.
    """
    name = key.replace("-", "_")
    if name in known:
        return {name: value}, None
    if name in NEGATED:
        ours = NEGATED[name]
        shown = str(str(value).lower() not in TRUE).lower()
        return dict.fromkeys(ours, shown), f"{key} is {' and '.join(f'{o} {shown}' for o in ours)} here; taken as such"
    if name in RENAMED:
        return {RENAMED[name]: value}, f"{key} is called {RENAMED[name]} here; taken as such"
    if name in LEFT_OUT or (name == "adapter" and str(value).lower() in ("lora", "qlora")):
        return {}, f"{key} has no counterpart here and is left out"
    if name in SWITCHES:
        if str(value).lower() in TRUE:
            ((ours, meaning),) = SWITCHES[name].items()
            return {ours: meaning}, f"{key} is called {ours} {meaning} here; taken as such"
        return {}, f"{key} {value} needs no option here"
    if name in REFUSED and str(value).lower() in FALSE:
        return {}, f"{key} {value} needs no option here"
    if name in REFUSED:
        raise UsageError(f"{key!r} is not an option here", where=where, ways_out=[REFUSED[name]])
    close = nearest(name, known)
    raise UsageError(
        f"unknown option {key!r}",
        where=where,
        ways_out=[f"did you mean {close!r}?"] if close else ["see `halfbyte --help`"],
    )


def read_yaml(path: Path) -> dict[str, Any]:
    """The options of a configuration file; keys of any verb are allowed.

    Raises:
        UsageError: unreadable, no YAML mapping, or an unknown key.
    """
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read the configuration {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not valid YAML", found=str(error).replace("\n", " ")) from error
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise UsageError(f"{path} must hold a mapping of options, not a {type(value).__name__}")
    return {str(key): item for key, item in value.items() if item is not None}  # a blank value is not given


def build(cls: type[OptionsT], values: dict[str, Any], *, where: str = "") -> OptionsT:
    """A checked record from keys already translated (lists, where one string is wanted, are joined by commas).

    Raises:
        UsageError: naming every wrong value by the name the user typed.
    """
    for name in ("target_modules", "modules_to_save", "report_to"):
        if isinstance(given := values.get(name), list):
            values = {**values, name: ",".join(map(str, given))}
    try:
        return cls.model_validate(values)
    except ValidationError as error:
        problems = []
        for item in error.errors():
            name = ".".join(str(part) for part in item["loc"])
            message = item["msg"].removeprefix("Value error, ")
            missing = item["type"] == "missing"
            problems.append(f"{name} is required" if missing else f"{name}: {message}" if name else message)
        found = {str(e["loc"][0]): e["input"] for e in error.errors() if e["loc"] and e["type"] != "missing"}
        raise UsageError(
            "; ".join(problems),
            where=where,
            found=", ".join(f"{name}={value!r}" for name, value in found.items()),
        ) from error
