"""Putting converted layers into a model, and what a checkpoint says about them.

``describe`` writes what was converted into ``config.modules``; ``build_modules`` puts the same
layers into an empty model when a checkpoint is loaded. The two are each other's inverse.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import nn

from .config import MaQDConfig
from .matching import ConversionPlan, Names, is_linear
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
    parent, _, leaf = name.rpartition(".")
    model.get_submodule(parent)._modules[leaf] = module


def modules_of(model: nn.Module, kind: type[Any] | tuple[type[Any], ...]) -> list[tuple[str, Any]]:
    return [(n, m) for n, m in model.named_modules() if isinstance(m, kind)]


def base_of(model: nn.Module) -> nn.Module:
    prefix = Names(model).prefix.rstrip(".")
    return model.get_submodule(prefix) if prefix else model


def tie_head(
    model: nn.Module, embedding: str, head: str, spec: LinearSpec, context: BatchContext
) -> None:
    table, bias = model.get_submodule(embedding), model.get_submodule(head).bias
    if isinstance(table, MaQDEmbedding):
        tied: nn.Module = table.as_linear(spec)
        if spec.activation_levels is not None:
            quantizer = ActivationQuantizer(spec, context, table.weight.device)
            tied.activation = quantizer
    else:
        assert isinstance(table, PackedEmbedding)
        tied = PackedLinear(
            table.embedding_dim, table.num_embeddings, False, spec, context, table.weight.device
        )
        table.tie(tied)
    tied.bias = bias  # type: ignore[assignment]
    replace_module(model, head, tied)
    keys = getattr(model, "all_tied_weights_keys", None)
    if keys is not None:
        for name in ("weight", *TIED_TENSORS):
            if getattr(table, name, None) is not None:
                keys[f"{head}.{name}"] = f"{embedding}.{name}"


def describe(model: nn.Module, config: MaQDConfig, plan: ConversionPlan) -> dict[str, Any]:
    names, modules = Names(model), {}
    for name, module in model.named_modules():
        relative = names.relative(name)
        if isinstance(module, MaQDLinear):
            usual, actual = asdict(config.linear_spec(relative)), asdict(module.spec)
            entry: dict[str, Any] = {k: v for k, v in actual.items() if v != usual[k]}
            entry["bias"] = module.bias is not None
            if name == plan.head and plan.head_tied:
                assert plan.embedding is not None
                entry["tied_to"] = names.relative(plan.embedding)
            modules[relative] = {"kind": "linear", **entry}
        elif isinstance(module, MaQDEmbedding):
            scale = {} if module.output_scale == 1 else {"output_scale": module.output_scale}
            modules[relative] = {"kind": "embedding", "levels": module.levels, **scale}
        elif isinstance(module, LayerBatchNorm):
            absorbed_by = [names.relative(n) for n in plan.norms[name].absorbed_by]
            modules[relative] = {
                "kind": "norm",
                "absorbed_by": absorbed_by,
                "eps": module.eps,
                **asdict(module.spec),
            }
    return modules


def build_modules(model: nn.Module, config: MaQDConfig) -> None:
    """Put the layers ``config.modules`` lists into a float skeleton (on meta: nothing is copied).

    Modules outside the base model that this class does not have are skipped (a CausalLM checkpoint
    loaded as its base model); one missing inside it is an error.
    """
    names, context = Names(model), BatchContext()
    have = dict(model.named_modules())
    tied: list[tuple[str, str, LinearSpec]] = []
    for relative, entry in (config.modules or {}).items():
        name, settings = names.absolute(relative), dict(entry)
        old = have.get(name)
        if old is None:
            if relative.startswith("/"):
                continue
            raise ValueError(
                f"the checkpoint lists a converted module {name!r} that {type(model).__name__} "
                "does not have: config.json does not fit this model class"
            )
        build = _BUILDERS.get(settings.pop("kind", ""))
        if build is None:
            raise ValueError(f"module {relative!r} has an unknown kind {entry.get('kind')!r}")
        if "tied_to" in settings:
            source, spec = (
                names.absolute(settings.pop("tied_to")),
                _spec(relative, settings, config),
            )
            tied.append((source, name, spec))
        else:
            replace_module(model, name, build(old, relative, settings, config, context))
    for source, name, spec in tied:
        tie_head(model, source, name, spec, context)
    context.attach(base_of(model))


def _spec(relative: str, settings: dict[str, Any], config: MaQDConfig) -> LinearSpec:
    changes = {k: v for k, v in settings.items() if k != "bias"}
    return replace(config.linear_spec(relative), **changes)


def _build_linear(
    old: nn.Module, relative: str, settings: dict[str, Any], config: MaQDConfig, ctx: BatchContext
) -> nn.Module:
    if not is_linear(old):
        raise ValueError(f"{relative!r} should be a Linear here, it is {type(old).__name__}")
    shape: tuple[int, int] = tuple(old.weight.shape)  # type: ignore[arg-type, assignment]
    out_features, in_features = shape if isinstance(old, nn.Linear) else shape[::-1]
    spec, bias = _spec(relative, settings, config), bool(settings["bias"])
    device = old.weight.device
    if config.state == "packed" and spec.weight_levels is not None:
        return PackedLinear(in_features, out_features, bias, spec, ctx, device)  # type: ignore[arg-type]
    return MaQDLinear(in_features, out_features, bias, spec, ctx, device)  # type: ignore[arg-type]


def _build_embedding(
    old: nn.Module, relative: str, settings: dict[str, Any], config: MaQDConfig, ctx: BatchContext
) -> nn.Module:
    if not isinstance(old, nn.Embedding):
        raise ValueError(f"{relative!r} should be an Embedding here, it is {type(old).__name__}")
    kind: Callable[..., nn.Module] = PackedEmbedding if config.state == "packed" else MaQDEmbedding
    return kind(
        old.num_embeddings,
        old.embedding_dim,
        settings["levels"],
        old.padding_idx,
        settings.get("output_scale", 1.0),
        device=old.weight.device,
    )


def _build_norm(
    old: nn.Module, relative: str, settings: dict[str, Any], config: MaQDConfig, ctx: BatchContext
) -> nn.Module:
    weight = getattr(old, "weight", None)
    if not isinstance(weight, torch.Tensor):
        raise ValueError(f"{relative!r} should be a norm here, it is {type(old).__name__}")
    eps = settings.pop("eps")
    settings.pop("absorbed_by")
    spec = NormSpec(**settings)
    return LayerBatchNorm(weight.numel(), spec, eps, ctx, weight.device, weight.dtype)


_BUILDERS: dict[str, Callable[..., nn.Module]] = {
    "linear": _build_linear,
    "embedding": _build_embedding,
    "norm": _build_norm,
}
