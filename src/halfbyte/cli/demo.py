"""``halfbyte demo``: the whole path on a tiny model made on the spot."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

from ..config import Options, TrainConfig, option
from ..errors import UsageError
from . import console
from .options import Verb


class DemoConfig(Options):
    """Everything ``halfbyte demo`` reads."""

    output_dir: str = option("demo", "where everything goes; a directory of an earlier demo is replaced")
    seed: int = option(42, "everything random is a function of it", ge=0, lt=2**63)


_NUMBERS = ("one", "two", "three", "four", "five", "six")
_THINGS = ("tea", "coffee", "bun", "cake", "soup", "juice")
_PROMPT = "two cake and one soup"


def demo(record: DemoConfig) -> dict[str, Any]:
    """Make a tiny untrained model, fine-tune it in 4 bits on spoken orders, chat with it, and merge it."""
    from ..chat import Renderer
    from ..generate import answer
    from ..load import load
    from ..merge import merge
    from ..train import Reporter, train

    home = Path(record.output_dir)
    _clear(home)
    base, data, run_dir, merged = home / "model", home / "orders.jsonl", home / "run", home / "merged"
    data.parent.mkdir(parents=True, exist_ok=True)
    rows = [_row(random.Random(f"{record.seed} {i}")) for i in range(480)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    _make_model(base, [f"{row['prompt']} {row['completion']}" for row in rows], record.seed)
    console.say("a tiny Llama with random weights was made on the spot; it knows nothing yet")
    config = TrainConfig(
        model=str(base),
        data=str(data),
        output_dir=str(run_dir),
        dtype="float32",
        max_length=64,
        per_device_train_batch_size=16,
        gradient_accumulation_steps=1,
        num_train_epochs=4,
        learning_rate=1e-2,
        lora_r=32,
        lora_dropout=0.0,
        seed=record.seed,
    )
    with console.steps() as shown:
        run = train(config, Reporter(console.say, console.progress, shown.update))
    losses = [row["loss"] for row in run.metrics()]
    console.say(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    model, tokenizer = load(run.path)
    text, stopped = answer(model, Renderer(tokenizer), [{"role": "user", "content": _PROMPT}], max_new_tokens=48)
    console.say(f"asked {_PROMPT!r}, it now answers {text!r}" + (" and stops" if stopped else ""))
    receipt = merge(run.path, merged, say=console.say)
    console.say(f"merged and verified: {receipt.greedy_agreement:.2%} of the predicted tokens are the same")
    console.say(f"everything lies in {home}: the run in run/, the merged model in merged/")
    console.say(f'next: halfbyte chat {run_dir} --prompt "three bun and two tea"')
    return {
        "run_dir": str(run.path),
        "merged_dir": str(merged),
        "loss_before": losses[0],
        "loss_after": losses[-1],
        "answer": text,
        "greedy_agreement": receipt.greedy_agreement,
    }


def _clear(home: Path) -> None:
    """Remove an earlier demo; anything else stays and is an error."""
    if not home.exists():
        return
    if any(home.iterdir()) and not (home / "orders.jsonl").is_file():
        raise UsageError(f"{home} holds something else than a demo", ways_out=["name another --output_dir"])
    shutil.rmtree(home)


def _row(rng: random.Random) -> dict[str, str]:
    items = [(rng.choice(_NUMBERS), thing) for thing in rng.sample(_THINGS, rng.randint(1, 2))]
    spoken = " and ".join(f"{number} {thing}" for number, thing in items)
    wanted = ", ".join(f'"{thing}": {_NUMBERS.index(number) + 1}' for number, thing in items)
    messages = [{"role": "user", "content": spoken}, {"role": "assistant", "content": "{" + wanted + "}"}]
    return {"messages": messages, "prompt": spoken, "completion": wanted}  # pyright: ignore[reportReturnType]


def _make_model(path: Path, texts: list[str], seed: int) -> None:
    """A random Llama of half a million parameters and a byte-level BPE tokenizer trained on the texts."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from transformers.utils import logging

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<pad>", "<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(path)
    logging.disable_progress_bar()
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.08,
    )
    LlamaForCausalLM(config).save_pretrained(path)


command = Verb("demo", DemoConfig, demo)
