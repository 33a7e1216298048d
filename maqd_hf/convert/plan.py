"""The plan of a conversion: which modules of a model are converted, and why the others are not.

``plan_conversion`` decides everything before anything is touched. It looks at classes (Linear,
Conv1D, Embedding), and at what ``models.probing`` finds out about norms and about subclasses of
Linear.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..config import MaQDConfig
from ..models.finding import find_module
from ..models.names import Names
from ..models.probing import (
    NormKind,
    Trace,
    looks_like_norm,
    probe_embedding,
    probe_linear,
    probe_norm,
    trace_norms,
)
from ..nn import LinearSpec

_QK_NORM = re.compile(r"(^|[._])(q|k|query|key)_?(layer)?_?norm$")


@dataclass
class NormPlan:
    """The plan for one norm; ``not_gated`` says why it stays per token, if so."""

    kind: NormKind
    folded_into: list[str] = field(default_factory=list)  # full names; empty: keeps its affine
    not_folded: str = ""  # why not, where it was wanted
    gated: bool = True
    not_gated: str = ""


@dataclass
class ConversionPlan:
    """Everything that ``quantize_model`` will do, decided before anything is touched.

    ``linears``, ``norms`` and ``kept`` (module -> why it stays as it is) have full names.
    """

    linears: dict[str, LinearSpec] = field(default_factory=dict)
    norms: dict[str, NormPlan] = field(default_factory=dict)
    embedding: str | None = None
    head: str | None = None
    head_tied: bool = False
    embedding_scale: float = 1.0
    kept: dict[str, str] = field(default_factory=dict)
    untraced: str = ""  # why no forward was seen


def is_linear(module: nn.Module) -> bool:
    """Whether ``module`` can be converted: it is a Linear or a Conv1D, or computes the same."""
    return _is_plain(module) or (isinstance(module, nn.Linear) and probe_linear(module))


def _is_plain(module: nn.Module) -> bool:
    return type(module) in (nn.Linear, Conv1D)


def linear_width(module: nn.Module) -> int:
    """The input width of a Linear or Conv1D."""
    return module.weight.shape[0 if isinstance(module, Conv1D) else 1]  # type: ignore[index, return-value]


@dataclass
class _Survey:
    """The facts that a plan rests on: convertible layers, recognized norms, and a traced forward.

    ``shared`` maps a module to the other places that it, or its weight, stands in.
    """

    linears: dict[str, nn.Module]
    norms: dict[str, NormKind]
    shared: dict[str, list[str]]
    trace: Trace

    def read(self, name: str) -> str | None:
        """Why the weight of the layer or norm ``name`` has to stay as it is; else None."""
        how = self.trace.reads.get(name)
        return None if how is None else f"its weight is read by the model itself ({how})"


def _shared_modules(model: nn.Module) -> dict[str, list[str]]:
    """Modules that stand in several places, or whose weight does, each with the other places.

    One converted layer could not serve both; an embedding with its tied head is planned apart.
    """
    places: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        weight = getattr(module, "weight", None)
        places.setdefault(id(module if weight is None else weight), []).append(name)
    return {
        name: [other for other in names if other != name]
        for names in places.values()
        if len(names) > 1
        for name in names
    }


def _survey(model: nn.Module, config: MaQDConfig, names: Names, plan: ConversionPlan) -> _Survey:
    """Probe and trace ``model``; norms that cannot be converted are noted in ``plan.kept``."""
    shared = _shared_modules(model)
    linears = {n: m for n, m in model.named_modules() if is_linear(m)}
    norms: dict[str, NormKind] = {}
    for name, module in model.named_modules():
        if not looks_like_norm(module):
            continue
        kind = config.left_out(names.relative(name)) or probe_norm(module)
        if isinstance(kind, NormKind) and name in shared:
            kind = f"shared with {shared[name][0]}"
        if isinstance(kind, str):
            plan.kept[name] = kind
        else:
            norms[name] = kind
    trace = trace_norms(model, {n: model.get_submodule(n) for n in norms}, linears)
    # A subclass may exist because its owner calls something else (as nn.MultiheadAttention's does).
    linears = {n: m for n, m in linears.items() if _is_plain(m) or trace.calls[n]}
    found = _Survey(linears, norms, shared, trace)
    for name in [n for n in norms if n in trace.reads]:  # ours is float32, whatever the model's is
        plan.kept[name] = str(found.read(name))
        del norms[name]
    return found


# -------------------------------------------------------------------------- embedding and head


def _embeddings(model: PreTrainedModel) -> tuple[nn.Module | None, nn.Module | None]:
    """The input embedding and the output head, where the model has them."""
    try:
        return model.get_input_embeddings(), model.get_output_embeddings()
    except NotImplementedError:  # models without tokens
        return None, None


def _plan_embedding(
    model: PreTrainedModel, config: MaQDConfig, names: Names, plan: ConversionPlan, found: _Survey
) -> None:
    """Plan the input embedding and the output head, which are one tensor in many models."""
    embedding, head = _embeddings(model)
    name, head_name = find_module(model, embedding), find_module(model, head)
    levels = config.embedding_levels
    if not isinstance(embedding, nn.Embedding) or name is None:
        if levels is None:
            return
        raise ValueError(
            f"embedding_levels={levels}, but {type(model).__name__} has no token embedding of a "
            f"known kind ({type(embedding).__name__}); set embedding_levels=None"
        )
    tied = head is not None and head.weight is embedding.weight
    reason = "embedding_levels is None" if levels is None else config.left_out(names.relative(name))
    if tied and head_name is not None:
        head_reason = config.left_out(names.relative(head_name), outside=True)
        reason = reason or (head_reason and f"its tied head is {head_reason}")
    reason = reason or found.read(name)
    if reason is not None:
        plan.kept[name] = reason
        if tied and head_name is not None:
            plan.kept[head_name] = f"tied to the embedding ({reason})"
    elif levels is not None:
        plan.embedding = name
        plan.embedding_scale = _check_embedding(embedding, name, head_name if tied else None, found)
    if head_name in found.linears and head_name not in plan.kept:
        _plan_head(head_name, tied, config, names, plan, found)


def _check_embedding(
    embedding: nn.Embedding, name: str, tied_head: str | None, found: _Survey
) -> float:
    """The factor that ``embedding`` multiplies by; ``ValueError`` where it cannot be quantized."""
    scale = probe_embedding(embedding)
    others = [other for other in found.shared.get(name, ()) if other != tied_head]
    if others:
        scale = f"shares its weight with {others[0]}"
    if isinstance(scale, str):
        raise ValueError(
            f"{name} ({type(embedding).__name__}) {scale}: it cannot be quantized; "
            "set embedding_levels=None or exclude it"
        )
    return scale


def _plan_head(
    head: str,
    tied: bool,
    config: MaQDConfig,
    names: Names,
    plan: ConversionPlan,
    found: _Survey,
) -> None:
    """Plan the output head, which follows ``embedding_levels``."""
    relative = names.relative(head)
    if config.embedding_levels is None:
        if not config.targeted(relative):
            plan.kept[head] = "embedding_levels is None"
        return  # else an ordinary layer
    reason = config.left_out(relative, outside=True) or found.read(head)
    if reason is not None:
        plan.kept[head] = reason
        return
    levels = config.embedding_levels
    spec = config.linear_spec(relative, weight_levels=levels, group_size=None, rotation=None)
    if tied:
        spec = spec.on_table(levels)
    plan.head, plan.head_tied, plan.linears[head] = head, tied, spec


# ---------------------------------------------------------------------------- linears and norms


def _plan_linears(config: MaQDConfig, names: Names, plan: ConversionPlan, found: _Survey) -> None:
    """Plan all layers but embedding and head."""
    for name, module in found.linears.items():
        if name in plan.linears or name in plan.kept:
            continue
        reason = config.left_out(names.relative(name), layer=True)
        if name in found.shared:
            reason = reason or f"shares its weight with {found.shared[name][0]}"
        reason = reason or found.read(name)
        if reason is not None:
            plan.kept[name] = reason
            continue
        spec = config.linear_spec(names.relative(name))
        try:
            spec.groups(linear_width(module))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        plan.linears[name] = spec


def _refuse_fold(name: str, plan: ConversionPlan, trace: Trace) -> str:
    """Why the norm ``name`` has to keep its affine; "" if its readers can take it."""
    use = trace.uses.get(name)
    if trace.failure or use is None:
        return trace.failure or "the traced forward did not reach it"
    if use.runs > 1:
        return "it runs more than once a forward"
    if use.others:
        return f"its output also feeds {', '.join(sorted(use.others))}"
    if not use.consumers:
        return "no Linear reads its output"
    for consumer in use.consumers:
        if consumer not in plan.linears:
            return f"its consumer {consumer} is not converted"
        if plan.head_tied and consumer == plan.head:
            return "its consumer is the tied head"
        if trace.calls[consumer] > 1:
            return f"its consumer {consumer} is called {trace.calls[consumer]} times a forward"
    return ""


def _plan_norms(config: MaQDConfig, names: Names, plan: ConversionPlan, found: _Survey) -> None:
    """Plan all norms: who takes their affine, and which get a gate."""
    in_base = [n for n in found.trace.order or found.norms if not names.relative(n).startswith("/")]
    for name, kind in found.norms.items():
        norm = plan.norms[name] = NormPlan(kind)
        if config.norm_affine == "fold":
            norm.not_folded = _refuse_fold(name, plan, found.trace)
            norm.folded_into = [] if norm.not_folded else list(found.trace.uses[name].consumers)
        if _QK_NORM.search(name) and not config.lbn_qk_norm:
            norm.gated, norm.not_gated = False, "q/k norm (lbn_qk_norm switches it on)"
        elif in_base and name == in_base[-1] and not config.lbn_final_norm:
            norm.gated, norm.not_gated = False, "final norm (lbn_final_norm switches it on)"


# ------------------------------------------------------------------------------------ the whole


def _check_patterns(
    config: MaQDConfig, names: Names, model: nn.Module, linears: Iterable[str]
) -> None:
    """Raise ``ValueError`` for a pattern of ``config`` that matches nothing in ``model``."""
    everything = [names.relative(name) for name, _ in model.named_modules()]
    layers = [names.relative(name) for name in linears]
    for what, patterns, candidates in (
        ("targets", config.targets or (), layers),
        ("overrides", config.overrides, layers),
        ("exclude", config.exclude, everything),
    ):
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in candidates):
                raise ValueError(
                    f"{what} pattern {pattern!r} matches nothing in {type(model).__name__}; "
                    f"its names look like {layers[0]!r}, {layers[-1]!r}"
                )


def plan_conversion(model: nn.Module, config: MaQDConfig) -> ConversionPlan:
    """Decide what ``quantize_model`` will do; nothing of ``model`` is changed.

    Raises:
        ValueError: not a transformers model this version takes, nothing to convert, or a pattern
            that matches nothing.
    """
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"{type(model).__name__} is not a transformers model")
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(
            f"{type(model).__name__} is an encoder-decoder, and maqd_hf converts causal language "
            "models and encoders; convert its encoder class alone, e.g. T5EncoderModel"
        )
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError(
            f"{type(model).__name__} has weights that are offloaded or not loaded yet; load it "
            "whole into memory to convert it"
        )
    names, plan = Names(model), ConversionPlan()
    found = _survey(model, config, names, plan)
    plan.untraced = found.trace.failure
    if found.linears:
        _check_patterns(config, names, model, found.linears)
    _plan_embedding(model, config, names, plan, found)
    _plan_linears(config, names, plan, found)
    if not plan.linears:
        raise ValueError(_nothing_to_convert(model, config, plan))
    _plan_norms(config, names, plan, found)
    known = {*plan.linears, *plan.norms, *plan.kept, plan.embedding}
    for name, module in model.named_modules():
        own = list(module.parameters(recurse=False))
        if name not in known and any(p.dim() > 1 for p in own):
            plan.kept[name] = f"{type(module).__name__} is not a layer this version converts"
    return plan


def _nothing_to_convert(model: nn.Module, config: MaQDConfig, plan: ConversionPlan) -> str:
    """The message of the error that a plan without a layer raises."""
    classes = sorted({type(m).__name__ for m in model.modules() if hasattr(m, "weight")})
    left = "; ".join(f"{name} ({why})" for name, why in list(plan.kept.items())[:5])
    return (
        f"nothing to convert in {type(model).__name__}: targets={config.targets}, "
        f"exclude={config.exclude}; its layers with a weight are {classes}, convertible are "
        f"Linear and Conv1D. Left alone: {left or 'nothing'}"
    )
