"""Before the first step, the largest batch runs once through everything a training does, and the
state is put back.

What would fail at step 900 (the longest rows do not fit, the disk takes no checkpoint) fails in the
first minute. The state is saved as a checkpoint of its own before and restored from it after, bit
for bit: a run ends with the same bytes as if it had not been rehearsed, and saving and restoring
have been tried, too.
"""

import shutil
from pathlib import Path

import torch

from ..data.batches import MicroBatch
from ..data.encoder import TokenizedExample
from ..engine.evaluate import mean_loss
from ..engine.learner import Learner
from ..errors import DoesNotFit, first_line, is_exhaustion
from ..memory.process import return_freed
from ..model import attention
from ..run import checkpoint

DIRECTORY = ".rehearsal.tmp"


def _restore(learner: Learner, saved: checkpoint.Found) -> None:
    """Put the state back; where memory is too short for that, once more with what could be freed.

    Raises:
        DoesNotFit: it could not be put back, so that nothing may go on from here.
    """
    for attempt in range(2):
        try:
            learner.updates = checkpoint.restore(saved, learner.model, learner.optimizer)
            return
        except Exception as error:
            if not is_exhaustion(error):
                raise
            message = first_line(error)
            if attempt:
                raise DoesNotFit(
                    "memory ran out while the state was put back after the rehearsal; nothing was "
                    "trained",
                    found=message,
                    ways_out=["repeat the command with more memory", "or with --rehearse false"],
                ) from error
        return_freed()


def rehearse(
    learner: Learner, batch: MicroBatch, rows: list[TokenizedExample], directory: Path, base: str
) -> None:
    """Run ``batch`` forward, backward and through the optimizer, and ``rows`` forward; then
    restore.

    Args:
        batch: the largest micro-batch.
        rows: of an evaluation's largest batch, empty without one.
        directory: the run's.
        base: the model's name, for the adapter's file.

    Raises:
        StorageError: the disk does not take a checkpoint. Whatever a step can raise.
    """
    place = directory / DIRECTORY
    if place.is_symlink():  # rmtree leaves links
        place.unlink()
    shutil.rmtree(place, ignore_errors=True)
    try:
        checkpoint.save(
            place, 0, learner.model, learner.optimizer, {"updates": learner.updates}, 1, base
        )
        packed, updated = learner.abilities.packing, False
        try:
            with torch.random.fork_rng():
                with attention.packed(learner.model, packed):
                    learner.accumulate(batch, max(batch.supervised, 1), 0, 0)
                learner.clip()
                updated = True
                learner.update(learner.config.learning_rate)
                learner.forget()
                if rows:
                    mean_loss(learner.model, rows, packed=packed)
        finally:
            if updated:
                _restore(learner, checkpoint.Found(place / "step-00000000", 0))
    finally:
        shutil.rmtree(place, ignore_errors=True)
