"""Options that are given and that a training makes no use of, because of another option: what is
to be said of them."""

from .options import OF_ADAPTER, FourBitOptions, TrainConfig


def unused(config: TrainConfig) -> list[str]:
    """A line for each kind of option that was given in vain, for people."""
    found = [_warmup(config), _epochs(config)]
    if config.full:
        found.append(_named(config, OF_ADAPTER, "full trains every parameter, and no adapter"))
    if not config.load_in_4bit:
        bits = tuple(FourBitOptions.model_fields)
        found.append(_named(config, bits, "load_in_4bit false leaves the base unquantized"))
    return [line for line in found if line]


def _warmup(config: TrainConfig) -> str:
    asked = [
        f"{name} {value:g}"
        for name in ("warmup_steps", "warmup_ratio")
        if name in config.model_fields_set and (value := getattr(config, name))
    ]
    if not asked:
        return ""
    if config.lr_scheduler_type == "constant":
        return (
            f"{asked[0]} is not used: lr_scheduler_type constant has no warm-up, "
            "constant_with_warmup has one"
        )
    if config.warmup_steps is not None and asked[-1].startswith("warmup_ratio"):
        return f"{asked[-1]} is not used: warmup_steps {config.warmup_steps} is given as well"
    return ""


def _epochs(config: TrainConfig) -> str:
    if config.max_steps < 1 or "num_train_epochs" not in config.model_fields_set:
        return ""
    return (
        f"num_train_epochs {config.num_train_epochs:g} is not used: max_steps {config.max_steps} "
        "says how long the training is"
    )


def _named(config: TrainConfig, names: tuple[str, ...], why: str) -> str:
    given = [name for name in names if name in config.model_fields_set]
    if not given:
        return ""
    return f"{', '.join(given)} {'is' if len(given) == 1 else 'are'} not used: {why}"
