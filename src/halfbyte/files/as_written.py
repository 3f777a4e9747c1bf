"""Tokenizers that do what their tokenizer.json says.

transformers 5 builds the tokenizer that a class name in tokenizer_config.json stands for, with that
class's own way of cutting texts, and takes only vocabulary and merges from tokenizer.json. Where a
model was published with another way (a ``GPT2Tokenizer`` with Llama 3's expression, say), texts
become other ids than those it was trained on, without a word.
"""

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from ..errors import first_line

PROBES = (
    "<think>\nOkay, I'll don't DON'T we're",
    "1234567890 3.14159 1,000 x2y3 v1.2.3-rc4",
    "a  b   c\td\n\n\ne \n f\r\ng   ",
    " def foo_bar(x: int) -> dict:\n        return {'k': [x**2]}  # !!",
    "Café naïve Zürich ÅÄÖ e\u0301 n\u0303 ﬁ ½ Ⅷ",
    "Привет мир! Γειά σου שלום مرحبا नमस्ते 你好,世界 こんにちは 안녕하세요",
    "👩‍👩‍👧 🇩🇪 ✨  … — “quoted” ‘it’s’ http://a.b/c?d=e&f=%20",
    "ALLCAPS camelCase snake_case UPPERlower123 \u00a0\u200b\u3000end",
)
PARTS = ("normalizer", "pre_tokenizer", "model", "decoder")


def read_as_written(tokenizer: Any, directory: Path) -> bool:
    """Bring a fast tokenizer to what its directory's tokenizer.json says, if its class made another
    of it; returns whether it had."""
    path = directory / "tokenizer.json"
    if type(tokenizer).__name__ in ("TokenizersBackend", "PreTrainedTokenizerFast"):
        return False  # which are what the file says
    if not path.is_file() or tokenizer.init_kwargs.get("add_prefix_space"):
        return False  # or a setting stands above the file
    try:
        written = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing else
        raise ValueError(first_line(error)) from error
    backend = tokenizer.backend_tokenizer
    if all(_ids(backend, text) == _ids(written, text) for text in PROBES):
        return False
    for part in PARTS:
        setattr(backend, part, getattr(written, part))
    return True


def _ids(tokenizer: Tokenizer, text: str) -> tuple[list[int], str]:
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    return ids, tokenizer.decode(ids)
