"""Everything before the first step, in the order in which it can fail."""

from pathlib import Path
from typing import Any


def _loaded_line(model: Any, coverage: float, load_in_4bit: bool) -> str:
    count = sum(p.numel() for p in model.parameters())
    held = f"{coverage:.1%} of the weights in layers held in 4 bits" if load_in_4bit else "held unquantized"
    return f"{type(model).__name__}: {count:,} parameters, {held}, computing in {str(model.config.dtype)[6:]}"


def _absolute(source: str) -> str:
    """A file's absolute path, so that later verbs find it from anywhere; a Hub id as it is."""
    path = Path(source).expanduser()
    return str(path.resolve()) if path.exists() else source
