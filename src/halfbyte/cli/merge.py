"""``halfbyte merge RUN --onto trained|original -o DIR``."""

from pathlib import Path
from typing import Any

from ..config.verbs import MergeConfig
from . import console
from .options import Verb


def merge(record: MergeConfig) -> dict[str, Any]:
    """Add the adapter of RUN into the weights, write a model every tool loads, and verify it."""
    from ..exporters.merge import merge
    from ..files.publish import publish, reserve

    repository = reserve(record.hub_model_id, record.hub_private_repo) if record.push_to_hub else ""
    receipt = merge(
        record.run,
        record.output_dir,
        onto=record.onto,
        min_agreement=record.min_agreement,
        requantize=record.requantize,
        min_survival=record.min_survival,
        device=record.device,
        progress=console.progress,
        say=console.say,
    )
    console.say(
        f"verified on {receipt.tokens} tokens of {receipt.rows} rows ({receipt.compute_dtype}): "
        f"logits differ by at most {receipt.max_logit_difference:.2e} (largest "
        f"{receipt.largest_logit:.1f}), "
        f"{receipt.greedy_agreement:.2%} of the predicted tokens are the same"
    )
    rows = [["the run, unmerged", "", "", f"{receipt.running_loss:.4f}"]]
    for onto, found in receipt.comparisons.items():
        mark = (
            " (recommended)" if onto == receipt.recommended and len(receipt.comparisons) > 1 else ""
        )
        rows.append(
            [
                f"onto {onto}{mark}",
                f"{found.kl:.2e}",
                f"{found.greedy_agreement:.2%}",
                f"{found.loss:.4f}",
            ]
        )
    title = f"beside the model that was trained, on {receipt.rows} rows {receipt.rows_are}"
    console.table(title, ["", "KL divergence, nats", "same token", "loss"], rows)
    if receipt.recommended != receipt.onto:
        console.say(f"--onto {receipt.recommended} is nearer to the model that was trained")
    console.say(f"the merged model is in {record.output_dir}")
    if repository:
        again = f"hf upload {repository} {record.output_dir}"
        console.say(
            "published: "
            f"{publish(Path(record.output_dir), repository, 'merged with halfbyte', again)}"
        )
    held = "" if record.requantize else " --load_in_4bit false"
    console.say(f'next: halfbyte chat {record.output_dir}{held} --prompt "..."')
    return {"output_dir": record.output_dir, **receipt.as_dict()}


command = Verb("merge", MergeConfig, merge, positional=("run",), short={"o": "output_dir"})
