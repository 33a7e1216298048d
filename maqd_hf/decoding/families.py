"""Which models the library can run, and the plan of one as ``kernels.decoder`` wants it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..kernels import loader, native
from ..kernels.decoder import BlockPlan, LinearPlan, NativeDecoder
from ..kernels.norm import NativeNorm
from ..nn import BatchContext, LayerBatchNorm, PackedEmbedding, PackedLinear

_SLIDING = "sliding_attention"
_ROPE = ("default", "linear", "llama3", "yarn")  # frequencies that do not depend on the length
_ACTIVATIONS = {
    "silu": "swiglu",
    "relu": "relu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
Parts = dict[str, nn.Module]


class UnsupportedError(Exception):
    """The reason is the message."""


def check_model(model: Any) -> tuple[list[object], list[Tensor]]:
    """What a plan is made of: path and modules, and their tensors; ``UnsupportedError`` where the
    library does not run the model."""
    config = model.config
    if loader.chosen_isa() is None:
        raise UnsupportedError("the compiled kernels are missing or switched off")
    if config.model_type not in FAMILIES:
        raise UnsupportedError(
            f"model_type {config.model_type!r} is not one of {', '.join(FAMILIES)}"
        )
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", _SLIDING}
    if kinds:
        raise UnsupportedError(f"attention of type {', '.join(sorted(kinds))}")
    parts: list[object] = [loader.chosen_isa()]
    tensors: list[Tensor] = []
    for name, module in model.named_modules():
        patched = "forward" in module.__dict__ and module is not model
        if patched or "_hf_hook" in module.__dict__ or _hooked(module):
            raise UnsupportedError(f"{name or 'the model'} has hooks or a forward of its own")
        parts.append(id(module))
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None:
                if tensor.device.type != "cpu":
                    raise UnsupportedError(f"{name} is on {tensor.device}")
                tensors.append(tensor)
    return parts, tensors


def _hooked(module: nn.Module) -> bool:
    """Hooks of others, on a module inside the model: the library would pass them by."""
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    return any(not isinstance(getattr(hook, "__self__", None), BatchContext) for hook in hooks)


def build(model: Any) -> NativeDecoder:
    """The plan of a model that passed ``check_model``."""
    config = model.config
    try:
        blocks, norm, options = FAMILIES[config.model_type](model)
    except AttributeError as error:  # another version of transformers, or someone's own block
        raise UnsupportedError(f"a {config.model_type} of another build ({error})") from error
    steps = []
    for index, (attention, norms, layers) in enumerate(blocks):
        where = f"block {index}"
        steps.append(
            BlockPlan(
                cast(Any, {name: _norm(norm, where) for name, norm in norms.items()}),
                cast(Any, {name: _linear(layer, where) for name, layer in layers.items()}),
                _window(config, index),
                bool(getattr(attention, "use_rope", True)),  # not in every fourth of SmolLM3
            )
        )
    return NativeDecoder(
        steps,
        _norm(norm, "the last norm"),
        heads=config.num_attention_heads,
        head_dim=blocks[0][0].head_dim,
        table=_table(model.get_input_embeddings()),
        head=_linear(model.lm_head, "lm_head") if _is_plain(model.lm_head) else None,
        **{"kv_heads": config.num_attention_heads, **options},
    )


# ----------------------------------------------------------------------------------- the families

Anatomy = tuple[list[tuple[Any, Parts, Parts]], nn.Module, dict[str, Any]]
"""Of every block its attention, norms and layers; the last norm; what else a decoder is given."""


def _llama(model: Any) -> Anatomy:
    blocks = []
    for block in model.model.layers:
        attention, mlp = block.self_attn, block.mlp
        layers = {name: getattr(attention, f"{name}_proj") for name in ("q", "k", "v", "o")}
        layers |= {name: getattr(mlp, f"{name}_proj") for name in ("gate", "up", "down")}
        norms = {"input_norm": block.input_layernorm, "post_norm": block.post_attention_layernorm}
        if hasattr(attention, "q_norm"):
            norms |= {"query_norm": attention.q_norm, "key_norm": attention.k_norm}
        blocks.append((attention, norms, layers))
    rotary = model.model.rotary_emb
    if rotary.rope_type not in _ROPE:
        raise UnsupportedError(f"rotary embedding of type {rotary.rope_type!r}")
    if len(rotary.inv_freq) * 2 != attention.head_dim or attention.head_dim % 2:
        raise UnsupportedError("a rotary embedding of part of a head")
    options = {"frequencies": rotary.inv_freq, "rope_scale": rotary.attention_scaling}
    options |= {
        "kv_heads": model.config.num_key_value_heads,
        "attention_scale": attention.scaling,
    }
    return blocks, model.model.norm, options | _activation(model.config.hidden_act, gated=True)


def _gpt2(model: Any) -> Anatomy:
    config, body = model.config, model.transformer
    if config.add_cross_attention or config.scale_attn_by_inverse_layer_idx:
        raise UnsupportedError("cross attention, or a scale of attention for each block")
    blocks = []
    for block in body.h:
        attention, mlp = block.attn, block.mlp
        layers = {"q": attention.c_attn, "o": attention.c_proj, "up": mlp.c_fc, "down": mlp.c_proj}
        blocks.append((attention, {"input_norm": block.ln_1, "post_norm": block.ln_2}, layers))
    options = _activation(config.activation_function, gated=False)
    options["attention_scale"] = attention.head_dim**-0.5 if config.scale_attn_weights else 1.0
    return blocks, body.ln_f, options | {"learned": _learned(body.wpe, 0)}


def _opt(model: Any) -> Anatomy:
    config, body = model.config, model.model.decoder
    if not config.do_layer_norm_before or body.project_in is not None or not body.final_layer_norm:
        raise UnsupportedError("norms after the sums, or embeddings of another width")
    blocks = []
    for block in body.layers:
        attention = block.self_attn
        layers = {name: getattr(attention, f"{name}_proj") for name in ("q", "k", "v")}
        layers |= {"o": attention.out_proj, "up": block.fc1, "down": block.fc2}
        norms = {"input_norm": block.self_attn_layer_norm, "post_norm": block.final_layer_norm}
        blocks.append((attention, norms, layers))
    options = _activation(config.activation_function, gated=False)
    options["attention_scale"] = attention.scaling
    learned = _learned(body.embed_positions, body.embed_positions.offset)
    return blocks, body.final_layer_norm, options | {"learned": learned}


FAMILIES: dict[str, Callable[[Any], Anatomy]] = {
    "llama": _llama,
    "mistral": _llama,
    "qwen2": _llama,
    "qwen3": _llama,
    "smollm3": _llama,
    "gpt2": _gpt2,
    "opt": _opt,
}
"""By ``model_type``: the architectures whose blocks the library runs."""


def _activation(name: str, gated: bool) -> dict[str, Any]:
    found = _ACTIVATIONS.get(name)
    if found is None or (found == "swiglu") != gated:
        raise UnsupportedError(f"activation function {name!r}")
    return {"activation": found}


def _learned(embedding: nn.Module, offset: int) -> Tensor:
    if not isinstance(embedding, nn.Embedding):
        raise UnsupportedError(f"positions of type {type(embedding).__name__}")
    return embedding.weight.detach()[offset:]


# ---------------------------------------------------------------------------------------- a block


def _window(config: Any, index: int) -> int:
    """Positions a token of block ``index`` sees; 0: all before it."""
    kinds = getattr(config, "layer_types", None)
    slides = kinds[index] == _SLIDING if kinds else config.model_type == "mistral"
    return int(getattr(config, "sliding_window", None) or 0) if slides else 0


def _table(embedding: nn.Module) -> native.Table | None:
    """The embedding for the library, where its rows need no rounding to a narrower dtype."""
    if isinstance(embedding, PackedEmbedding) and embedding.output_like.dtype == torch.float32:
        return embedding.native_table()
    return None


def _is_plain(head: Any) -> bool:
    """Whether the library can multiply with the head."""
    return isinstance(head, PackedLinear) and native.fits(
        head.in_features, head.weight_scale.shape[1], head.levels
    )


def _norm(norm: Any, where: str) -> NativeNorm:
    if not isinstance(norm, LayerBatchNorm):
        if type(norm).__name__.endswith("RMSNorm") and hasattr(norm, "variance_epsilon"):
            return NativeNorm(len(norm.weight), norm.variance_epsilon, weight=norm.weight)
        raise UnsupportedError(f"{where}: a norm of type {type(norm).__name__}")
    if norm.spec.statistics == "gated":
        raise UnsupportedError(f"{where}: a norm in training")
    return norm.native_norm()


def _linear(layer: Any, where: str) -> LinearPlan:
    if not isinstance(layer, PackedLinear):
        raise UnsupportedError(f"{where}: a layer of type {type(layer).__name__} is not packed")
    groups = layer.weight_scale.shape[1]
    if not native.fits(layer.in_features, groups, layer.levels):
        raise UnsupportedError(f"{where}: groups of {layer.in_features // groups} inputs")
    static = layer.activation_step
    own_first = static is not None and layer.spec.first_token == "own"
    step = 0.0 if static is None else float(static)
    return LinearPlan(layer.native_weight(), step, own_first)
