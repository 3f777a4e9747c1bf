"""``halfbyte explain TOPIC``: the article this project grew from, alive: its tables computed now,
on this machine, and the published or measured figure beside the article's wherever they differ.

One file because its pages are running text beside the figures they recompute.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ..config.aliases import NEGATED, RENAMED, SWITCHES, nearest
from ..config.verbs import VERBS, ExplainConfig
from ..errors import UsageError
from ..ledger import Part
from . import console
from .options import Verb


@dataclass
class Page:
    """What a topic shows: paragraphs and tables, in order of adding."""

    title: str
    parts: list[dict[str, Any]] = field(default_factory=list)

    def text(self, paragraph: str) -> None:
        self.parts.append({"text": " ".join(paragraph.split())})

    def table(self, title: str, columns: list[str], rows: list[list[str]]) -> None:
        self.parts.append({"title": title, "columns": columns, "rows": rows})


def explain(record: ExplainConfig) -> dict[str, Any]:
    """The article's ideas with live numbers: int4, nf4, double-quant, paged, memory, tokens, quiz,
    or any option."""
    topic = (record.topic or "").strip().replace("-", "_").lower()
    if not topic:
        page = Page("topics")
        page.table(
            "",
            ["topic", ""],
            [[name.replace("_", "-"), (f.__doc__ or "")] for name, f in _TOPICS.items()],
        )
        page.text("Or the name of any option, such as `halfbyte explain lora_r`.")
        following = "int4"
    elif topic in _TOPICS:
        page = _TOPICS[topic](record)
        order = list(_TOPICS)
        following = order[(order.index(topic) + 1) % len(order)].replace("_", "-")
    else:
        page, following = _option(topic), "memory"
    for part in page.parts:
        if "text" in part:
            console.paragraph(part["text"])
        else:
            console.table(part["title"], part["columns"], part["rows"])
    console.say(f"next: halfbyte explain {following}")
    return {"topic": record.topic, "title": page.title, "parts": page.parts}


# --- formats --------------------------------------------------------------------------------------

_WEIGHTS = (-0.8, -0.45, -0.12, 0.0, 0.07, 0.33, 0.61, 0.95)


def _int4(record: ExplainConfig) -> Page:
    """Uniform 4-bit quantization, its error bound, and where the bound fails"""
    from ..codebooks import LinearGrid

    page = Page("INT4: sixteen evenly spaced levels")
    page.text(
        """A weight x becomes a code q = round(x / s) + z of 0..15, and comes back as s (q - z). The step s spreads sixteen
        levels over the range of the weights; the zero point z makes zero exact."""
    )
    grid = LinearGrid.fit(_WEIGHTS)
    codes, _ = grid.encode(_WEIGHTS)
    back = grid.decode(codes)
    rows = [
        [f"{x:+.2f}", str(q), f"{y:+.4f}", f"{abs(x - y):.4f}"]
        for x, q, y in zip(_WEIGHTS, codes, back, strict=True)
    ]
    page.table(
        f"the article's eight weights: s = {grid.scale:.4f}, z = {grid.zero_point}, s/2 = "
        f"{grid.scale / 2:.4f}",
        ["x", "code", "back", "error"],
        rows,
    )
    worst = grid.scale / 2 / (max(_WEIGHTS) - min(_WEIGHTS))
    page.text(
        f"""No error exceeds s/2. That is {worst:.1%} of the range, whatever the range: for [-1, 1] the article says 7 % of
        the full range, but 0.067 of 2.0 is {1 / 30:.1%}."""
    )
    wide = LinearGrid.from_range(0.5, 1.0)
    page.table(
        "where the formula breaks",
        ["range", "the article's z", "what happens", "here"],
        [
            [
                "[0.5, 1.0]",
                str(round(-0.5 / (0.5 / 15))),
                "no 4-bit code; clamped, errors reach 15 s",
                f"widened to [0, 1], s = {wide.scale:.4f}",
            ],
            ["[0.7, 0.7]", "0 / 0", "division by zero", "kept exactly"],
            ["[-1, 1]", "7.5", "rounds half to even: 8, and -1 comes back as -1.0667", "the same"],
        ],
    )
    return page


def _nf4(record: ExplainConfig) -> Page:
    """Levels at quantiles of the normal distribution: the article's, the published ones, and their
    errors measured now"""
    import torch

    from ..codebooks import BNB_QUANT_TYPES, QUANT_TYPES, derive_nf4_article, levels
    from ..quantization.tensor import quantize

    page = Page("NF4: sixteen levels where a bell curve has its weights")
    published, article = levels("nf4"), derive_nf4_article()
    rows = []
    for i in range(16):
        gap = "" if i == 0 else f"{published[i] - published[i - 1]:.4f}"
        rows.append(
            [
                str(i),
                f"{(2 * i + 1) / 32:.5f}",
                f"{article[i]:+.4f}",
                f"{published[i]:+.4f}",
                gap,
                f"{-1 + i * 2 / 15:+.4f}",
            ]
        )
    page.table("levels", ["i", "p", "article", "published NF4", "gap", "uniform"], rows)
    page.text(
        """The article's levels, inv_Phi((2i + 1) / 32), are symmetric and have no exact zero. The published table, which every
        tool stores, has eight levels above zero, seven below, and zero itself: a weight of zero stays zero. The article
        speaks of normalizing a block to zero mean and unit variance; what is done, there and everywhere, is dividing it by
        its largest magnitude."""
    )
    torch.manual_seed(0)
    n, block = 1 << 20, 64
    gauss = torch.randn(n)
    heavy = torch.distributions.StudentT(5.0).sample((n,))
    measured: list[list[str]] = []
    for name in QUANT_TYPES:
        cells = [
            f"{_relative_mse(quantize(w, quant_type=name).dequantize(torch.float32), w):.5f}"
            for w in (gauss, heavy)
        ]
        measured.append([name, *cells, "yes" if name in BNB_QUANT_TYPES else "no"])
    for name, grid in (
        ("int4, absmax", _int4_absmax),
        ("int4, affine (with a zero point: 4.19 bits)", _int4_affine),
    ):
        measured.append(
            [
                name,
                *(
                    f"{_relative_mse(grid(w.view(-1, block)).view(-1), w):.5f}"
                    for w in (gauss, heavy)
                ),
                "no",
            ]
        )
    measured.sort(key=lambda row: row[1])
    page.table(
        f"squared error over squared weight, blocks of {block}, {n:,} weights drawn now",
        ["format", "normal", "heavy tails (t, 5 d.o.f.)", "stored by bitsandbytes"],
        measured,
    )
    codes = quantize(gauss).packed
    counts = torch.bincount(torch.cat((codes >> 4, codes & 15)).long(), minlength=16).double()
    p = counts / counts.sum()
    entropy = float(-(p * p.log2()).sum())
    page.text(
        f"""Information-theoretically optimal it is not: the sixteen codes carry {entropy:.2f} bits here, not 4, because the
        largest of 64 weights is pinned to a level; tables with less error exist. It is good, and it is what everybody can
        read."""
    )
    return page


def _relative_mse(value: Any, reference: Any) -> float:
    return float((value - reference).square().sum() / reference.square().sum())


def _int4_absmax(blocks: Any) -> Any:
    scale = blocks.abs().amax(1, keepdim=True) / 7
    return (blocks / scale).round().clamp(-8, 7) * scale


def _int4_affine(blocks: Any) -> Any:
    low, high = blocks.amin(1, keepdim=True).clamp(max=0), blocks.amax(1, keepdim=True).clamp(min=0)
    scale = (high - low) / 15
    zero = (-low / scale).round()
    return scale * ((blocks / scale).round() + zero).clamp(0, 15).sub(zero)


def _double_quant(record: ExplainConfig) -> Page:
    """What the scales cost, what quantizing them saves, and with which 8-bit numbers"""
    import torch

    from ..quantization.tensor import quantize

    page = Page("double quantization: the scales in 8 bits")
    torch.manual_seed(0)
    weights = torch.randn(4096, 1024)
    single, double = quantize(weights, double_quant=False), quantize(weights)
    rows = []
    for label, tensor, formula in (
        ("fp32 scales", single, "4 + 32/64"),
        ("8-bit scales", double, "4 + 8/64 + 32/(64 256)"),
    ):
        bits = 8 * tensor.stored_bytes / tensor.numel()
        error = _relative_mse(tensor.dequantize(torch.float32), weights)
        rows.append([label, formula, f"{bits:.4f}", f"{bits / 8:.4f}", f"{error:.6f}"])
    page.table(
        "measured on 4096 x 1024 normal weights",
        ["", "bits a weight", "measured", "bytes", "relative error"],
        rows,
    )
    saved = (8 * (single.stored_bytes - double.stored_bytes) / weights.numel()) / 8
    page.text(
        f"""For 70 billion weights the difference is {70e9 * saved / 1e9:.1f} GB. (The article says the overhead falls to 0.127
        bits and also that it saves 8 % of the memory; both are right.)"""
    )
    scales = single.absmax
    restored = _restored_scales(double)
    fp8 = _fp8_scales(scales)
    page.table(
        "relative error of a scale, rms",
        ["8-bit numbers", "error"],
        [
            [
                "dynamic map, mean subtracted (published, stored by every tool)",
                f"{_rms(restored, scales):.2%}",
            ],
            ["IEEE-like FP8 E4M3, as the article says", f"{_rms(fp8, scales):.2%}"],
        ],
    )
    return page


def _rms(value: Any, reference: Any) -> float:
    return float(((value - reference) / reference).square().mean().sqrt())


def _restored_scales(tensor: Any) -> Any:
    groups = tensor.nested_absmax.repeat_interleave(tensor.nested_block_size)[
        : tensor.absmax.numel()
    ]
    return tensor.nested_quant_map[tensor.absmax.long()] * groups + tensor.nested_offset


def _fp8_scales(scales: Any) -> Any:
    import torch

    groups = scales.view(-1, 256)
    top = groups.amax(1, keepdim=True) / 448
    return ((groups / top).to(torch.float8_e4m3fn).float() * top).view(-1)


# --- memory ---------------------------------------------------------------------------------------

_LLAMA2 = {
    "7B": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
    "13B": {
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
    },
    "70B": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
}
"""Llama 2's published shapes; vocabulary 32,000."""


def llama2(size: str) -> Any:
    """The transformers configuration of a Llama 2 model, by its name."""
    from transformers import LlamaConfig

    shape: dict[str, Any] = _LLAMA2[size]
    return LlamaConfig(vocab_size=32000, **shape)


def _article_gb(size: str) -> dict[str, float]:
    """The article's estimate, by its own formulas, GB."""
    shape, parameters = _LLAMA2[size], float(size.removesuffix("B")) * 1e9
    width = 8192 if parameters > 30e9 else 4096
    lora = shape["num_hidden_layers"] * 7 * 2 * 16 * width
    return {
        "base": parameters * 0.52 / 1e9,
        "adapters": lora * 2 / 1e9,
        "optimizer and gradients": lora * 12 / 1e9,
        "activations": 5.0,
    }


def _memory(record: ExplainConfig) -> Page:
    """The article's budget for 7B, 13B and 70B beside the one computed from the model's real shapes"""
    from ..planning.dry_run import outline

    page = Page(
        "where the gigabytes go, training QLoRA r=16 on all linear layers, one row of 512 tokens"
    )
    rows: list[list[str]] = []
    totals = []
    for size in console.progress(list(_LLAMA2), len(_LLAMA2), "building empty models"):
        plan = outline(llama2(size), 512)
        theirs = _article_gb(size)
        ours = {
            "base": plan.bytes_of(Part.CODES, Part.SCALES, Part.EMBEDDINGS, Part.NORMS),
            Part.ADAPTERS: plan.bytes_of(Part.ADAPTERS),
            "optimizer and gradients": plan.bytes_of(Part.GRADIENTS, Part.OPTIMIZER),
            "activations": plan.bytes_of(
                Part.LAYER_INPUTS, Part.LIVE_LAYER, Part.LOGITS, Part.DEQUANTIZED_WEIGHT
            ),
        }
        for part, count in ours.items():
            rows.append([f"{size} {part}", f"{theirs[part]:.2f}", f"{count / 1e9:.2f}"])
        rows.append(
            [f"{size} together", f"{sum(theirs.values()):.2f}", f"{plan.tensor_bytes / 1e9:.2f}"]
        )
        totals.append((size, plan))
    page.table("GB", ["", "article", "computed"], rows)
    last = totals[-1][1]
    page.text(
        f"""Where the article is off, for 70B: the adapter has {last.lora_parameters / 1e6:.0f} M parameters, not about 160 M
        (its own code gives 146.8 M); twelve bytes of states per parameter contradict the 8-bit optimizer it recommends;
        activations of one checkpointed row of 512 tokens are about 1 GB, not 5 to 10. What no table shows: a GPU's context
        (0.6 to 0.7 GB), the allocator's slack, and, where all logits are held at once, 0.3 MB a token (1.3 MB with Llama
        3's vocabulary)."""
    )
    page.text(
        """Checkpointing keeps one input per layer: L T d 2 bytes, and 2 T (7 d + 2 kv + 3 ff) for the one layer that is being
        recomputed: at 70B a fourteenth of what is kept without it, not a half."""
    )
    return page


def _paged(record: ExplainConfig) -> Page:
    """What paging an optimizer moves, and what paged means in today's tools"""
    from ..planning.dry_run import outline

    page = Page("paged optimizers: states that may live in the other memory")
    rows = []
    for size in console.progress(["7B", "70B"], 2, "building empty models"):
        small = outline(llama2(size), 512)
        full = outline(llama2(size), 512, optim="adamw_torch")
        count = small.bytes_of(Part.OPTIMIZER)
        rows.append(
            [
                size,
                f"{small.lora_parameters / 1e6:.1f} M",
                f"{full.bytes_of(Part.OPTIMIZER) / 1e9:.2f}",
                f"{count / 1e9:.2f}",
                f"{2 * count / 25e9 * 1e3:.0f} ms",
            ]
        )
    page.table(
        "AdamW states of an r=16 adapter",
        ["model", "parameters", "fp32, GB", "8 bits, GB", "there and back at 25 GB/s"],
        rows,
    )
    page.text(
        """The article calls a page-out a few hundred milliseconds. An adapter's 8-bit states are so small that moving all of
        them costs a tenth of that; and what spikes in a training is activations, which a paged optimizer does not touch."""
    )
    page.text(
        """In bitsandbytes, paged means CUDA managed memory: tensors under 100,000 elements are never paged, a step synchronizes
        the device for each parameter, loading a state un-pages everything, and on a CPU nothing is paged. Here all of the
        state lies in one arena, of small tensors too, and goes through memory in windows: a mapped file beside a CPU, pinned
        host memory and two buffers beside a GPU. It stays out of memory over save, load and resume, and every number is
        the unpaged optimizer's."""
    )
    page.text(
        """--optim paged_adamw_8bit (the default) keeps states in memory while there is room, and moves them out where the plan
        does not fit otherwise or memory runs short; --paging always moves them from the start. What spikes, layer inputs and
        the layer at work, has its own ways out: --activation_offloading, --tokens_per_pass, --tokens_per_tile; and a base
        larger than memory stays in a file with --weight_streaming. `python bench/paging.py` has what each costs."""
    )
    return page


def _tokens(record: ExplainConfig) -> Page:
    """How a conversation becomes ids, and which of them are trained (--model, --text)"""
    from ..data.formats import Example
    from ..data.renderer import Renderer
    from ..files import hub

    renderer = Renderer(hub.load_tokenizer(hub.resolve(record.model)))
    turns = [
        {"role": "user", "content": record.text},
        {"role": "assistant", "content": "An answer."},
    ]
    (row,) = renderer.encode([Example("the example", turns)])
    page = Page("from a conversation to ids")
    page.text(f"The template of {record.model} writes: {renderer.render(turns)!r}")
    shown = [
        [
            str(i),
            str(index),
            repr(renderer.tokenizer.convert_ids_to_tokens(index)),
            "trained" if flag else "read",
        ]
        for i, (index, flag) in enumerate(zip(row.input_ids, row.loss_mask, strict=True))
    ]
    page.table(
        f"{len(row.input_ids)} tokens, {sum(row.loss_mask)} of them trained",
        ["", "id", "token", ""],
        shown,
    )
    page.text(
        """The loss counts trained tokens only, each once. The end token is trained, or the model would never stop; it is told
        by its place, not by its id, so a tokenizer whose padding is the end token loses nothing. Text of a row that looks
        like a control token stays text."""
    )
    return page


def _quiz(record: ExplainConfig) -> Page:
    """The article's four questions, answered with figures"""
    from ..codebooks import levels
    from ..quantization.tensor import stored_sizes

    table = levels("nf4")
    middle, tail = table[8] - table[7], table[1] - table[0]
    codes, scales = stored_sizes(70_000_000_000)
    page = Page("the article's quiz")
    for question, answer in (
        (
            "Why do NF4's levels lie at quantiles of a normal distribution instead of evenly?",
            "Trained weights look normal: most are near zero. The gap between levels is "
            f"{middle:.3f} there and {tail:.3f} at the edge, so precision goes where the weights "
            "are. See `explain nf4` for the error this saves.",
        ),
        (
            "What does double quantization compress, and what for?",
            "The scales, one per 64 weights. In fp32 they cost 0.5 bits a weight, in 8 bits with "
            f"a scale per 256 of them {8 * scales / 70e9:.3f}: "
            f"{70e9 * (0.5 / 8) / 1e9 - scales / 1e9:.1f} GB less for 70 billion weights.",
        ),
        (
            "In which precision are the matrix products of a QLoRA step computed?",
            "In 16 bits (bf16, or fp16 on older cards). The 4-bit weight is expanded block by "
            "block when it is needed and forgotten again; the adapter's master weights and the "
            "optimizer's arithmetic are fp32.",
        ),
        (
            "How much do the base weights of a 70B model take in NF4 with double quantization, "
            "against fp16?",
            f"{(codes + scales) / 1e9:.1f} GB against 140 GB if all 70e9 weights are counted, a "
            f"factor of {140e9 / (codes + scales):.2f}. Of Llama 2 70B, embeddings and head stay "
            "in 16 bits: see `explain memory`.",
        ),
    ):
        page.text(f"Q: {question}")
        page.text(f"A: {answer}")
    return page


_TOPICS: dict[str, Callable[[ExplainConfig], Page]] = {
    "int4": _int4,
    "nf4": _nf4,
    "double_quant": _double_quant,
    "paged": _paged,
    "memory": _memory,
    "tokens": _tokens,
    "quiz": _quiz,
}


# --- options --------------------------------------------------------------------------------------


def _option(name: str) -> Page:
    """One option: what it is, where it is taken, what other tools call it.

    Raises:
        UsageError: no topic and no option of that name.
    """
    declared = {verb: cls.model_fields for verb, cls in VERBS.items()}
    asked = RENAMED.get(
        name, NEGATED[name][0] if name in NEGATED else next(iter(SWITCHES.get(name, [name])))
    )
    where = [verb for verb, fields in declared.items() if asked in fields]
    if not where:
        known = {*_TOPICS, *(key for fields in declared.values() for key in fields)}
        close = nearest(name, known)
        raise UsageError(
            f"no topic and no option is called {name!r}",
            expected=", ".join(key.replace("_", "-") for key in _TOPICS) + ", or an option",
            ways_out=[f"did you mean {close!r}?"] if close else ["see `halfbyte explain`"],
        )
    info = declared[where[0]][asked]
    others = [theirs for theirs, ours in RENAMED.items() if ours == asked]
    others += [f"not {theirs}" for theirs, ours in NEGATED.items() if asked in ours]
    others += [theirs for theirs, ours in SWITCHES.items() if asked in ours]
    page = Page(asked)
    default = "required" if info.is_required() else str(info.default)
    page.table(
        asked,
        ["", ""],
        [
            ["what", info.description or ""],
            ["default", default],
            ["taken by", ", ".join(f"halfbyte {verb}" for verb in where)],
            ["in other tools", ", ".join(others) or "the same"],
            *([["effect", note]] if (note := _effect(asked)) else []),
        ],
    )
    return page


def _effect(name: str) -> str:
    """Figures for the options whose price people ask about, on Llama 2 7B."""
    from ..planning.dry_run import outline

    settings: dict[str, list[tuple[str, dict[str, Any]]]] = {
        "lora_r": [(f"r={r}", {"lora_r": r}) for r in (8, 16, 64)],
        "load_in_4bit": [("4 bits", {}), ("16 bits", {"load_in_4bit": False})],
        "bnb_4bit_use_double_quant": [("on", {}), ("off", {"bnb_4bit_use_double_quant": False})],
        "optim": [("adamw_8bit", {}), ("adamw_torch", {"optim": "adamw_torch"})],
        "paging": [("in memory", {}), ("always", {"paging": "always"})],
        "embedding_offloading": [("never", {}), ("always", {"embedding_offloading": "always"})],
        "dequantized_weights": [
            (stay, {"dequantized_weights": stay}) for stay in ("product", "ahead", "layer")
        ],
        "activation_offloading": [("never", {}), ("always", {"activation_offloading": "always"})],
        "gradient_checkpointing": [("on", {}), ("off", {"gradient_checkpointing": False})],
        "kept_activations": [
            (keep, {"kept_activations": keep}) for keep in ("none", "attention", "mlp_in", "all")
        ],
        "per_device_train_batch_size": [
            (f"{n} rows", {"per_device_train_batch_size": n}) for n in (1, 2, 4)
        ],
    }
    if name == "max_length":
        plans = [(f"{t} tokens", outline(llama2("7B"), t)) for t in (512, 2048, 8192)]
    elif name in settings:
        plans = [(label, outline(llama2("7B"), 512, **change)) for label, change in settings[name]]
    else:
        return ""
    shown = ", ".join(f"{label}: {plan.tensor_bytes / 1e9:.2f} GB" for label, plan in plans)
    return f"Llama 2 7B, one row at a time: {shown}"


command = Verb("explain", ExplainConfig, explain, positional=("topic",))
