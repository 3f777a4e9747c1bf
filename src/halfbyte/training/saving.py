"""What a training leaves behind: checkpoints, and the result that other tools load.

Each is there whole or not at all (`files.atomic.new_directory`); older ones are untouched until a
newer one is complete.
"""

from pathlib import Path
from typing import Any

from ..adapters.lora import has_adapter
from ..adapters.peft_files import save_adapter
from ..config.options import REORDERING, TrainConfig
from ..data.renderer import Renderer
from ..engine.learner import Learner, all_finite
from ..errors import NonFiniteError
from ..exporters.write import config_of
from ..files import atomic
from ..files.companions import copy_companions, generation_settings, write_templates
from ..files.publish import publish
from ..run import checkpoint
from ..run.card import CARD, adapter_card
from ..run.directory import (
    ADAPTER_FACTS,
    EVALS,
    TEMPLATES_AS_TRAINED,
    Run,
    files_of_result,
)
from ..run.fingerprint import fingerprint
from ..run.source import named_elsewhere
from .promise import Promise

AGAIN = "then repeat the command with --resume_from_checkpoint auto"


def save_checkpoint(
    run: Run, learner: Learner, promise: Promise, info: dict[str, Any], step: int, total_steps: int
) -> None:
    """Save the state after a step, and prune older checkpoints; the best and the newest stay.

    Args:
        info: the run's record, of which the checkpoint holds what a resume must share.

    Raises:
        StorageError: the disk said no; nothing of it is left behind.
    """
    config = promise.config
    if not learner.is_finite() or not all_finite(
        checkpoint.optimizer_tensors(learner.optimizer).values()
    ):
        raise NonFiniteError(
            f"the state after step {step} is not finite, and is not saved",
            ways_out=["lower --learning_rate", "--resume_from_checkpoint auto goes on before it"],
        )
    state = {
        "total_steps": total_steps,
        "updates": learner.updates,
        "loss_scale": [learner.scale.value, learner.scale.good],
        "since_logged": list(learner.since_logged),
        "first_loss": info.get("first_loss"),
        "cut": {
            "given": promise.given,
            "now": {name: getattr(config, name) for name in REORDERING},
        },
        "base_digest": info["base"]["digest"],
        "fingerprint": fingerprint(info),
    }
    checkpoint.save(
        run.checkpoints,
        step,
        learner.model,
        learner.optimizer,
        state,
        config.save_total_limit,
        config.model,
        best_step(run, step),
    )


def best_step(run: Run, step: int) -> int | None:
    """Return the step with the lowest held-out loss, among the checkpoints there are and
    ``step``."""
    there = {path.name for path in checkpoint.directories(run.checkpoints)} | {f"step-{step:08d}"}
    rows = [row for row in run.read(EVALS) if f"step-{row['step']:08d}" in there]
    losses = {row["step"]: row["loss"] for row in rows if row["loss"] is not None}
    return min(losses, key=lambda done: losses[done]) if losses else None


def save_result(
    run: Run, learner: Learner, renderer: Renderer, info: dict[str, Any], config: TrainConfig
) -> None:
    """Write adapter/: what other tools load (of a full fine-tuning: the whole model).

    Raises:
        StorageError: the disk said no; an older result is as it was.
    """
    base = Path(info["base"]["path"])
    with atomic.new_directory(run.adapter, replace=True, ways_out=[AGAIN]) as target:
        if has_adapter(learner.model):
            save_adapter(learner.model, target, *named_elsewhere(config))
        else:
            _save_masters(learner, target, base)
        own = renderer.has_own_template and config.chat_template is None
        misread = getattr(renderer.tokenizer, "misread", None)
        copy_companions(base, target, templates=own, misread=misread)
        if not own:
            write_templates(target, renderer.chat_template)
            atomic.write_json(run.path / TEMPLATES_AS_TRAINED, renderer.templates)
        atomic.write_json(
            target / "generation_config.json", generation_settings(base, renderer.stop_ids())
        )
        atomic.write_bytes(target / CARD, adapter_card(run, info).encode())
        facts = {"base_digest": info["base"]["digest"], "template_sha256": info["template_sha256"]}
        atomic.write_json(target / ADAPTER_FACTS, {**facts, "files": files_of_result(target)})


def _save_masters(learner: Learner, target: Path, base: Path) -> None:
    """Every parameter as it was trained: fp32 masters, which 16 bits would round updates away
    from; and the base's configuration in the form that it has there."""
    model = learner.model
    computed_in = model.config.dtype
    try:
        model.save_pretrained(target)
    finally:
        model.config.dtype = computed_in
    config = config_of(base, model)
    for part in (config, config.get("text_config")):
        if isinstance(part, dict):
            part["torch_dtype" if "torch_dtype" in part else "dtype"] = "float32"
    atomic.write_json(target / "config.json", config)


def save_judgement(run: Run, info: dict[str, Any]) -> None:
    """Write what became of a finished run (``info["judged"]``) into its record and its card."""
    run.write_info(info)
    atomic.write_bytes(run.adapter / CARD, adapter_card(run, info).encode())


def publish_result(run: Run, promise: Promise, repository: str, steps: int) -> None:
    """Upload the result, where ``push_to_hub`` asks for it."""
    config = promise.config
    if not config.push_to_hub:
        return
    to = "hf" if config.full else "peft"
    again = (
        f"halfbyte export {run.path} --to {to} -o DIR --push_to_hub --hub_model_id "
        f"{config.hub_model_id}"
    )
    where = publish(run.adapter, repository, f"{steps} steps with halfbyte", again)
    promise.reporter.say(f"published: {where}")
