"""Options to checked records: YAML files read, values validated, every mistake named at once."""

from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from ..errors import UsageError
from .options import OptionsT


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
        raise UsageError(
            f"{path} is not valid YAML", found=str(error).replace("\n", " ")
        ) from error
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise UsageError(f"{path} must hold a mapping of options, not a {type(value).__name__}")
    if "adapter" in value and value["adapter"] is None:
        raise UsageError(
            f"{path}: adapter is blank, which is full fine-tuning in axolotl",
            ways_out=[
                "full: true and load_in_4bit: false trains every parameter",
                "adapter: qlora",
            ],
        )
    # a blank value is not given
    return {str(key): item for key, item in value.items() if item is not None}


def build(cls: type[OptionsT], values: dict[str, Any], *, where: str = "") -> OptionsT:
    """A checked record from keys already translated (lists, where one string is wanted, are joined
    by commas).

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
            problems.append(
                f"{name} is required" if missing else f"{name}: {message}" if name else message
            )
        found = {
            str(e["loc"][0]): e["input"]
            for e in error.errors()
            if e["loc"] and e["type"] != "missing"
        }
        raise UsageError(
            "; ".join(problems),
            where=where,
            found=", ".join(f"{name}={value!r}" for name, value in found.items()),
        ) from error
