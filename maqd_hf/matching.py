"""Which modules of a model are converted, why the others are not, and who consumes each norm.

Nothing here changes a model. ``plan_conversion`` looks at classes (Linear, Conv1D, Embedding),
*probes* norms numerically (class names lie: T5LayerNorm is an RMS norm, Gemma multiplies by
1 + weight) and runs one tiny traced forward to learn which layers read each norm's output, so that
no table of families is needed and an unknown family is refused by name instead of corrupted.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers.pytorch_utils import Conv1D

from .config import MaQDConfig
from .nn import LinearSpec

_QK_NORM = re.compile(r"(^|[._])(q|k|query|key)_?(layer)?_?norm$")
_T5_LIKE = ("t5", "mt5", "umt5", "longt5", "switch_transformers", "udop", "pop2piano")


# --------------------------------------------------------------------------------------- norms


@dataclass(frozen=True)
class NormKind:
    """What a norm computes, found by probing it."""

    features: int
    centered: bool
    unit_offset: bool  # multiplies by 1 + weight
    has_bias: bool
    eps: float

    def gamma(self, norm: nn.Module) -> Tensor:
        """The factor the norm really multiplies by, (features,)."""
        weight: Tensor = norm.weight.detach()  # type: ignore[union-attr, operator, assignment]
        return weight + 1 if self.unit_offset else weight


def looks_like_norm(module: nn.Module) -> bool:
    """A leaf whose class calls itself a norm."""
    named = "norm" in type(module).__name__.lower()
    return named and not any(True for _ in module.children())


def probe_norm(norm: nn.Module) -> NormKind | str:
    """Run ``norm`` on random numbers and recognise it; a string says why it was not."""
    weight = getattr(norm, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 1:
        return "has no one-dimensional weight"
    if len(inspect.signature(norm.forward).parameters) != 1:
        return "takes more than the hidden states"
    eps = getattr(norm, "eps", getattr(norm, "variance_epsilon", None))
    if not isinstance(eps, float):
        return "has no eps this version knows"
    clone = copy.deepcopy(norm).to_empty(device="cpu").float().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in clone.parameters():
            parameter.uniform_(0.5, 1.5, generator=generator)
        x = 3 * torch.randn(2, 3, weight.numel(), generator=generator) + 0.7
        try:
            y = clone(x)
        except (RuntimeError, TypeError, ValueError) as error:
            return f"could not be probed ({error})"
        bias = getattr(clone, "bias", None)
        for centered in (False, True):
            z = x - x.mean(-1, keepdim=True) if centered else x
            z = z * torch.rsqrt(z.square().mean(-1, keepdim=True) + eps)
            for unit_offset in (False, True):
                expected = z * (clone.weight + unit_offset)  # type: ignore[operator]
                expected = expected if bias is None else expected + bias
                if torch.allclose(y, expected, rtol=1e-4, atol=1e-4):
                    return NormKind(weight.numel(), centered, unit_offset, bias is not None, eps)
    return f"computes neither an RMS norm nor a layer norm ({type(norm).__name__})"


# ----------------------------------------------------------------------------------- the trace


@dataclass
class NormUse:
    """Who reads a norm's output: module names of linears, and anything else, in words."""

    consumers: list[str] = field(default_factory=list)
    others: set[str] = field(default_factory=set)
    runs: int = 0


_METADATA_GETTERS = {
    getattr(Tensor, name).__get__
    for name in ("shape", "dtype", "device", "ndim", "is_meta", "requires_grad", "is_cuda")
}
_METADATA_CALLS = {Tensor.size, Tensor.dim, Tensor.is_floating_point, Tensor.__hash__}


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, dict):
        for value in tree.values():
            yield from _tensors(value)
    elif isinstance(tree, (list, tuple)):
        for value in tree:
            yield from _tensors(value)


class _ConsumerTrace(TorchFunctionMode):
    """Follows the outputs of norms by identity through one forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.uses: dict[str, NormUse] = {}
        self.order: list[str] = []
        self._made_by: dict[int, tuple[str, Tensor]] = {}  # keeps outputs alive: ids stay unique
        self._inside = 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if not self._inside and func not in _METADATA_GETTERS and func not in _METADATA_CALLS:
            self.note((args, kwargs), getattr(func, "__name__", str(func)))
        return func(*args, **kwargs)

    def note(self, tree: Any, user: str) -> None:
        """Record that ``user`` reads every traced tensor in ``tree``."""
        for tensor in _tensors(tree):
            if id(tensor) in self._made_by:
                self.uses[self._made_by[id(tensor)][0]].others.add(user)

    def enter_linear(self, name: str, args: tuple[Any, ...]) -> None:
        for tensor in _tensors(args):
            if id(tensor) in self._made_by:
                self.uses[self._made_by[id(tensor)][0]].consumers.append(name)
        self._inside += 1

    def enter_norm(self, name: str, args: tuple[Any, ...]) -> None:
        self.note(args, f"norm {name}")
        self._inside += 1

    def leave(self, norm: str | None, output: Any) -> None:
        self._inside -= 1
        if norm is not None and isinstance(output, Tensor):
            use = self.uses.setdefault(norm, NormUse())
            use.runs += 1
            self.order.append(norm)
            self._made_by[id(output)] = (norm, output)


def example_inputs(model: nn.Module) -> dict[str, Tensor]:
    """A tiny input for one forward of a transformers model, on its device."""
    config: Any = model.config
    device = next(model.parameters()).device
    if getattr(model, "main_input_name", "input_ids") == "pixel_values":
        size = config.image_size
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        dtype = next(model.parameters()).dtype
        return {"pixel_values": torch.zeros(1, config.num_channels, height, width, dtype=dtype)}
    vocabulary = config.get_text_config().vocab_size
    ids = torch.arange(4, device=device).remainder(vocabulary).unsqueeze(0)
    inputs = {"input_ids": ids}
    if getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = ids
    return inputs


def trace_norms(
    model: nn.Module, norms: dict[str, nn.Module], linears: dict[str, nn.Module]
) -> tuple[dict[str, NormUse], list[str]]:
    """Run one tiny forward; return each norm's uses and the norms in the order they ran."""
    trace = _ConsumerTrace()
    handles = []
    for name, module in linears.items():
        enter = lambda _, args, name=name: trace.enter_linear(name, args)  # noqa: E731
        handles.append(module.register_forward_pre_hook(enter))
        handles.append(module.register_forward_hook(lambda *_: trace.leave(None, None)))
    for name, module in norms.items():
        enter = lambda _, args, name=name: trace.enter_norm(name, args)  # noqa: E731
        handles.append(module.register_forward_pre_hook(enter))
        leave = lambda _m, _a, output, name=name: trace.leave(name, output)  # noqa: E731
        handles.append(module.register_forward_hook(leave))
    base = getattr(model, getattr(model, "base_model_prefix", ""), model)
    for owner in {id(model): model, id(base): base}.values():
        note = lambda _m, _a, output: trace.note(output, "the model's output")  # noqa: E731
        handles.append(owner.register_forward_hook(note))
    training = model.training
    try:
        model.eval()
        with torch.no_grad(), trace:
            model(**example_inputs(model))
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    return trace.uses, trace.order


# ------------------------------------------------------------------------------------ the plan


class Names:
    """Module names relative to the base model, "/name" outside it; the same for every head.

    A checkpoint written from ``ForCausalLM`` and loaded as ``AutoModel`` (or the other way round)
    then means the same modules.
    """

    def __init__(self, model: nn.Module) -> None:
        prefix = getattr(model, "base_model_prefix", "")
        nested = bool(prefix) and hasattr(model, prefix)
        self.prefix = f"{prefix}." if nested else ""

    def relative(self, name: str) -> str:
        """Full module name -> name in a config."""
        if name.startswith(self.prefix):
            return name[len(self.prefix) :]
        return f"/{name}"

    def absolute(self, name: str) -> str:
        """Name in a config -> full module name."""
        return name[1:] if name.startswith("/") else f"{self.prefix}{name}"


@dataclass
class NormPlan:
    """What happens to one norm."""

    kind: NormKind
    absorbed_by: list[str] = field(default_factory=list)  # full names; empty: keeps its affine
    not_absorbed: str = ""
    gated: bool = True
    not_gated: str = ""


@dataclass
class ConversionPlan:
    """Everything ``quantize_model`` will do, decided before anything is touched."""

    linears: dict[str, LinearSpec] = field(default_factory=dict)
    norms: dict[str, NormPlan] = field(default_factory=dict)
    embedding: str | None = None
    head: str | None = None
    head_tied: bool = False
    kept: dict[str, str] = field(default_factory=dict)


def is_linear(module: nn.Module) -> bool:
    """A layer this version can convert: exactly Linear or Conv1D, subclasses may do anything."""
    return type(module) in (nn.Linear, Conv1D, nn.modules.linear.NonDynamicallyQuantizableLinear)


def linear_width(module: nn.Module) -> int:
    """Input width of a Linear or Conv1D."""
    return module.weight.shape[0 if isinstance(module, Conv1D) else 1]  # type: ignore[union-attr, index, return-value]


def find_module(model: nn.Module, module: nn.Module | None) -> str | None:
    """Full name of ``module`` in ``model``."""
    return next((n for n, m in model.named_modules() if m is module), None) if module else None


def _plan_linears(model: nn.Module, config: MaQDConfig, names: Names, plan: ConversionPlan) -> None:
    model_type = str(getattr(getattr(model, "config", None), "model_type", ""))
    for name, module in model.named_modules():
        if name in (plan.head, plan.embedding) or not is_linear(module):
            continue
        reason = config.left_out(names.relative(name), layer=True)
        if reason is None and model_type in _T5_LIKE and name.endswith(".wo"):
            reason = "its caller reads weight.dtype and casts the input to it"
        if reason is not None:
            plan.kept[name] = reason
            continue
        spec = config.linear_spec(names.relative(name))
        try:
            spec.groups(linear_width(module))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        plan.linears[name] = spec


def _plan_embedding(model: Any, config: MaQDConfig, plan: ConversionPlan) -> None:
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    head_name = find_module(model, head)
    name = find_module(model, embedding)
    if config.embedding_levels is None:
        for part in (name, head_name):
            if part is not None:
                plan.kept[part] = "embedding_levels is None"
        plan.head = head_name
        return
    if not isinstance(embedding, nn.Embedding) or name is None:
        raise ValueError(
            f"embedding_levels={config.embedding_levels}, but the input embedding of "
            f"{type(model).__name__} is {type(embedding).__name__}; set embedding_levels=None"
        )
    plan.embedding = name
    if isinstance(head, nn.Linear) and head_name is not None:
        plan.head, plan.head_tied = head_name, head.weight is embedding.weight
        spec = config.linear_spec("/" + head_name)
        plan.linears[head_name] = LinearSpec(
            config.embedding_levels,
            spec.activation_levels,
            spec.activation_scaling,
            spec.first_token,
            surrogate=spec.surrogate,
        )


def _refuse_absorption(use: NormUse | None, plan: ConversionPlan) -> str:
    if use is None or not use.runs:
        return "the traced forward did not reach it"
    if use.runs > 1:
        return "it runs more than once a forward"
    if use.others:
        return f"its output also feeds {', '.join(sorted(use.others))}"
    if not use.consumers:
        return "no Linear reads its output"
    outside = [name for name in use.consumers if name not in plan.linears]
    if outside:
        return f"its consumer {outside[0]} is not converted"
    if plan.head_tied and plan.head in use.consumers:
        return "its consumer is the tied head"
    return ""


def _plan_norms(model: nn.Module, config: MaQDConfig, names: Names, plan: ConversionPlan) -> None:
    norms: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if not looks_like_norm(module):
            continue
        kind = config.left_out(names.relative(name)) or probe_norm(module)
        if isinstance(kind, str):
            plan.kept[name] = kind
        else:
            norms[name] = module
            plan.norms[name] = NormPlan(kind)
    linears = {n: m for n, m in model.named_modules() if is_linear(m)}
    uses, order = trace_norms(model, norms, linears)
    in_base = [n for n in order if not names.relative(n).startswith("/")]
    for name, norm in plan.norms.items():
        norm.not_absorbed = _refuse_absorption(uses.get(name), plan)
        if not norm.not_absorbed:
            norm.absorbed_by = list(uses[name].consumers)
        if _QK_NORM.search(name) and not config.lbn_qk_norm:
            norm.gated, norm.not_gated = False, "q/k norm (lbn_qk_norm switches it on)"
        elif in_base and name == in_base[-1] and not config.lbn_final_norm:
            norm.gated, norm.not_gated = False, "final norm (lbn_final_norm switches it on)"


def plan_conversion(model: nn.Module, config: MaQDConfig) -> ConversionPlan:
    """Decide what ``quantize_model`` will do; ``ValueError`` when nothing matches."""
    names, plan = Names(model), ConversionPlan()
    _plan_embedding(model, config, plan)
    _plan_linears(model, config, names, plan)
    if not plan.linears:
        classes = sorted({type(m).__name__ for m in model.modules() if hasattr(m, "weight")})
        raise ValueError(
            f"nothing to convert in {type(model).__name__}: targets={config.targets}, "
            f"exclude={config.exclude}; its layers with a weight are {classes}, convertible are "
            "Linear and Conv1D. Left alone: "
            + ("; ".join(f"{n} ({why})" for n, why in list(plan.kept.items())[:5]) or "nothing")
        )
    _plan_norms(model, config, names, plan)
    known = {*plan.linears, *plan.norms, *plan.kept, plan.embedding}
    for name, module in model.named_modules():
        own = list(module.parameters(recurse=False))
        if own and name not in known and any(p.dim() > 1 for p in own):
            plan.kept[name] = f"{type(module).__name__} is not a layer this version converts"
    return plan
