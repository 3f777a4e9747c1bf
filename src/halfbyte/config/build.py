"""Options to checked records: YAML files read, values validated, every mistake named at once."""

from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from ..errors import UsageError
from .aliases import RENAMED
from .options import OptionsT
from .text_file import read_text_file

CONTEXT = 1 << 20
"""A longest row that no model's context reaches."""
SHOWN = 200
"""Characters of a wrong value that are shown."""


def read_yaml(path: Path) -> dict[str, Any]:
    """The options of a configuration file; keys of any verb are allowed.

    Raises:
        UsageError: unreadable, no YAML mapping, or an unknown key.
    """
    text = read_text_file(path, "the configuration")
    try:
        value = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
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
    return {str(key): item for key, item in value.items()}


def without_blanks(values: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Keys that hold something, and what is to be said of the others: a blank value is not given,
    a blank length no limit of one's own."""
    kept, notices = {}, []
    blank = [key for key, item in values.items() if item is None]
    for key, item in values.items():
        if item is None and RENAMED.get(key, key) == "max_length":
            kept[key] = CONTEXT
            notices.append(f"{key} is blank: rows may be as long as the model's context")
        elif item is not None:
            kept[key] = item
    if others := [key for key in blank if key not in kept]:
        notices.append(f"blank, so not given: {', '.join(others)}")
    return kept, notices


class _Loader(yaml.SafeLoader):
    """YAML of which no key is given twice."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        if twice := sorted({str(key) for key in keys if keys.count(key) > 1}):
            raise yaml.YAMLError(
                f"line {node.start_mark.line + 1}: given twice: {', '.join(twice)}"
            )
        return super().construct_mapping(node, deep)


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
            found=", ".join(f"{name}={_shown(value)}" for name, value in found.items()),
        ) from error


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}... ({len(text):,} characters)"
