"""Changes to the modules of a transformers model: one replaced, a head tied, a context added."""

from __future__ import annotations

from torch import nn

from ..nn import (
    ActivationQuantizer,
    BatchContext,
    LinearSpec,
    MaQDEmbedding,
    PackedLinear,
)
from ..nn.kinds import TABLES
from .names import Names

TIED_TENSORS = ("weight_step", "weight_log_scale", "weight_offset", "weight_scale")
"""Tensors, beside ``weight``, that a tied head shares with its embedding."""


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put ``module`` in the place called ``name``, in the same mode (training or not)."""
    parent, _, leaf = name.rpartition(".")
    module.train(model.get_submodule(name).training)
    model.get_submodule(parent)._modules[leaf] = module


def _entrances(model: nn.Module) -> dict[int, nn.Module]:
    """The modules that get ids and mask: ``model``, and its base model, which may be called alone.

    Both, because some heads reach past the base model (OPT's calls its decoder).
    """
    base = model.get_submodule(Names(model).prefix.rstrip("."))
    return {id(model): model, id(base): base}


def attach_context(model: nn.Module, context: BatchContext) -> None:
    """Tell ``context`` of every forward of ``model``."""
    for module in _entrances(model).values():
        context.attach(module)


def remove_context(model: nn.Module) -> None:
    """Undo ``attach_context``."""
    for module in _entrances(model).values():
        for hooks, flags in (
            (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
            (module._forward_hooks, module._forward_hooks_always_called),
        ):
            for key, hook in list(hooks.items()):
                if isinstance(getattr(hook, "__self__", None), BatchContext):
                    del hooks[key]
                    flags.pop(key, None)


def tie_head(
    model: nn.Module, embedding: str, head: str, spec: LinearSpec, context: BatchContext
) -> None:
    """Replace the layer ``head`` by one that shares the grid of the converted ``embedding``.

    Raises:
        ValueError: ``embedding`` is not converted.
    """
    table, bias = model.get_submodule(embedding), model.get_submodule(head).bias
    if not isinstance(table, TABLES):
        raise ValueError(
            f"{embedding} is a {type(table).__name__}: {head} can share the grid of a converted "
            "embedding only"
        )
    spec = spec.on_table(table.levels)
    if isinstance(table, MaQDEmbedding):
        tied: nn.Module = table.as_linear(spec)
        if spec.activation_levels is not None:
            tied.activation = ActivationQuantizer(spec, context, table.weight.device)
    else:
        tied = PackedLinear(
            table.embedding_dim, table.num_embeddings, False, spec, context, table.weight.device
        )
        table.tie(tied)
    tied.bias = bias
    replace_module(model, head, tied)
    note_tied_tensors(model, embedding, head)


def note_tied_tensors(model: nn.Module, embedding: str, head: str) -> None:
    """Tell transformers which tensors of ``head`` are those of ``embedding``, to be saved once."""
    keys: dict[str, str] = model.all_tied_weights_keys  # type: ignore[assignment]
    table = model.get_submodule(embedding)
    for name in ("weight", *TIED_TENSORS):
        keys.pop(f"{head}.{name}", None)
        if getattr(table, name, None) is not None:
            keys[f"{head}.{name}"] = f"{embedding}.{name}"
