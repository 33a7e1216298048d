"""``resize_token_embeddings`` of a converted model: rows of a quantized table, and of its head.

transformers makes new layers of its own classes, which would drop the grid. Here the rows that stay
keep their bits; new ones start at the mean of the old rows, as transformers' do, on a grid of
their own.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..nn import MaQDEmbedding, MaQDLinear, PackedEmbedding, PackedLinear, rotate
from ..nn.kinds import LINEARS, PACKED, QUANTIZED, TABLES, TRAINABLE


def resizes(model: Any) -> bool:
    """Whether this module has to resize the tokens of ``model``: the table or its head is ours."""
    return any(isinstance(layer, QUANTIZED) for layer in _table_and_head(model))


def resize_tokens(model: Any, rows: int, mean_resizing: bool = True) -> None:
    """Give the input embedding and the output head of ``model`` ``rows`` rows, in place.

    Tensors that several modules share (a tied head, a bias) stay shared. ``mean_resizing=False``
    starts new rows from a normal distribution of deviation ``config.initializer_range``.

    Raises:
        ValueError: ``rows`` is not positive, or would cut off the padding token; or the weights are
            offloaded. The model is then unchanged.
    """
    layers = _table_and_head(model)
    if any(p.is_meta for layer in layers for p in layer.parameters()):
        raise ValueError(
            f"the token embedding of {type(model).__name__} is offloaded; load the model whole "
            "into memory to resize it"
        )
    padding = getattr(layers[0], "padding_idx", None)
    if rows < 1 or (padding is not None and padding >= rows):
        raise ValueError(
            f"{rows} rows: an embedding needs at least one, and here more than the padding token, "
            f"which is {padding}"
        )
    deviation = None if mean_resizing else model.config.get_text_config().initializer_range
    new: dict[int, nn.Parameter] = {}
    for layer in layers:
        _resize_layer(layer, rows, deviation, new)
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if id(parameter) in new:
                module._parameters[name] = new[id(parameter)]
    model.config.get_text_config().vocab_size = model.vocab_size = rows


def _table_and_head(model: Any) -> list[Any]:
    layers = (model.get_input_embeddings(), model.get_output_embeddings())
    return [layer for layer in layers if layer is not None]


@torch.no_grad()
def _resize_layer(
    layer: Any, rows: int, deviation: float | None, new: dict[int, nn.Parameter]
) -> None:
    """Note in ``new`` what becomes of each of the layer's tensors that has a row a token."""
    table = isinstance(layer, (nn.Embedding, *TABLES))
    old = layer.num_embeddings if table else layer.out_features
    added = _new_rows(layer, rows - old, deviation) if rows > old else {}
    for name, parameter in layer._parameters.items():
        if parameter is None or not parameter.numel() or parameter.shape[0] != old:
            continue
        if id(parameter) not in new:
            kept = parameter[:rows]
            whole = torch.cat([kept, added[name].to(kept)]) if added else kept.clone()
            new[id(parameter)] = nn.Parameter(whole, parameter.requires_grad)
    setattr(layer, "num_embeddings" if table else "out_features", rows)


def _new_rows(layer: Any, count: int, deviation: float | None) -> dict[str, torch.Tensor]:
    """The tensors of ``count`` rows for a layer like ``layer``, by the names they have there."""
    weight = _float_rows(layer)
    start = weight.mean(dim=0, keepdim=True).repeat(count, 1)
    if deviation is not None:
        start.normal_(0, deviation)
    tensors = {"weight": start}
    if isinstance(layer, QUANTIZED):
        tensors = dict(_on_grid(start, layer).named_parameters())
    if getattr(layer, "bias", None) is not None:
        tensors["bias"] = layer.bias.mean().expand(count)
    return tensors


def _float_rows(layer: Any) -> torch.Tensor:
    """The weight in force, (rows, width), as an input meets it that is not rotated yet."""
    if isinstance(layer, PACKED):
        weight = layer.dequantized_weight()
    elif isinstance(layer, TRAINABLE):
        weight = layer.quantized_weight()
    else:
        weight = layer.weight.float()
    return rotate(weight, layer.rotation) if isinstance(layer, LINEARS) else weight


def _on_grid(start: torch.Tensor, layer: Any) -> nn.Module:
    """A layer of the class of ``layer`` with the rows ``start``; its inputs stay float."""
    rows, width = start.shape
    if isinstance(layer, TABLES):
        table = MaQDEmbedding.from_embedding(nn.Embedding(rows, width, _weight=start), layer.levels)
        return PackedEmbedding.from_qat(table) if isinstance(layer, PACKED) else table
    plain = nn.Linear(width, rows, bias=False, device="meta")
    plain.weight = nn.Parameter(start)
    head = MaQDLinear.from_linear(plain, replace(layer.spec, activation_levels=None))
    return PackedLinear.from_qat(head) if isinstance(layer, PACKED) else head
