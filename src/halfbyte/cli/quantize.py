"""``halfbyte quantize MODEL -o DIR``."""

from typing import Any

from ..config.verbs import QuantizeConfig
from . import console
from .options import Verb


def quantize(record: QuantizeConfig) -> dict[str, Any]:
    """Write MODEL with its linear layers in 4 bits, as transformers and bitsandbytes open it."""
    from ..config.options import FourBitOptions, ModelOptions
    from ..files import hub
    from ..quantization.writer import quantize

    options = ModelOptions(**{name: getattr(record, name) for name in FourBitOptions.model_fields})
    base = hub.base_of(record)
    report = quantize(base, options, record.output_dir, console.progress)
    before = sum(each["weights"] for each in report.tensors) * 2
    after = sum(each["bytes"] for each in report.tensors)
    errors = [each["relative_mse"] for each in report.tensors if "relative_mse" in each]
    console.say(
        f"{len(report.tensors)} weights, {report.coverage:.1%} of those in layers: "
        f"{before / 1e6:,.1f} MB in 16 bits, {after / 1e6:,.1f} MB in 4"
        + (f"; squared error {max(errors):.3%} of the weights' at most" if errors else "")
    )
    console.say(f"the quantized model is in {record.output_dir}")
    console.following("train", record.output_dir, raw="--data my.jsonl")
    return {"output_dir": record.output_dir, "bytes": after, **report.as_dict()}


command = Verb(
    "quantize", QuantizeConfig, quantize, positional=("model",), short={"o": "output_dir"}
)
