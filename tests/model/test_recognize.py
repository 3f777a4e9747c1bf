"""Tests of `model.recognize`."""

import functools

import pytest
import torch
from torch import Tensor, nn

from halfbyte import ops
from halfbyte.model import fusion
from halfbyte.model.attention import packed
from halfbyte.model.fp32 import distance
from halfbyte.model.fusion import FusedNorm
from halfbyte.model.recognize import activation_name, is_function_of

from ..helpers import needs_library, norm

NORMS = [
    ("llama", "LlamaRMSNorm"),
    ("qwen3", "Qwen3RMSNorm"),
    ("gemma2", "Gemma2RMSNorm"),
    ("gpt_oss", "GptOssRMSNorm"),
    ("helium", "HeliumRMSNorm"),
    ("moshi", "MoshiRMSNorm"),
]


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("family", "name"), NORMS)
def test_norms_of_many_families(family: str, name: str, dtype: torch.dtype):
    """16-bit results are the same bits nearly everywhere: means are summed in another order."""
    module = norm(family, name).to(dtype).requires_grad_(False)
    x = torch.randn(20, 48, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected = module(x)
    holder = nn.Sequential(module)
    assert fusion.fuse(holder).norms == 1 and isinstance(module, FusedNorm)
    found = module(x)
    if dtype != torch.float32:
        assert float((found != expected).float().mean()) < 0.02
    unit = {torch.float32: 2.0**-22, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}[dtype]
    assert bool(((found - expected).abs() <= 2 * unit * expected.abs() + 1e-30).all())


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["Llama", "Mistral", "Qwen2", "Qwen3"])
def test_attentions_of_many_families(family: str, dtype: torch.dtype):
    """Two rows with and without the fused rotation, a window where the family has one: outputs and
    gradients."""
    import transformers

    shape = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    more = {"use_sliding_window": True, "max_window_layers": 1} if family.startswith("Qwen") else {}
    config = getattr(transformers, f"{family}Config")(
        **shape, num_key_value_heads=2, head_dim=16, vocab_size=99, sliding_window=5, **more
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config).to(dtype)
    model.config.dtype = dtype
    model.config.use_cache = False
    ids, cu_seqlens = torch.arange(24)[None], torch.tensor([0, 9, 24], dtype=torch.int32)
    positions = torch.cat((torch.arange(9), torch.arange(15)))[None]

    def run() -> tuple[Tensor, Tensor]:
        model.zero_grad()
        with packed(model):
            hidden = model.model(
                input_ids=ids, position_ids=positions, cu_seq_lens_q=cu_seqlens
            ).last_hidden_state
        (hidden.float().flatten() * torch.linspace(-1, 1, hidden.numel())).sum().backward()
        return hidden.detach(), model.model.layers[0].self_attn.k_proj.weight.grad.clone()

    expected = run()
    assert fusion.fuse(model).attentions == 2
    for mine, theirs in zip(run(), expected, strict=True):
        assert distance(mine, theirs) <= {torch.float32: 2e-4, torch.bfloat16: 0.03}[dtype]
    # with a cache, or another attention, it is the model's own
    torch.testing.assert_close(
        model.generate(ids[:, :5], max_new_tokens=3, do_sample=False).shape, torch.Size([1, 8])
    )


def test_activations_are_known_by_their_values():
    from transformers.activations import ACT2FN

    expected = {
        "silu": "silu",
        "swish": "silu",
        "gelu_pytorch_tanh": "gelu_tanh",
        "gelu": "gelu",
        "gelu_new": "gelu_tanh",
    }
    for name, ours in expected.items():
        assert activation_name(ACT2FN[name]) == ours
    for name in ("relu", "quick_gelu", "relu2", "tanh", "gelu_10"):
        assert activation_name(ACT2FN[name]) is None
    assert set(expected.values()) == set(ops.ACTIVATIONS)


def test_a_function_is_known_through_transformers_own_deprecations_alone():
    """5.17 wraps its mask so; what another package wraps around it is another function."""
    from transformers.utils.deprecation import deprecate_kwarg

    def own(b: int = 1) -> int:
        return b

    known = (own.__globals__["__name__"], "own")
    assert is_function_of(own, *known)
    assert is_function_of(deprecate_kwarg("a", version="99.0", new_name="b")(own), *known)
    assert not is_function_of(functools.wraps(own)(lambda b=1: own(b)), *known)
