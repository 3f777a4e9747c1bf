"""Draw programs, run each beside its oracle, and write what differs as a case.

    python -m tests.fuzz --minutes 60 [--seed 0] [--home DIR] [--found DIR]
    python -m tests.fuzz --count 40
    python -m tests.fuzz --again CASE.json...

A seed's programs are the same on every machine. A finding is shrunk by
hypothesis to the smallest program that still differs, and written to DIR; the search goes on with
the next seed. Ends with 1 where something was found.
"""

import argparse
import gc
import json
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings

from .judge import Finding, Verdict, judge
from .program import Program, from_json, programs

AT_ONCE = 20
"""Programs of a seed."""


class Tally:
    """What became of the programs so far."""

    def __init__(self) -> None:
        self.ends: Counter[str] = Counter()
        self.reasons: Counter[str] = Counter()
        self.compared: dict[str, list[float]] = {}

    def add(self, verdict: Verdict) -> None:
        self.ends[verdict.how] += 1
        if verdict.why:
            self.reasons[f"{verdict.how}: {verdict.why[:110]}"] += 1
        for what, share in verdict.compared.items():
            self.compared.setdefault(what, []).append(share)

    def report(self) -> str:
        lines = [json.dumps(dict(self.ends))]
        lines += [f"  {count:5}  {why}" for why, count in self.reasons.most_common(25)]
        lines += [
            f"  {what}: {len(shares)} held, the worst {max(shares):.2f} of its bound"
            for what, shares in sorted(self.compared.items())
        ]
        return "\n".join(lines)


def search(
    number: int, count: int, home: Path, tally: Tally, until: float, *, shrink: bool = True
) -> Program | None:
    """The programs of a seed: the smallest that differs (or, unless it is shrunk, the first), or
    None."""
    smallest: list[Program] = []

    @seed(number)
    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[Phase.generate, Phase.shrink] if shrink else [Phase.generate],
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
    )
    @given(programs())
    def each(program: Program) -> None:
        if time.monotonic() > until and not smallest:
            return
        try:
            tally.add(judge(program, home))
        except Finding as finding:
            smallest[:] = [program]  # the last that is tried is the smallest
            tally.reasons[f"finding: {finding}"] += 1
            raise

    try:
        each()
    except Finding:
        return smallest[0]
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=0.0)
    parser.add_argument("--count", type=int, default=0, help="so many programs")
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument("--home", type=Path, help="where models are kept")
    parser.add_argument("--found", type=Path, default=Path("fuzz-found"), help="for what differs")
    parser.add_argument("--again", type=Path, nargs="+", help="programs that were written")
    options = parser.parse_args()
    torch.set_num_threads(1)
    gc.freeze()  # what is imported is not looked through again and again
    with tempfile.TemporaryDirectory() as scratch:
        home = options.home or Path(scratch)
        if options.again:
            return again(options.again, home)
        tally, found, number = Tally(), 0, options.seed
        until = time.monotonic() + 60 * options.minutes if options.minutes else float("inf")
        left = options.count or sys.maxsize
        while time.monotonic() < until and left > 0:
            smallest = search(number, min(AT_ONCE, left), home, tally, until)
            if smallest is not None:
                found += 1
                write(smallest, options.found / f"{number}.json", home)
            number, left = number + 1, left - AT_ONCE
            print(f"seed {number - 1}: {tally.report()}", file=sys.stderr, flush=True)
        print(tally.report())
        print(f"{found} findings" + (f", in {options.found}" if found else ""))
    return 1 if found else 0


def write(program: Program, path: Path, home: Path) -> None:
    """A case, and what differs in it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(program.to_json() + "\n")
    try:
        judge(program, home)
        print(f"{path}: does not differ when run again", flush=True)
    except Finding as finding:
        print(f"{path}: {finding}", flush=True)


def again(paths: list[Path], home: Path) -> int:
    """Run programs that were written; 1 where one differs."""
    differ = 0
    for path in paths:
        try:
            verdict = judge(from_json(path.read_text()), home)
            print(f"{path}: {verdict.how} {verdict.why}", flush=True)
        except Finding as finding:
            differ += 1
            print(f"{path}: {finding}", flush=True)
            if finding.__cause__ is not None:
                raise
    return 1 if differ else 0


if __name__ == "__main__":
    sys.exit(main())
