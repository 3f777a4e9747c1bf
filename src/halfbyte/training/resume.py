"""A run that goes on: the checkpoint it is taken up from, what may differ, and what is promised."""

import contextlib
from pathlib import Path
from typing import Any

from ..config.options import FITTED, FREE_ON_RESUME, OF_ADAPTER, REORDERING, TrainConfig
from ..data.dataset import make_renderer
from ..engine.learner import Learner
from ..errors import BusyError, DataError, HalfbyteError, ModelError, UsageError
from ..files import hub
from ..progress import Say
from ..run import checkpoint
from ..run.directory import Run
from ..run.fingerprint import RESHAPING, changes_since, rendered, tokenizer_digest
from ..run.load import refuse_other_base
from .promise import Promise


def find_checkpoint(run: Run, resume: str | None, say: Say) -> checkpoint.Found | None:
    """Return the checkpoint to go on from, None for a training that begins.

    Args:
        resume: "auto", or the directory of one; None: it begins.

    Raises:
        BusyError: the directory holds a run, and resuming was not asked for.
        ModelError: resuming was, and no checkpoint is valid, or the named one is not.
        UsageError: the named one is none of this run.
    """
    if resume not in (None, "auto"):
        return _named(run, Path(resume).expanduser(), say)
    found, damaged = checkpoint.newest(run.checkpoints)
    for line in damaged:
        say(f"skipped a damaged checkpoint: {line}")
    if not resume:
        if found or damaged or run.adapter.exists():
            raise BusyError(
                f"{run.path} already holds a run",
                ways_out=[
                    "continue it with --resume_from_checkpoint auto",
                    "or choose another --output_dir; the older run is left as it is",
                ],
            )
        return None
    if found is None and (damaged or run.adapter.exists()):
        raise ModelError(
            f"{run.path} has no valid checkpoint to resume from, and is not begun anew over what "
            "is there",
            found="; ".join(damaged) or f"a finished adapter in {run.adapter}",
            ways_out=[
                "train into another --output_dir",
                "or move these files away, if they are not wanted",
            ],
        )
    return found


def _named(run: Run, path: Path, say: Say) -> checkpoint.Found:
    """A checkpoint by its directory; those of later steps are set aside, for what they hold is
    undone."""
    there = checkpoint.directories(run.checkpoints)
    if path.resolve() not in [each.resolve() for each in there]:
        raise UsageError(
            f"{path} is no checkpoint of {run.path}",
            expected=", ".join(map(str, there)) or "none is there",
            ways_out=["--resume_from_checkpoint auto takes the newest"],
        )
    found = checkpoint.Found(path, checkpoint.check(path))
    for later in (each for each in there if each.name > path.name):
        later.rename(later.with_name(f"undone-{later.name}"))
        say(f"{later.name} is later than the checkpoint named, and is set aside as undone")
    return found


class Resume:
    """What a checkpoint says of the training that goes on from it.

    Args:
        found: a valid checkpoint.
        run: whose.
        allow_change: names of what may differ, by commas.
    """

    def __init__(self, found: checkpoint.Found, run: Run, allow_change: str) -> None:
        self.found, self.run = found, run
        self.state = checkpoint.read_state(found)
        names = (name.strip().replace("-", "_") for name in allow_change.split(","))
        self.allowed = {name for name in names if name}
        self.changes: list[str] = []

    def options_of_adapter(self, config: TrainConfig) -> dict[str, Any]:
        """What the adapter decided that the run began with: it need not be there any more."""
        if not config.adapter_name_or_path:
            return {}
        before = self.run.config()
        return {name: getattr(before, name) for name in OF_ADAPTER}

    def options_of_data(self, config: TrainConfig) -> dict[str, Any]:
        """How many rows are held out, where the command leaves it to us: as many as before."""
        return {"eval_split": self.run.config().eval_split} if config.eval_split is None else {}

    def options_as_before(self, promise: Promise) -> dict[str, Any]:
        """Options that stay as the run had them: how passes were cut, unless the command asks for
        something else than it did then, and what ``fit_to`` chose that changes a number."""
        cut, options = self.state.get("cut"), {}
        if cut is not None:
            same = [name for name in REORDERING if cut["given"].get(name) == promise.given[name]]
            options |= {name: cut["now"][name] for name in same}
        if promise.config.fit_to:
            before = self.run.config()
            options |= {
                name: getattr(before, name) for name in FITTED if name not in FREE_ON_RESUME
            }
        return options

    def explain(self, error: DataError, config: TrainConfig, base: Path) -> None:
        """Add to an error over rows what decides what they become and has changed since."""
        info = self.run.info()
        with contextlib.suppress(HalfbyteError):
            renderer = make_renderer(hub.load_tokenizer(base), config)
            now = {
                "chat template": (renderer.template_sha256, info["template_sha256"]),
                "tokenizer": (tokenizer_digest(renderer), info["tokenizer_sha256"]),
            }
            changed = [name for name, (is_now, was) in now.items() if is_now != was]
            if changed:
                way = f"bring back the {' and the '.join(changed)} in {base}: changed since"
                error.ways_out = (f"{way} the run began", *error.ways_out)

    def compare(self, info: dict[str, Any], config: TrainConfig) -> None:
        """Note what differs from the checkpoint's training.

        Raises:
            ModelError: something does that was not allowed, or that no resume can change.
        """
        # releases before it was part of a fingerprint had it in the record
        before = {"rendered": rendered(self.run.info()), **self.state["fingerprint"]}
        self.changes = changes_since({"fingerprint": before}, info, self.allowed)
        was = self.state.get("cut", {}).get("now", {})
        for name in sorted(was):
            if was[name] != (now := getattr(config, name)):
                self.changes.append(f"{name}: {was[name]} then, {now} now")

    def _by_older_rules(self) -> bool:
        """Whether the state has the form of older rules, and that was allowed."""
        return any(line.partition(":")[0] in RESHAPING for line in self.changes)

    def compare_base(self, digest: str, path: str) -> None:
        """Note another base than the checkpoint's.

        Raises:
            ModelError: it is another, and that was not allowed.
        """
        before = self.state["base_digest"]
        if "base" not in self.allowed:
            refuse_other_base(digest, before, path, "--allow_change base")
        elif before != digest:
            self.changes.append(f"base: digest {before[:16]} then, {digest[:16]} now")

    def restore(self, learner: Learner, info: dict[str, Any]) -> str:
        """Bring a learner to the checkpoint's state, and into ``info`` what the run has been.

        Returns:
            A line that says what is promised.
        """
        was, scale, start = self.run.info(), learner.scale, self.found.step
        learner.updates = checkpoint.restore(
            self.found, learner.model, learner.optimizer, convert=self._by_older_rules()
        )
        scale.value, scale.good = self.state.get("loss_scale", (scale.value, scale.good))
        learner.since_logged[:] = self.state.get("since_logged", [])
        if (first := self.state.get("first_loss")) is not None:
            info["first_loss"] = first
        # of what memory made of the run, what came after this checkpoint is undone with its steps
        earlier = [c for c in was.get("changes", []) if c["step"] < start or not c.get("by_memory")]
        info["changes"] = earlier + [{"step": start, "change": line} for line in self.changes]
        info["identity"] = was.get("identity", info["identity"])
        promised = exactness(self.changes, [c["change"] for c in earlier], learner.device.type)
        return f"resumed from step {start} ({self.found.path}): {promised}"


def exactness(changes: list[str], earlier: list[str], device: str) -> str:
    """What a resumed run promises, given what differs now and what changed on its way."""
    if changes:
        return "it will not end as the unbroken run would have: " + "; ".join(changes)
    if earlier:
        return "it goes on as the run did, which changed on its way: " + "; ".join(earlier)
    if device != "cpu":
        return "not bit-exact: some of this device's kernels add in no fixed order"
    return "it will end with the same bytes as an unbroken run"
