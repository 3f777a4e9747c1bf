"""How the built-in base model was made: a small Llama, pretrained on two CPU cores in well under an
hour.

    python scripts/pretrain_base.py --corpus DIR [--output_dir src/halfbyte/builtin] [--steps 1800]

Text: public-domain English books (every .txt file of DIR; the shipped model used 34 books of the
Standard Ebooks collection, 23 MB); and dialogues written by the code below, of which the answers
are trained: repeating, counting, spelling, number words, lists, records as JSON, continuing a
sentence of a book. They teach the chat format and what any large model has seen plenty of (digits,
JSON, copying), not the form of answer that `halfbyte demo` teaches, which occurs nowhere in them.

The first quarter of the steps is dialogues alone, of the kinds that copy from the question: to
attend to what was said is learned all at once, after some 300 steps of nothing else; mixed thinly
among books it had not come after 2,000. Then five rows in eight are books.

Everything drawn is a function of --seed; the bytes of the result depend on the thread count and the
torch version too, which `pretraining.json` beside the weights names.
"""

import argparse
import json
import math
import random
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY, CONTEXT, LENGTH, BATCH = 3072, 512, 256, 16
PAD, END, SYSTEM, USER, ASSISTANT = "<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"
TEMPLATE = """\
{%- for message in messages -%}
{%- if message.role == 'assistant' -%}
{{ '<|assistant|>' }}{% generation %}{{ message.content + '<|end|>' }}{% endgeneration %}{{ '\\n' }}
{%- else -%}
{{ '<|' + message.role + '|>' + message.content + '<|end|>\\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|assistant|>' }}{%- endif -%}
"""
NUMBERS = "zero one two three four five six seven eight nine ten eleven twelve".split()
NAMES = (
    "Anna Ben Clara David Ella Frank Grace Henry Iris Jack Kate Leo Mary Nick Olive Paul Rose Sam "
    "Tom Vera"
).split()
TOWNS = "London Paris Rome York Bath Dover Leeds Oxford Madrid Vienna Bergen Cork".split()
COLOURS = "red blue green white black yellow brown grey pink purple".split()
NOUNS = (
    "apple pear plum cherry orange lemon grape tea coffee milk juice water soup bread bun cake pie "
    "roll cookie sandwich muffin scone toast salad egg cheese honey sugar salt butter cup plate "
    "spoon knife table chair lamp book pen letter key coin hat coat shoe glove ring rope box bag "
    "ball kite drum bell boat ship cart horse cow dog cat mouse bird duck hen fish tree leaf "
    "flower stone river road bridge house door window garden king queen boy girl friend brother"
).split()
SIZES = "small large big little tiny huge old new".split()


def plural(noun: str) -> str:
    if noun.endswith(("ch", "sh", "x", "s")):
        return noun + "es"
    if noun in ("mouse", "knife", "leaf", "fish", "bread", "toast", "sugar", "salt", "butter"):
        return {"mouse": "mice", "knife": "knives", "leaf": "leaves"}.get(noun, noun)
    return noun[:-1] + "ies" if noun.endswith("y") and noun[-2] not in "aeiou" else noun + "s"


def things(rng: random.Random, most: int) -> list[tuple[int, str]]:
    return [(rng.randint(1, 12), noun) for noun in rng.sample(NOUNS, rng.randint(1, most))]


def listed(parts: Sequence[str], rng: random.Random) -> str:
    if len(parts) == 1:
        return parts[0]
    return ", ".join(parts[:-1]) + rng.choice([" and ", ", and "]) + parts[-1]


def counted(number: int, noun: str, rng: random.Random) -> str:
    if number == 1:
        return f"{rng.choice(['one', 'an' if noun[0] in 'aeiou' else 'a'])} {noun}"
    return f"{NUMBERS[number]} {plural(noun)}"


COPYING = (1, 4, 7, 12, 13, 14, 16)
"""Kinds of dialogue whose answer is in the question."""


def dialogue(
    rng: random.Random, sentences: list[str], kinds: Sequence[int] = range(18)
) -> list[tuple[str, str]]:
    """One exchange, or a few, of (question, answer)."""
    kind = rng.choice(kinds)
    some, name, town = things(rng, 4), rng.choice(NAMES), rng.choice(TOWNS)
    said = listed([counted(n, noun, rng) for n, noun in some], rng)
    if kind == 0:
        text = rng.choice(sentences)
        return [(rng.choice(["Repeat: ", "Say this again: ", "Copy this sentence: "]) + text, text)]
    if kind == 1:
        chosen = [rng.randint(0, 12) for _ in range(rng.randint(1, 6))]
        words, digits = ", ".join(NUMBERS[n] for n in chosen), ", ".join(map(str, chosen))
        if rng.random() < 0.7:
            return [(rng.choice(["Write in digits: ", "As numbers, please: "]) + words, digits)]
        return [(f"Write in words: {digits}", words)]
    if kind == 2:
        number, noun = rng.choice(some)
        question = rng.choice(
            [
                f"{name} has {said}. How many {plural(noun)}?",
                f"How many {plural(noun)} are in: {said}?",
            ]
        )
        return [(question, str(number))]
    if kind == 3:
        record = {"name": name, "age": rng.randint(1, 99), "town": town}
        keys = rng.sample(list(record), rng.randint(1, 3))
        text = ", ".join(f"{key} {record[key]}" for key in keys)
        return [(f"Write as JSON: {text}", json.dumps({key: record[key] for key in keys}))]
    if kind == 4:
        colours = rng.sample(COLOURS, rng.randint(1, 4))
        return [(f"Write as a JSON list: {listed(colours, rng)}", json.dumps(colours))]
    if kind == 5:
        word = rng.choice(NOUNS)
        return [(f"Spell {word}.", "-".join(word))]
    if kind == 6:
        noun = rng.choice(NOUNS)
        if rng.random() < 0.5:
            return [(f"What is the plural of {noun}?", plural(noun))]
        return [
            (f"What is one of the {plural(noun)}?", f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}")
        ]
    if kind == 7:
        words = rng.sample(NOUNS + COLOURS, rng.randint(2, 6))
        if rng.random() < 0.5:
            return [(f"Reverse: {' '.join(words)}", " ".join(reversed(words)))]
        place = rng.randrange(len(words) - 1)
        return [(f"Which word follows {words[place]} in: {' '.join(words)}?", words[place + 1])]
    if kind == 8:
        size, colour, noun = rng.choice(SIZES), rng.choice(COLOURS), rng.choice(NOUNS)
        asked = rng.choice(
            [("What colour is it?", colour), ("How big or old is it?", size), ("What is it?", noun)]
        )
        return [(f"{name} saw a {size} {colour} {noun}. {asked[0]}", asked[1])]
    if kind == 9:
        start = rng.randrange(len(sentences) - 1)
        return [(f"Continue: {sentences[start]}", sentences[start + 1])]
    if kind == 10:
        record = {rng.choice(["name", "owner", "who"]): name, "has": [noun for _, noun in some]}
        return [(f"{name} has {said}. Write that as JSON.", json.dumps(record))]
    if kind == 11:
        return [
            (f"My name is {name} and I live in {town}.", f"Hello, {name}!"),
            rng.choice([("Where do I live?", f"In {town}."), ("What is my name?", f"{name}.")]),
        ]
    if kind == 12:
        numbered = ", ".join(f"{n} {noun if n == 1 else plural(noun)}" for n, noun in some)
        return [(rng.choice(["Write the numbers as digits: ", "Count: "]) + said, numbered)]
    if kind == 13:
        return [
            (
                rng.choice(["How many of each? ", "Count as JSON: "]) + said,
                json.dumps({noun: n for n, noun in some}),
            )
        ]
    if kind == 14:
        singular = listed([noun for _, noun in some], rng)
        return [(f"Name each thing once: {said}", singular)]
    if kind == 15:
        described = [f"{rng.choice(SIZES)} {rng.choice(COLOURS)} {noun}" for _, noun in some]
        place = rng.randrange(len(described))
        size, colour, noun = described[place].split()
        return [
            (
                f"{name} saw a {listed(described, rng)}. Write the {noun} as JSON.",
                json.dumps({"what": noun, "size": size, "colour": colour}),
            )
        ]
    if kind == 16:
        words = rng.sample(NOUNS + COLOURS + SIZES, rng.randint(3, 12))
        return [(f"Repeat: {' '.join(words)}", " ".join(words))]
    hello = [
        ("Hello!", "Hello! I am a very small model. I know old stories, and little else."),
        ("Who are you?", "I am a very small language model, made in an hour from old books."),
        ("Thank you.", "You are welcome."),
        ("Tell me a story.", rng.choice(sentences) + " " + rng.choice(sentences)),
    ]
    return [rng.choice(hello)]


def as_chat(turns: list[tuple[str, str]]) -> str:
    return "".join(
        f"{USER}{question}{END}\n{ASSISTANT}{answer}{END}\n" for question, answer in turns
    )


def read_books(corpus: Path) -> list[str]:
    files = sorted(corpus.glob("*.txt"))
    if not files:
        raise SystemExit(f"{corpus} holds no .txt files")
    return [
        re.sub(r"\n{3,}", "\n\n", f.read_text(encoding="utf-8")).translate(
            str.maketrans("“”‘’", "\"\"''")
        )
        for f in files
    ]


def make_tokenizer(texts: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    # a word has the same token after a space, a quote or a line end, so that copying it is one step
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"[A-Za-z]+|[0-9]|\s|[^A-Za-z0-9\s]+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, END, SYSTEM, USER, ASSISTANT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def token_stream(tokenizer: Tokenizer, texts: list[str]) -> torch.Tensor:
    pieces = [piece for text in texts for piece in text.split("\n\n")]
    ids = [i for row in tokenizer.encode_batch([p + "\n\n" for p in pieces]) for i in row.ids]
    return torch.tensor(ids, dtype=torch.int32)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--output_dir", type=Path, default=Path("src/halfbyte/builtin"))
    parser.add_argument("--steps", type=int, default=1800)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    books = read_books(args.corpus)
    sentences = [
        s.strip()
        for text in books
        for s in re.split(r"(?<=[.!?])\s+", text.replace("\n", " "))
        if 20 < len(s.strip()) < 120 and '"' not in s
    ]
    copying = [as_chat(dialogue(rng, sentences, COPYING)) for _ in range(40_000)]
    dialogues = [as_chat(dialogue(rng, sentences)) for _ in range(80_000)]
    tokenizer = make_tokenizer(
        [*books, "\n".join(dialogues[:20_000]).replace(USER, "").replace(ASSISTANT, "")]
    )
    stream = token_stream(tokenizer, books)
    held_out, stream = stream[-40 * LENGTH :], stream[: -40 * LENGTH]
    labelled = torch.stack((stream, stream))
    first, second = chat_stream(tokenizer, copying), chat_stream(tokenizer, dialogues)
    print(
        f"{len(stream):,} tokens of books, {first.shape[1] + second.shape[1]:,} of dialogues",
        flush=True,
    )
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    matrices = [p for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name]
    rest = [p for name, p in model.named_parameters() if p.dim() != 2 or "embed" in name]
    optimizers = [
        torch.optim.Muon(
            matrices, lr=0.0, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(rest, lr=0.0, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]
    generator = torch.Generator().manual_seed(args.seed)
    began = time.monotonic()
    for step in range(args.steps):
        done = step / args.steps
        pairs = [draw(row, done, labelled, first, second, generator) for row in range(BATCH)]
        batch, labels = (torch.stack(side) for side in zip(*pairs, strict=True))
        rate = 3e-3 * min(1.0, (step + 1) / 60) * min(1.0, (1.02 - done) / 0.7)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
        loss = loss_of(model, batch, labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if (step + 1) % 50 == 0:
            speed = (step + 1) * BATCH * LENGTH / (time.monotonic() - began)
            print(
                f"step {step + 1}/{args.steps}  loss {loss.item():.3f}  {speed:.0f} tokens/s",
                flush=True,
            )
        if (step + 1) % 450 == 0 or step + 1 == args.steps:
            save(model, tokenizer, args, step + 1, held_out, began)


def chat_stream(tokenizer: Tokenizer, dialogues: list[str]) -> torch.Tensor:
    """Ids and labels [2, tokens] of dialogues end to end; labels are -100 outside answers."""
    user, assistant = tokenizer.token_to_id(USER), tokenizer.token_to_id(ASSISTANT)
    ids, labels = [], []
    for row in tokenizer.encode_batch(dialogues):
        answering = False
        for index in row.ids:
            answering = answering and index != user
            ids.append(index)
            labels.append(index if answering else -100)
            answering = answering or index == assistant
    return torch.tensor([ids, labels], dtype=torch.int32)


def draw(
    row: int,
    done: float,
    books: torch.Tensor,
    first: torch.Tensor,
    second: torch.Tensor,
    generator: torch.Generator,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and labels [LENGTH + 1] of one row: of the books or of the dialogues."""
    source = first if done < 0.25 else second if row % 8 >= 5 else books
    at = int(torch.randint(source.shape[1] - LENGTH - 1, (), generator=generator))
    ids, labels = source[:, at : at + LENGTH + 1].long()
    return ids, labels


def loss_of(model: LlamaForCausalLM, batch: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model.model(input_ids=batch[:, :-1], use_cache=False).last_hidden_state
        logits = torch.nn.functional.linear(hidden, model.lm_head.weight)
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels[:, 1:].flatten())


def save(model, tokenizer, args, step: int, held_out: torch.Tensor, began: float) -> None:
    rows = held_out.long()[: 39 * LENGTH + 1]
    batch = torch.stack([rows[i * LENGTH : (i + 1) * LENGTH + 1] for i in range(39)])
    model.eval()
    with torch.no_grad():
        loss = sum(float(loss_of(model, part, part)) * len(part) for part in batch.split(13)) / len(
            batch
        )
    model.train()
    target: Path = args.output_dir
    target.mkdir(parents=True, exist_ok=True)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=PAD, model_max_length=CONTEXT
    )
    wrapped.chat_template = TEMPLATE
    wrapped.save_pretrained(target)
    weights = {n: p.detach().to(torch.bfloat16) for n, p in model.state_dict().items()}
    copy: Any = LlamaForCausalLM(model.config)
    copy = copy.to(torch.bfloat16)
    copy.load_state_dict(weights)
    copy.generation_config.eos_token_id, copy.generation_config.pad_token_id = 1, 0
    copy.save_pretrained(target)
    parameters = sum(p.numel() for p in model.parameters())
    facts = {
        "parameters": parameters,
        "steps": step,
        "tokens": step * BATCH * LENGTH,
        "minutes": round((time.monotonic() - began) / 60, 1),
        "threads": args.threads,
        "seed": args.seed,
        "held_out_nats_per_token": round(loss, 4),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    (target / "pretraining.json").write_text(json.dumps(facts, indent=1) + "\n")
    print(
        f"saved at step {step}: {parameters:,} parameters, {loss:.3f} nats per held-out token",
        flush=True,
    )
    assert math.isfinite(loss)


if __name__ == "__main__":
    main()
