"""Known silent faults, put back one at a time.

    python -m tests.tools.put_back [NAME ...]

Each file of `tests/fuzz/faults` describes a fault this package once had: what its user got, the
edits that bring it back, and the tests that notice. A fault is put back in a copy of the sources,
where its tests must fail.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parents[2]
FAULTS = ROOT / "tests" / "fuzz" / "faults"

WITHOUT_EDITABLE = """import sys
sys.meta_path[:] = [f for f in sys.meta_path if not type(f).__name__.startswith("ScikitBuild")]
"""
"""An editable installation finds the package before the path does."""


@dataclass(frozen=True)
class Edit:
    """In ``file``, ``old`` (which stands there once) becomes ``new``."""

    file: str
    old: str
    new: str


@dataclass(frozen=True)
class Fault:
    """name: the file's. what: what its user got. tests: pytest ids, each of which must fail."""

    name: str
    what: str
    tests: list[str]
    edits: list[Edit]


def read_faults() -> list[Fault]:
    """All that `tests/fuzz/faults` describes, by name."""
    found = []
    for path in sorted(FAULTS.glob("*.toml")):
        text = tomllib.loads(path.read_text())
        edits = [Edit(**edit) for edit in text["edit"]]
        found.append(Fault(path.stem, text["what"], text["tests"], edits))
    return found


def put_back(fault: Fault, home: Path) -> None:
    """Copy the sources and tests below ``home``, with the fault in them."""
    for folder in ("src", "tests"):
        shutil.copytree(ROOT / folder, home / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "docs", "examples"):
        (home / name).symlink_to(ROOT / name)
    if (inputs := ROOT.parent / "shared").exists():  # where tests look for them
        (home.parent / "shared").symlink_to(inputs.resolve())
    (home / "src" / "sitecustomize.py").write_text(WITHOUT_EDITABLE)
    spec = find_spec("halfbyte")
    for place in spec.submodule_search_locations or [] if spec else []:
        for library in Path(place).glob("ops/halfbyte_cpu.*"):
            shutil.copy(library, home / "src" / "halfbyte" / "ops")
    for edit in fault.edits:
        path = home / edit.file
        text = path.read_text()
        if text.count(edit.old) != 1:
            raise ValueError(f"{fault.name}: stands {text.count(edit.old)} times in {edit.file}")
        path.write_text(text.replace(edit.old, edit.new))


def run_tests(home: Path, tests: list[str]) -> subprocess.CompletedProcess[str]:
    """The tests of the copy, with the copy's sources."""
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", *tests],
        cwd=home,
        env={**os.environ, "PYTHONPATH": str(home / "src"), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )


def noticed(fault: Fault) -> dict[str, str]:
    """For each of its tests "failed", or how it ended otherwise; "skipped" without its inputs."""
    with tempfile.TemporaryDirectory() as place:
        home = Path(place) / "halfbyte"
        put_back(fault, home)
        ends = {}
        for test in fault.tests:
            done = run_tests(home, [test])
            ends[test] = "failed" if done.returncode == 1 else f"ended with {done.returncode}"
            if done.returncode == 0 and " passed" not in done.stdout and " skipped" in done.stdout:
                ends[test] = "skipped"
            if done.returncode not in (0, 1):
                print(done.stdout[-2000:], done.stderr[-2000:], file=sys.stderr)
        return ends


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*")
    names = parser.parse_args().names
    missed = 0
    for fault in read_faults():
        if not names or fault.name in names:
            ends = noticed(fault)
            missed += any(end not in ("failed", "skipped") for end in ends.values())
            for test, end in ends.items():
                print(f"{fault.name:32} {end:12} {test}", flush=True)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
