"""What an option may do is said on the option, and the lists that follow are the right ones."""

from halfbyte.config.options import (
    ADDED_LATER,
    FITTED,
    FREE_ON_RESUME,
    NEVER_ON_RESUME,
    OF_ADAPTER,
    REORDERING,
    RULES,
    SEARCHED,
    TrainConfig,
)
from halfbyte.run.fingerprint import fingerprint


def test_shapes_of_saved_state_never_change():
    assert {"lora_r", "target_modules", "full", "optim", "use_dora"} <= NEVER_ON_RESUME
    assert not NEVER_ON_RESUME & FREE_ON_RESUME


def test_what_is_free_changes_no_number():
    """Everything that a result is a function of is compared, or can never change."""
    numbers = {"learning_rate", "seed", "max_length", "gradient_accumulation_steps", "lora_dropout"}
    assert not numbers & FREE_ON_RESUME
    assert {"output_dir", "save_steps", "paging", "kept_activations"} <= FREE_ON_RESUME


def test_the_lists_are_derived():
    assert set(REORDERING) == {"tokens_per_pass", "tokens_per_tile"}
    assert FITTED[:-1] == SEARCHED and FITTED[-1] == "max_length"
    assert set(OF_ADAPTER) >= {"lora_r", "lora_alpha", "modules_to_save", "adapter_name_or_path"}
    assert RULES["output_dir"].in_trainer and not RULES["lora_r"].in_trainer


def test_an_option_that_was_added_later_is_as_good_as_none():
    """A checkpoint from before there was the option has the same fingerprint as one without it."""
    config = TrainConfig(model="m", data="d").model_dump()
    info = {
        "config": config,
        "data": {"sha256": "d"},
        "template_sha256": "t",
        "tokenizer_sha256": "k",
        "total_steps": 3,
        "compute_dtype": "float32",
        "machine": {"threads": 2, "device": "x", "kernel_path": "y"},
        "versions": {"torch": "1", "transformers": "2"},
    }
    older = {**info, "config": {k: v for k, v in config.items() if k not in ADDED_LATER}}
    assert fingerprint(info) == fingerprint(older)
    # ``data`` is there as the digest of what it held, not as its name
    assert set(fingerprint(info)) & FREE_ON_RESUME == {"data"}
