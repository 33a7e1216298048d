"""Which decoders the library runs: a table of families, and where each keeps its parts.

A family of your own joins by an entry in ``FAMILIES``: the module that defines its classes, and a
function that says where the parts of such a model are. ``plan`` turns that into what the library
is given, and refuses whatever does not add up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

Parts = dict[str, nn.Module]
Constants = list[tuple[str, object, object]]
SLIDING = "sliding_attention"


class UnsupportedError(Exception):
    """The library does not run this model or this call; the reason is the message."""


@dataclass(frozen=True)
class Block:
    """The parts of one block, under the names of ``kernels.decoder``.

    ``window``: how many positions a token sees, itself included; 0: all before it. ``rope``:
    whether queries and keys are rotated, in a model with a rotary embedding.
    """

    attention: nn.Module
    activation: nn.Module
    norms: Parts
    linears: Parts
    window: int = 0
    rope: bool = True


@dataclass(frozen=True)
class Anatomy:
    """The parts of a decoder.

    ``embedding``, ``norm`` (the last) and ``head`` are those that the model's ``forward`` calls.
    ``scales``: what every block multiplies its scores with. ``rotary``: the rotary embedding, or
    None; ``learned`` (positions, hidden): the embedding of positions, or None. ``gated``: whether
    the feed-forward part has a gate. ``constants``: numbers that the library takes for granted,
    as (name, value found, value wanted). ``counts_padding``: positions that nobody gives are
    counted by the mask.
    """

    embedding: nn.Module
    blocks: Sequence[Block]
    norm: nn.Module
    head: nn.Module
    scales: Sequence[float]
    rotary: nn.Module | None = None
    learned: Tensor | None = None
    gated: bool = False
    constants: Sequence[tuple[str, object, object]] = ()
    counts_padding: bool = False


@dataclass(frozen=True)
class Family:
    """``module`` defines the classes of a family; ``anatomy`` finds the parts of a model."""

    module: str
    anatomy: Callable[[Any], Anatomy]


# -------------------------------------------------------------------------------------- windows


def _no_windows(config: Any, blocks: int) -> list[int]:
    return [0] * blocks


def _one_window(config: Any, blocks: int) -> list[int]:
    """Mistral: all blocks have the window of the config, if there is one."""
    return [0 if config.sliding_window is None else _window(config)] * blocks


def _typed_windows(config: Any, blocks: int) -> list[int]:
    """Qwen and SmolLM3: the config says of each block whether it has the window."""
    kinds = config.layer_types
    unknown = set(kinds) - {"full_attention", SLIDING}
    if unknown:
        raise UnsupportedError(f"attention of type {', '.join(sorted(unknown))}")
    if len(kinds) != blocks:
        raise UnsupportedError(f"{len(kinds)} layer_types for {blocks} blocks")
    return [_window(config) if kind == SLIDING else 0 for kind in kinds]


def _window(config: Any) -> int:
    window = config.sliding_window
    if type(window) is not int or window < 1:
        raise UnsupportedError(f"sliding_window={window!r}: want a whole number from 1")
    return window


# ------------------------------------------------------------------------------------- families


def _llama(model: Any, windows: Callable[[Any, int], list[int]] = _no_windows) -> Anatomy:
    base = model.model
    blocks: list[Block] = []
    constants: Constants = []
    for index, window in enumerate(windows(base.config, len(base.layers))):
        block = base.layers[index]
        attention, mlp = block.self_attn, block.mlp
        linears = {name: getattr(attention, f"{name}_proj") for name in ("q", "k", "v", "o")}
        linears |= {name: getattr(mlp, f"{name}_proj") for name in ("gate", "up", "down")}
        norms = {"input_norm": block.input_layernorm, "post_norm": block.post_attention_layernorm}
        if hasattr(attention, "q_norm"):
            norms |= {"query_norm": attention.q_norm, "key_norm": attention.k_norm}
        rope = bool(getattr(attention, "use_rope", True))  # not in every fourth of SmolLM3
        blocks.append(Block(attention, mlp.act_fn, norms, linears, window, rope))
        kind = SLIDING if window else "full_attention"
        constants.append(("attention_type", getattr(block, "attention_type", kind), kind))
    return Anatomy(
        base.embed_tokens,
        blocks,
        base.norm,
        model.lm_head,
        [block.self_attn.scaling for block in base.layers],
        rotary=base.rotary_emb,
        gated=True,
        constants=constants,
    )


def _gpt2(model: Any) -> Anatomy:
    base = model.transformer
    blocks: list[Block] = []
    scales: list[float] = []
    constants: Constants = []
    for index, block in enumerate(base.h):
        attention, mlp = block.attn, block.mlp
        linears = {"q": attention.c_attn, "o": attention.c_proj}
        linears |= {"up": mlp.c_fc, "down": mlp.c_proj}
        norms = {"input_norm": block.ln_1, "post_norm": block.ln_2}
        blocks.append(Block(attention, mlp.act, norms, linears))
        scale = attention.head_dim**-0.5 if attention.scale_attn_weights else 1.0
        if attention.scale_attn_by_inverse_layer_idx:
            scale /= index + 1
        scales.append(getattr(attention, "scaling", scale))  # kept by newer versions alone
        constants += [
            ("is_cross_attention", attention.is_cross_attention, False),
            ("split_size", attention.split_size, attention.c_attn.out_features // 3),
            ("reorder_and_upcast_attn", attention.reorder_and_upcast_attn, False),
        ]
    constants.append(("add_cross_attention", base.config.add_cross_attention, False))
    learned = _learned(base.wpe, nn.Embedding, 0)
    return Anatomy(
        base.wte,
        blocks,
        base.ln_f,
        model.lm_head,
        scales,
        learned=learned,
        constants=constants,
    )


def _opt(model: Any) -> Anatomy:
    base = model.model.decoder
    blocks: list[Block] = []
    constants: Constants = [("project_in", base.project_in, None)]
    constants.append(("project_out", base.project_out, None))
    for block in base.layers:
        attention = block.self_attn
        linears = {name: getattr(attention, f"{name}_proj") for name in ("q", "k", "v")}
        linears |= {"o": attention.out_proj, "up": block.fc1, "down": block.fc2}
        norms = {"input_norm": block.self_attn_layer_norm, "post_norm": block.final_layer_norm}
        blocks.append(Block(attention, block.activation_fn, norms, linears))
        constants.append(("do_layer_norm_before", block.do_layer_norm_before, True))
    scales = [block.self_attn.scaling for block in base.layers]
    positions = base.embed_positions
    learned = _learned(positions, type(positions), positions.offset)
    return Anatomy(
        base.embed_tokens,
        blocks,
        base.final_layer_norm,
        model.lm_head,
        scales,
        learned=learned,
        constants=constants,
        counts_padding=True,
    )


def _learned(embedding: Any, kind: type, offset: int) -> Tensor:
    """The rows that positions 0, 1, ... are given."""
    plain = type(embedding) is kind and isinstance(embedding, nn.Embedding)
    if not plain or embedding.max_norm is not None or not 0 <= offset < len(embedding.weight):
        raise UnsupportedError(f"positions of {type(embedding).__name__}, the first at {offset}")
    return embedding.weight.detach()[offset:]


def _stock(name: str, anatomy: Callable[[Any], Anatomy]) -> Family:
    return Family(f"transformers.models.{name}.modeling_{name}", anatomy)


_typed = partial(_llama, windows=_typed_windows)

FAMILIES: dict[str, Family] = {
    "llama": _stock("llama", _llama),
    "mistral": _stock("mistral", partial(_llama, windows=_one_window)),
    "qwen2": _stock("qwen2", _typed),
    "qwen3": _stock("qwen3", _typed),
    "smollm3": _stock("smollm3", _typed),
    "gpt2": _stock("gpt2", _gpt2),
    "opt": _stock("opt", _opt),
}
"""The families that the library runs, by ``model_type``. Add to it what has the same blocks."""


def family_of(model: Any) -> Family:
    """The family of ``model``; ``UnsupportedError`` where there is none."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind not in FAMILIES:
        raise UnsupportedError(f"model_type {kind!r} is not one of {', '.join(FAMILIES)}")
    return FAMILIES[kind]


def all_equal(values: Iterable[Any], what: str) -> Any:
    """The one value that all of ``values`` are."""
    first, *others = values
    if any(value != first for value in others):
        raise UnsupportedError(f"{what} differs from block to block")
    return first
