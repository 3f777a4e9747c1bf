"""Other tools' names for our options, and what becomes of an option as a user typed it.

Names other tools use for the same thing are in `RENAMED` and taken with a notice; any other key is
an error that names the nearest one.
"""

import difflib
from collections.abc import Iterable
from typing import Any

from ..errors import UsageError
from . import trainer_settings

TOGETHER = "\n"
"""Between the sources of a training that has several: no file's name holds it."""

RENAMED = {
    "max_seq_length": "max_length",
    "max_seq_len": "max_length",
    "cutoff_len": "max_length",
    "sequence_len": "max_length",
    "micro_batch_size": "per_device_train_batch_size",
    "train_micro_batch_size_per_gpu": "per_device_train_batch_size",
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
    "peft_use_rslora": "use_rslora",
    "lora_modules_to_save": "modules_to_save",
    "model_name_or_path": "model",
    "base_model": "model",
    "dataset_name": "data",
    "dataset": "data",
    "neat_packing": "packing",
    "double_quantization": "bnb_4bit_use_double_quant",
    "quantization_type": "bnb_4bit_quant_type",
    "activation_checkpointing": "gradient_checkpointing",
    "wandb_project": "project",
    "wandb_name": "run_name",
}
"""Other tools' names for our options."""

OPTIMIZERS = {
    **dict.fromkeys(("adamw_torch", "adamw_torch_fused"), "adamw_torch"),
    **dict.fromkeys(("paged_adamw_32bit", "paged_adamw"), "paged_adamw_32bit"),
    **dict.fromkeys(("adamw_8bit", "adamw_bnb_8bit"), "adamw_8bit"),
    "paged_adamw_8bit": "paged_adamw_8bit",
}
"""Names of the same optimizers in transformers, to ours."""

NEGATED = {"train_on_inputs": ("completion_only_loss", "assistant_only_loss")}
"""Renamed options whose meaning is the opposite, of these options of ours."""

ADDING_TOKENS = (
    "adding tokens is not done here: add them with transformers "
    "(resize_token_embeddings), save the model, train that"
)
REFUSED = {
    **dict.fromkeys(
        ("resize_token_embeddings", "additional_special_tokens", "added_tokens"), ADDING_TOKENS
    ),
    "trust_remote_code": "code that comes with a model is never run",
    "load_in_8bit": "bases are held in 4 bits, or unquantized with load_in_4bit false",
}
"""Options of other tools that we know and do not have, and what to do instead."""

SWITCHES = {
    "mask_history": {"turns": "last"},
    "bf16": {"dtype": "bfloat16"},
    "fp16": {"dtype": "float16"},
    "lora_target_linear": {"target_modules": "all-linear"},
}
"""Switches of other tools and what they mean here when they are on."""

TRUE = ("true", "1", "yes", "on", "")
FALSE = ("false", "0", "0.0", "no", "off", "none", "[]")

LEFT_OUT = {
    **dict.fromkeys(
        ("save_strategy", "eval_strategy", "evaluation_strategy", "logging_strategy"),
        "when something is written, evaluated or shown trains nothing",
    ),
    **dict.fromkeys(
        (
            "evals_per_epoch",
            "saves_per_epoch",
            "logging_first_step",
            "plot_loss",
            "save_only_model",
        ),
        "when something is written, evaluated or shown trains nothing",
    ),
    **dict.fromkeys(
        (
            "logging_dir",
            "wandb_entity",
            "wandb_watch",
            "wandb_run_id",
            "wandb_log_model",
            "debug",
            "disable_tqdm",
            "log_level",
        ),
        "names of logs",
    ),
    **dict.fromkeys(
        ("overwrite_output_dir", "dataset_prepared_path", "overwrite_cache", "dataset_dir"),
        "places of files",
    ),
    **dict.fromkeys(
        (
            "dataloader_num_workers",
            "do_eval",
            "strict",
            "preprocessing_num_workers",
            "ddp_timeout",
            "dataset_num_proc",
            "local_rank",
            "model_type",
            "tokenizer_type",
            "use_fast_tokenizer",
            "is_llama_derived_model",
            "dataloader_pin_memory",
            "pad_to_sequence_len",
            "auto_resume_from_checkpoints",
            "dataset_processes",
            "low_cpu_mem_usage",
        ),
        "how a trainer goes about it",
    ),
    **dict.fromkeys(
        (
            "per_device_eval_batch_size",
            "eval_batch_size",
            "eval_accumulation_steps",
            "eval_table_size",
            "eval_max_new_tokens",
            "eval_sample_packing",
        ),
        "evaluation trains nothing",
    ),
    "remove_unused_columns": "what no format knows is read by none, and named",
    **dict.fromkeys(
        ("flash_attention", "flash_attn", "xformers_attention", "sdp_attention"),
        "another order of the same sums",
    ),
    "tf32": "no product is rounded to less than its dtype here",
    "gradient_checkpointing_kwargs": "layers run again give the same gradients",
}
"""Keys of other tools' files that have no counterpart here, and why they change nothing that is
trained."""

ONLY = {
    "stage": (("sft",), "`halfbyte train` is supervised fine-tuning"),
    "finetuning_type": (("lora",), "an adapter is trained; full true trains every parameter"),
    "quantization_bit": (("4",), "bases are in 4 bits, or unquantized with load_in_4bit false"),
    "quantization_method": (("bnb", "bitsandbytes"), "bases are held as bitsandbytes holds them"),
    "rl": (FALSE, "`halfbyte train` is supervised fine-tuning"),
    **dict.fromkeys(
        ("deepspeed", "fsdp", "fsdp_config"), (FALSE, "one machine trains, by its own means")
    ),
    "early_stopping_patience": (FALSE, "a training goes to its end; max_steps ends it sooner"),
    "lora_fan_in_fan_out": (FALSE, "layers that are stored transposed are known as such"),
    "train_on_prompt": (FALSE, "completion_only_loss and assistant_only_loss say what is trained"),
    "bias": (("none",), "biases are not trained"),
    "task_type": (("causal_lm",), "causal language models are trained"),
    "inference_mode": (FALSE, "an adapter is trained"),
    "do_train": (TRUE, "`halfbyte train` trains"),
    "load_best_model_at_end": (FALSE, "the result is the last step's; the best checkpoint is kept"),
    **dict.fromkeys(
        ("label_smoothing_factor", "neftune_noise_alpha", "router_aux_loss_coef"),
        (FALSE, "the loss is the cross-entropy of the tokens, and nothing is added to it"),
    ),
    "dataloader_drop_last": (FALSE, "the last step of an epoch takes the rows that are left"),
    "group_by_length": (FALSE, "rows come in random order; packing true fills sequences"),
}
"""Keys of other tools that would change what is trained: the values that do not, and what is done
here instead."""


def nearest(key: str, known: set[str]) -> str | None:
    matches = difflib.get_close_matches(key, sorted(known), n=1, cutoff=0.7)
    return matches[0] if matches else None


def translate(
    key: str, value: Any, known: set[str], where: str
) -> tuple[dict[str, Any], str | None]:
    """A key as the user wrote it, to ours: (our keys and values, notice or None).

    Raises:
        UsageError: the key is unknown; names the nearest, or says what to do instead.
    """
    name = key.replace("-", "_")
    if name in ("datasets", "dataset", "data") and isinstance(value, list):
        return _data_sets(key, value, where)
    if RENAMED.get(name, name) == "target_modules" and str(value).lower() == "all":
        return {"target_modules": "all-linear"}, f"{key} {value} is target_modules all-linear here"
    if name == "warmup_steps" and _is_share(value):
        return {"warmup_ratio": value}, f"{key} {value} is warmup_ratio {value} here"
    if RENAMED.get(name, name) == "optim" and OPTIMIZERS.get(str(value), value) != value:
        ours = OPTIMIZERS[str(value)]
        return {"optim": ours}, f"{key} {value} is optim {ours} here; taken as such"
    if name in known:
        return {name: value}, None
    if name in NEGATED:
        ours = NEGATED[name]
        shown = str(str(value).lower() not in TRUE).lower()
        return dict.fromkeys(
            ours, shown
        ), f"{key} is {' and '.join(f'{o} {shown}' for o in ours)} here; taken as such"
    if name in RENAMED:
        return {RENAMED[name]: value}, f"{key} is called {RENAMED[name]} here; taken as such"
    if name in ONLY and str(value).lower() not in ONLY[name][0]:
        raise UsageError(
            f"{key} {value} would change what is trained, and is no option here",
            where=where,
            expected=f"{key} {ONLY[name][0][0]}, or without it: {ONLY[name][1]}",
        )
    if (
        name in LEFT_OUT
        or name in ONLY
        or (name == "adapter" and str(value).lower() in ("lora", "qlora"))
    ):
        return {}, f"{key} has no counterpart here and is left out"
    if name in SWITCHES:
        if str(value).lower() in TRUE or (name == "bf16" and str(value).lower() == "full"):
            ((ours, wanted),) = SWITCHES[name].items()
            return {ours: wanted}, f"{key} is called {ours} {wanted} here; taken as such"
        if SWITCHES[name].keys() == {"dtype"}:
            return {}, f"{key} {value} leaves dtype as it is: auto, where it is not given"
        return {}, f"{key} {value} needs no option here"
    if name in REFUSED and str(value).lower() in FALSE:
        return {}, f"{key} {value} needs no option here"
    if name in REFUSED:
        raise UsageError(f"{key!r} is not an option here", where=where, ways_out=[REFUSED[name]])
    if name in trainer_settings.ONLY or name in trainer_settings.LEFT_OUT:
        return _of_a_trainer(key, name, value, where)
    close = nearest(name, known)
    raise UsageError(
        f"unknown option {key!r}",
        where=where,
        ways_out=[f"did you mean {close!r}?"] if close else ["see `halfbyte --help`"],
    )


def _of_a_trainer(key: str, name: str, value: Any, where: str) -> tuple[dict[str, Any], str]:
    """A field of transformers' or TRL's trainer, which has no counterpart: left out, or refused
    where it asks for something else than is done."""
    values, instead = trainer_settings.ONLY.get(name, ((value,), ""))
    if str(value).lower() not in {str(each).lower() for each in values}:
        raise UsageError(f"{key} {value} is no option here", where=where, ways_out=[instead])
    return {}, f"{key} has no counterpart here and is left out"


def _is_share(value: Any) -> bool:
    """Whether a count is a share of all, as transformers takes one below 1."""
    try:
        return 0 < float(value) < 1
    except (TypeError, ValueError):
        return False


def translate_all(
    pairs: Iterable[tuple[str, Any]], known: set[str], where: str
) -> tuple[dict[str, Any], list[str]]:
    """All keys of a file or call, to ours: (our keys and values, notices).

    Raises:
        UsageError: naming every key that is unknown, refused, or beside another that says
            otherwise.
    """
    values: dict[str, Any] = {}
    given: dict[str, str] = {}
    notices: list[str] = []
    errors: list[UsageError] = []
    for key, value in pairs:
        try:
            ours, notice = translate(key, value, known, where)
        except UsageError as error:
            errors.append(error)
            continue
        notices += [notice] if notice else []
        for name, item in ours.items():
            before = values.get(name, item)
            if str(before).lower() != str(item).lower():
                errors.append(contradiction(name, given[name], before, key, item, where))
            values[name], given[name] = item, key
    raise_all(errors, where)
    return values, notices


def contradiction(
    name: str, first: str, before: Any, second: str, item: Any, where: str
) -> UsageError:
    """Two values for an option that has one."""
    if first == second:
        return UsageError(f"{first} is given twice", where=where, found=f"{before} and {item}")
    return UsageError(
        f"{first} and {second} both say what {name} is",
        where=where,
        found=f"{before} and {item}",
        ways_out=["give one of them"],
    )


def raise_all(errors: list[UsageError], where: str) -> None:
    """Raise what went wrong with options, all of it at once."""
    if not errors:
        return
    if len(errors) == 1:
        raise errors[0]
    said = [
        error.what + (f": {error.ways_out[0]}" if error.ways_out else f" ({error.found})")
        for error in errors
    ]
    raise UsageError(
        f"{len(errors)} options cannot be taken", where=where, found="\n            ".join(said)
    )


def _data_sets(key: str, value: list[Any], where: str) -> tuple[dict[str, Any], str | None]:
    """A list of sources: paths, or axolotl's mappings of them."""
    names, left = [], set[str]()
    for item in value:
        if not isinstance(item, dict):
            names.append(str(item))
            continue
        if not isinstance(item.get("path"), str):
            raise UsageError(f"{key}: an entry without a path", where=where, found=str(item)[:200])
        names.append(item["path"])
        changing = item.keys() - {"path", "type", "split", "ds_type", "data_files"}
        if changing:
            raise UsageError(
                f"{key}: {', '.join(sorted(changing))} of {item['path']} would change what is "
                "read, and is no option here",
                where=where,
                ways_out=["name the columns as a form that is known has them"],
            )
        left |= item.keys() & {"type", "ds_type"}
    ours: dict[str, Any] = {"data": TOGETHER.join(names)}
    splits = {item["split"] for item in value if isinstance(item, dict) and item.get("split")}
    if len(splits) > 1:
        raise UsageError(f"{key}: several splits", where=where, found=", ".join(sorted(splits)))
    if splits:
        ours["dataset_train_split"] = splits.pop()
    notices = [] if key == "data" else [f"{key} is called data here; taken as such"]
    if left:
        notices.append(f"{' and '.join(sorted(left))}: the columns of the rows say their form")
    return ours, "; ".join(notices) or None


WHOLE = ("batch_size", "train_batch_size")
MICRO = ("micro_batch_size", "train_micro_batch_size_per_gpu", "per_device_train_batch_size")


def whole_batch(given: dict[str, Any], where: str) -> tuple[dict[str, Any], str | None]:
    """``batch_size`` beside ``micro_batch_size`` is the rows of a whole step in alpaca-lora,
    axolotl and DeepSpeed: as accumulation (what is given with it, notice or None).

    Raises:
        UsageError: it is no multiple, or the accumulation that is given is another.
    """
    names = {key.replace("-", "_"): key for key in given}
    whole = next((names[name] for name in WHOLE if name in names), None)
    micro = next((names[name] for name in MICRO if name in names), None)
    if whole is None or micro is None:
        return given, None
    try:
        rows, at_once = int(given[whole]), int(given[micro])
    except (TypeError, ValueError):
        return given, None  # refused where it is checked
    steps = rows // max(at_once, 1)
    other = given.get(names.get("gradient_accumulation_steps", ""))
    if steps * at_once != rows or (other is not None and str(other) != str(steps)):
        raise UsageError(
            f"{whole} {rows} beside {micro} {at_once} is the rows of a whole step, which they do "
            "not make",
            where=where,
            found=f"gradient_accumulation_steps {other}" if other is not None else "",
            ways_out=["name per_device_train_batch_size and gradient_accumulation_steps"],
        )
    kept = {key: value for key, value in given.items() if key != whole}
    notice = (
        f"{whole} {rows} beside {micro} {at_once} is the rows of a whole step: "
        f"gradient_accumulation_steps {steps}"
    )
    return {**kept, "gradient_accumulation_steps": steps}, notice
