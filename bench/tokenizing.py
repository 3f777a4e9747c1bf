"""Rows to ids and masks beside transformers' own, in one process, alternating.

    python bench/tokenizing.py MODEL --data A.jsonl [--rows 4000] [--rounds 5]

Of the same conversations: what a training does (rendered and followed, tokenized, ids and masks
stored) and `apply_chat_template(tokenize=True)` of transformers, one conversation at a time as data
sets are mapped, and all at once. It prints the conversations a second of each, medians, and the
ratios; the ids are held equal.
"""

import argparse
import itertools
import json
import statistics
import time
from pathlib import Path
from typing import Any

from halfbyte.data.formats import ExampleReader
from halfbyte.data.renderer import Renderer
from halfbyte.data.tokenizing import encode
from halfbyte.files.hub import load_tokenizer


def _ours(renderer: Renderer, examples: list[Any]) -> list[list[int]]:
    rows, bad = encode(examples, renderer)
    if bad:
        raise bad[0]
    return [rows[index].input_ids for index in range(len(rows))]


def _seconds(work: Any, *given: Any) -> tuple[float, Any]:
    began = time.perf_counter()
    found = work(*given)
    return time.perf_counter() - began, found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", type=Path, nargs="+", required=True)
    parser.add_argument("--rows", type=int, default=4000)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()

    tokenizer = load_tokenizer(given.model)
    found = [example for path in given.data for example in ExampleReader(str(path))]
    examples = list(itertools.islice(itertools.cycle(found), given.rows))
    chats: list[Any] = [example.messages for example in examples]
    renderer = Renderer(tokenizer)

    def singly() -> list[Any]:
        return [tokenizer.apply_chat_template(chat, tokenize=True)["input_ids"] for chat in chats]

    def at_once() -> list[Any]:
        return list(tokenizer.apply_chat_template(chats, tokenize=True)["input_ids"])

    expected: list[Any] = []
    seconds: dict[str, list[float]] = {"halfbyte": [], "singly": [], "at_once": []}
    for turn in range(given.rounds + 1):  # the first compiles templates
        for name, work in (
            ("halfbyte", lambda: _ours(renderer, examples)),
            ("singly", singly),
            ("at_once", at_once),
        ):
            took, ids = _seconds(work)
            if name == "halfbyte":
                expected = ids
            elif ids != expected:
                raise SystemExit(f"ids differ from {name}")
            if turn:
                seconds[name].append(took)
    rate = {name: len(chats) / statistics.median(took) for name, took in seconds.items()}
    tokens = sum(map(len, expected))
    print(
        json.dumps(
            {
                "rows": len(chats),
                "tokens": tokens,
                **{name: round(each) for name, each in rate.items()},
                "beside_singly": round(rate["halfbyte"] / rate["singly"], 3),
                "beside_at_once": round(rate["halfbyte"] / rate["at_once"], 3),
            }
        )
    )


if __name__ == "__main__":
    main()
