"""``halfbyte merge RUN --onto trained|original -o DIR``."""

from typing import Any

from ..config import MergeConfig
from . import console
from .options import Verb


def merge(record: MergeConfig) -> dict[str, Any]:
    """Add the adapter of RUN into the weights, write a model every tool loads, and verify it."""
    from ..merge import merge

    receipt = merge(
        record.run,
        record.output_dir,
        onto=record.onto,
        min_agreement=record.min_agreement,
        device=record.device,
        progress=console.progress,
        say=console.say,
    )
    console.say(
        f"verified on {receipt.tokens} tokens of {receipt.rows} rows ({receipt.compute_dtype}): "
        f"logits differ by at most {receipt.max_logit_difference:.2e} (largest {receipt.largest_logit:.1f}), "
        f"{receipt.greedy_agreement:.2%} of the predicted tokens are the same"
    )
    if receipt.agreement_with_trained_run is not None:
        console.say(f"against the 4-bit model that was trained: {receipt.agreement_with_trained_run:.2%} the same")
    console.say(f"the merged model is in {record.output_dir}")
    console.say(f'next: halfbyte chat {record.output_dir} --load_in_4bit false --prompt "..."')
    return {"output_dir": record.output_dir, **receipt.as_dict()}


command = Verb("merge", MergeConfig, merge, positional=("run",), short={"o": "output_dir"})
