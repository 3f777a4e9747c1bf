"""Weights of a directory, tensor by tensor: read alone, quantized or as they are, hashed, put in
their place and freed.

Peak memory is the finished model plus the largest tensor. What does not fit is collected and
reported in one error.
"""

import hashlib
import json
import math
import re
from collections.abc import Iterable
from concurrent import futures
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..config.options import ModelOptions
from ..errors import ModelError
from ..files.safetensors import Checkpoint
from ..memory.streaming import LayerStreamer
from ..model.targets import checkpoint_names, name_entries, quantizable, tied_names
from ..model.wrappers import not_read
from .bnb_format import quantized_names, read_stored, weight_names
from .mxfp4 import is_held, read_held
from .tensor import NF4Tensor, quantize


@dataclass
class QuantReport:
    """quant.json: what was quantized and how well."""

    quant_type: str
    coverage: float
    tensors: list[dict[str, Any]]
    digest: str
    """sha256 over all weights as they are held: 4-bit codes and scales, other tensors as they are
    stored."""

    def as_dict(self) -> dict[str, Any]:
        return {
            "quant_type": self.quant_type,
            "coverage": self.coverage,
            "digest": self.digest,
            "tensors": self.tensors,
        }


class WeightLoader:
    """Fills an empty model from a checkpoint, tensor by tensor."""

    def __init__(
        self,
        model: Any,
        checkpoint: Checkpoint,
        options: ModelOptions,
        dtype: torch.dtype,
        device: torch.device,
        streamer: LayerStreamer | None = None,
    ) -> None:
        """streamer: weights that are stored in 4 bits stay in their file, layer by layer as groups
        of it."""
        self.streamer = streamer
        self.model, self.checkpoint, self.options = model, checkpoint, options
        self.dtype, self.device = dtype, device
        self.twice = name_entries(model, checkpoint.entries)
        self.stored_4bit = quantized_names(set(checkpoint.entries))
        every, left = weight_names(checkpoint, self.stored_4bit), not_read(model)
        self.targets = checkpoint_names(model, every)
        self.unread = [name for name in every if left(self.targets[name])]
        plain = [name for name in every if not left(self.targets[name])]
        self.sources = plain
        head = model.get_output_embeddings()
        # what a 4-bit checkpoint keeps in 16 bits was kept so for a reason
        self.linear = set() if self.stored_4bit else quantizable(model)
        tables = [part for part in model.modules() if isinstance(part, nn.Embedding)]
        embeddings = {
            id(m.weight) for m in (model.get_input_embeddings(), head, *tables) if m is not None
        }
        self.in_layers = {
            name: p.numel()
            for name, p in model.named_parameters()
            if p.dim() >= 2 and id(p) not in embeddings
        }
        self.records: list[dict[str, Any]] = []
        self.hashes: dict[str, futures.Future[str]] = {}
        # where weights are read to be quantized: the same memory for all, so that freed pieces of
        # their size do not pile up between the pieces that stay
        read = [
            n
            for n in plain
            if options.load_in_4bit and self.targets[n] in self.linear and n not in self.stored_4bit
            if not is_held(checkpoint.entries[n])
        ]
        most = max((checkpoint.entries[n].nbytes for n in read), default=0)
        self.buffer = torch.empty(most, dtype=torch.uint8)
        self.workspace = torch.empty(2, _SAMPLE if read else 0, device=device)
        self.hasher = futures.ThreadPoolExecutor(max_workers=1)

    def check_names(self) -> None:
        """Everything that does not fit, in one error, from the headers alone."""
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        buffers = dict(self.model.named_buffers())
        tied = tied_names(self.model).keys()
        ignored = list(getattr(self.model, "_keys_to_ignore_on_load_unexpected", None) or [])
        found = {self.targets[source] for source in self.sources}
        problems = [f"missing: {name}" for name in parameters.keys() - found - tied]
        for source in self.sources:
            target = self.targets[source]
            expected = parameters.get(target, buffers.get(target))
            if expected is None:
                if not _matches(target, ignored) and "rotary_emb.inv_freq" not in target:
                    problems.append(f"unexpected: {source}")
            elif source not in self.stored_4bit and self.checkpoint.entries[source].shape != tuple(
                expected.shape
            ):
                shape = list(self.checkpoint.entries[source].shape)
                problems.append(
                    f"{source}: {shape} in the file, {list(expected.shape)} in the model"
                )
        if problems:
            more = f"; and {len(problems) - 12} more" if len(problems) > 12 else ""
            raise ModelError(
                f"the weights in {self.checkpoint.directory} do not fit "
                f"{type(self.model).__name__}",
                found="; ".join(sorted(problems)[:12]) + more,
                ways_out=["check that config.json belongs to these weights"],
            )

    def load(self, source: str) -> None:
        """Read one tensor, quantize or cast it, and put it in its place."""
        module_name, _, attribute = self.targets[source].rpartition(".")
        try:
            module = self.model.get_submodule(module_name)
        except AttributeError:
            return
        value = self.read(source)
        if attribute in module._buffers:
            buffer = module._buffers[attribute]
            module._buffers[attribute] = value.to(
                self.device, buffer.dtype if buffer is not None else None
            )
        elif attribute in module._parameters:
            if not isinstance(value, NF4Tensor):
                self._refuse_whole_numbers(source, value)
                value = value.to(self.device, self.dtype)
                self._refuse_non_finite(source, value)
                self._refuse_torn_tie(source, value, module._parameters[attribute])
            module._parameters[attribute] = nn.Parameter(value, requires_grad=False)

    def is_quantized(self, source: str) -> bool:
        """Whether a tensor is held in 4 bits."""
        return self.options.load_in_4bit and (
            source in self.stored_4bit or self.targets[source] in self.linear
        )

    def read(self, source: str) -> Tensor:
        """One tensor as it is held, in 4 bits, or else as it is stored; hashed."""
        target = self.targets[source]
        if source in self.stored_4bit:
            return self._stored(source, target)
        in_4bit = self.is_quantized(source)
        if in_4bit and is_held(self.checkpoint.entries[source]):
            return self._held(source, read_held(self.checkpoint.entries[source], source))
        tensor = self.checkpoint.read(source, self.buffer if in_4bit else None)
        if in_4bit:
            self._refuse_whole_numbers(source, tensor)
            return self._quantize(source, tensor)
        self._hash(source, [tensor])
        return tensor

    def _refuse_whole_numbers(self, source: str, tensor: Tensor) -> None:
        if not tensor.is_floating_point() or tensor.dtype.itemsize < 2:
            raise ModelError(
                f"{source} is stored as {tensor.dtype}, which is not read here",
                ways_out=["use a 16- or 32-bit version of the model"],
            )

    def _stored(self, source: str, target: str) -> Tensor:
        layer = re.search(r"\.(\d+)\.", source)
        group = int(layer.group(1)) if layer else 0
        tensor = read_stored(self.checkpoint, source, self.streamer, group)
        expected = self.model.get_parameter(target).shape
        if tensor.shape != expected:
            raise ModelError(
                f"{source}: {list(tensor.shape)} in the file, {list(expected)} in the model"
            )
        if not self.options.load_in_4bit:
            return tensor.dequantize(self.dtype).to(self.device)
        held = self._held(source, tensor)
        if self.streamer is not None:
            futures.wait(self.hashes.values())
            self.streamer.release(group)
        return held

    def _held(self, source: str, tensor: NF4Tensor) -> NF4Tensor:
        """A tensor that is held in the 4 bits it is stored in; hashed."""
        self.records.append(self._record(source, tensor, None))
        self._hash(source, tensor.stored_tensors())
        tensor = tensor.with_dtype(self.dtype)
        return tensor if tensor.streamed else tensor._map(lambda part: part.to(self.device))

    def _hash(self, source: str, tensors: Iterable[Tensor]) -> None:
        """Hash beside the next tensor's reading; one at a time, so that no more than one is kept
        alive for it. What a tensor is called beside its name in the file makes no other base."""
        if source in self.twice:
            return
        futures.wait(self.hashes.values())
        self.hashes[source] = self.hasher.submit(_digest, list(tensors))

    def digest(self) -> str:
        digests = sorted((self._own_name(name), f.result()) for name, f in self.hashes.items())
        self.hasher.shutdown()
        return hashlib.sha256(json.dumps(digests).encode()).hexdigest()

    def _own_name(self, source: str) -> str:
        """The name a tensor has on disk; where only another name of a tied tensor is there, the
        tensor's own one in the model."""
        target = self.targets[source]
        alone = list(self.targets.values()).count(target) == 1
        return target if alone and source in tied_names(self.model) else source

    def _quantize(self, source: str, tensor: Tensor) -> Tensor:
        tensor = (
            tensor
            if tensor.dtype in (torch.float32, torch.bfloat16, torch.float16)
            else tensor.float()
        )
        try:
            quantized = quantize_as(tensor.to(self.device), self.options)
        except ValueError as error:
            raise self._non_finite(source, str(error)) from error
        self.records.append(self._record(source, quantized, tensor))
        self._hash(source, quantized.stored_tensors())
        return quantized.with_dtype(self.dtype)

    def _refuse_torn_tie(self, source: str, value: Tensor, before: Tensor | None) -> None:
        """Raise ModelError if the file holds two different tensors for one of the model."""
        if before is None or before.is_meta or torch.equal(before, value):
            return
        target = self.targets[source]
        names = [name for name in self.sources if self.targets[name] == target]
        raise ModelError(
            f"{' and '.join(names)} are one tensor in this model (config.json ties them), and "
            "differ in the file",
            where=str(self.checkpoint.entries[source].file),
            ways_out=[
                'set "tie_word_embeddings" to false in config.json, if they were trained apart',
                "or remove the one that is out of date from the file",
            ],
        )

    def _refuse_non_finite(self, source: str, tensor: Tensor) -> None:
        # the extremes carry a NaN or an infinity, and need no copy of the tensor to be found
        if tensor.numel() and not all(
            math.isfinite(end) for end in torch.stack(torch.aminmax(tensor)).tolist()
        ):
            raise self._non_finite(
                source, f"{int((~torch.isfinite(tensor)).sum())} values are NaN or infinite"
            )

    def _non_finite(self, source: str, found: str) -> ModelError:
        return ModelError(
            f"the weight {source} is not finite",
            where=str(self.checkpoint.entries[source].file),
            found=found,
            ways_out=["download the file again", "or use another checkpoint of the model"],
        )

    def _record(self, source: str, quantized: NF4Tensor, original: Tensor | None) -> dict[str, Any]:
        record: dict[str, Any] = {
            "name": source,
            "shape": list(quantized.shape),
            "bytes": quantized.stored_bytes,
            "weights": quantized.numel(),
        }
        if original is not None:
            record["relative_mse"] = relative_error(quantized, original, self.workspace)
        return record

    def coverage(self) -> float:
        """Share of the weights in layers (all but embeddings, head and vectors) that is held in 4
        bits."""
        total = sum(self.in_layers.values())
        return sum(record["weights"] for record in self.records) / total if total else 0.0


def _digest(tensors: list[Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy())  # pyright: ignore[reportArgumentType]
    return digest.hexdigest()


_SAMPLE = 1 << 20


def relative_error(quantized: NF4Tensor, original: Tensor, workspace: Tensor) -> float:
    """Squared quantization error over squared weight, of the first million weights (whole blocks).

    Args:
        workspace: fp32 [2, a million], overwritten: temporary tensors between the weights that stay
            would split the heap.
    """
    n = min(_SAMPLE, original.numel())
    n = n if n == original.numel() else n - n % quantized.block_size
    parts = quantized.parts
    blocks = -(-n // parts.block_size)
    if n < original.numel():
        groups = -(-blocks // parts.nested_block_size)
        parts = parts._replace(
            packed=parts.packed[: n // 2],
            absmax=parts.absmax[:blocks],
            nested_absmax=None if parts.nested_absmax is None else parts.nested_absmax[:groups],
        )
    values, reference = workspace[0, :n], workspace[1, :n]
    ops.dequantize_4bit(parts, n, torch.float32, values)
    reference.copy_(original.reshape(-1)[:n])
    power = float(torch.linalg.vector_norm(reference))
    return (float(torch.linalg.vector_norm(values.sub_(reference))) / power) ** 2 if power else 0.0


def _matches(name: str, patterns: list[str]) -> bool:
    return any(re.search(pattern, name) for pattern in patterns)


def quantize_as(weight: Tensor, options: ModelOptions, **otherwise: Any) -> NF4Tensor:
    """A weight in the 4 bits that the options ask for. otherwise: settings of `quantize` that stand
    above them."""
    settings: dict[str, Any] = {
        "block_size": options.bnb_4bit_blocksize,
        "double_quant": options.bnb_4bit_use_double_quant,
        "quant_type": options.bnb_4bit_quant_type,
    }
    return quantize(weight, **{**settings, **otherwise})
