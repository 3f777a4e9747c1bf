"""Command-line options from the pydantic declarations in `config`: one option a field, dash or
underscore."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from ..config import options
from ..config.aliases import (
    MICRO,
    NEGATED,
    RENAMED,
    SWITCHES,
    TOGETHER,
    WHOLE,
    contradiction,
    raise_all,
    translate,
    translate_all,
    whole_batch,
)
from ..config.build import build, read_yaml, without_blanks
from ..config.verbs import all_keys
from ..errors import UsageError
from . import console

_RESERVED = {"config", "dry_run", "json", "help"}


class Verb(click.Command):
    """A verb whose options are the fields of a configuration class.

    Unknown options name the nearest; other tools' names are taken with a notice; ``--config`` gives
    a YAML file that the flags override; booleans are ``--packing``, ``--packing true`` or
    ``--packing false``. What ``call`` returns is the JSON document; its ``exit_code``, if it has
    one, is the command's.
    """

    def __init__(
        self,
        name: str,
        declaration: type[options.Options],
        call: Callable[[Any], Any],
        positional: tuple[str, ...] = (),
        short: dict[str, str] | None = None,
    ) -> None:
        self.declaration, self.call = declaration, call
        self.short = {f"-{letter}": field for letter, field in (short or {}).items()}
        params: list[click.Parameter] = [
            click.Argument([field], required=False) for field in positional
        ]
        for field, info in declaration.model_fields.items():
            if field not in positional:
                params.append(self._option(field, info))
        params.append(
            click.Option(
                ["--config"], metavar="FILE", help="YAML file of options; flags override it"
            )
        )
        params.append(
            click.Option(["--dry-run", "dry_run"], is_flag=True, help="check the options and stop")
        )
        params.append(
            click.Option(["--json", "as_json"], is_flag=True, help="one JSON document on stdout")
        )
        super().__init__(name, params=params, callback=self._run, help=(call.__doc__ or "").strip())

    def _option(self, field: str, info: Any) -> click.Option:
        names = [f"--{field}", f"--{field.replace('_', '-')}"] if "_" in field else [f"--{field}"]
        names += [letter for letter, target in self.short.items() if target == field]
        unset = info.is_required() or info.default in (None, [])
        default = "" if unset else f"  [{_shown(info.default)}]"
        more: dict[str, Any] = (
            {"is_flag": False, "flag_value": "true"} if info.annotation is bool else {}
        )
        if info.annotation == list[str]:
            more = {"multiple": True}
        return click.Option(
            [*names, field], help=f"{info.description}{default}", metavar=_metavar(info), **more
        )

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        translated, waiting = list[str](), self._whole_batch(args)
        errors: list[UsageError] = []
        given: dict[str, tuple[str, str]] = {}
        while waiting:
            argument = waiting.pop(0)
            name, equals, value = argument[2:].partition("=")
            if (
                not argument.startswith("--")
                or argument == "--"
                or name.replace("-", "_") in _RESERVED
            ):
                translated.append(argument)
                if name == "config" and not equals and waiting:
                    translated.append(waiting.pop(0))
                continue
            if not equals and waiting and self._takes(name, waiting[0]):
                equals, value = "=", waiting.pop(0)
            try:
                ours, notice = translate(
                    name, value, set(self.declaration.model_fields), f"halfbyte {self.name}"
                )
            except UsageError as error:
                errors.append(error)
                continue
            if notice:
                console.say(notice)
            for field, item in ours.items():
                if field not in self.declaration.model_fields:
                    raise UsageError(f"--{name} is not an option of `halfbyte {self.name}`")
                if (
                    not equals
                    and not notice
                    and self.declaration.model_fields[field].annotation is bool
                ):
                    equals, item = "=", "true"
                if field == "data" and field in given:  # several sources are one training's
                    item = f"{given[field][1]}{TOGETHER}{item}"
                elif self.declaration.model_fields[field].annotation == list[str]:
                    pass  # each is one more
                elif field in given and given[field][1].lower() != str(item).lower():
                    first, before = given[field]
                    errors.append(
                        contradiction(
                            field, f"--{first}", before, f"--{name}", item, f"halfbyte {self.name}"
                        )
                    )
                given[field] = (name, str(item))
                translated.append(f"--{field}={item}" if equals or notice else f"--{field}")
        raise_all(errors, f"halfbyte {self.name}")
        return super().parse_args(ctx, translated)

    def _whole_batch(self, args: list[str]) -> list[str]:
        """The arguments, with the batch of a whole step as accumulation."""
        sizes = {name.replace("_", "-"): name for name in (*WHOLE, *MICRO)}
        found: dict[str, int] = {}
        for place, argument in enumerate(args):
            name = argument[2:].partition("=")[0].replace("_", "-")
            if argument.startswith("--") and name in sizes:
                found[sizes[name]] = place
        given = {
            name: args[place].partition("=")[2] or (args[place + 1 : place + 2] or [""])[0]
            for name, place in found.items()
        }
        kept, notice = whole_batch(given, f"halfbyte {self.name}")
        if notice is None:
            return list(args)
        console.say(notice)
        (place,) = (place for name, place in found.items() if name not in kept)
        taken = 1 if "=" in args[place] else 2
        steps = f"--gradient_accumulation_steps={kept['gradient_accumulation_steps']}"
        return [*args[:place], steps, *args[place + taken :]]

    def _takes(self, name: str, following: str) -> bool:
        """Whether the argument after an option is its value: a text may begin with dashes, a switch
        has true/false."""
        field = name.replace("-", "_")
        info = self.declaration.model_fields.get(field)
        if (info and info.annotation is bool) or field in (*NEGATED, *SWITCHES):
            return following.lower() in ("true", "false", "yes", "no", "1", "0", "on", "off")
        option = following[2:].partition("=")[0].replace("-", "_")
        known = {*self.declaration.model_fields, *RENAMED, *NEGATED, *SWITCHES, *_RESERVED}
        return not (following.startswith("--") and option in known)

    def _run(self, **given: Any) -> Any:
        path, as_json, dry_run = given.pop("config"), given.pop("as_json"), given.pop("dry_run")
        values: dict[str, Any] = {}
        more: list[str] = []
        if path:
            read, notices = without_blanks(read_yaml(Path(path)))
            read, notice = whole_batch(read, path)
            values, more = translate_all(read.items(), all_keys(), path)
            for line in (*notices, *([notice] if notice else []), *more):
                console.say(line)
            fields = self.declaration.model_fields.keys()
            # a file's repository is the training's: theirs is named with them
            if self.name in ("merge", "export"):
                fields = fields - options.PublishOptions.model_fields.keys()
            values = {key: value for key, value in values.items() if key in fields}
        values.update({name: value for name, value in given.items() if value not in (None, ())})
        if more and (line := _left_to_us(self.declaration, values)):
            console.say(line)
        record = build(self.declaration, values, where=path or "")
        if isinstance(record, options.KernelOptions) and not dry_run:
            from ..ops import cpu

            cpu.use(record.kernels)
        result = record.model_dump() if dry_run else self.call(record)
        if dry_run:
            console.say(f"the options of `halfbyte {self.name}` are in order")
        if as_json:
            console.result(result)
        return result.get("exit_code", 0)


OTHERWISE_ELSEWHERE = (
    *("load_in_4bit", "lora_r", "lora_alpha", "lora_dropout", "target_modules", "learning_rate"),
    *("lr_scheduler_type", "warmup_ratio", "optim", "num_train_epochs", "max_length"),
    *("per_device_train_batch_size", "gradient_accumulation_steps"),
)
"""Options with other defaults in other tools."""


def _left_to_us(declaration: Any, values: dict[str, Any]) -> str:
    """A line for a file of another tool: what it leaves to defaults, which are ours; else ""."""
    if "num_train_epochs" not in declaration.model_fields:
        return ""
    decided = {*values, "warmup_ratio"} if "warmup_steps" in values else {*values}
    if values.get("adapter_name_or_path") or str(values.get("full", "")).lower() == "true":
        decided |= {*options.OF_ADAPTER}
    left = [
        f"{name} {_shown(declaration.model_fields[name].default)}"
        for name in OTHERWISE_ELSEWHERE
        if name not in decided
    ]
    return f"not given, so halfbyte's own, not another tool's: {', '.join(left)}" if left else ""


def flags_of(record: options.Options, without: tuple[str, ...]) -> list[str]:
    """The options that were given, as they are typed, for the command to type next."""
    return [
        word
        for name in sorted(record.model_fields_set - set(without))
        for word in (f"--{name}", _shown(getattr(record, name)))
    ]


def _shown(default: Any) -> str:
    return str(default).lower() if isinstance(default, bool) else str(default)


def _metavar(info: Any) -> str:
    if getattr(info.annotation, "__args__", None) and all(
        isinstance(a, str) for a in info.annotation.__args__
    ):
        return "|".join(info.annotation.__args__)
    return {bool: "BOOL", int: "N", float: "X"}.get(info.annotation, "TEXT")
