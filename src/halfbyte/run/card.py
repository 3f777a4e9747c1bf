"""The model card: what an adapter or a merged model was made of, how it was checked, and how to
load it.

Every figure comes from the run's own files; what is not known is not written. Hugging Face's
metadata stand on top.
"""

import json
from pathlib import Path
from typing import Any

from ..files.publish import is_public
from .directory import Run
from .facts import facts

CARD = "README.md"
MODELS = {"original": "the model it began with", "base": "its base in 4 bits", "run": "the run"}
"""What a run is held against, by the keys of its judgement and of a merge's receipt."""


def adapter_card(run: Run, info: dict[str, Any]) -> str:
    """Of a run's adapter (a full fine-tuning: of the whole model). info: what `run.json` holds."""
    full = info["config"]["full"]
    kind = (
        "every parameter was trained"
        if full
        else f"a LoRA adapter of rank {info['config']['lora_r']}"
    )
    parts = [
        _metadata(info, "transformers" if full else "peft"),
        f"# {run.path.name}",
        f"{_name(info)}, fine-tuned with halfbyte: {kind}.",
        _load_model() if full else _load_adapter(info),
        _training(run, info),
        _base(info),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def export_card(run: Run, info: dict[str, Any]) -> str:
    """Of a directory that holds a base in 4 bits, and a run's adapter in ``adapter/``."""
    parts = [
        _metadata(info, "peft"),
        f"# {run.path.name}",
        f"{_name(info)} in the 4 bits of its training, and in `adapter/` a LoRA adapter of rank "
        f"{info['config']['lora_r']} that was trained on them with halfbyte.",
        _load_export(),
        _training(run, info),
        _base(info),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def merged_card(run: Run | None, base: str, receipt: dict[str, Any]) -> str:
    """Of a merged model.

    Args:
        run: where the adapter came from; None where PEFT wrote it.
        base: the base's name.
        receipt: `exporters.receipt.Receipt.as_dict`.
    """
    stored = "4 bits" if receipt["surviving"] else "16 or 32 bits, as its base"
    name = _name_of(base) or "a local model"
    said = f"onto the {receipt['onto']} base, stored in {stored}."
    if run is None:
        plain = {"base": {"name": base}, "config": {"full": False, "load_in_4bit": False}}
        parts = [
            _metadata(plain, "transformers"),
            f"# {name}, merged",
            f"{name} with a LoRA adapter added into its weights, {said}",
            _load_model(),
            _receipt(receipt),
        ]
    else:
        info = run.info()
        rank = info["config"]["lora_r"]
        parts = [
            _metadata(info, "transformers"),
            f"# {run.path.name}, merged",
            f"{name} with a LoRA adapter of rank {rank} added into its weights, {said}",
            _load_model(),
            _receipt(receipt),
            _training(run, info),
            _base(info),
        ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _metadata(info: dict[str, Any], library: str) -> str:
    name, c = info["base"]["name"], info["config"]
    tags = [
        "halfbyte",
        *(["full-fine-tuning"] if c["full"] else ["lora"]),
        *(["qlora"] if c["load_in_4bit"] else []),
    ]
    lines = ["---"]
    if is_public(name):
        lines.append(f"base_model: {json.dumps(name)}")
    lines += [
        f"library_name: {library}",
        "pipeline_tag: text-generation",
        f"tags: {json.dumps(tags)}",
        "---",
    ]
    return "\n".join(lines)


def _name(info: dict[str, Any]) -> str:
    """The base's name."""
    return _name_of(info["base"]["name"]) or "a local model"


def _name_of(name: str) -> str:
    """A Hub id, or the last part of a path."""
    return name if is_public(name) else Path(name).name


def _load_adapter(info: dict[str, Any]) -> str:
    base = info["base"]["name"] if is_public(info["base"]["name"]) else "path/to/the/base"
    revision = info["config"].get("revision") if is_public(info["base"]["name"]) else None
    at = f", revision={revision!r}" if revision else ""
    held = (
        "The adapter corrected its base as it is in 4 bits: load that (`quantization_config`, or "
        "halfbyte on the run) for exactly\nthe model that was trained. "
        if info["config"]["load_in_4bit"]
        else ""
    )
    return f"""## Load it

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

base = AutoModelForCausalLM.from_pretrained({base!r}{at}, dtype="auto")
model = PeftModel.from_pretrained(base, "path/to/this/directory")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/directory")
# where answers of this training end
model.generation_config = GenerationConfig.from_pretrained("path/to/this/directory")
```

{held}The tokenizer here carries the chat template of the training."""


def _load_export() -> str:
    return """## Load it

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = AutoModelForCausalLM.from_pretrained("path/to/this/directory")
model = PeftModel.from_pretrained(base, "path/to/this/directory/adapter")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/directory")
```

`adapter/adapter_config.json` names its base by the path this directory was written to, for tools
that open the adapter alone; after the directory has moved, the lines above open both."""


def _load_model() -> str:
    return """## Load it

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/this/directory", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/directory")
```"""


def _training(run: Run, info: dict[str, Any]) -> str:
    known = facts(run, info)
    c, data = known["config"], known["data"]
    per_step = c["per_device_train_batch_size"] * c["gradient_accumulation_steps"]
    rows = [
        (
            "rows, tokens",
            f"{data['rows']:,} rows, {data['tokens']:,} tokens, {data['supervised_tokens']:,} "
            "trained",
        ),
        ("data", f"{data['form']}, sha256 {data['sha256']}"),
        ("chat template", f"sha256 {info['template_sha256']}"),
        ("steps", f"{info['total_steps']:,} of {per_step} rows"),
        (
            "optimizer",
            f"{c['optim']}, learning rate {c['learning_rate']:g}, {c['lr_scheduler_type']}",
        ),
        (
            "seed, versions",
            f"{c['seed']}; " + ", ".join(f"{name} {v}" for name, v in info["versions"].items()),
        ),
        *_loss(known),
        *_judged(known["judged"]),
        *_memory(known),
    ]
    if not c["full"]:
        adapter = (
            f"r {c['lora_r']}, alpha {c['lora_alpha']}, dropout {c['lora_dropout']:g}, "
            f"{c['target_modules']}"
        )
        adapter += (", DoRA" if c.get("use_dora") else "") + (", rsLoRA" if c["use_rslora"] else "")
        adapter += f", trained whole: {c['modules_to_save']}" if c.get("modules_to_save") else ""
        adapter += (
            f", begun with {_name_of(c['adapter_name_or_path'])}"
            if c.get("adapter_name_or_path")
            else ""
        )
        for name in ("rank_pattern", "alpha_pattern"):
            adapter += f", {name} {json.dumps(c[name])}" if c.get(name) else ""
        rows.insert(0, ("adapter", adapter))
    for change in info.get("changes", []):
        key = change["change"].partition(":")[0]
        line = (
            f"{key}: another path"
            if key in ("adapter_name_or_path", "chat_template")
            else change["change"]
        )
        rows.append((f"changed at step {change['step']}", line))
    return "## Training\n\n" + _table(["", ""], rows)


def _loss(known: dict[str, Any]) -> list[tuple[str, str]]:
    if known["held_out"]:
        first, last = known["held_out"]
        return [
            (
                "held-out loss",
                f"{first['loss']:.4f} before, {last['loss']:.4f} after ({last['tokens']:,} tokens)",
            )
        ]
    steps = [row for row in known["curve"] if row["loss"] is not None]
    return (
        [("training loss", f"{known['first_loss']:.4f} to {steps[-1]['loss']:.4f}")]
        if steps
        else []
    )


def _memory(known: dict[str, Any]) -> list[tuple[str, str]]:
    words = [
        f"{known['memory'][what] / 2**30:.2f} GiB {what}"
        for what in ("planned", "measured")
        if known["memory"][what]
    ]
    return [("memory at the peak", ", ".join(words))] if words else []


def _base(info: dict[str, Any]) -> str:
    c = info["config"]
    held = f"{c['bnb_4bit_quant_type']}, blocks of {c['bnb_4bit_blocksize']}"
    held += ", double quantized" if c["bnb_4bit_use_double_quant"] else ""
    rows = [
        ("name", _name(info)),
        ("held in", held if c["load_in_4bit"] else info["compute_dtype"]),
        ("computed in", info["compute_dtype"]),
        ("digest of the weights as held", f"sha256 {info['base']['digest']}"),
    ]
    return "## Base\n\n" + _table(["", ""], rows)


def _receipt(receipt: dict[str, Any]) -> str:
    rows = [(MODELS[key], "", "", f"{loss:.4f}") for key, loss in receipt["losses"].items()]
    for onto, found in receipt["comparisons"].items():
        this = f"{receipt['onto']}, requantized" if receipt["surviving"] else receipt["onto"]
        mark = " (this one)" if onto == this else ""
        mark += (
            " (recommended)"
            if onto == receipt["recommended"] and len(receipt["comparisons"]) > 1
            else ""
        )
        rows.append(
            (
                f"onto {onto}{mark}",
                f"{found['kl']:.2e}",
                f"{found['greedy_agreement']:.2%}",
                f"{found['loss']:.4f}",
            )
        )
    again = receipt["recomputed"]
    text = (
        f"## Merge receipt\n\nAll {again['tensors']:,} tensors were computed again from the files "
        f"of base and adapter, and are the same; rounding to the stored type keeps "
        f"{again['surviving'][1]:.1%} of the adapter's effect in the median layer. Compared with "
        f"the run in fp32 on {receipt['rows']} rows {receipt['rows_are']} "
        f"({receipt['tokens']:,} tokens; rounding to {receipt['rounded_to']} alone makes a KL "
        f"divergence of {receipt['noise']:.2e}):\n\n"
        + _table(["", "KL divergence, nats", "same token", "loss"], rows)
    )
    if receipt["surviving"]:
        least, middle, most = receipt["surviving"]
        text += (
            f"\n\nThe merged weights were rounded to 4 bits again; {middle:.1%} of the adapter's "
            f"effect survive that in the median layer ({least:.1%} to {most:.1%})."
        )
    return text


def _judged(found: dict[str, Any] | None) -> list[tuple[str, str]]:
    """What a training brought and what it made the model forget."""
    if not found:
        return []
    rows, gap, loss = [], found["difference"], found["loss"]
    if gap and gap["half_width"] is not None:
        losses = ", ".join(f"{MODELS[key]} {value:.4f}" for key, value in loss.items())
        rows.append((f"loss on {found['rows']} held-out rows", losses))
        rows.append(
            (
                f"beside {MODELS[found['against']]}",
                f"{found['verdict']}: {gap['mean']:+.4f} +/- {gap['half_width']:.4f} nats a token",
            )
        )
    kl = found["neutral"]["kl"]
    if kl.get("run") is not None:
        text = ", ".join(f"{MODELS[key]} {value:.4f}" for key, value in kl.items())
        rows.append(
            (f"KL divergence from {MODELS[found['against'] or 'base']} on neutral text", text)
        )
    return rows


def _table(head: list[str], rows: list[Any]) -> str:
    clean = [[" ".join(cell.split()).replace("|", "\\|") for cell in cells] for cells in rows]
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *clean)]
    return "\n".join(lines)
