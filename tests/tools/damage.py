"""Damage to every file that a run lives on: its own, its base's, the cache's, its data.

    python -m tests.tools.damage --count N --seed S --home DIR [--links] [--show]

prints one JSON document. A case changes one file (a bit flipped, cut short, emptied, removed; or in
its place a link that leads nowhere or elsewhere, a directory, a pipe) and then uses what it belongs
to: resumes a stopped run to its end, evaluates or merges a finished one. Either what comes out has
the bytes it has without the damage, or the command ends with a code of ours and names the file; and
where it was refused, the run goes on as if nothing had been once the file is as it was.

With --links each file and folder becomes a link to the same one outside, and what is opened (as the
system sees it) is held against that: nothing outside is read or written.
"""

import argparse
import contextlib
import ctypes
import hashlib
import importlib
import json
import os
import pkgutil
import random
import re
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import transformers.conversion_mapping  # noqa: F401

import halfbyte

from .faults import arguments, cli, forked, make_inputs, wait

for _module in pkgutil.walk_packages(halfbyte.__path__, "halfbyte."):
    if not _module.name.endswith(("__main__", "halfbyte_cpu")) and "triton" not in _module.name:
        importlib.import_module(_module.name)

STEPS, STOP = 4, 2
LARGE = 1 << 16
"""Bytes: a file is large from here on."""
SECONDS = 60.0
OURS = (3, 4, 5, 6, 7, 8)
"""Exit codes that a refusal may have."""


# --- what is used ---------------------------------------------------------------------------------


def training(home: Path, out: Path, streamed: bool) -> list[str]:
    line = arguments(home, out)
    for name, value in (("max_steps", STEPS), ("save_steps", 1), ("num_samples", 0)):
        line[line.index(f"--{name}") + 1] = str(value)
    return [*line, "--save_total_limit", "2", *(["--weight_streaming", "always"] * streamed)]


def resumed(home: Path, streamed: bool = False) -> tuple[list[str], Callable[[], str]]:
    out = home / ("streamed" if streamed else "run")
    files = (
        "adapter/adapter_model.safetensors",
        f"checkpoints/step-{STEPS:08d}/optimizer.safetensors",
    )
    return training(home, out, streamed), lambda: sha256(*(out / name for name in files))


def evaluated(home: Path) -> tuple[list[str], Callable[[], str]]:
    line = ["eval", str(home / "done"), "--data", str(home / "rows.jsonl"), "--json"]
    return [*line, "--generate", "false"], lambda: said(home / "log")


def merged(home: Path) -> tuple[list[str], Callable[[], str]]:
    line = ["merge", str(home / "done"), "--onto", "original", "-o", str(home / "merged")]
    return line, lambda: sha256(home / "merged" / "model.safetensors")


def sha256(*files: Path) -> str:
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def said(log: Path) -> str:
    """The figures of an evaluation's last line."""
    found = json.loads(log.read_text().strip().splitlines()[-1])
    return json.dumps([found["base"]["loss"], found["tuned"]["loss"]])


USES = {
    "resume": resumed,
    "resume streamed": lambda home: resumed(home, True),
    "eval": evaluated,
    "merge": merged,
}
AREAS = {
    "run": ("resume",),
    "done": ("eval", "merge"),
    "base": ("resume", "eval", "merge"),
    "cache": ("resume streamed",),
    "rows.jsonl": ("resume",),
}


# --- what is done to a file -----------------------------------------------------------------------


def flip(file: Path, rng: random.Random) -> None:
    data = bytearray(file.read_bytes())
    if data:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    file.write_bytes(data)


def cut(file: Path, rng: random.Random) -> None:
    os.truncate(file, rng.randrange(file.stat().st_size + 1))


def in_its_place(make: Callable[[Path], object]) -> Callable[[Path, random.Random], None]:
    def replace(file: Path, rng: random.Random) -> None:
        file.unlink()
        make(file)

    return replace


DAMAGE: dict[str, Callable[[Path, random.Random], None]] = {
    "bit flipped": flip,
    "cut short": cut,
    "emptied": lambda file, rng: os.truncate(file, 0),
    "removed": in_its_place(lambda file: None),
    "a link to nothing": in_its_place(lambda file: file.symlink_to("/nowhere/at/all")),
    "a link elsewhere": in_its_place(lambda file: file.symlink_to("/etc/hostname")),
    "a directory": in_its_place(lambda file: file.mkdir()),
    "a pipe": in_its_place(os.mkfifo),
}


# --- trials ---------------------------------------------------------------------------------------


@dataclass
class World:
    """Everything as it is without damage, and a copy at a place that stays the same."""

    home: Path

    @property
    def kept(self) -> Path:
        return self.home.with_name(self.home.name + "-kept")

    def make(self) -> dict[str, str]:
        """Make it; returns what each use comes out with."""
        self.home.mkdir(parents=True)
        os.environ["HALFBYTE_CACHE"] = str(self.home / "cache")
        # forked: nothing is computed in here
        assert wait(forked(lambda: make_inputs(self.home) or 0, self.home / "log")) == 0, self.log
        for name, streamed in (("run", False), ("streamed", True)):
            self._stopped(training(self.home, self.home / name, streamed))
        assert self.run(training(self.home, self.home / "done", False)) == 0, self.log
        shutil.copytree(self.home, self.kept, symlinks=True)
        found = {}
        for use, how in USES.items():
            line, outcome = how(self.home)
            assert self.run(line) == 0, (use, self.log)
            found[use] = outcome()
            self.restore()
        return found

    def _stopped(self, line: list[str]) -> None:
        from halfbyte.training.trainer import Trainer

        def work() -> int:
            report = Trainer._report

            def stop(self: Trainer, row: dict[str, object]) -> None:
                report(self, row)
                if row["step"] == STOP:
                    os.kill(os.getpid(), 15)

            Trainer._report = stop
            return cli(line)

        assert wait(forked(work, self.home / "log")) == 143, self.log

    @property
    def log(self) -> str:
        return (self.home / "log").read_text(errors="replace")

    def restore(self) -> None:
        shutil.rmtree(self.home)
        shutil.copytree(self.kept, self.home, symlinks=True)

    def run(self, line: list[str]) -> int:
        (self.home / "log").unlink(missing_ok=True)
        return wait(forked(lambda: cli(line), self.home / "log"), SECONDS)


def files_of(place: Path) -> list[Path]:
    return [place] if place.is_file() else sorted(p for p in place.rglob("*") if p.is_file())


def cases(world: World, count: int, rng: random.Random) -> Iterator[tuple[str, Path, str]]:
    """(use, file, damage): every damage to every file in turn, and flips for what is left."""
    chosen = [
        (use, file, damage)
        for area, uses in AREAS.items()
        for file in files_of(world.home / area)
        for damage in DAMAGE
        for use in uses
    ]
    rng.shuffle(chosen)
    yield from chosen[:count]
    flips = [case for case in chosen if case[2] in ("bit flipped", "cut short")]
    yield from (rng.choice(flips) for _ in range(count - len(chosen)))


def trial(
    world: World, use: str, file: Path, damage: str, expected: str, rng: random.Random
) -> tuple[str, str]:
    """What came of a case, and what is wrong with that, if something is."""
    DAMAGE[damage](file, rng)
    line, outcome = USES[use](world.home)
    try:
        code = world.run(line)
    except TimeoutError:
        return "hung", "no answer"
    log = world.log
    if code == 0:
        same = outcome() == expected
        return "unharmed", "" if same else "another result"
    if code not in OURS or "unforeseen" in log or "Traceback" in log:
        return f"exit {code}", log[-600:]
    names = {file.name, *(parent.name for parent in file.relative_to(world.home).parents)} - {""}
    if not any(name in log for name in names):
        return "refused", f"names nothing of {sorted(names)}: {log[-600:]}"
    return "refused", again(world, use, file, expected)


def again(world: World, use: str, file: Path, expected: str) -> str:
    """What is wrong where the damage is taken back; where the command removed what it belongs to,
    so that it is made anew, that is enough."""
    if file.parent.exists():
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(file) if file.is_dir() and not file.is_symlink() else file.unlink()
        shutil.copy2(world.kept / file.relative_to(world.home), file)
    line, outcome = USES[use](world.home)
    code = world.run(line)
    if code:
        return f"exit {code} after it was taken back: {world.log[-600:]}"
    return "" if outcome() == expected else "another result after it was taken back"


def inject(home: Path, seed: int, count: int, show: bool = False) -> dict[str, object]:
    world, rng = World(home / "world"), random.Random(seed)
    expected = world.make()
    tally: dict[str, Counter[str]] = {}
    wrong: list[list[str]] = []
    for use, file, damage in cases(world, count, rng):
        found, fault = trial(world, use, file, damage, expected[use], rng)
        where = str(file.relative_to(world.home))
        tally.setdefault(damage, Counter())[found] += 1
        if fault:
            wrong.append([use, where, damage, found, fault])
        if show:
            print(use, where, damage, found, fault[-300:], sep=" | ", flush=True)
        world.restore()
    return {"cases": count, "came of them": {k: dict(v) for k, v in tally.items()}, "wrong": wrong}


# --- links, and what is opened through them -------------------------------------------------------


def traced(world: World, line: list[str]) -> set[str]:
    """The real paths of all files that a command opens."""
    trace = world.home / "trace"

    def work() -> int:
        ctypes.CDLL(None).prctl(0x59616D61, -1)  # PR_SET_PTRACER: any process may look
        watch = ["strace", "-f", "-y", "-e", "trace=open,openat,creat", "-o", str(trace)]
        process = subprocess.Popen([*watch, "-p", str(os.getpid())], stderr=subprocess.PIPE)
        assert b"attached" in (process.stderr.readline() if process.stderr else b"")
        return cli(line)

    wait(forked(work, world.home / "log"), SECONDS)
    for _ in range(100):  # its last lines
        found = trace.read_text(errors="replace")
        if "+++ exited" in found:
            break
        time.sleep(0.05)
    return set(re.findall(r"= \d+<(/[^>]*)>", found))


def linked(home: Path, seed: int, count: int, show: bool = False) -> dict[str, object]:
    """Each file and folder in turn as a link to its like outside: what was opened there."""
    world, outside = World(home / "world"), home / "outside"
    world.make()
    (world.home / "rows").mkdir()
    shutil.copy(world.home / "rows.jsonl", world.home / "rows" / "a.jsonl")
    shutil.rmtree(world.kept)
    shutil.copytree(world.home, world.kept)
    chosen = [
        (use, place)
        for area, uses in {**AREAS, "rows": ("eval",)}.items()
        for place in [*files_of(world.home / area), *folders_of(world.home / area)]
        for use in uses
        if area not in ("rows.jsonl", "cache")  # which may lie on other disks
    ]
    random.Random(seed).shuffle(chosen)
    wrong: list[list[str]] = []
    for use, place in chosen[:count]:
        shutil.rmtree(outside, ignore_errors=True)
        outside.mkdir()
        place.rename(outside / place.name)
        place.symlink_to(outside / place.name)
        before = hashed(outside)
        line = USES[use](world.home)[0]
        if "rows" in place.parts:
            line = [str(place.parent) if word.endswith("rows.jsonl") else word for word in line]
        opened = sorted(path for path in traced(world, line) if path.startswith(f"{outside}/"))
        where = str(place.relative_to(world.home))
        if opened or hashed(outside) != before:
            wrong.append([use, where, *opened, *(["changed"] * (hashed(outside) != before))])
        if show:
            print(use, where, opened, world.log.strip().splitlines()[-1:], flush=True)
        world.restore()
    return {"links": len(chosen[:count]), "opened outside": wrong}


def folders_of(place: Path) -> list[Path]:
    return sorted(p for p in place.rglob("*") if p.is_dir()) if place.is_dir() else []


def hashed(place: Path) -> dict[str, str]:
    return {str(p): sha256(p) for p in sorted(place.rglob("*")) if p.is_file()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("--links", action="store_true")
    parser.add_argument("--show", action="store_true")
    given = parser.parse_args()
    how = linked if given.links else inject
    print(json.dumps(how(given.home, given.seed, given.count, given.show), indent=1))
