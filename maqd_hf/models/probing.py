"""What no class name tells: what a norm or a layer computes, and who reads a norm's output.

Norms and layers are *probed* with numbers (names lie: T5LayerNorm is an RMS norm, Gemma multiplies
by 1 + weight, Falcon's layers are of a class of their own), and the readers of a norm's output are
found by one tiny *traced* forward. So there is no table of families, and an unknown one is named in
the report instead of corrupted. Nothing here changes a model.
"""

from __future__ import annotations

import copy
import inspect
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..nn.modes import evaluating

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
        """The factor the norm really multiplies by, (features,), at least float32."""
        weight: Tensor = norm.weight.detach()  # type: ignore[operator]
        return weight.to(torch.promote_types(weight.dtype, torch.float32)) + self.unit_offset


def looks_like_norm(module: nn.Module) -> bool:
    """Whether ``module`` is a leaf whose class calls itself a norm."""
    named = "norm" in type(module).__name__.lower()
    return named and not any(True for _ in module.children())


def probe_norm(norm: nn.Module) -> NormKind | str:
    """Recognize ``norm`` by running a copy on random numbers; a string says why that failed.

    >>> probe_norm(nn.LayerNorm(8)).centered, probe_norm(nn.RMSNorm(8, eps=1e-6)).centered
    (True, False)
    """
    weight = getattr(norm, "weight", None)
    if not isinstance(weight, nn.Parameter) or weight.dim() != 1:
        return f"{type(norm).__name__} has no one-dimensional weight that is trained"
    if any(True for _ in norm.buffers()):
        return f"{type(norm).__name__} has buffers"
    if len(inspect.signature(norm.forward).parameters) != 1:
        return f"{type(norm).__name__} takes more than the hidden states"
    eps = getattr(norm, "eps", getattr(norm, "variance_epsilon", None))
    if not isinstance(eps, float):
        return f"{type(norm).__name__} has no eps this version knows"
    clone = copy.deepcopy(norm).to_empty(device="cpu").float().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in clone.parameters():
            parameter.uniform_(0.5, 1.5, generator=generator)
        x = 3 * torch.randn(2, 3, weight.numel(), generator=generator) + 0.7
        try:
            y = clone(x)
        except (RuntimeError, TypeError, ValueError) as error:
            return f"{type(norm).__name__} could not be probed ({error})"
        bias = getattr(clone, "bias", None)
        for centered in (False, True):
            z = x - x.mean(-1, keepdim=True) if centered else x
            z = z * torch.rsqrt(z.square().mean(-1, keepdim=True) + eps)
            for unit_offset in (False, True):
                expected = z * (clone.weight + unit_offset)  # type: ignore[operator]
                expected = expected if bias is None else expected + bias
                if torch.allclose(y, expected, rtol=1e-4, atol=1e-4):
                    return NormKind(weight.numel(), centered, unit_offset, bias is not None, eps)
    return f"{type(norm).__name__} computes neither an RMS norm nor a layer norm"


# ------------------------------------------------------------------------- layers, embeddings


def probe_linear(layer: nn.Linear) -> bool:
    """Whether ``layer``, of a subclass of ``nn.Linear``, computes what an ``nn.Linear`` does.

    >>> class Doubled(nn.Linear):
    ...     def forward(self, input):
    ...         return 2 * super().forward(input)
    >>> probe_linear(nn.Linear(3, 2)), probe_linear(Doubled(3, 2))
    (True, False)
    """
    weight, bias = layer.weight, layer.bias
    own = {name for name, _ in [*layer.named_parameters(), *layer.named_buffers()]}
    if own - {"weight", "bias"} or [*layer.children()] or not weight.is_floating_point():
        return False
    x = torch.randn(2, layer.in_features, generator=torch.Generator().manual_seed(0)).to(weight)
    try:
        with torch.no_grad():
            found, expected = layer(x), nn.functional.linear(x, weight, bias)
    except Exception:  # a forward of its own may want anything
        return False
    if not isinstance(found, Tensor) or found.shape != expected.shape:
        return False
    return torch.allclose(found, expected, rtol=1e-2, atol=1e-2 * float(expected.abs().max()))


def probe_embedding(embedding: nn.Embedding) -> float | str:
    """The factor ``embedding`` multiplies its rows by (Gemma's is not 1), or why there is none.

    >>> probe_embedding(nn.Embedding(4, 2))
    1.0
    """
    if embedding.max_norm is not None:
        return "has max_norm"
    scale = getattr(embedding, "scalar_embed_scale", getattr(embedding, "embed_scale", 1.0))
    ids = torch.arange(min(4, embedding.num_embeddings), device=embedding.weight.device)
    with torch.no_grad():
        rows, expected = embedding(ids), embedding.weight[ids] * float(scale)
    if rows.shape == expected.shape and torch.allclose(rows, expected.to(rows), rtol=1e-2):
        return float(scale)
    return "puts out something else than its rows times a constant"


# ----------------------------------------------------------------------------------- the trace


@dataclass
class NormUse:
    """The readers of a norm's output: ``consumers`` are names of linears, ``others`` words.

    ``runs`` counts the calls of the norm in one forward.
    """

    consumers: list[str] = field(default_factory=list)
    others: set[str] = field(default_factory=set)
    runs: int = 0


@dataclass
class Trace:
    """What one forward showed, by module name; ``failure`` says why there was none.

    ``uses`` has the readers of each norm, ``order`` the norms in the order they ran, ``calls`` how
    often each linear was called. ``reads`` names what a model does with the ``weight`` of a linear,
    embedding or norm besides calling it (T5 asks for its dtype, attention may multiply by it).
    """

    uses: dict[str, NormUse] = field(default_factory=dict)
    order: list[str] = field(default_factory=list)
    calls: Counter[str] = field(default_factory=Counter)
    reads: dict[str, str] = field(default_factory=dict)
    failure: str = ""


def _getters(*names: str) -> set[Any]:
    return {getattr(Tensor, name).__get__ for name in names}


# Reading these attributes of an activation is harmless.
_HARMLESS = _getters("device", "is_meta", "requires_grad", "is_cuda", "grad_fn", "data")
_HARMLESS |= {Tensor.dim, Tensor.__hash__}
# These are harmless for an activation, but would mislead of a packed weight.
_DESCRIBING = _getters("shape", "dtype", "ndim") | {Tensor.size, Tensor.is_floating_point}


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, dict):
        for value in tree.values():
            yield from _tensors(value)
    elif isinstance(tree, (list, tuple)):
        for value in tree:
            yield from _tensors(value)


class _Tracer(TorchFunctionMode):
    """A mode that follows the outputs of norms, by identity, through one forward."""

    def __init__(self, layers: dict[str, nn.Module]) -> None:
        super().__init__()
        self.trace = Trace()
        self._weights: dict[int, list[str]] = {}  # tied ones have several names
        for name, module in layers.items():
            self._weights.setdefault(id(module.weight), []).append(name)
        self._made_by: dict[int, tuple[str, Tensor]] = {}  # keeps outputs alive: ids stay unique
        self._inside = 0  # a layer or a norm: what happens in there is its own affair

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if not self._inside and func not in _HARMLESS:
            name = getattr(func, "__name__", str(func))
            if name == "__get__":  # of an attribute: say which
                name = func.__self__.__name__
            for tensor in _tensors((args, kwargs)):
                for layer in self._weights.get(id(tensor), ()):
                    self.trace.reads[layer] = name
            if func not in _DESCRIBING:
                self.note((args, kwargs), name)
        return func(*args, **kwargs)

    def _uses_in(self, tree: Any) -> Iterator[NormUse]:
        for tensor in _tensors(tree):
            if id(tensor) in self._made_by:
                yield self.trace.uses[self._made_by[id(tensor)][0]]

    def note(self, tree: Any, user: str) -> None:
        """Record that ``user``, in words, reads every traced tensor in ``tree``."""
        for use in self._uses_in(tree):
            use.others.add(user)

    def enter_linear(self, name: str, tree: Any) -> None:
        """A linear is called with the arguments ``tree``."""
        self.trace.calls[name] += 1
        for use in self._uses_in(tree):
            use.consumers.append(name)
        self._inside += 1

    def enter_embedding(self) -> None:
        """An embedding is called."""
        self._inside += 1

    def enter_norm(self, name: str, tree: Any) -> None:
        """A norm is called with the arguments ``tree``."""
        self.note(tree, f"norm {name}")
        self._inside += 1

    def leave(self, norm: str | None = None, output: Any = None) -> None:
        """A watched module returns; a ``norm`` with its ``output``."""
        self._inside -= 1
        if norm is not None and isinstance(output, Tensor):
            use = self.trace.uses.setdefault(norm, NormUse())
            use.runs += 1
            self.trace.order.append(norm)
            self._made_by[id(output)] = (norm, output)

    def watch(
        self,
        model: nn.Module,
        norms: dict[str, nn.Module],
        linears: dict[str, nn.Module],
        embeddings: dict[str, nn.Module],
    ) -> Iterator[Any]:
        """Register the hooks of one forward; yields their handles."""
        for module in embeddings.values():
            yield module.register_forward_pre_hook(lambda *_: self.enter_embedding())
            yield module.register_forward_hook(lambda *_: self.leave())
        for name, module in linears.items():
            enter = lambda _, args, kwargs, name=name: self.enter_linear(name, (args, kwargs))  # noqa: E731
            yield module.register_forward_pre_hook(enter, with_kwargs=True)
            yield module.register_forward_hook(lambda *_: self.leave())
        for name, module in norms.items():
            enter = lambda _, args, kwargs, name=name: self.enter_norm(name, (args, kwargs))  # noqa: E731
            yield module.register_forward_pre_hook(enter, with_kwargs=True)
            leave = lambda _m, _a, output, name=name: self.leave(name, output)  # noqa: E731
            yield module.register_forward_hook(leave)
        base = getattr(model, getattr(model, "base_model_prefix", ""), model)
        for owner in {id(model): model, id(base): base}.values():
            note = lambda _m, _a, output: self.note(output, "the model's output")  # noqa: E731
            yield owner.register_forward_hook(note)


def example_inputs(model: nn.Module) -> dict[str, Tensor]:
    """A tiny input for one forward of a transformers model, on its device and in its dtype."""
    config: Any = model.config
    first = next(model.parameters())
    kind = getattr(model, "main_input_name", "input_ids")
    if kind == "pixel_values":
        size = getattr(config, "image_size", 224)
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        return {kind: first.new_zeros(1, config.num_channels, height, width)}
    if kind == "input_values":  # half a second of sound, or a spectrogram
        spectrogram = hasattr(config, "num_mel_bins")
        shape = (1, config.max_length, config.num_mel_bins) if spectrogram else (1, 8000)
        return {kind: first.new_zeros(shape)}
    ids = torch.arange(4, device=first.device).remainder(config.get_text_config().vocab_size)
    inputs = {"input_ids": ids.unsqueeze(0)}
    if "attention_mask" in inspect.signature(model.forward).parameters:
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    return inputs


def trace_norms(
    model: nn.Module, norms: dict[str, nn.Module], linears: dict[str, nn.Module]
) -> Trace:
    """Run one tiny forward and record who reads what.

    ``norms`` and ``linears`` are the modules to watch, by name. A model that cannot be run gives a
    trace with a ``failure``.
    """
    embeddings: dict[str, nn.Module] = {
        n: m for n, m in model.named_modules() if isinstance(m, nn.Embedding)
    }
    tracer, handles = _Tracer(linears | embeddings | norms), []
    try:
        with evaluating(model):
            handles = list(tracer.watch(model, norms, linears, embeddings))
            with tracer:
                model(**example_inputs(model))
    except Exception as error:  # a model's own code may raise anything; its norms stay as they are
        reason = str(error).partition("\n")[0][:120]
        return Trace(failure=f"the model could not be traced ({type(error).__name__}: {reason})")
    finally:
        for handle in handles:
            handle.remove()
    return tracer.trace
