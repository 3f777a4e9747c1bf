"""The files that belong to a model beside its configuration and weights: tokenizer, templates,
licences.

What a training did not change is delivered as the base has it, byte for byte: a tokenizer that is
written again gets a class name that older releases of transformers do not know.
"""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import ModelError, StorageError
from . import atomic
from .hub import LEGAL, TEMPLATES, load_tokenizer

TEMPLATE = "chat_template.jinja"
SETTINGS = "tokenizer_config.json"
TOKENIZER = (
    *("tokenizer.json", SETTINGS, "special_tokens_map.json", "added_tokens.json"),
    *("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "tekken.json"),
    *("vocab.json", "vocab.txt", "merges.txt"),
)
PROCESSORS = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
"""What prepares pictures and sound for a wrapper's towers."""
_GENERATION = re.compile(r"(\{%[-+]?)\s*(end)?generation\s*([-+]?%\})")


def companions(directory: Path) -> Iterator[Path]:
    """Those of a model's directory, as paths in it."""
    names = {file.name for pattern in LEGAL for file in directory.glob(pattern)}
    for name in sorted({*TOKENIZER, *PROCESSORS, TEMPLATE, "chat_template.json", *names}):
        if (directory / name).is_file():
            yield Path(name)
    if (directory / TEMPLATES).is_dir():
        yield from (
            file.relative_to(directory) for file in sorted((directory / TEMPLATES).glob("*.jinja"))
        )


def copy_companions(
    source: Path,
    target: Path,
    *,
    tokenizer: bool = True,
    templates: bool = True,
    misread: bool | None = None,
) -> None:
    """Copy them, whatever they are stored as (links into a Hub cache among it).

    Args:
        tokenizer: its files, and the chat templates, too; else licences and what prepares pictures
            and sound.
        templates: the chat templates, too.
        misread: whether the class that the tokenizer's settings name makes something else of its
            file (`files.as_written`); None: it is loaded to see.

    Raises:
        StorageError: the disk said no.
    """
    try:
        for place in companions(source):
            of_template = place.name.startswith("chat_template") or place.parts[0] == TEMPLATES
            always = any(place.match(pattern) for pattern in (*LEGAL, *PROCESSORS))
            if (of_template and not templates) or (not always and not tokenizer):
                continue
            (target / place).parent.mkdir(exist_ok=True)
            if place.name == SETTINGS and not templates:
                settings = atomic.read_json(source / place)
                if settings.pop("chat_template", None) is not None:
                    atomic.write_json(target / place, settings)
                    continue
            shutil.copyfile(source / place, target / place)
        named = tokenizer and (target / SETTINGS).is_file()
        if named and (_is_misread(source) if misread is None else misread):
            # a class that reads the file as it is, in every release
            settings = atomic.read_json(target / SETTINGS)
            settings["tokenizer_class"] = "PreTrainedTokenizerFast"
            atomic.write_json(target / SETTINGS, settings)
    except OSError as error:
        raise StorageError(f"cannot write to {target}: {error.strerror}") from error


def _is_misread(directory: Path) -> bool:
    """Whether the class that a tokenizer's settings name makes something else of its file."""
    try:
        return load_tokenizer(directory).misread
    except ModelError:
        return False


def write_templates(target: Path, template: str | dict[str, str]) -> None:
    """Chat templates as transformers reads them: one, or the default one and others by name; in a
    form that every Jinja engine takes."""
    named = {"default": template} if isinstance(template, str) else dict(template)
    default = named.pop("default", "")
    if default:
        atomic.write_bytes(target / TEMPLATE, plain_jinja(default).encode())
    for name, text in named.items():
        (target / TEMPLATES).mkdir(exist_ok=True)
        atomic.write_bytes(target / TEMPLATES / f"{name}.jinja", plain_jinja(text).encode())


def plain_jinja(template: str) -> str:
    """A template without the tags of transformers' own that mark what an assistant says; what they
    do to the white space around them stays."""
    return _GENERATION.sub(
        lambda tag: f"{tag[1]} {'endif' if tag[2] else 'if true'} {tag[3]}", template
    )


def generation_settings(directory: Path, ends: list[int]) -> dict[str, Any]:
    """A base's generation_config.json with the ends of a training beside its own, and without
    sampling settings that its ``do_sample`` switches off, which transformers refuses to write.

    Raises:
        ModelError: the base's file is none.
    """
    file = directory / "generation_config.json"
    found = dict(atomic.read_json(file)) if file.is_file() else _of_config(directory)
    declared = found.get("eos_token_id")
    own = declared if isinstance(declared, list) else [] if declared is None else [declared]
    found["eos_token_id"] = list(dict.fromkeys([*own, *ends]))
    if not found.get("do_sample"):
        for name in SAMPLING:
            found.pop(name, None)
    return found


def _of_config(directory: Path) -> dict[str, Any]:
    """The tokens that transformers takes from config.json where there is no
    generation_config.json."""
    file = directory / "config.json"
    said = atomic.read_json(file) if file.is_file() else {}
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {name: said[name] for name in names if said.get(name) is not None}


SAMPLING = (
    *("temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"),
    "top_h",
)
