"""The demo's task: an order as it is spoken becomes JSON. Rows are written here, each a function of
(seed, its number).

    two large teas and a bun, no sugar {"items": [{"item": "tea", "count": 2, "size": "large"},
    {"item": "bun", "count": 1}], "without": ["sugar"]}

Held-out rows share no sentence with training rows, nor, spoken in other words, an order.
"""

import json
import random
from typing import Any

_COUNTS = ("one", "two", "three", "four", "five", "six")
_ITEMS = {
    "tea": "teas",
    "coffee": "coffees",
    "juice": "juices",
    "soup": "soups",
    "bun": "buns",
    "cake": "cakes",
    "scone": "scones",
    "muffin": "muffins",
    "roll": "rolls",
    "pie": "pies",
    "sandwich": "sandwiches",
    "salad": "salads",
    "cookie": "cookies",
    "egg": "eggs",
}
_SIZES = ("small", "large")
_EXTRAS = ("sugar", "milk", "butter", "honey", "salt", "cheese")
_OPENERS = (
    "",
    "",
    "",
    "I'd like ",
    "can I have ",
    "we'll take ",
    "could we get ",
    "please bring us ",
    "hello, ",
    "for me ",
)
_CLOSERS = ("", "", "", ", please", " please", ", thanks", ", thank you")


def rows(seed: int, train: int, held_out: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(training rows, held-out rows) as conversations, all different orders."""
    rng = random.Random(f"halfbyte orders {seed}")
    made: list[dict[str, Any]] = []
    seen: set[str] = set()
    while len(made) < train + held_out:
        spoken, wanted = _order(rng)
        if wanted not in seen:
            seen.add(wanted)
            turns = [{"role": "user", "content": spoken}, {"role": "assistant", "content": wanted}]
            made.append({"messages": turns})
    return made[held_out:], made[:held_out]


def _order(rng: random.Random) -> tuple[str, str]:
    items, said = [], []
    for name in rng.sample(list(_ITEMS), rng.choice((1, 1, 2, 2, 2, 3))):
        count, size = rng.randint(1, len(_COUNTS)), rng.choice((None, None, *_SIZES))
        items.append({"item": name, "count": count, **({"size": size} if size else {})})
        noun = name if count == 1 else _ITEMS[name]
        described = f"{size} {noun}" if size else noun
        article = "an" if described[0] in "aeiou" else "a"
        number = rng.choice((article, "one")) if count == 1 else _COUNTS[count - 1]
        said.append(f"{number} {described}")
    spoken = said[0] if len(said) == 1 else ", ".join(said[:-1]) + " and " + said[-1]
    order: dict[str, Any] = {"items": items}
    if rng.random() < 0.4:
        left_out = rng.sample(_EXTRAS, rng.choice((1, 1, 2)))
        order["without"] = left_out
        spoken += rng.choice((", no ", ", without ", " with no ")) + " and ".join(left_out)
    return rng.choice(_OPENERS) + spoken + rng.choice(_CLOSERS), json.dumps(order)
