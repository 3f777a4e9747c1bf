"""What can be quantized and adapted, asked in one place."""

from transformers import AutoConfig, LlamaForCausalLM

from halfbyte.adapters.lora import AdapterConfig, attach_lora, target_names
from halfbyte.model.architecture import build_empty
from halfbyte.model.targets import adaptable, is_target, quantizable, targets


def test_targets_are_linear_weights_and_the_head_is_told_apart(tiny_llama: LlamaForCausalLM):
    found = targets(tiny_llama)
    assert len(found) == 2 * 7 + 1 and [t.path for t in found if t.is_head] == ["lm_head"]
    assert quantizable(tiny_llama) == {t.name for t in found if not t.is_head}
    assert adaptable(tiny_llama) == target_names(tiny_llama, "all-linear")
    assert not is_target(tiny_llama.model.embed_tokens, "weight")
    assert not is_target(tiny_llama.model.layers[0].self_attn.q_proj, "bias")


def test_adapted_layers_stay_targets(tiny_llama: LlamaForCausalLM):
    before = targets(tiny_llama)
    attach_lora(tiny_llama, AdapterConfig(4, 8))
    assert targets(tiny_llama) == before


def test_what_a_mamba_block_multiplies_by_itself_stays_as_it_is():
    """``dt_proj``, past the layer; and ``out_proj`` takes no adapter, as PEFT has it."""
    config = AutoConfig.for_model("mamba", vocab_size=64, hidden_size=32, num_hidden_layers=1)
    model = build_empty(config)
    held, adapted = quantizable(model), adaptable(model)
    assert {name.split(".")[-2] for name in held} == {"in_proj", "x_proj", "out_proj"}
    assert {path.rpartition(".")[2] for path in adapted} == {"in_proj", "x_proj"}
