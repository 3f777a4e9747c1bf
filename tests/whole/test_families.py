"""Every causal family that transformers can build small: `optimize` beside the script without it,
and the power of a merge's verification.

The checkpoints are made by builders that are not part of this repository; without them the test is
skipped.
"""

import copy
import gc
import importlib.util
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import halfbyte
from halfbyte.adapters.lora import LoraLinear, lora_layers
from halfbyte.config.options import ModelOptions
from halfbyte.errors import HalfbyteError, ModelError, VerificationError
from halfbyte.exporters.exact import recompute
from halfbyte.exporters.write import write_merged
from halfbyte.progress import no_progress

from ..exporters.test_exact import HONEST, missing, rescaled, transposed, without_rslora
from ..helpers import SHARED, train_adapter

FAMILIES = SHARED / "families" / "families.py"
PAGE = Path(__file__).parents[2] / "docs" / "families.md"
LIMIT = 1e-5
"""Of a gradient's norm, in fp32: rounding, over two layers."""
WORSE = 4
"""Times the script's own distance from fp64, where that is more: what is recurrent is ill
conditioned."""


needs_builders = pytest.mark.skipif(
    not FAMILIES.is_file(), reason="the builders of families are not here"
)


def builders() -> Any:
    spec = importlib.util.spec_from_file_location("families", FAMILIES)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["families"] = module
    spec.loader.exec_module(module)
    return module


def adapted(model: Any) -> Any:
    torch.manual_seed(0)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")
    model = peft.get_peft_model(model, config)
    torch.manual_seed(1)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.05)
    return model.train()


def gradients(model: Any, checkpointing: bool) -> dict[str, Tensor]:
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    ids = (torch.arange(40) * 7 % 150 + 5).view(2, 20)
    torch.manual_seed(7)
    model(input_ids=ids, labels=ids).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def furthest(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert found.keys() == expected.keys()
    return max(
        float((found[n].double() - g.double()).norm() / g.double().norm())
        for n, g in expected.items()
        if g.norm() > 1e-9
    )


def outcome(base: Any, checkpointing: bool) -> str:
    """What became of a family, for the table; raises where that is wrong."""
    try:
        expected = gradients(adapted(copy.deepcopy(base)), checkpointing)
    except (ValueError, AttributeError) as error:
        return f"the script itself: {str(error).splitlines()[0][:60]}"
    model = halfbyte.optimize(adapted(copy.deepcopy(base)), say=lambda line: None)
    found = gradients(model, checkpointing)
    error = furthest(found, expected)
    if error <= LIMIT:
        return "same"
    wide = adapted(copy.deepcopy(base)).double()
    if hasattr(base, "set_experts_implementation"):  # grouped products have no fp64
        wide.get_base_model().set_experts_implementation("eager")
    exact = gradients(wide, checkpointing)
    mine, its = furthest(found, exact), furthest(expected, exact)
    assert mine <= max(LIMIT, WORSE * its), f"{mine:.1e} from fp64, the script {its:.1e}"
    return "as near to fp64"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # PEFT's, of patterns that match nothing
@needs_builders
def test_optimize_leaves_every_familys_gradients(tmp_path: Path):
    module = builders()
    lines, wrong = [], []
    for family in module.FAMILIES:
        if family.group == "refuse" or family.after is not None:
            continue
        base = module.make(family, tmp_path / "model")
        base.config.use_cache = False
        cells = []
        for checkpointing in (False, True):
            try:
                cells.append(outcome(base, checkpointing))
            except Exception as error:
                wrong.append(f"{family.name}: {type(error).__name__} {error}")
        lines.append(f"| {family.name} | {' | '.join(cells)} |")
        gc.collect()
    assert not wrong, "\n".join(wrong)
    assert_on_page(lines)


def assert_on_page(lines: list[str]) -> None:
    page = PAGE.read_text()
    absent = [line for line in lines if line not in page]
    assert not absent, f"{PAGE} lacks:\n" + "\n".join(absent)


WRONG = (missing, rescaled, transposed, without_rslora)


def on_the_first(wrong: Any, model: Any) -> Any:
    """A wrong merge of one layer: the first adapted one that it changes."""
    square = wrong is transposed
    layers = [layer for _, layer in lora_layers(model) if layer.lora_B.any()]
    if square:
        layers = [layer for layer in layers if layer.weight.shape[0] == layer.weight.shape[1]]
    if not layers:
        return None

    def merged(layer: LoraLinear, weight: Tensor, dtype: torch.dtype) -> Tensor:
        if layer is not layers[0]:
            return HONEST(layer, weight, dtype)
        wide = weight.float()
        change = HONEST(layer, weight, torch.float32) - wide
        return (wide + (change.T if square else 0 * change)).to(dtype)

    return merged


def merges_of(base: Path, home: Path) -> str:
    """What becomes of a family's merges, for the table; raises where that is wrong."""
    options: dict[str, Any] = {"use_rslora": True, "judge": False, "allow_low_coverage": True}
    try:
        run = train_adapter(base, home, "run", max_steps=6, **options)
    except HalfbyteError as error:
        return f"not trained: {re.sub(r'/[^ ]*/', '', error.what.splitlines()[0])[:70]} | "
    try:
        halfbyte.merge(run.path, home / "merged")
    except ModelError as error:
        assert "shares its weight" in error.what, error
        return "refused: layers with adapters of their own share a weight | "
    running = halfbyte.load(run.path)[0]
    refused = tried = 0
    for number, kind in enumerate(WRONG):
        wrong = kind if kind in (rescaled, without_rslora) else on_the_first(kind, running)
        if wrong is None:
            continue
        target, tried = home / f"wrong {number}", tried + 1
        target.mkdir()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(LoraLinear, "merged", wrong)
            write_merged(base, target, running, "trained", no_progress)
        held = ModelOptions(**run.config().holding())
        given = (base, run.adapter, running, "trained", held, no_progress)
        try:
            recompute(target, *given)
        except VerificationError:
            refused += 1
    assert refused == tried >= 3, f"{refused} of {tried} wrong merges are refused"
    return f"accepted | {refused} of {tried}"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@needs_builders
def test_a_right_merge_is_accepted_and_wrong_ones_are_refused(tmp_path: Path):
    """One layer's adapter missing, the scale off by five percent, one square layer transposed,
    rsLoRA's scale taken for LoRA's; six steps after the start."""
    module = builders()
    lines, wrong = [], []
    for family in module.FAMILIES:
        if family.group == "refuse":
            continue
        home = tmp_path / family.name
        home.mkdir()
        module.make(family, home / "model", torch.bfloat16)
        try:
            cells = merges_of(home / "model", home)
            lines.append(f"| {family.name} | {cells} |")
        except Exception as error:
            wrong.append(f"{family.name}: {type(error).__name__} {str(error)[:300]}")
        shutil.rmtree(home)
        gc.collect()
    assert not wrong, "\n".join(wrong)
    assert_on_page(lines)
