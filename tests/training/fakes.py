"""A learner that computes nothing: what is done with one is seen in milliseconds."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from halfbyte.config.options import TrainConfig
from halfbyte.data.batches import MicroBatch, collate
from halfbyte.data.encoder import TokenizedExample
from halfbyte.ops.dequantized import DequantBuffer
from halfbyte.progress import Reporter
from halfbyte.run.directory import Run
from halfbyte.training.promise import Promise


def micro_batch(*lengths: int) -> MicroBatch:
    rows = [TokenizedExample(f"r:{i}", [1] * n, [True] * n) for i, n in enumerate(lengths)]
    return collate(rows, range(len(rows)))


class FakeLearner:
    """As `engine.learner.Learner` to whoever drives one; losses and norms are given."""

    def __init__(self, packing: bool = True, loss: float = 2.0, norm: float = 1.0) -> None:
        self.abilities = SimpleNamespace(packing=packing)
        self.config = SimpleNamespace(embedding_offloading="never", activation_offloading="never")
        self.device = torch.device("cpu")
        self.dequant_buffer = DequantBuffer()
        self.recompute = self.optimizer = None
        self.tokens_per_pass = self.tokens_per_tile = 0
        self.scale = SimpleNamespace(
            active=False, value=1.0, lower=lambda: False, stay=lambda: None
        )
        self.loss, self.norm = loss, norm
        self.calls: list[str] = []
        self.tiles = self.finite = True
        self.model: Any = torch.nn.Linear(2, 2)
        self.gradients: list[torch.Tensor] = []

    def parts(self, batch: MicroBatch) -> list[tuple[int, MicroBatch]]:
        return batch.split(self.tokens_per_pass or len(batch.input_ids))

    def tile(self, tokens: int) -> bool:
        self.calls.append(f"tile {tokens}")
        self.tokens_per_tile = tokens if self.tiles else 0
        return self.tiles

    def accumulate(self, batch: MicroBatch, supervised: int, step: int, number: int) -> list[Any]:
        self.calls.append(f"accumulate {number}")
        return [torch.tensor(self.loss * batch.supervised)]

    def clip(self) -> torch.Tensor:
        return torch.tensor(self.norm)

    def update(self, rate: float) -> None:
        self.calls.append("update")

    def is_finite(self) -> bool:
        return self.finite

    def forget(self) -> None:
        self.calls.append("forget")


def promise_for(tmp_path: Path, lines: list[str] | None = None, **options: Any) -> Promise:
    """Of a training that needs no model."""
    given = {"model": "m", "data": "d", "output_dir": str(tmp_path / "run"), **options}
    run = Run(tmp_path / "run")
    run.path.mkdir(exist_ok=True)
    say = (lambda line: None) if lines is None else lines.append
    promise = Promise(TrainConfig(**given), run, Reporter(say=say))
    promise.write_waiting()
    return promise
