"""What is planned: for the usual models on a GPU, and for other people's published runs beside
their figures.

    python bench/plans.py [--json]

Shapes are the models' published ones; nothing is downloaded. The first table is GiB at the peak of
a training on a GPU with its context, one row at a time, r=16 on all linear layers. In the second,
GB, ``theirs`` are the options of the published run as far as a plan has them (rank, target layers,
tokens, checkpointing, optimizer), ``ours`` the same tokens with the defaults of ``halfbyte train``.
"""

import argparse
import json
from typing import Any


def shape(
    kind: str,
    width: int,
    inner: int,
    layers: int,
    heads: int,
    kv: int,
    vocabulary: int,
    tied: bool = False,
) -> Any:
    """A transformers configuration. kind: Llama, Qwen2 or Qwen3."""
    import transformers

    return getattr(transformers, f"{kind}Config")(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
        head_dim=width // heads,
    )


MODELS: dict[str, tuple[Any, ...]] = {
    "Llama 3.2 1B": ("Llama", 2048, 8192, 16, 32, 8, 128256, True),
    "Llama 3.2 3B": ("Llama", 3072, 8192, 28, 24, 8, 128256, True),
    "Llama 2 7B": ("Llama", 4096, 11008, 32, 32, 32, 32000),
    "Qwen2.5 7B": ("Qwen2", 3584, 18944, 28, 28, 4, 152064),
    "Llama 3 8B": ("Llama", 4096, 14336, 32, 32, 8, 128256),
    "Qwen3 8B": ("Qwen3", 4096, 12288, 36, 32, 8, 151936),
    "Llama 2 13B": ("Llama", 5120, 13824, 40, 40, 40, 32000),
    "LLaMA 33B": ("Llama", 6656, 17920, 60, 52, 52, 32000),
    "LLaMA 65B": ("Llama", 8192, 22016, 80, 64, 64, 32000),
    "Llama 2 70B": ("Llama", 8192, 28672, 80, 64, 8, 32000),
    "Llama 3 70B": ("Llama", 8192, 28672, 80, 64, 8, 128256),
}
LITGPT: dict[str, Any] = {
    "lora_r": 8,
    "target_modules": "q_proj,v_proj",
    "gradient_checkpointing": False,
    "optim": "adamw_torch",
}
PAPER: dict[str, Any] = {"lora_r": 64, "optim": "adamw_torch"}
TORCHTUNE: dict[str, Any] = {"lora_r": 8, "optim": "adamw_torch", "per_device_train_batch_size": 2}
ROWS: list[tuple[str, str, float, int, dict[str, Any]]] = [
    ("litgpt, nf4-dq", "Llama 2 7B", 13.84, 1304, LITGPT),
    ("litgpt, nf4-dq", "Llama 2 13B", 22.55, 1304, LITGPT),
    ("QLoRA paper", "Llama 2 7B", 6.9, 512, PAPER),
    ("QLoRA paper", "Llama 2 13B", 11.3, 512, PAPER),
    ("QLoRA paper", "LLaMA 33B", 24.7, 512, PAPER),
    ("QLoRA paper", "LLaMA 65B", 45.0, 512, PAPER),
    ("torchtune QLoRA", "Llama 3 8B", 7.4 * 1.0737, 2048, TORCHTUNE),
    ("torchtune QLoRA", "Llama 3.2 3B", 4.6 * 1.0737, 2048, TORCHTUNE),
    ("Unsloth, minimum", "Llama 3 8B", 6.0, 512, {}),
    ("Unsloth, minimum", "Llama 3 70B", 41.0, 512, {}),
]
"""Who, model, GB, tokens of a row, options that differ from our defaults."""


def planned(model: str, tokens: int, options: dict[str, Any]) -> int:
    """Bytes at the peak of a training on a GPU."""
    from halfbyte.config.options import PlanConfig
    from halfbyte.planning.budget import CONTEXT_BYTES
    from halfbyte.planning.dry_run import plan_memory
    from halfbyte.planning.workload import work_of

    config = PlanConfig(model=model, max_length=tokens, dtype="bfloat16", **options)
    work = work_of(config, None)
    return plan_memory(
        shape(*MODELS[model]), config, work, device="cuda", runtime_bytes=CONTEXT_BYTES
    ).peak_bytes


def usual_models() -> list[dict[str, Any]]:
    from halfbyte.planning.budget import CARDS, RESERVE

    cards = sorted({size << 20: name for name, size in reversed(CARDS.items())}.items())
    found = []
    for model in MODELS:
        row: dict[str, Any] = {"model": model}
        for key, tokens, options in (
            ("512", 512, {}),
            ("2048", 2048, {}),
            ("512 in 16 bits", 512, {"load_in_4bit": False}),
        ):
            row[key] = planned(model, tokens, options)
        row["smallest card"] = next(
            (name for size, name in cards if row["512"] <= size * (1 - RESERVE)), "none"
        )
        found.append(row)
    return found


def published() -> list[dict[str, Any]]:
    found = []
    for who, model, figure, tokens, options in ROWS:
        rows = {
            name: value for name, value in options.items() if name == "per_device_train_batch_size"
        }
        found.append(
            {
                "who": who,
                "model": model,
                "tokens": tokens * rows.get("per_device_train_batch_size", 1),
                "published_gb": round(figure, 2),
                "theirs_gb": round(planned(model, tokens, options) / 1e9, 2),
                "ours_gb": round(planned(model, tokens, rows) / 1e9, 2),
            }
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    arguments = parser.parse_args()
    models, others = usual_models(), published()
    if arguments.json:
        print(json.dumps({"models": models, "published": others}, indent=1))
        return
    print(
        "| GiB | 512 tokens | 2,048 tokens | 16-bit LoRA, 512 | smallest card for 512 "
        "|\n|---|---|---|---|---|"
    )
    for row in models:
        sizes = " | ".join(f"{row[key] / 2**30:.1f}" for key in ("512", "2048", "512 in 16 bits"))
        print(f"| {row['model']} | {sizes} | {row['smallest card']} |")
    print(
        "\n| GB | model | tokens | published | planned for theirs | planned for ours "
        "|\n|---|---|---|---|---|---|"
    )
    for row in others:
        sizes = " | ".join(f"{row[key]:.1f}" for key in ("published_gb", "theirs_gb", "ours_gb"))
        print(f"| {row['who']} | {row['model']} | {row['tokens']:,} | {sizes} |")


if __name__ == "__main__":
    main()
