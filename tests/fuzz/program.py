"""Programs: what a fuzzer draws, as plain data.

A program is a model, an adapter, rows, options and what is done with them. Its rows are kept as the
conversations they mean; `written` puts each into one of the forms people use, so that an oracle
never has to read a form.
"""

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

Turn = tuple[str, str]
"""(role, content)."""

FAMILIES = (
    "llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gemma3_text", "phi3", "olmo2",
    "granite", "smollm3", "stablelm", "starcoder2", "gpt_neox", "gpt2", "glm4",
)  # fmt: skip
TEMPLATES = ("builtin", "chatml", "headers", "inst", "thinking")
FORMS = ("messages", "sharegpt", "alpaca", "qa", "prompt", "text", "ids")
WORDS = (
    "tea", "two", "buns", "the", "café", "naïve", "größer", "東京", "🙂", "one  two", "a\nb", "x=1",
    '{"a": [1]}', "end.", "No!", "\tq", "don't", "Ünï", "3.14", "- item", "**b**", "ok",
)  # fmt: skip
LINEAR = {
    "gpt2": ("c_attn", "c_proj", "c_fc"),
    "gpt_neox": ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"),
    "phi3": ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
    "glm4": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"),
    "starcoder2": ("q_proj", "k_proj", "v_proj", "o_proj", "c_fc", "c_proj"),
}
"""Layers by their last name; of families that are not here as of llama."""
MIXTURES = ("qwen3_moe", "mixtral", "olmoe")
"""Families with experts, of which a token goes to two of four."""
REAL = ("smollm2", "HALFBYTE_SMOLLM2")
"""Four layers of a real model, where the variable says in which directory it is."""
LLAMA = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Model:
    """family: a model type. stored: dtype of its file. bits: 4 or 16."""

    family: str
    template: str
    tied: bool = False
    stored: str = "float32"
    bits: int = 4
    quant_type: str = "nf4"
    double_quant: bool = True
    blocksize: int = 64


@dataclass(frozen=True)
class Adapter:
    """kind: lora or full. targets: names, or none for all linear layers. rank, alpha_of: of one of
    the targets, apart. fresh: ours, else PEFT's with random values. experts: a mixture's, too."""

    kind: str = "lora"
    r: int = 4
    alpha: int = 8
    rslora: bool = False
    dora: bool = False
    targets: tuple[str, ...] = ()
    rank: tuple[str, int] | None = None
    alpha_of: tuple[str, int] | None = None
    whole: tuple[str, ...] = ()
    fresh: bool = False
    experts: bool = False


@dataclass(frozen=True)
class Row:
    """turns: what it means; of ids, what is encoded. Of a row with tools a turn of the role "call"
    is an assistant's call of `TOOL` with its content, one of the role "tool" the answer."""

    form: str
    turns: tuple[Turn, ...]

    @property
    def tools(self) -> bool:
        return any(role == "call" for role, _ in self.turns)


TOOL = {
    "type": "function",
    "function": {
        "name": "look",
        "description": "Looks it up.",
        "parameters": {"type": "object", "properties": {"what": {"type": "string"}}},
    },
}
"""The one tool that rows may call."""


def messages_of(row: Row) -> list[dict[str, Any]]:
    """The row as a chat template takes it."""

    def message(role: str, text: str) -> dict[str, Any]:
        if role == "call":
            call = {"name": TOOL["function"]["name"], "arguments": {"what": text}}
            calls = [{"type": "function", "function": call}]
            return {"role": "assistant", "content": "", "tool_calls": calls}
        return {"role": role, "content": text}

    return [message(role, text) for role, text in row.turns]


@dataclass(frozen=True)
class Program:
    """way: train (our loop), optimize (PEFT's model in a plain loop), trl. resume_at: the step a
    second command goes on from. after: what is made of the result. dtype: that of computing.
    held_out: so many rows of the file
    are only evaluated, after every step. second: PEFT's model holds another
    adapter, too."""

    model: Model
    adapter: Adapter
    rows: tuple[Row, ...]
    way: str = "train"
    max_length: int = 128
    packing: bool = False
    assistant_only: bool = True
    batch: int = 2
    accumulation: int = 1
    steps: int = 2
    learning_rate: float = 1e-3
    schedule: str = "linear"
    warmup: int = 0
    weight_decay: float = 0.0
    beta2: float = 0.999
    epsilon: float = 1e-8
    max_norm: float = 0.3
    optimizer: str = "adamw_torch"
    kept: str = "auto"
    checkpointing: bool = True
    tokens_per_pass: int = 0
    resume_at: int = 0
    after: str = "reload"
    dtype: str = "float32"
    held_out: int = 0
    second: bool = False

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), ensure_ascii=False, indent=1)


def from_json(text: str) -> Program:
    """A program that `Program.to_json` wrote."""
    told = json.loads(text)
    adapter = told.pop("adapter")
    for name in ("rank", "alpha_of"):
        adapter[name] = tuple(adapter[name]) if adapter[name] else None
    for name in ("targets", "whole"):
        adapter[name] = tuple(adapter[name])
    rows = tuple(
        Row(row["form"], tuple((role, text) for role, text in row["turns"]))
        for row in told.pop("rows")
    )
    return Program(Model(**told.pop("model")), Adapter(**adapter), rows, **told)


# --- rows as people write them --------------------------------------------------------------------

SHAREGPT = {"user": "human", "assistant": "gpt", "system": "system"}


def written(row: Row) -> dict[str, Any]:
    """The row in its form; ids are the caller's to make."""
    turns = list(row.turns)
    system = turns.pop(0)[1] if turns[0][0] == "system" else None
    own = {} if system is None else {"system": system}
    match row.form:
        case "messages":
            return {"messages": messages_of(row), **({"tools": [TOOL]} if row.tools else {})}
        case "sharegpt":
            return {
                "conversations": [{"from": SHAREGPT[role], "value": text} for role, text in turns],
                **own,
            }
        case "alpaca":
            *before, (_, question), (_, answer) = turns
            pairs = list(zip(before[::2], before[1::2], strict=True))
            history = [[asked[1], said[1]] for asked, said in pairs]
            told = {"instruction": question, "input": "", "output": answer, **own}
            return {**told, "history": history} if history else told
        case "qa":
            return {"question": turns[0][1], "answer": turns[1][1], **own}
        case "prompt":
            return {"prompt": turns[0][1], "completion": turns[1][1]}
        case "text":
            return {"text": turns[0][1]}
        case form:
            raise ValueError(form)


def write_rows(rows: list[dict[str, Any]], path: Path) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


# --- drawing --------------------------------------------------------------------------------------

texts = st.lists(st.sampled_from(WORDS), min_size=1, max_size=9).map(" ".join)


@st.composite
def conversations(draw: st.DrawFn, form: str, template: str) -> tuple[Turn, ...]:
    """Turns that a form can hold and a template shows."""
    if form == "text":
        return (("user", draw(texts)),)
    if form in ("prompt", "ids"):
        return (("user", draw(texts) + ":"), ("assistant", " " + draw(texts).strip()))
    exchanges = 1 if form == "qa" else draw(st.integers(1, 3))
    turns: list[Turn] = []
    if draw(st.integers(0, 3)) == 0:
        turns.append(("system", draw(texts)))
    for _ in range(exchanges):
        turns.append(("user", draw(texts)))
        said = draw(texts)
        if template == "thinking" and draw(st.booleans()):
            said = f"<think>\n{draw(texts).strip()}\n</think>\n\n{said.strip()}"
        if form == "messages" and template == "chatml" and draw(st.integers(0, 3)) == 0:
            turns += [("call", draw(texts)), ("tool", draw(texts))]
        turns.append(("assistant", said))
    return tuple(turns)


@st.composite
def models(draw: st.DrawFn) -> Model:
    bits = draw(st.sampled_from((4, 4, 4, 16)))
    family = draw(
        st.sampled_from((*FAMILIES, *MIXTURES, *REAL[:1] * bool(os.environ.get(REAL[1]))))
    )
    real = family == REAL[0]
    return Model(
        family,
        "own" if real else draw(st.sampled_from(TEMPLATES)),
        tied=real or draw(st.booleans()),
        stored="bfloat16" if real else draw(st.sampled_from(("float32", "bfloat16"))),
        bits=bits,
        **(
            {
                "quant_type": draw(st.sampled_from(("nf4", "nf4", "fp4"))),
                "double_quant": draw(st.booleans()),
                "blocksize": draw(st.sampled_from((64, 64, 128))),
            }
            if bits == 4
            else {}
        ),
    )


@st.composite
def adapters(draw: st.DrawFn, model: Model) -> Adapter:
    if model.bits == 16 and draw(st.integers(0, 2)) == 0:
        return Adapter(kind="full")
    names = LLAMA[:4] if model.family in MIXTURES else LINEAR.get(model.family, LLAMA)
    targets = draw(
        st.just(())
        | st.lists(st.sampled_from(names), min_size=1, max_size=3, unique=True).map(tuple)
    )
    apart = st.none() | st.tuples(st.sampled_from(targets or names), st.sampled_from((2, 6)))
    whole = st.sampled_from(((), (), (), ("lm_head",), ("lm_head", "embed_tokens")))
    named = model.family not in ("gpt2", "gpt_neox")  # where these names are others
    dora = draw(st.integers(0, 4)) == 0
    return Adapter(
        r=draw(st.sampled_from((1, 4, 8))),
        alpha=draw(st.sampled_from((4, 8, 16))),
        rslora=draw(st.booleans()),
        dora=dora,
        targets=targets,
        rank=draw(apart),
        alpha_of=draw(apart),
        whole=draw(whole) if named else (),
        fresh=draw(st.booleans()),
        experts=model.family in MIXTURES and not dora and draw(st.booleans()),
    )


@st.composite
def programs(draw: st.DrawFn) -> Program:
    model = draw(models())
    adapter = draw(adapters(model))
    way = draw(st.sampled_from(("train", "train", "train", "optimize", "trl")))
    # in somebody's own loop experts stay in 16 bits
    if adapter.kind == "full" or model.family in MIXTURES:
        way = "train"
    forms = draw(st.lists(st.sampled_from(FORMS), min_size=1, max_size=2))
    rows = tuple(
        Row(form, draw(conversations(form, model.template)))
        for form in draw(st.lists(st.sampled_from(forms), min_size=2, max_size=6))
    )
    steps = draw(st.integers(1, 4))
    return Program(
        model,
        adapter,
        rows,
        way,
        max_length=draw(st.sampled_from((128, 128, 64))),
        packing=draw(st.booleans()),
        assistant_only=draw(st.integers(0, 3)) > 0,
        batch=draw(st.integers(1, 3)),
        accumulation=draw(st.integers(1, 2)),
        steps=steps,
        learning_rate=draw(st.sampled_from((1e-4, 1e-3, 5e-3))),
        schedule=draw(st.sampled_from(("linear", "cosine", "constant", "constant_with_warmup"))),
        warmup=draw(st.integers(0, 2)),
        weight_decay=draw(st.sampled_from((0.0, 0.0, 0.1))),
        beta2=draw(st.sampled_from((0.999, 0.95))),
        epsilon=draw(st.sampled_from((1e-8, 1e-6))),
        max_norm=draw(st.sampled_from((0.3, 1.0, 0.0))),
        optimizer=draw(st.sampled_from(("adamw_torch", "paged_adamw_32bit", "paged_adamw_8bit"))),
        kept=draw(st.sampled_from(("auto", "none", "attention", "mlp_in", "all"))),
        checkpointing=draw(st.booleans()),
        tokens_per_pass=draw(st.sampled_from((0, 0, 40))),
        resume_at=draw(st.integers(0, steps - 1)) if draw(st.booleans()) else 0,
        after=draw(st.sampled_from(("reload", "onto trained", "onto original", "bnb-4bit"))),
        dtype=draw(st.sampled_from(("float32", "float32", "bfloat16"))),
        held_out=draw(st.sampled_from((0, 0, 1))),
        second=draw(st.booleans()),
    )
