"""What each verb of the command line reads, beside training and planning (`config.options`)."""

from typing import Any, Literal

from pydantic import field_validator

from .options import (
    SUBFOLDER_HELP,
    DataOptions,
    FourBitOptions,
    KernelOptions,
    ModelOptions,
    Options,
    PlanConfig,
    PublishOptions,
    TrainConfig,
    known_device,
    template_kwargs,
)
from .rules import option

BASE_HELP = "the base's directory or Hub id, where it is not where the run found it"
MODEL_HELP = "a run directory, a Hub id, a local directory, or `demo` for the built-in model"


class EvalConfig(ModelOptions, DataOptions):
    """Everything ``halfbyte eval`` reads."""

    model: str = option(..., MODEL_HELP)
    data: str = option(..., "the rows to evaluate on: a file or a Hub data set")
    base: str | None = option(None, BASE_HELP)
    generate: bool = option(True, "answer each row's question and count exact matches")
    max_rows: int = option(0, "the first so many rows; 0: all", ge=0)


class DataCheckConfig(DataOptions):
    """Everything ``halfbyte data check`` reads."""

    data: str = option(..., "a file or a Hub data set")
    model: str = option(
        "demo", "the model whose tokenizer and template are used, or a run directory"
    )
    revision: str | None = option(None, "revision of a Hub model")
    subfolder: str | None = option(None, SUBFOLDER_HELP)
    rows: int = option(3, "rows shown", ge=0)


class CheckpointConfig(Options):
    """Everything ``halfbyte checkpoint list`` and ``verify`` read."""

    run: str = option(..., "a run directory")


class ExplainConfig(Options):
    """Everything ``halfbyte explain`` reads."""

    topic: str | None = option(
        None, "int4, nf4, double-quant, paged, memory, tokens, quiz, or the name of an option"
    )
    model: str = option("demo", "for `tokens`: whose tokenizer and template")
    text: str = option("two large teas and a bun, no sugar", "for `tokens`: what is said")


class DoctorConfig(Options):
    """Everything ``halfbyte doctor`` reads."""


class BenchConfig(KernelOptions):
    """Everything ``halfbyte bench`` reads."""

    path: str | None = option(
        None, "an instruction set of the C++ library, instead of the best this processor has"
    )


class DemoConfig(KernelOptions):
    """Everything ``halfbyte demo`` reads."""

    output_dir: str = option(
        "demo", "where everything goes; a directory of an earlier demo is replaced"
    )
    seed: int = option(42, "everything random is a function of it", ge=0, lt=2**63)
    compare: bool = option(
        False, "also train LoRA on the unquantized base, and every parameter, on the same rows"
    )


class ChatConfig(ModelOptions):
    """Everything ``halfbyte chat`` reads."""

    model: str = option(..., MODEL_HELP)
    base: str | None = option(None, BASE_HELP)
    prompt: str | None = option(
        None, "one message; its answer goes to stdout, and the program ends; a pipe is one, too"
    )
    system: str | None = option(None, "system message; an empty one is sent, too")
    chat_template_kwargs: dict[str, Any] | None = option(
        None, 'what the template is given: {"enable_thinking": false}; else as the run was trained'
    )
    answer_prefix: str = option(
        "", "how answers begin; control tokens in it are control tokens, \\n a line break"
    )
    max_new_tokens: int = option(256, "longest answer in tokens", ge=1)
    temperature: float = option(0.0, "0: the likeliest token each time", ge=0)
    top_p: float = option(
        1.0, "sample from the likeliest tokens that make up this probability", gt=0, le=1
    )
    top_k: int = option(0, "sample from so many of the likeliest tokens; 0: from all", ge=0)
    min_p: float = option(
        0.0, "sample from tokens at least this share as likely as the likeliest", ge=0, lt=1
    )
    repetition_penalty: float = option(
        1.0, "divides the logits of tokens that were there; 1: none", gt=0
    )
    stop: list[str] = option([], "a text that ends an answer, and is no part of it; repeatable")
    generation_config: Literal["none", "model"] = option(
        "none", "model: sample as the base's generation_config.json says; options stand above it"
    )
    seed: int = option(42, "for sampling", ge=0, lt=2**63)
    clock: Literal["now", "run"] = option(
        "now", "what a template that asks for the day sees: today, or the day of the training"
    )

    @field_validator("chat_template_kwargs", mode="before")
    @classmethod
    def _switches(cls, value: Any) -> Any:
        return template_kwargs(value)

    @field_validator("stop")
    @classmethod
    def _not_everywhere(cls, value: list[str]) -> list[str]:
        if "" in value:
            raise ValueError("an empty text is at the beginning of every answer, and would end it")
        return value


class QuantizeConfig(KernelOptions, FourBitOptions):
    """Everything ``halfbyte quantize`` reads."""

    model: str = option(..., "a Hub id, a local directory, or `demo` for the built-in model")
    output_dir: str = option(..., "where the quantized model goes")
    revision: str | None = option(None, "revision of a Hub model")
    subfolder: str | None = option(None, SUBFOLDER_HELP)


class MergeConfig(KernelOptions, PublishOptions):
    """Everything ``halfbyte merge`` reads."""

    run: str = option(..., "a run directory, or an adapter that PEFT wrote")
    onto: Literal["trained", "original"] = option(
        "trained",
        "the base the adapter is added to: the 4-bit weights it was trained on, or the original "
        "ones",
    )
    output_dir: str = option(..., "where the merged model goes")
    base: str | None = option(None, BASE_HELP)
    min_agreement: float | None = option(
        None,
        "refuse it, too, if it predicts another token than the adapted model at more positions "
        "than this leaves: 0.99",
        ge=0,
        le=1,
    )
    max_noise: float = option(
        4.0,
        "how many times the KL divergence that rounding alone causes the merged model may be from "
        "the adapted one",
        ge=0,
    )
    requantize: bool = option(
        False, "write the merged weights in 4 bits, which erases part of what the adapter adds"
    )
    min_survival: float = option(
        0.9,
        "with requantize: the share of the adapter's effect that must survive in the median layer",
        ge=0,
        le=1,
    )
    device: str = option("auto", "cpu, cuda or auto")

    @field_validator("device")
    @classmethod
    def _known_device(cls, value: str) -> str:
        return known_device(value)


class ExportConfig(KernelOptions, PublishOptions):
    """Everything ``halfbyte export`` reads."""

    run: str = option(..., "a run directory")
    to: Literal["peft", "hf", "bnb-4bit"] = option(
        ...,
        "peft: the adapter; hf: one verified model in 16 bits; bnb-4bit: the base in the 4 bits of "
        "the training, and the adapter beside it",
    )
    output_dir: str = option(..., "where it goes")
    base: str | None = option(None, BASE_HELP)


VERBS: dict[str, type[Options]] = {
    "demo": DemoConfig,
    "doctor": DoctorConfig,
    "plan": PlanConfig,
    "train": TrainConfig,
    "chat": ChatConfig,
    "eval": EvalConfig,
    "merge": MergeConfig,
    "export": ExportConfig,
    "quantize": QuantizeConfig,
    "data check": DataCheckConfig,
    "checkpoint list": CheckpointConfig,
    "explain": ExplainConfig,
    "bench": BenchConfig,
}


def all_keys() -> set[str]:
    return {name for cls in VERBS.values() for name in cls.model_fields}
