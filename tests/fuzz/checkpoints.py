"""Small random models of many families, each with a tokenizer and a chat template."""

import json
import os
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

import halfbyte

from .program import REAL, WORDS, Model

BUILTIN = Path(halfbyte.__file__).parent / "builtin"
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
}
OTHER: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256, "n_inner": 128}
    | {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "gpt_neox": {"num_key_value_heads": 4},
    "gemma3_text": {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]},
    "gemma2": {"sliding_window": 16},
    "mistral": {"sliding_window": 24},
    "starcoder2": {"residual_dropout": 0.0, "embedding_dropout": 0.0, "sliding_window": None},
    "stablelm": {"partial_rotary_factor": 0.25},
    "glm4": {"partial_rotary_factor": 0.5},
    "phi3": {"sliding_window": 32},
    "smollm3": {"no_rope_layers": [1, 0]},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
}

# Each but the first follows the form of a family people use, in our own words.
TEMPLATE = {
    "chatml": (
        "{% if tools %}{{ '<|im_start|>system\n' + tools | tojson + '<|im_end|>\n' }}{% endif %}"
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}"
        "{% for call in m.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}"
        "{{ '<|im_end|>' + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "headers": (
        "{{ bos_token }}{% for m in messages %}{{ '<|head|>' + m['role'] + '<|/head|>\n\n' + "
        "m['content'] | trim + '<|eot|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|head|>assistant<|/head|>\n\n' }}{% endif %}"
    ),
    "inst": (
        "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] + '\n\n' %}"
        "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}"
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}"
        "{{ '[INST] ' + (system if loop.first else '') + m['content'] + ' [/INST]' }}"
        "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
    ),
    "thinking": (
        "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m['role'] == 'user' %}"
        "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
        "{% for m in messages %}{% set text = m['content'] %}"
        "{% if m['role'] == 'assistant' and '</think>' in text and loop.index0 < ns.last %}"
        "{% set text = text.split('</think>')[-1].lstrip('\n') %}{% endif %}"
        "{{ '<|im_start|>' + m['role'] + '\n' + text + '<|im_end|>' + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
}
SPECIAL = {
    "chatml": ("<s>", "<|im_end|>", ("<|im_start|>",)),
    "headers": ("<s>", "<|eot|>", ("<|head|>", "<|/head|>")),
    "inst": ("<s>", "</s>", ("[INST]", "[/INST]")),
    "thinking": ("<s>", "<|im_end|>", ("<|im_start|>",)),
}
"""bos, eos, and other control tokens of a template."""


@cache
def _tokenizer(template: str) -> PreTrainedTokenizerFast:
    """A tokenizer of 600 pieces: of words behind a mark for "inst", as sentencepiece makes them, of
    bytes otherwise."""
    bos, eos, more = SPECIAL[template]
    special = [bos, eos, "<|pad|>", *more]
    sentencepiece = template == "inst"
    made = Tokenizer(models.BPE(byte_fallback=sentencepiece, unk_token=None))
    text = [" ".join(WORDS[i::3]) + "\nsystem user assistant" for i in range(3)] * 4
    trainer: Any
    if sentencepiece:
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)  # type: ignore[assignment]
        made.decoder = decoders.Sequence(  # type: ignore[assignment]
            [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first", split=False)]
        )
        pieces = [f"<0x{i:02X}>" for i in range(256)]
        trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=[*special, *pieces])  # type: ignore[call-arg]
    else:
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
        made.decoder = decoders.ByteLevel()  # type: ignore[assignment]
        letters = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(  # type: ignore[call-arg]
            vocab_size=600, special_tokens=special, initial_alphabet=letters
        )
    made.train_from_iterator(text, trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token=bos, eos_token=eos, pad_token="<|pad|>"
    )
    wrapped.chat_template = TEMPLATE[template]
    return wrapped


def _cut(real: Path, path: Path) -> None:
    """The first four layers of a model, with its tokenizer."""
    config = AutoConfig.from_pretrained(real, num_hidden_layers=4)
    loud = logging.get_verbosity()
    logging.set_verbosity_error()  # of weights that find no layer
    made = AutoModelForCausalLM.from_pretrained(real, config=config, dtype="auto")
    logging.set_verbosity(loud)
    made.save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(real / name, path / name)


def checkpoint(model: Model, home: Path) -> Path:
    """The model's directory below ``home``, made where it is not there yet. In 4 bits and 16 the
    same files serve."""
    path = home / "-".join((model.family, model.template, str(model.tied), model.stored))
    if (path / "config.json").exists():
        return path
    shutil.rmtree(path, ignore_errors=True)
    if model.family == REAL[0]:
        _cut(Path(os.environ[REAL[1]]), path)
        return path
    if model.template == "builtin":
        tokens, eos, pad, bos = 3072, 1, 0, None
    else:
        tokenizer = _tokenizer(model.template)
        tokens, eos, pad = len(tokenizer) + 5, tokenizer.eos_token_id, tokenizer.pad_token_id
        bos = tokenizer.bos_token_id
    sizes = {} if model.family == "gpt2" else SIZES
    config = AutoConfig.for_model(
        model.family,
        vocab_size=tokens,
        bos_token_id=bos,
        eos_token_id=eos,
        pad_token_id=pad,
        **{**sizes, **OTHER.get(model.family, {})},
    )
    config.tie_word_embeddings = model.tied
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, p in made.named_parameters():
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=0.08)
        elif "bias" in name:
            torch.nn.init.normal_(p, std=0.02)
    made.to(getattr(torch, model.stored)).save_pretrained(path)
    if model.template == "builtin":
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            shutil.copy(BUILTIN / name, path / name)
    else:
        _tokenizer(model.template).save_pretrained(path)
    assert json.loads((path / "config.json").read_text())["model_type"] == model.family
    return path
