"""The package's tree with a line per file, from the files' own first lines: docs/architecture.md.

python scripts/draw_tree.py           # rewrites the tree in docs/architecture.md
python scripts/draw_tree.py --check   # exit 1 where it is not the tree that is here
"""

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "architecture.md"
BEGIN, END = "<!-- tree: scripts/draw_tree.py -->\n", "<!-- end of tree -->\n"
WINGS = (
    ("config", "every option, said once"),
    ("ops", "one contract per operation; plain PyTorch, C++ and Triton behind it"),
    ("files", "model directories and safetensors, read with care and written whole"),
    ("memory", "where tensors lie, and what is kept or computed twice"),
    ("data", "rows to token ids, loss masks and micro-batches"),
    ("model", "transformers' models, empty, recognized, and computed in fewer passes"),
    ("quantization", "weights of 4 bits: the tensor, its files, loading and writing"),
    ("adapters", "LoRA, DoRA and whole modules, and PEFT's files of them"),
    ("engine", "what a training step computes, and ways of needing less memory"),
    ("run", "the run directory: checkpoints, what a resume must share, cards"),
    ("planning", "does it fit: a step on shapes, counted; and what was measured"),
    ("exporters", "a run for other tools, verified"),
    ("training", "the loop, its set-up, and what happens when something goes wrong"),
    ("integrations", "into other people's scripts"),
    ("cli", "one file a verb"),
)
"""Lower wings first: imports never climb this list (`tests/test_house.py`)."""


def first_line(path: Path) -> str:
    """The first sentence of a module's docstring, on one line."""
    text = ast.get_docstring(ast.parse(path.read_text())) or ""
    return " ".join(text.partition("\n\n")[0].split())


def tree() -> str:
    """The tree, as a table a wing."""
    package = ROOT / "src" / "halfbyte"
    lines = ["## Ground", "", *_rows(sorted(package.glob("*.py")))]
    for wing, what in WINGS:
        lines += ["", f"## {wing}/", "", f"{what[0].upper()}{what[1:]}.", ""]
        lines += _rows(sorted((package / wing).glob("*.py")))
    return "\n".join(lines) + "\n"


def _rows(paths: list[Path]) -> list[str]:
    named = [(path.name, first_line(path)) for path in paths]
    return [f"- `{name}`: {line}" for name, line in named if line]


def main() -> int:
    page = PAGE.read_text()
    before, rest = page.split(BEGIN)
    wanted = f"{before}{BEGIN}{tree()}{END}{rest.split(END)[1]}"
    if "--check" not in sys.argv:
        PAGE.write_text(wanted)
        return 0
    if page == wanted:
        return 0
    print(f"{PAGE} is not the tree that is here: python scripts/draw_tree.py")
    return 1


if __name__ == "__main__":
    sys.exit(main())
