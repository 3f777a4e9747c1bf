"""The ledger against what is really allocated, and against parameter counts of real models."""

from pathlib import Path

import pytest
import torch
from conftest import shared

from halfbyte import hub, nf4
from halfbyte.config import TrainConfig
from halfbyte.load import load_base, read_config
from halfbyte.plan import PlanOptions, plan_memory
from halfbyte.run import Run
from halfbyte.train import Trainer


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize(("weights", "block"), [(64, 64), (65, 64), (17 * 64 * 256 + 3, 64), (4096, 32), (1, 4096)])
def test_stored_sizes_are_what_a_tensor_takes(weights: int, block: int, double_quant: bool):
    tensor = nf4.quantize(torch.randn(weights), block_size=block, double_quant=double_quant)
    assert sum(nf4.stored_sizes(weights, block, double_quant)) == tensor.stored_bytes


def test_every_resident_part_is_what_a_training_allocates(tmp_path: Path):
    """The built-in model, read, adapted and given an optimizer: byte for byte."""
    path = hub.resolve("demo")
    config = TrainConfig(model="demo", data="x", output_dir=str(tmp_path), dtype="bfloat16", device="cpu")
    trainer = Trainer(config, Run(tmp_path))
    trainer.build_model(path)
    model = trainer.learner.model
    plan = plan_memory(read_config(path), config, 512)
    weights = [p for p in model.parameters() if isinstance(p.data, nf4.NF4Tensor) or hasattr(p, "stored_bytes")]
    assert sum(p.stored_bytes for p in weights) == plan.bytes_of("4-bit codes", "scales")  # pyright: ignore
    assert sum(p.nbytes for p in trainer.learner.trained) == plan.bytes_of("adapters") == plan.bytes_of("gradients")
    states = trainer.learner.optimizer.state_tensors().values()  # pyright: ignore[reportAttributeAccessIssue]
    assert sum(t.nbytes for t in states) == plan.bytes_of("optimizer states")
    embedding = model.get_input_embeddings().weight
    assert embedding is model.get_output_embeddings().weight, "tied, and counted once"
    assert embedding.nbytes == plan.bytes_of("embeddings and head")
    norms = [p for name, p in model.named_parameters() if "norm" in name]
    assert sum(p.nbytes for p in norms) == plan.bytes_of("norms and biases")
    unquantized, _ = load_base(path, config.model_copy(update={"load_in_4bit": False}))
    twin = plan_memory(read_config(path), config.model_copy(update={"load_in_4bit": False}), 512)
    held = twin.bytes_of("16-bit layers", "embeddings and head", "norms and biases")
    assert sum(p.nbytes for p in unquantized.parameters()) == held


@pytest.mark.parametrize(
    ("model", "linear", "lora"),
    [
        ("llama-2-7b", 6_476_005_376, 39_976_960),
        ("llama-2-13b", 12_687_769_600, 62_586_880),
        ("llama-2-70b", 68_451_041_280, 207_093_760),
        ("llama-3-8b", 6_979_321_856, 41_943_040),
    ],
)
def test_counts_of_real_models(model: str, linear: int, lora: int):
    plan = plan_memory(read_config(shared(f"geometry/{model}")), PlanOptions(), 512)
    assert (plan.quantized_parameters, plan.lora_parameters) == (linear, lora)
