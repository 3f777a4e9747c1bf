"""Answers and scores beside transformers' on the merged model: the table in `docs/conformance.md`.

In fp32, so that equal means equal: the same ids for the likeliest tokens and, with the same seed,
for three ways of drawing them; the same ends; the same loss and the same share of exact answers.
"""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import halfbyte
from halfbyte.config.options import DataOptions
from halfbyte.data.dataset import read_data
from halfbyte.data.renderer import Renderer
from halfbyte.engine.evaluate import score
from halfbyte.engine.generate import Sampling, answer, ends_of
from halfbyte.files import hub
from halfbyte.run.load import load

PAGE = Path(__file__).parents[2] / "docs" / "conformance.md"
WAYS = {
    "likeliest": Sampling(),
    "temperature 0.7": Sampling(0.7),
    "top_k 5": Sampling(1.3, top_k=5),
    "top_p 0.6, min_p 0.05": Sampling(1.0, top_p=0.6, min_p=0.05),
}
PAIRS = [
    ("What is the capital of France?", "Paris, on the Seine."),
    ("Two and two?", "4"),
    ("Say nothing much.", "Nothing much!"),
    ("Name three colours.", "red, green and blue"),
    ("Who wrote Emma?", "Jane Austen wrote it in 1815."),
    ("A list, please.", "- one\n- two"),
]
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
FAMILIES = ("llama", "qwen3", "mistral", "gemma2", "phi3", "olmo2")


def base_of(name: str, home: Path, smollm2: Any) -> str:
    """A base by the name it has in the table; families are random and small."""
    if name == "demo":
        return name
    if name == "SmolLM2":
        return str(smollm2())
    place = home / "base"
    builtin = hub.resolve("demo")
    tokenizer = hub.load_tokenizer(builtin)
    config = AutoConfig.for_model(name, vocab_size=len(tokenizer), **SMALL)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(place)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(builtin / file, place / file)
    return str(place)


def theirs(model: Any, tokenizer: Any, ids: list[int], ends: list[int], way: Sampling) -> list[int]:
    """The ids that transformers answers, with the end."""
    drawn = {"temperature": way.temperature, "top_p": way.top_p, "top_k": way.top_k}
    asked = {"do_sample": True, "min_p": way.min_p or None, **drawn} if way.temperature else {}
    torch.manual_seed(42)
    prompt = torch.tensor([ids])
    row = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=24,
        eos_token_id=ends,
        pad_token_id=ends[0],
        **(asked or {"do_sample": False}),
    )
    return row[0, len(ids) :].tolist()


def same_answers(mine: Any, its: Any, renderer: Renderer, way: Sampling) -> str:
    """How many of the questions are answered with the same text and the same end."""
    same = 0
    ends = ends_of(mine, renderer)
    for question, _ in PAIRS:
        turns = [{"role": "user", "content": question}]
        ids = theirs(its, renderer.tokenizer, renderer.prompt_ids(turns), ends, way)
        stopped = bool(ids) and ids[-1] in ends
        text = renderer.tokenizer.decode(ids[:-1] if stopped else ids, skip_special_tokens=True)
        said = answer(mine, renderer, turns, max_new_tokens=24, sampling=way)
        same += said.text == text and said.stopped == stopped
    return f"{same} of {len(PAIRS)}"


def same_scores(mine: Any, its: Any, data: Any) -> tuple[str, str]:
    """(the difference in loss, that of the share of exact answers)."""
    found = score(mine, data, data.train.rows, packed=False, generate=True)
    total = tokens = exact = 0.0
    for row in data.train.rows:
        labels = [i if flag else -100 for i, flag in zip(row.input_ids, row.loss_mask, strict=True)]
        count = sum(label != -100 for label in labels[1:])
        with torch.no_grad():
            loss = its(torch.tensor([row.input_ids]), labels=torch.tensor([labels])).loss
        total, tokens = total + float(loss) * count, tokens + count
        asked, wanted = data.question(row)
        ends = ends_of(mine, data.renderer)
        ids = theirs(its, data.renderer.tokenizer, asked, ends, Sampling())
        text = data.renderer.tokenizer.decode(ids, skip_special_tokens=True)
        exact += ids[-1] in ends and text.strip() == wanted.strip()
    difference = abs(found.loss - total / tokens)
    assert difference < 1e-5 * max(1.0, found.loss), (found.loss, total / tokens)
    share = exact / len(data.train.rows)
    assert math.isclose(found.exact_match or 0.0, share)
    return "< 1e-5", "equal"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["demo", "SmolLM2", *FAMILIES])
def test_merged_models_answer_as_transformers_does(
    name: str, tmp_path: Path, request: pytest.FixtureRequest
):
    base = base_of(name, tmp_path, lambda: request.getfixturevalue("smollm2"))
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"instruction": q, "output": a}) + "\n" for q, a in PAIRS))
    trained = halfbyte.train(
        model=base,
        data=str(rows),
        output_dir=str(tmp_path / "run"),
        dtype="float32",
        learning_rate=5e-4 if name == "SmolLM2" else 5e-3,
        max_steps=12 if name == "SmolLM2" else 40,
        per_device_train_batch_size=6,
        gradient_accumulation_steps=1,
        lora_dropout=0.0,
        num_samples=0,
        eval_split=0,
        rehearse=False,
    )
    merged = tmp_path / "merged"
    halfbyte.merge(trained.path, merged)
    mine, tokenizer = load(merged, load_in_4bit=False, dtype="float32", device="cpu")
    its = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    assert AutoTokenizer.from_pretrained(merged).get_vocab() == tokenizer.get_vocab()
    renderer = Renderer(tokenizer)
    cells = [same_answers(mine, its, renderer, way) for way in WAYS.values()]
    assert all(cell.startswith(f"{len(PAIRS)} of {len(PAIRS)}") for cell in cells), cells
    data = read_data(str(rows), DataOptions(eval_split=0), merged)
    line = f"| {name} | {' | '.join([*cells, *same_scores(mine, its, data)])} |"
    assert line in PAGE.read_text(), f"{PAGE} lacks:\n{line}"
