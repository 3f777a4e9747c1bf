"""Other tools' names for our options, and what becomes of an option as a user typed it.

Names other tools use for the same thing are in `RENAMED` and taken with a notice; any other key is
an error that names the nearest one.
"""

import difflib
from typing import Any

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

SWITCHES = {"bf16": {"dtype": "bfloat16"}, "fp16": {"dtype": "float16"}}
"""Switches of other tools and what they mean here when they are on."""

LEFT_OUT = {
    *(
        "save_strategy",
        "eval_strategy",
        "evaluation_strategy",
        "logging_strategy",
        "overwrite_output_dir",
    ),
    *(
        "load_best_model_at_end",
        "dataloader_num_workers",
        "remove_unused_columns",
        "group_by_length",
        "task_type",
        "bias",
    ),
    *(
        "bias",
        "flash_attention",
        "gradient_checkpointing_kwargs",
        "tf32",
        "inference_mode",
        "do_train",
        "do_eval",
    ),
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


def nearest(key: str, known: set[str]) -> str | None:
    matches = difflib.get_close_matches(key, sorted(known), n=1, cutoff=0.5)
    return matches[0] if matches else None


def translate(
    key: str, value: Any, known: set[str], where: str
) -> tuple[dict[str, Any], str | None]:
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
        return dict.fromkeys(
            ours, shown
        ), f"{key} is {' and '.join(f'{o} {shown}' for o in ours)} here; taken as such"
    if name in RENAMED:
        return {RENAMED[name]: value}, f"{key} is called {RENAMED[name]} here; taken as such"
    if name in LEFT_OUT or (name == "adapter" and str(value).lower() in ("lora", "qlora")):
        return {}, f"{key} has no counterpart here and is left out"
    if name in SWITCHES:
        if str(value).lower() in TRUE:
            ((ours, wanted),) = SWITCHES[name].items()
            return {ours: wanted}, f"{key} is called {ours} {wanted} here; taken as such"
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
