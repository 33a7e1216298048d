"""Putting converted layers into a model, and what a checkpoint says about them.

``describe`` writes what was converted into ``config.modules``; ``build_modules`` puts the same
layers into an empty model when a checkpoint is loaded. The two are each other's inverse.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields, replace
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from .config import MaQDConfig
from .matching import Names, find_module
from .nn import (
    ActivationQuantizer,
    BatchContext,
    LayerBatchNorm,
    LinearSpec,
    MaQDEmbedding,
    MaQDLinear,
    NormSpec,
    PackedEmbedding,
    PackedLinear,
)

QUANTIZED = (MaQDLinear, MaQDEmbedding, PackedLinear, PackedEmbedding)
TIED_TENSORS = ("weight_step", "weight_log_scale", "weight_offset", "weight_scale")


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put ``module`` in the place called ``name``, in the same mode (training or not)."""
    parent, _, leaf = name.rpartition(".")
    module.train(model.get_submodule(name).training)
    model.get_submodule(parent)._modules[leaf] = module


def modules_of(model: nn.Module, *kinds: type[nn.Module]) -> list[tuple[str, Any]]:
    """Full names and modules of these classes."""
    return [(n, m) for n, m in model.named_modules() if isinstance(m, kinds)]


def _entrances(model: nn.Module) -> dict[int, nn.Module]:
    """Where ids and mask come in: ``model``, and its base model, which may be called alone.

    Both, because some heads reach past the base model (OPT's calls its decoder).
    """
    base = model.get_submodule(Names(model).prefix.rstrip("."))
    return {id(model): model, id(base): base}


def attach_context(model: nn.Module, context: BatchContext) -> None:
    """Fill ``context`` at every forward of ``model``."""
    for module in _entrances(model).values():
        context.attach(module)


def remove_context(model: nn.Module) -> None:
    """Undo ``attach_context``."""
    for module in _entrances(model).values():
        hooks = module._forward_pre_hooks
        for key, hook in list(hooks.items()):
            if isinstance(getattr(hook, "__self__", None), BatchContext):
                del hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)


def tie_head(
    model: nn.Module, embedding: str, head: str, spec: LinearSpec, context: BatchContext
) -> None:
    """Replace the layer ``head`` by one that shares the grid of the converted ``embedding``."""
    table, bias = model.get_submodule(embedding), model.get_submodule(head).bias
    levels: int = table.levels  # type: ignore[assignment]
    spec = spec.on_table(levels)
    if isinstance(table, MaQDEmbedding):
        tied: nn.Module = table.as_linear(spec)
        if spec.activation_levels is not None:
            tied.activation = ActivationQuantizer(spec, context, table.weight.device)
    else:
        assert isinstance(table, PackedEmbedding)
        tied = PackedLinear(
            table.embedding_dim, table.num_embeddings, False, spec, context, table.weight.device
        )
        table.tie(tied)
    tied.bias = bias
    replace_module(model, head, tied)
    note_tied_tensors(model, embedding, head)


def note_tied_tensors(model: nn.Module, embedding: str, head: str) -> None:
    """Tell transformers which tensors of ``head`` are those of ``embedding``: saved once."""
    keys: dict[str, str] = model.all_tied_weights_keys  # type: ignore[assignment]
    table = model.get_submodule(embedding)
    for name in ("weight", *TIED_TENSORS):
        keys.pop(f"{head}.{name}", None)
        if getattr(table, name, None) is not None:
            keys[f"{head}.{name}"] = f"{embedding}.{name}"


# ------------------------------------------------------------------------- model -> config.modules


def describe(
    model: nn.Module,
    config: MaQDConfig,
    absorbed_by: Mapping[str, Sequence[str]],
    tied_to: Mapping[str, str],
) -> dict[str, dict[str, Any]]:
    """What ``build_modules`` needs to build the converted layers of ``model`` again.

    ``absorbed_by`` (norm -> its consumers) and ``tied_to`` (head -> embedding) hold full names.
    Linear layers say where they differ from the plain settings of ``config``.
    """
    names, modules = Names(model), {}
    usual = asdict(config.plain_linear_spec())
    for name, module in model.named_modules():
        entry: dict[str, Any]
        if isinstance(module, (MaQDLinear, PackedLinear)):
            entry = {k: v for k, v in asdict(module.spec).items() if v != usual[k]}
            entry |= {"kind": "linear", "bias": module.bias is not None}
            if name in tied_to:
                entry["tied_to"] = names.relative(tied_to[name])
        elif isinstance(module, (MaQDEmbedding, PackedEmbedding)):
            entry = {"kind": "embedding", "levels": module.levels}
            if module.output_scale != 1:
                entry["output_scale"] = module.output_scale
        elif isinstance(module, LayerBatchNorm):
            entry = {"kind": "norm", "eps": module.eps, **asdict(module.spec)}
            entry["absorbed_by"] = [names.relative(n) for n in absorbed_by.get(name, ())]
        else:
            continue
        modules[names.relative(name)] = entry
    return modules


# ------------------------------------------------------------------------- config.modules -> model


def build_modules(model: nn.Module, config: MaQDConfig) -> list[str]:
    """Put the layers ``config.modules`` lists into a float skeleton (on meta: nothing is copied).

    A checkpoint may be loaded into another class with the same base model: heads this class lacks
    are dropped from ``config.modules``, and an output head it ties to a converted embedding joins
    (the names of such heads are returned). A module missing inside the base model is an error.
    """
    names, context = Names(model), BatchContext()
    have, modules = dict(model.named_modules()), dict(config.modules or {})
    for relative in [n for n in modules if n.startswith("/") and names.absolute(n) not in have]:
        del modules[relative]
    new_heads = _heads_to_tie(model, names, modules)
    modules |= new_heads
    for relative, entry in modules.items():
        old = have.get(names.absolute(relative))
        if old is None:
            raise ValueError(
                f"the checkpoint lists a converted module {relative!r} that {type(model).__name__} "
                "does not have: config.json does not fit this model class, or was edited"
            )
        try:
            if "tied_to" not in entry:
                new = _BUILDERS[entry["kind"]](old, dict(entry), config, context)
                replace_module(model, names.absolute(relative), new)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"config.json describes {relative!r} as {entry}, which does not fit a "
                f"{type(old).__name__} ({type(error).__name__}: {error}): it was edited, or "
                "written by another maqd_hf release"
            ) from None
    for relative, entry in modules.items():
        if "tied_to" in entry:
            source = names.absolute(entry["tied_to"])
            tie_head(model, source, names.absolute(relative), _spec(entry, config), context)
    config.modules = modules
    attach_context(model, context)
    return [names.absolute(head) for head in new_heads]


def _heads_to_tie(
    model: nn.Module, names: Names, modules: dict[str, dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Entry of an output head that this class ties to an embedding saved converted without it."""
    head = find_module(model, model.get_output_embeddings())  # type: ignore[operator]
    source = getattr(model, "all_tied_weights_keys", {}).get(f"{head}.weight")
    if head is None or source is None or names.relative(head) in modules:
        return {}
    embedding = names.relative(source.rpartition(".")[0])
    if modules.get(embedding, {}).get("kind") != "embedding":
        return {}
    bias = model.get_submodule(head).bias is not None
    entry = {"kind": "linear", "tied_to": embedding, "bias": bias, "activation_levels": None}
    return {names.relative(head): entry}


def _spec(entry: dict[str, Any], config: MaQDConfig) -> LinearSpec:
    known = {f.name for f in fields(LinearSpec)}
    unknown = set(entry) - known - {"kind", "bias", "tied_to", "crc32"}
    if unknown:
        raise ValueError(f"unknown settings {sorted(unknown)}")
    changes = {k: v for k, v in entry.items() if k in known}
    return replace(config.plain_linear_spec(), **changes)


def _build_linear(
    old: nn.Module, entry: dict[str, Any], config: MaQDConfig, context: BatchContext
) -> nn.Module:
    if not isinstance(old, (nn.Linear, Conv1D)):
        raise ValueError("it should be a Linear")
    shape: tuple[int, int] = tuple(old.weight.shape)
    out_features, in_features = shape if isinstance(old, nn.Linear) else shape[::-1]
    spec, bias, device = _spec(entry, config), bool(entry["bias"]), old.weight.device
    packed = config.state == "packed" and spec.weight_levels is not None
    kind: Callable[..., nn.Module] = PackedLinear if packed else MaQDLinear
    return kind(in_features, out_features, bias, spec, context, device)


def _build_embedding(
    old: nn.Module, entry: dict[str, Any], config: MaQDConfig, context: BatchContext
) -> nn.Module:
    if not isinstance(old, nn.Embedding):
        raise ValueError("it should be an Embedding")
    kind: Callable[..., nn.Module] = PackedEmbedding if config.state == "packed" else MaQDEmbedding
    return kind(
        old.num_embeddings,
        old.embedding_dim,
        entry["levels"],
        old.padding_idx,
        entry.get("output_scale", 1.0),
        device=old.weight.device,
        output_dtype=old.weight.dtype,
    )


def _build_norm(
    old: nn.Module, entry: dict[str, Any], config: MaQDConfig, context: BatchContext
) -> nn.Module:
    weight = getattr(old, "weight", None)
    if not isinstance(weight, torch.Tensor):
        raise ValueError("it should be a norm")
    settings = {k: v for k, v in entry.items() if k not in ("kind", "eps", "absorbed_by", "crc32")}
    spec = NormSpec(**settings)
    return LayerBatchNorm(weight.numel(), spec, entry["eps"], context, weight.device)


_BUILDERS: dict[str, Callable[..., nn.Module]] = {
    "linear": _build_linear,
    "embedding": _build_embedding,
    "norm": _build_norm,
}
