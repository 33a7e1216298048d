"""Tiny packed decoders that have a native step, and what it means that their logits agree."""

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)
from transformers.cache_utils import StaticLayer

from maqd_hf import MaQDConfig, pack_model, quantize_model

STATIC = StaticLayer(2)
KNOWS_LENGTH = isinstance(getattr(STATIC, "cumulative_length", None), torch.Tensor) and hasattr(
    STATIC, "crop"
)
knows_length = pytest.mark.skipif(
    not KNOWS_LENGTH, reason="static caches of this transformers version are the model's own"
)
TOLERANCE = 1e-5  # of the logits' norm, where no activation code tips over
SIZES = {
    "vocab_size": 259,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
FAMILIES = {
    "llama": (LlamaForCausalLM, LlamaConfig, {"tie_word_embeddings": True}),
    "odd widths": (
        LlamaForCausalLM,
        LlamaConfig,
        {
            "hidden_size": 40,
            "intermediate_size": 75,
            "num_attention_heads": 5,
            "head_dim": 8,
            "num_key_value_heads": 1,
            "attention_bias": True,
        },
    ),
    "llama3 rope": (
        LlamaForCausalLM,
        LlamaConfig,
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
                "rope_theta": 500.0,
            }
        },
    ),
    "mistral": (MistralForCausalLM, MistralConfig, {"sliding_window": None}),
    "sliding": (MistralForCausalLM, MistralConfig, {"sliding_window": 20}),
    "one slides": (
        Qwen2ForCausalLM,
        Qwen2Config,
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "gpt2": (GPT2LMHeadModel, GPT2Config, {"n_embd": 64, "n_head": 4, "n_layer": 2}),
    "opt": (OPTForCausalLM, OPTConfig, {"ffn_dim": 96, "word_embed_proj_dim": 64}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 32}),
    "smollm3": (SmolLM3ForCausalLM, SmolLM3Config, {"no_rope_layer_interval": 2}),
}


def packed(family="llama", dtype=torch.float32, **settings):
    torch.manual_seed(0)
    model_class, config_class, extra = FAMILIES[family]
    model = model_class(config_class(**SIZES | extra)).to(dtype).eval()
    settings = {"weight_levels": 16, "activation_scaling": "token"} | settings
    quantize_model(model, MaQDConfig(**settings))
    pack_model(model)
    return model


def assert_equal(got, expected, tipped=0.1):
    """Half of all tokens agree to float32 rounding. Rounding lets an activation code tip over now
    and then, in one path and not in the other; such a token differs by ``tipped`` at most."""
    errors = (got.double() - expected.double()).norm(dim=-1) / expected.double().norm(dim=-1)
    assert float(errors.median()) < TOLERANCE
    assert float(errors.max()) < tipped
