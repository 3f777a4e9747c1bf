"""What an option may do, said once, on the option: `option` declares it, and every list is derived
from there."""

from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field

ABSENT = object()
"""No value: the option has been there from the first checkpoint on."""


@dataclass(frozen=True)
class Rules:
    """What may be done with an option of a training.

    Attributes:
        resume: what a resumed run may do. "free": change it, for it changes no number of the
            training, or last bits where memory chooses them. (Of ``kernels`` it is compared what
            computes, of ``model`` and ``data`` the digest of what they hold.) "named": change it
            where ``allow_change`` names it. "never": what is saved has the shape of it (of
            ``optim``, the unpaged one's). None: the option belongs to no training.
        of_adapter: an adapter that a training begins with decides it.
        fit_to: whether ``fit_to`` chooses it: "searched", "last" (where nothing else fits), or not
            ("").
        reorders_sums: sums are added in another order by it.
        in_trainer: transformers' and TRL's trainers have it under the same name.
        added_later: the value that is as good as none, in checkpoints from before there was the
            option.
    """

    resume: Literal["free", "named", "never"] | None = None
    of_adapter: bool = False
    fit_to: Literal["searched", "last", ""] = ""
    reorders_sums: bool = False
    in_trainer: bool = False
    added_later: Any = ABSENT


def option(
    default: Any,
    help_text: str,
    *,
    resume: Literal["free", "named", "never"] | None = None,
    of_adapter: bool = False,
    fit_to: Literal["searched", "last", ""] = "",
    reorders_sums: bool = False,
    in_trainer: bool = False,
    added_later: Any = ABSENT,
    **checks: Any,
) -> Any:
    """Declare an option.

    Args:
        default: its value where it is not given; ``...``: it has to be.
        help_text: for people, in ``--help`` and ``explain``.
        resume, of_adapter, fit_to, reorders_sums, in_trainer, added_later: its `Rules`.
        checks: pydantic's (``ge``, ``lt``, ...).
    """
    rules = Rules(resume, of_adapter, fit_to, reorders_sums, in_trainer, added_later)
    extra: Any = {"rules": rules}
    return Field(default, description=help_text, json_schema_extra=extra, **checks)


def rules_of(cls: Any) -> dict[str, Rules]:
    """The rules of every option of a record, by name, in the order of their declaration."""
    return {name: field.json_schema_extra["rules"] for name, field in cls.model_fields.items()}
