"""Tiny models of every family the tests convert, with nothing left at its initial value.

Fresh norms are the identity and fresh biases zero, which would hide most mistakes of a fold; so
every vector is randomised.
"""

from __future__ import annotations

import torch
import transformers as hf
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

VOCABULARY, WIDTH, TOKENS = 67, 32, 12

_SIZE = {
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
}
_IDS = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
_GROUPED = {**_SIZE, **_IDS, "num_key_value_heads": 2}


def _gpt2() -> PreTrainedConfig:
    size = {"n_embd": WIDTH, "n_layer": 2, "n_head": 4, "n_positions": 64}
    return hf.GPT2Config(**size, **_IDS, vocab_size=VOCABULARY)


def _opt() -> PreTrainedConfig:
    return hf.OPTConfig(**_SIZE, **_IDS, ffn_dim=48, word_embed_proj_dim=WIDTH)


def _falcon() -> PreTrainedConfig:
    size = {key: _SIZE[key] for key in list(_SIZE) if key != "intermediate_size"}
    return hf.FalconConfig(**{**size, "num_hidden_layers": 3}, **_IDS, ffn_hidden_size=48)


def _mamba() -> PreTrainedConfig:
    size = {"hidden_size": WIDTH, "num_hidden_layers": 3, "state_size": 4}
    return hf.MambaConfig(**size, **_IDS, vocab_size=VOCABULARY, tie_word_embeddings=True)


def _distilbert() -> PreTrainedConfig:
    size = {"dim": WIDTH, "hidden_dim": 48, "n_layers": 2, "n_heads": 4}
    return hf.DistilBertConfig(**size, vocab_size=VOCABULARY, max_position_embeddings=64)


def _vit() -> PreTrainedConfig:
    size = {key: _SIZE[key] for key in list(_SIZE)[:4]}
    return hf.ViTConfig(**size, image_size=16, patch_size=8)


def _t5() -> PreTrainedConfig:
    size = {"d_model": WIDTH, "d_ff": 48, "d_kv": 8, "num_layers": 2, "num_heads": 4}
    return hf.T5Config(**size, vocab_size=VOCABULARY, feed_forward_proj="gated-gelu")


def _mixtral() -> PreTrainedConfig:
    return hf.MixtralConfig(**_GROUPED, num_local_experts=4, num_experts_per_tok=2)


FAMILIES = {
    "llama-tied": lambda: (
        hf.LlamaForCausalLM,
        hf.LlamaConfig(**_GROUPED, tie_word_embeddings=True),
    ),
    "llama-untied": lambda: (
        hf.LlamaForCausalLM,
        hf.LlamaConfig(**_GROUPED, tie_word_embeddings=False, attention_bias=True),
    ),
    "mistral": lambda: (hf.MistralForCausalLM, hf.MistralConfig(**_GROUPED)),
    "qwen3": lambda: (hf.Qwen3ForCausalLM, hf.Qwen3Config(**_GROUPED, head_dim=8)),
    "gemma3": lambda: (hf.Gemma3ForCausalLM, hf.Gemma3TextConfig(**_GROUPED, head_dim=8)),
    "gpt2": lambda: (hf.GPT2LMHeadModel, _gpt2()),
    "opt": lambda: (hf.OPTForCausalLM, _opt()),
    "gpt-neox": lambda: (hf.GPTNeoXForCausalLM, hf.GPTNeoXConfig(**_SIZE, **_IDS)),
    "falcon": lambda: (hf.FalconForCausalLM, _falcon()),
    "mamba": lambda: (hf.MambaForCausalLM, _mamba()),
    "bert": lambda: (hf.BertForSequenceClassification, hf.BertConfig(**_SIZE)),
    "bert-mlm": lambda: (hf.BertForMaskedLM, hf.BertConfig(**_SIZE)),
    "roberta": lambda: (hf.RobertaForSequenceClassification, hf.RobertaConfig(**_SIZE)),
    "distilbert": lambda: (hf.DistilBertForSequenceClassification, _distilbert()),
    "vit": lambda: (hf.ViTForImageClassification, _vit()),
    "mixtral": lambda: (hf.MixtralForCausalLM, _mixtral()),
    "t5-encoder": lambda: (hf.T5EncoderModel, _t5()),
}
"""Name -> (model class, tiny config)."""

LAYER_NORM = (
    "gpt2",
    "opt",
    "gpt-neox",
    "falcon",
    "bert",
    "bert-mlm",
    "roberta",
    "distilbert",
    "vit",
)
"""Families whose norms compute in the model's own dtype. RMS norms of transformers cast to float32,
so a float64 model of theirs still agrees to float32 rounding only."""

DECODERS = (
    "llama-tied",
    "llama-untied",
    "mistral",
    "qwen3",
    "gemma3",
    "gpt2",
    "opt",
    "gpt-neox",
    "falcon",
)


def tiny(name: str, seed: int = 0) -> PreTrainedModel:
    """A model of the family, float32, in eval mode, every parameter random."""
    torch.manual_seed(seed)
    model_class, config = FAMILIES[name]()
    model: PreTrainedModel = model_class(config).eval()
    return randomize(model)


def randomize(model: PreTrainedModel) -> PreTrainedModel:
    """Give gammas, betas and biases values of their own, and matrices enough size to matter."""
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(noise * 0.2 if parameter.dim() > 1 else parameter + 0.3 * noise)
    return model


def to_bfloat16(model: PreTrainedModel) -> PreTrainedModel:
    """Cast the parameters, as loading does; ``.to`` would cast the rotary frequencies too."""
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    model.config.dtype = torch.bfloat16
    return model


def example(model: nn.Module, batch: int = 2, tokens: int = TOKENS) -> dict[str, Tensor]:
    """Random inputs, in the model's dtype where they are float."""
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.randn(batch, 3, 16, 16).to(model.dtype)}
    return {"input_ids": torch.randint(2, VOCABULARY, (batch, tokens))}


def output(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """The logits, or the last hidden state of a model without a head."""
    with torch.no_grad():
        result = model(**inputs)
    return result.logits if "logits" in result else result.last_hidden_state
