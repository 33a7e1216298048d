"""Putting converted layers into a model, and what a checkpoint says about them.

``describe`` writes what was converted into ``config.modules``; ``build_modules`` puts the same
layers into an empty model when a checkpoint is loaded. The two are each other's inverse. What the
modules themselves do not know, which layers a norm is folded into and which head is tied, stands
only there: ``relations`` reads it, and ``refresh`` carries it over when modules were taken away.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..config import MaQDConfig
from ..models.finding import find_module, modules_of
from ..models.names import Names
from ..models.surgery import attach_context, replace_module, tie_head
from ..nn import (
    BatchContext,
    LayerBatchNorm,
    LinearSpec,
    MaQDEmbedding,
    MaQDLinear,
    NormSpec,
    PackedEmbedding,
    PackedLinear,
)
from ..nn.kinds import LINEARS, OURS, TABLES

# ------------------------------------------------------------------------- model -> config.modules


def describe(
    model: nn.Module,
    config: MaQDConfig,
    folded_into: Mapping[str, Sequence[str]],
    tied_to: Mapping[str, str],
) -> dict[str, dict[str, Any]]:
    """What ``build_modules`` needs to build the converted layers of ``model`` again.

    ``folded_into`` (norm -> its consumers) and ``tied_to`` (head -> embedding) hold full names.
    Linear layers say where they differ from the plain settings of ``config``.
    """
    names, modules = Names(model), {}
    usual = asdict(config.plain_linear_spec())
    for name, module in model.named_modules():
        entry: dict[str, Any]
        if isinstance(module, LINEARS):
            entry = {k: v for k, v in asdict(module.spec).items() if v != usual[k]}
            entry |= {"kind": "linear", "bias": module.bias is not None}
            if name in tied_to:
                entry["tied_to"] = names.relative(tied_to[name])
        elif isinstance(module, TABLES):
            entry = {"kind": "embedding", "levels": module.levels}
            if module.output_scale != 1:
                entry["output_scale"] = module.output_scale
        elif isinstance(module, LayerBatchNorm):
            entry = {"kind": "norm", "eps": module.eps, **asdict(module.spec)}
            entry["folded_into"] = [names.relative(n) for n in folded_into.get(name, ())]
        else:
            continue
        modules[names.relative(name)] = entry
    return modules


def relations(model: nn.Module, config: MaQDConfig) -> tuple[dict[str, list[str]], dict[str, str]]:
    """What ``config.modules`` says of the modules that ``model`` still has, by full names.

    Norm -> the layers it is folded into, and tied head -> embedding.
    """
    names, have = Names(model), dict(model.named_modules())
    folded_into, tied_to = {}, {}
    for relative, entry in (config.modules or {}).items():
        name = names.absolute(relative)
        if entry["kind"] == "norm":
            consumers = [names.absolute(n) for n in entry["folded_into"]]
            folded_into[name] = consumers if all(n in have for n in consumers) else []
        head, table = have.get(name), have.get(names.absolute(entry.get("tied_to", name)))
        if "tied_to" in entry and head and table and head.weight is table.weight:
            tied_to[name] = names.absolute(entry["tied_to"])
    return folded_into, tied_to


def refresh(model: nn.Module, config: MaQDConfig) -> None:
    """Make ``config.modules`` say what ``model`` holds now, as after layers were dropped.

    Wrappers (FSDP, ``torch.compile``) put modules named ``_...`` between ours: the list then stays.
    """
    wrapped = any("._" in f".{name}" for name, _ in modules_of(model, *OURS))
    if config.modules is not None and not wrapped:
        config.modules = describe(model, config, *relations(model, config))


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
        if "tied_to" not in entry:
            with _fitting(relative, entry, old):
                new = _BUILDERS[entry["kind"]](old, dict(entry), config, context)
                replace_module(model, names.absolute(relative), new)
    for relative, entry in modules.items():
        if "tied_to" in entry:
            with _fitting(relative, entry, have[names.absolute(relative)]):
                source = names.absolute(entry["tied_to"])
                tie_head(model, source, names.absolute(relative), _spec(entry, config), context)
    config.modules = modules
    attach_context(model, context)
    return [names.absolute(head) for head in new_heads]


@contextmanager
def _fitting(relative: str, entry: dict[str, Any], old: nn.Module) -> Iterator[None]:
    """Say which entry of ``config.modules`` it was that did not fit the module ``old``."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise ValueError(
            f"config.json describes {relative!r} as {entry!s:.300}, which does not fit a "
            f"{type(old).__name__} ({type(error).__name__}: {error}): it was edited, or "
            "written by another maqd_hf release"
        ) from None


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
    settings = {k: v for k, v in entry.items() if k not in ("kind", "eps", "folded_into", "crc32")}
    return LayerBatchNorm(
        weight.numel(), NormSpec(**settings), entry["eps"], context, weight.device
    )


_BUILDERS: dict[str, Callable[..., nn.Module]] = {
    "linear": _build_linear,
    "embedding": _build_embedding,
    "norm": _build_norm,
}
