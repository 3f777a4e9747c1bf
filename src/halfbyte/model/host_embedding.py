"""The embedding table in host memory, beside a GPU: rows are gathered there, and they alone travel.

A table of 128,000 rows of 8,192 takes 2.1 GB of a card and serves a step with a few thousand rows.
Only a frozen table that nothing else reads can lie there: not one that is trained, nor one that is
the output head as well.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ..memory.process import return_freed
from ..ops.library import device_type
from .class_swap import swap_class


class HostEmbedding(nn.Module):
    """An embedding whose table lies in host memory; its class is also a subclass of the original's.

    The table is no parameter any more, so that the model's device is where it computes.
    """

    computes_on: torch.device

    def forward(self, ids: Tensor) -> Tensor:
        table: Any = self.weight
        return super().forward(ids.to(table.device)).to(self.computes_on)  # pyright: ignore[reportAttributeAccessIssue]


def why_not(model: Any) -> str:
    """Why a model's embedding table cannot lie in host memory, "" where it can."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if isinstance(embedding, HostEmbedding):
        return "it is there"
    tied = head is not None and head.weight is embedding.weight
    return reason_to_stay(device_type(embedding.weight), embedding.weight.requires_grad, tied)


def reason_to_stay(device: str, trained: bool, tied: bool) -> str:
    """Why an embedding table cannot lie in host memory, "" where it can.

    Args:
        device: "cpu" or "cuda": where the model computes.
        trained: whether the table is.
        tied: whether the output head is the same table.
    """
    if device == "cpu":
        return "the model computes in host memory"
    if trained:
        return "it is trained"
    return "the output head is the same table" if tied else ""


def keep_on_host(model: Any) -> None:
    """Move a model's embedding table to host memory, in place (`why_not` is asked first)."""
    embedding = model.get_input_embeddings()
    on_host = {
        name: t.detach() if t.is_meta else t.detach().cpu()
        for name, t in (("weight", embedding.weight), *embedding._buffers.items())
        if t is not None
    }
    computes_on = embedding.weight.device
    swap_class(embedding, HostEmbedding)
    embedding.computes_on = computes_on
    del embedding._parameters["weight"]
    object.__setattr__(embedding, "weight", on_host.pop("weight"))
    embedding._buffers.update(on_host)
    return_freed()


def host_table(model: Any) -> Tensor | None:
    """An embedding table in host memory, None where it is not there."""
    embedding: Any = model.get_input_embeddings()
    if not isinstance(embedding, HostEmbedding):
        return None
    table: Any = embedding.weight
    return table
