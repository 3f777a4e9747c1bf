"""What a training leaves behind: checkpoints and the result."""

from typing import Any


def _generation_config(model: Any, stops: list[int]) -> Any:
    """The base's generation settings with the end tokens of this training, in a form that can be saved."""
    from transformers import GenerationConfig

    found = model.generation_config
    found.eos_token_id = stops
    try:
        found.validate(strict=True)
    except ValueError:  # sampling settings without do_sample, as published by several models
        found.do_sample = True
        try:
            found.validate(strict=True)
        except ValueError:
            kept = {name: getattr(found, name) for name in ("pad_token_id", "bos_token_id")}
            return GenerationConfig(eos_token_id=stops, **kept)
    return found
