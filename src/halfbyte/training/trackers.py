"""Experiment trackers, fed with the rows of ``metrics.jsonl`` and ``eval.jsonl``.

The run's own files stay the record; a tracker is a copy. Each is a package of its own, imported
when it is asked for, before anything else is done, so that a missing one is known at once. A
tracker that fails in the middle of a training (a network, a server) is given up with a line, and
the training goes on.
"""

import functools
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import Interrupted, UsageError
from ..run.directory import METRICS

PACKAGES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb", "trackio": "trackio"}
PROJECT = "halfbyte"


def tracker_names(report_to: str) -> list[str]:
    """The trackers that an option names; "none" and "" are no tracker, "all" those that are
    installed.

    Raises:
        UsageError: one that is not known.
    """
    names = [name.strip() for name in report_to.split(",") if name.strip() not in ("", "none")]
    if names == ["all"]:
        return [name for name in PACKAGES if importlib.util.find_spec(name) is not None]
    if unknown := [name for name in names if name not in PACKAGES]:
        raise UsageError(
            f"report_to names {unknown[0]!r}", expected=f"none, or some of {', '.join(PACKAGES)}"
        )
    return names


class Trackers:
    """Copies of a run's rows to trackers.

    Args:
        names: from `tracker_names`.
        run: the run directory, whose name is the tracker's.
        say: takes lines for people.

    Raises:
        UsageError: a tracker's package is not installed.
    """

    def __init__(self, names: list[str], run: Path, say: Callable[[str], None]) -> None:
        self.run, self.say = run, say
        self.modules = {name: _imported(name) for name in names}
        self.open: dict[str, Any] = {}
        self.project: str | None = None
        self.title: str | None = None

    def start(self, config: dict[str, Any], step: int, identity: str, logged: int = 0) -> None:
        """Open them; rows after ``step`` will follow, and what was logged of them before is void:
        TensorBoard drops it, the others cannot, which is said.

        Args:
            identity: of the run, the same when it is resumed.
            logged: the last step that was logged before the run was resumed.
        """
        self.project, self.title = config.get("project"), config.get("run_name")
        flat = {
            key: value if isinstance(value, int | float | str | bool) else str(value)
            for key, value in config.items()
        }
        for name, module in self.modules.items():
            self._guarded(
                name,
                lambda name=name, module=module: self._start(name, module, flat, step, identity),
            )
        for name in self.open:
            if logged > step and name != "tensorboard":
                self.say(
                    f"what {name} was told of the steps after {step} stays there: they are made "
                    f"again, and {METRICS} alone has them as they are"
                )

    def _start(
        self, name: str, module: Any, config: dict[str, Any], step: int, identity: str
    ) -> None:
        title = self.title or f"{self.run.name}-{identity}"
        if name == "tensorboard":
            writer = module.SummaryWriter(
                # also of a run that begins anew in its directory
                str(self.run / "tensorboard"),
                purge_step=step + 1 if step else 0,
            )
            writer.add_text(
                "config", "\n".join(f"    {key}: {value}" for key, value in config.items()), step
            )
            self.open[name] = writer
        elif name == "wandb":
            where = {"dir": str(self.run), "id": identity, "resume": "allow"}
            project = self.project or os.environ.get("WANDB_PROJECT") or PROJECT
            title = self.title or os.environ.get("WANDB_NAME") or title
            self.open[name] = module.init(project=project, name=title, config=config, **where)
        else:
            project = self.project or os.environ.get("TRACKIO_PROJECT") or PROJECT
            self.open[name] = module.init(
                project=project, name=title, config=config, resume="allow"
            )

    def log(self, row: dict[str, Any], prefix: str = "train") -> None:
        """A row with its ``step``; what is no number is left out."""
        numbers = {
            f"{prefix}/{key}": float(value)
            for key, value in row.items()
            if key != "step" and isinstance(value, int | float) and not isinstance(value, bool)
        }
        for name in list(self.open):
            self._guarded(name, lambda name=name: self._log(name, numbers, row["step"]))

    def _log(self, name: str, numbers: dict[str, float], step: int) -> None:
        if name == "tensorboard":
            for key, value in numbers.items():
                self.open[name].add_scalar(key, value, step)
        else:
            self.open[name].log(numbers, step=step)

    def close(self, exit_code: int = 0) -> None:
        """End them. exit_code: how the training ended; not 0: not as a success."""
        for name in list(self.open):
            tracker = self.open.pop(name)
            end: Callable[[], object] = tracker.close if name == "tensorboard" else tracker.finish
            if name == "wandb":
                end = functools.partial(tracker.finish, exit_code=exit_code)
            self._guarded(name, end)

    def _guarded(self, name: str, work: Callable[[], object]) -> None:
        """A tracker is not worth a training."""
        try:
            work()
        except Interrupted:
            raise
        except Exception as error:
            self.open.pop(name, None)
            self.say(
                f"{name} failed ({str(error)[:200] or type(error).__name__}): the training goes "
                "on without it"
            )


def _imported(name: str) -> Any:
    try:
        return importlib.import_module(PACKAGES[name])
    except ImportError as error:
        raise UsageError(
            f"report_to {name} needs the package {name}, which is not installed",
            ways_out=[f"pip install {name}", "or leave report_to out: metrics.jsonl has every row"],
        ) from error
