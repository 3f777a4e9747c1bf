"""What a ``TrainingArguments`` of transformers or an ``SFTConfig`` of TRL may say, and what becomes
of it here: every field of theirs stands in one table.

A field of the same name and meaning as an option of ours is marked ``in_trainer`` there
(`config.options`). A field that stands nowhere, of a later release or of a script's own subclass,
is refused unless it is at its default.
"""

from typing import Any

from .peft_settings import EMPTY, changed

TRANSLATED = {
    "optim": "optimizers of the same arithmetic; others are refused",
    "lr_scheduler_type": "schedules of the same arithmetic; others are refused",
    "warmup_steps": "below 1: warmup_ratio",
    "warmup_ratio": "as it is; releases of transformers before 5.0",
    "report_to": "trackers that we have; others are refused",
    "push_to_hub": "with hub_model_id and hub_private_repo",
    "hub_model_id": "with push_to_hub",
    "hub_private_repo": "private, unless it is false",
    "project": "as it is, where somebody named it",
    "bf16": "dtype bfloat16",
    "fp16": "dtype float16",
    "use_cpu": "device cpu",
    "eval_strategy": "eval_steps, where it is by steps",
    "eval_steps": "as it is, where eval_strategy is by steps",
    "activation_checkpointing": "gradient_checkpointing, its older name",
    "packing_strategy": "refused, with packing, where it cuts rows",
    "accelerator_config": "refused where it says how many passes a step has",
}
"""Fields that `config.hf_objects` reads, and as what."""

_NOTHING = (None, [], {}, "", False)
ONLY: dict[str, tuple[tuple[Any, ...], str]] = {
    "label_smoothing_factor": ((0, 0.0), "the loss is plain cross-entropy"),
    "loss_type": (("nll", None), "the loss is plain cross-entropy"),
    "router_aux_loss_coef": ((None, 0, 0.0), "the loss is plain cross-entropy"),
    "neftune_noise_alpha": ((None, 0, 0.0), "no noise is added to embeddings"),
    "truncation_mode": (("keep_start",), "rows keep their beginning"),
    "train_sampling_strategy": (("random",), "rows come in random order"),
    "dataset_text_field": (("text", None, ""), "the columns of the rows say their form"),
    "dataset_kwargs": ((None, {}), "the columns of the rows say their form"),
    "dataloader_drop_last": ((False,), "the last batch of an epoch is trained on, too"),
    "lr_scheduler_kwargs": (_NOTHING, "schedules have no more settings here"),
    "optim_args": (_NOTHING, "AdamW has no more settings here"),
    "optim_target_modules": (_NOTHING, "AdamW trains everything that is trained"),
    "data_seed": ((None,), "seed decides everything random"),
    "load_best_model_at_end": (
        (False,),
        "the result is the last step's; the best checkpoint is kept",
    ),
    "ignore_data_skip": ((False,), "a resumed training goes on with the rows that follow"),
    "resume_from_checkpoint": (_NOTHING, "resume_from_checkpoint is given by name"),
    "save_strategy": (("steps", "no"), "a checkpoint is saved every save_steps, and at the end"),
    "save_only_model": ((False,), "a checkpoint holds what a training goes on with"),
    "hub_token": (_NOTHING, "the Hub is asked with HF_TOKEN, or as `hf auth login` says"),
    "hub_revision": (_NOTHING, "results go to the main branch"),
    "hub_strategy": (("every_save", "end"), "the result is pushed, at the end; no checkpoints"),
    "trackio_space_id": (_NOTHING, "trackio logs where its own environment says"),
    "trackio_bucket_id": (_NOTHING, "trackio logs where its own environment says"),
    "trackio_static_space_id": (_NOTHING, "trackio logs where its own environment says"),
    "deepspeed": (_NOTHING, "one machine trains, by its own means"),
    "fsdp": (_NOTHING, "one machine trains, by its own means"),
    "parallelism_config": (_NOTHING, "one machine trains, by its own means"),
    "model_init_kwargs": (_NOTHING, "the model's options are given by name"),
    "trust_remote_code": (_NOTHING, "code that comes with a model is never run"),
    "eos_token": (_NOTHING, "answers end as the model's own template ends them"),
    "chat_template_path": (_NOTHING, "chat_template is given by name"),
}
"""Fields that have no counterpart: the values that ask for nothing else than what is done, and what
that is."""

_SHOWN = "when something is shown or written trains nothing"
_EVALUATED = "evaluation trains nothing"
_NAMES = "names of logs"
_BATCHES = "how batches are fetched; what is in them is the same"
_ONE = "one machine trains"
_FASTER = "another order of the same sums"
_MEMORY = "how memory is used; the numbers are the same"

LEFT_OUT = {
    **dict.fromkeys(("logging_strategy", "logging_first_step", "logging_nan_inf_filter"), _SHOWN),
    **dict.fromkeys(("log_level", "log_level_replica", "disable_tqdm", "debug"), _SHOWN),
    **dict.fromkeys(("include_num_input_tokens_seen", "skip_memory_metrics"), _SHOWN),
    "logging_dir": _NAMES,
    **dict.fromkeys(
        ("eval_delay", "per_device_eval_batch_size", "prediction_loss_only"), _EVALUATED
    ),
    **dict.fromkeys(("eval_on_start", "eval_do_concat_batches", "eval_packing"), _EVALUATED),
    **dict.fromkeys(("eval_use_gather_object", "eval_accumulation_steps"), _EVALUATED),
    **dict.fromkeys(("include_for_metrics", "batch_eval_metrics", "label_names"), _EVALUATED),
    **dict.fromkeys(("bf16_full_eval", "fp16_full_eval", "metric_for_best_model"), _EVALUATED),
    **dict.fromkeys(("greater_is_better", "do_train", "do_eval", "do_predict"), _EVALUATED),
    **dict.fromkeys(("dataloader_num_workers", "dataloader_pin_memory"), _BATCHES),
    **dict.fromkeys(("dataloader_persistent_workers", "dataloader_prefetch_factor"), _BATCHES),
    **dict.fromkeys(("dataloader_multiprocessing_context", "dataloader_in_order"), _BATCHES),
    **dict.fromkeys(("dataset_num_proc", "padding_free", "pad_to_multiple_of"), _BATCHES),
    "pad_token": "padding is masked",
    "shuffle_dataset": "rows come in random order",
    "length_column_name": "for a train_sampling_strategy that is refused",
    "remove_unused_columns": "what no format knows is read by none, and named",
    **dict.fromkeys(("ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_static_graph"), _ONE),
    **dict.fromkeys(("ddp_broadcast_buffers", "ddp_backend", "ddp_timeout", "local_rank"), _ONE),
    **dict.fromkeys(("log_on_each_node", "save_on_each_node"), _ONE),
    **dict.fromkeys(("average_tokens_across_devices", "fsdp_config"), _ONE),
    **dict.fromkeys(("torch_compile", "torch_compile_backend", "torch_compile_mode"), _FASTER),
    **dict.fromkeys(("tf32", "use_liger_kernel", "liger_kernel_config"), _FASTER),
    **dict.fromkeys(("torch_empty_cache_steps", "use_cache"), _MEMORY),
    **dict.fromkeys(("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"), _MEMORY),
    "auto_find_batch_size": "a step keeps its rows; where memory runs out they go in smaller parts",
    "hub_always_push": "for pushes between, which there are none of",
    "enable_jit_checkpoint": "a signal saves a checkpoint in any case",
    "restore_callback_states_from_checkpoint": "there are no callbacks",
    "full_determinism": "a training is repeatable in any case",
}
"""Fields that have no counterpart, and why that changes nothing of what is trained."""


def undone(settings: Any, read: frozenset[str]) -> dict[str, str]:
    """The settings of such an object that ask for something that is not done here, each as its
    value and what is done instead.

    Args:
        read: fields that are options of ours.
    """
    wrong = {}
    for name, (values, instead) in ONLY.items():
        value = getattr(settings, name, values[0])
        if value not in values:
            wrong[name] = f"{value!r} ({instead})"
    if getattr(settings, "packing", False):
        strategy = getattr(settings, "packing_strategy", "bfd")
        if strategy != "bfd":
            wrong["packing_strategy"] = f"{strategy!r} (packed rows stay whole)"
    passes = getattr(getattr(settings, "accelerator_config", None), PASSES, None) or {}
    if passes.get("num_steps", 1) != 1:
        wrong["accelerator_config"] = f"{passes!r} (gradient_accumulation_steps says it)"
    known = read | TRANSLATED.keys() | ONLY.keys() | LEFT_OUT.keys()
    for name, value in {**_added(settings), **changed(settings)}.items():
        if name not in known:
            wrong[name] = f"{value!r} (not known here)"
    return wrong


def _added(settings: Any) -> dict[str, Any]:
    """What a class made from a trainer's settings sets beside its fields."""
    return {
        name: value
        for name, value in vars(settings).items()
        if not name.startswith("_")
        and name not in MADE
        and value != getattr(type(settings), name, None)
        and value not in EMPTY
    }


MADE = {"distributed_state", "mixed_precision", "deepspeed_plugin", "fsdp_plugin_args"}
"""What the settings make of themselves."""


PASSES = "gradient_accumulation_kwargs"
