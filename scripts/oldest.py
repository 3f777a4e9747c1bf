"""Every lower bound that ``pyproject.toml`` declares, as pins for pip; with PyTorch as
``constraints.txt`` has it where its own minimum has no build for CPUs here.

python scripts/oldest.py [--dev] > oldest.txt
"""

import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
PINNED = ("torch",)
"""Not to be had at its minimum without a GPU's libraries; tried on a card's image."""


def main() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"]]
    if "--dev" in sys.argv:
        wanted += project["optional-dependencies"]["dev"]
    pins = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if match := re.fullmatch(r"([\w.-]+)==(\S+)", line.strip()):
            pins[match[1].lower()] = match[2]
    for line in wanted:
        match = re.match(r"([\w.-]+)>=([\w.]+)(.*)", line)
        if match is None:
            raise SystemExit(f"{line}: no lower bound")
        name, least, more = match.groups()
        version = pins[name.lower()] if name in PINNED else least
        print(f"{name}=={version}{more}")


if __name__ == "__main__":
    main()
