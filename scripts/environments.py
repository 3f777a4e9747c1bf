"""The product in environments that are not ours: what is run before a release.

    python scripts/environments.py [--only NAME ...] [--list]

Each environment makes a short training, an answer, a merge and `doctor` end with 0, or is skipped
with the reason why it cannot be tried here (no root, no such compiler or Python, no network). The
installation that is tried is the one of this Python, unless the environment is another
installation. Exit 1 where one fails.
"""

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CONSTRAINTS = ROOT / "constraints.txt"
NOBODY = 1234
MEMORY_GIB = 1.0
"""Of the memory group; the built-in model needs about half of it."""


class Skipped(Exception):
    """The environment cannot be made here: why."""


def run(command: Sequence[str | Path], **options: object) -> subprocess.CompletedProcess[str]:
    """A command's output; raises with its last lines where it fails."""
    words = [str(word) for word in command]
    found = subprocess.run(words, capture_output=True, text=True, **options)  # pyright: ignore[reportCallIssue, reportArgumentType]
    if found.returncode:
        lines = (found.stdout + found.stderr).splitlines()[-12:]
        raise RuntimeError(f"{' '.join(words)[:200]}: exit {found.returncode}\n" + "\n".join(lines))
    return found


Wrapped = Callable[[Sequence[str | Path]], Sequence[str | Path]]


def tried(
    python: Path, home: Path, wrap: Wrapped = lambda command: command, **options: object
) -> dict[str, object]:
    """Train, ask, merge and examine; what `doctor` says.

    Args:
        wrap: how a command is started there.
    """
    rows = home / "rows.jsonl"
    lines = [{"prompt": f"{i} teas", "completion": f" {i} cups"} for i in range(12)]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    halfbyte = [python, "-m", "halfbyte"]
    more = ["--max_steps", "2", "--gradient_accumulation_steps", "1", "--num_samples", "1"]
    options.setdefault("cwd", home)
    run(wrap([*halfbyte, "train", "demo", "--data", rows, "-o", home / "run", *more]), **options)
    asked = ["--prompt", "2 teas", "--max_new_tokens", "4"]
    run(wrap([*halfbyte, "chat", home / "run", *asked]), **options)
    run(wrap([*halfbyte, "merge", home / "run", "-o", home / "merged"]), **options)
    said = run(wrap([*halfbyte, "doctor", "--json"]), **options)
    return json.loads(said.stdout.splitlines()[-1])


def as_root() -> None:
    if os.geteuid():
        raise Skipped("root is needed")


@contextlib.contextmanager
def mounted(kind: str, where: Path, *words: str) -> Iterator[Path]:
    as_root()
    where.mkdir(exist_ok=True)
    try:
        run(["mount", "-t", kind, *words, kind, where])
    except RuntimeError as error:
        raise Skipped(f"{kind} cannot be mounted: {str(error).splitlines()[-1]}") from error
    try:
        yield where
    finally:
        subprocess.run(["umount", "-l", str(where)], check=False)


def installed(
    home: Path, python: str = sys.executable, pins: Path = CONSTRAINTS, **environment: str
) -> Path:
    """Another installation: the interpreter that has it."""
    run([python, "-m", "venv", home / "venv"])
    made = home / "venv" / "bin" / "python"
    pip = [made, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    try:
        run([*pip, "-c", pins, ROOT], env={**os.environ, **environment})
    except RuntimeError as error:
        if "No matching distribution" in str(error) or "Connection" in str(error):
            raise Skipped(f"its packages cannot be had here: {error}") from error
        raise
    return made


# --- the environments -----------------------------------------------------------------------------


def as_it_is(home: Path) -> None:
    """This installation, this user, this machine."""
    tried(Path(sys.executable), home)


def oldest(home: Path) -> None:
    """Every lower bound that is declared, together."""
    pins = home / "pins.txt"
    pins.write_text(run([sys.executable, ROOT / "scripts" / "oldest.py"]).stdout)
    tried(installed(home, pins=pins), home)


def newest(home: Path) -> None:
    """The newest of everything that the declaration allows, but PyTorch, which is pinned."""
    pins = home / "pins.txt"
    torch = next(x for x in CONSTRAINTS.read_text().splitlines() if x.startswith("torch=="))
    pins.write_text(torch + "\n")
    tried(installed(home, pins=pins), home)


def without_compiler(home: Path) -> None:
    """No C++ compiler at installation: plain PyTorch computes, and `doctor` says so."""
    said = tried(installed(home, CXX="/nonexistent/c++", CC="/nonexistent/cc"), home)
    if "plain PyTorch" not in json.dumps(said):
        raise RuntimeError("doctor does not say that plain PyTorch computes")


def with_clang(home: Path) -> None:
    """clang++ in g++'s place."""
    if not (compiler := shutil.which("clang++")):
        raise Skipped("there is no clang++")
    tried(installed(home, CXX=compiler, CC=shutil.which("clang") or compiler), home)


def as_nobody(home: Path) -> None:
    """A user without a name and without a home (`docker run -u 1234`)."""
    as_root()
    user: dict[str, Any] = {"user": NOBODY, "group": NOBODY, "extra_groups": []}
    try:
        run([sys.executable, "-c", "import torch"], cwd="/", **user)
    except (OSError, RuntimeError) as error:
        raise Skipped("this Python lies where no other user may read") from error
    home.chmod(0o777)
    home.parent.chmod(0o755)
    bare = {k: v for k, v in os.environ.items() if k not in ("HOME", "USER", "LOGNAME")}
    tried(Path(sys.executable), home, env=bare, **user)


def in_a_memory_group(home: Path) -> None:
    """A container's memory limit."""
    sys.path.insert(0, str(ROOT / "bench"))
    from outside import inside, memory_group  # pyright: ignore[reportMissingImports]

    with contextlib.ExitStack() as stack:
        try:
            group = stack.enter_context(memory_group(int(MEMORY_GIB * 2**30)))
        except OSError as error:
            raise Skipped(str(error)) from error
        said = tried(
            Path(sys.executable), home, lambda command: inside(group, [str(w) for w in command])
        )
        if "GiB, by" not in json.dumps(said):
            raise RuntimeError("doctor does not name the limit")


def on_tmpfs(home: Path) -> None:
    """Files that are memory."""
    with mounted("tmpfs", home / "tmpfs") as place:
        tried(Path(sys.executable), place)


def on_overlay(home: Path) -> None:
    """A container's image layers: files are copied up where they are written."""
    with mounted("tmpfs", home / "layers") as layers:  # an overlay cannot lie on an overlay
        for name in ("lower", "upper", "work"):
            (layers / name).mkdir()
        folders = f"lowerdir={layers}/lower,upperdir={layers}/upper,workdir={layers}/work"
        with mounted("overlay", home / "overlay", "-o", folders) as place:
            tried(Path(sys.executable), place)


def on_a_read_only_root(home: Path) -> None:
    """Everything read-only but the place of the output and /tmp."""
    as_root()
    script = (
        "mount --bind / / && mount -o remount,ro,bind / && "
        'mount --bind "$0" "$0" && mount -o remount,rw,bind "$0" && exec "$@"'
    )

    def wrap(command: Sequence[str | Path]) -> list[str | Path]:
        return ["unshare", "--mount", "sh", "-c", script, home, *command]

    try:
        run(wrap(["true"]))
    except RuntimeError as error:
        raise Skipped(f"no name space of mounts: {str(error).splitlines()[-1]}") from error
    cache = {"HALFBYTE_CACHE": str(home / "cache"), "TMPDIR": str(home)}
    tried(Path(sys.executable), home, wrap, env={**os.environ, **cache})


def another_python(version: str) -> Callable[[Path], None]:
    def environment(home: Path) -> None:
        found = shutil.which(f"python{version}")
        if (
            not found
            or subprocess.run([found, "-c", ""], check=False, capture_output=True).returncode
        ):
            raise Skipped(f"there is no python{version}")
        tried(installed(home, python=found), home)

    environment.__doc__ = f"Python {version}."
    return environment


ENVIRONMENTS: dict[str, Callable[[Path], None]] = {
    "as it is": as_it_is,
    "oldest": oldest,
    "newest": newest,
    "without a compiler": without_compiler,
    "clang": with_clang,
    f"uid {NOBODY}": as_nobody,
    "memory group": in_a_memory_group,
    "tmpfs": on_tmpfs,
    "overlay": on_overlay,
    "read-only root": on_a_read_only_root,
    **{f"python {v}": another_python(v) for v in ("3.11", "3.12", "3.13")},
}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", action="append", choices=list(ENVIRONMENTS))
    parser.add_argument("--list", action="store_true")
    given = parser.parse_args()
    failed = 0
    for name in given.only or ENVIRONMENTS:
        made = ENVIRONMENTS[name]
        if given.list:
            print(f"{name:20} {(made.__doc__ or '').splitlines()[0]}")
            continue
        with tempfile.TemporaryDirectory() as place:
            home = Path(place) / "home"
            home.mkdir()
            try:
                made(home)
                print(f"ok    {name}", flush=True)
            except Skipped as why:
                print(f"skip  {name}: {why}", flush=True)
            except (RuntimeError, OSError, ValueError) as error:
                failed += 1
                print(f"FAILS {name}: {error}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
