"""Adapters of the peft library on trainable quantized layers: merged in the input's basis, or not.

An adapter's update is in the basis of the layer's input. The latent of a ``MaQDLinear`` is in the
rotated basis, on a grid whose scales are learned; peft takes the layer for an ``nn.Linear`` and
would add the one to the other. So a LoRA adapter is added to the weight *in force*, as the input
meets it, and the sum gets a grid of its own, with more levels where the layer's would round away
too much of the adapter. What even 256 levels round away, and every other merge, is refused. Packed
layers are no ``nn.Linear``, and peft refuses them itself.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import wraps
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from transformers.utils import logging

from ..functional import MAX_LEVELS
from ..nn import MaQDLinear, rotate
from ..nn.kinds import TRAINABLE

logger = logging.get_logger(__name__)

_TUNERS, _LORA = "peft.tuners.tuners_utils", "peft.tuners.lora.layer"
_MOST_ERROR = 0.125  # of an update's norm; beyond it a merge would say something else
_BEFORE = "_maqd_before_merge"  # where a LoRA layer keeps the tensors of its base layer


def watch_peft() -> None:
    """Teach peft about our layers now, if it is imported, or as soon as it is."""
    changes = {_TUNERS: _refuse_merges, _LORA: _merge_lora}
    for name, change in changes.items():
        if name in sys.modules:
            change(sys.modules[name])
        else:
            sys.meta_path.insert(0, _AfterImport(name, change))


class _AfterImport(MetaPathFinder):
    """Calls ``change`` with the module ``name`` once it is imported."""

    def __init__(self, name: str, change: Callable[[ModuleType], None]) -> None:
        self.name, self.change = name, change

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != self.name:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                run(module)
                self.change(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _refuse_merges(tuners: Any) -> None:
    """Refuse merges into trainable layers in the function that every merge of peft asks first."""
    name = "check_adapters_to_merge"
    inner = getattr(tuners, name)

    @wraps(inner)
    def check_adapters_to_merge(module: Any, *args: Any, **kwargs: Any) -> Any:
        base = module.get_base_layer()
        if isinstance(base, TRAINABLE) and not hasattr(module, _BEFORE):
            raise ValueError(
                f"a {type(module).__name__} adapter cannot be merged into a {type(base).__name__}, "
                "whose latent weight is in another basis: keep it unmerged, use LoRA on linear "
                "layers, or merge into the float model before quantize_model"
            )
        return inner(module, *args, **kwargs)

    setattr(tuners, name, check_adapters_to_merge)
    for module in [m for n, m in sys.modules.items() if n.startswith("peft.")]:
        if getattr(module, name, None) is inner:  # it was imported before
            setattr(module, name, check_adapters_to_merge)


def _merge_lora(lora: Any) -> None:
    """Merging and unmerging of LoRA for a ``MaQDLinear``; other layers as before."""
    merge, unmerge = lora.Linear.merge, lora.Linear.unmerge

    @wraps(merge)
    def merge_in_basis(self: Any, *args: Any, **kwargs: Any) -> None:
        layer = self.get_base_layer()
        if not isinstance(layer, MaQDLinear) or self.lora_variant:
            return merge(self, *args, **kwargs)  # variants are refused
        merged = len(self.merged_adapters)
        now = _Before(layer)
        before = self.__dict__.setdefault(_BEFORE, now)
        try:
            with torch.no_grad():
                in_force = rotate(layer.quantized_weight(), layer.rotation).clone()
                layer.weight.copy_(in_force)
                merge(self, *args, **kwargs)
                wanted = layer.weight.clone()
                if torch.equal(wanted, in_force):  # an adapter that was never trained
                    now.restore(layer)
                else:
                    layer.set_input_weight(wanted)
                    _choose_levels(layer, wanted, wanted - in_force)
        except BaseException:
            del self.merged_adapters[merged:]
            raise
        finally:
            if len(self.merged_adapters) == merged:  # nothing was merged, or an error
                now.restore(layer)
                if before is now:
                    del self.__dict__[_BEFORE]

    @wraps(unmerge)
    def unmerge_in_basis(self: Any) -> None:
        before = self.__dict__.pop(_BEFORE, None)
        if before is None:
            return unmerge(self)
        before.restore(self.get_base_layer())
        self.merged_adapters.clear()

    lora.Linear.merge, lora.Linear.unmerge = merge_in_basis, unmerge_in_basis


class _Before:
    """What a layer was before a merge."""

    def __init__(self, layer: MaQDLinear) -> None:
        self.spec = layer.spec
        self.tensors = {name: p.detach().clone() for name, p in layer.named_parameters()}

    @torch.no_grad()
    def restore(self, layer: MaQDLinear) -> None:
        layer.spec = self.spec
        for name, parameter in layer.named_parameters():
            parameter.copy_(self.tensors[name])


def _choose_levels(layer: MaQDLinear, wanted: torch.Tensor, update: torch.Tensor) -> None:
    """Give ``layer``, whose latent is the merged weight ``wanted``, the fewest levels that keep the
    ``update`` (both (out, in), in the basis of the input), starting at those it has.

    Raises:
        ValueError: not even the most levels keep it.
    """
    had = layer.weight_levels
    while True:
        layer.reset_quantizer("search")
        error = rotate(layer.quantized_weight(), layer.rotation) - wanted
        share = float(error.norm() / update.norm())
        if share <= _MOST_ERROR:
            break
        if layer.weight_levels is None or layer.weight_levels >= MAX_LEVELS - 1:
            raise ValueError(
                f"{layer.weight_levels} levels are too few for this adapter: rounding the merged "
                f"weight moves it by {share:.0%} of the update, at most {_MOST_ERROR:.0%} are "
                "allowed. Keep the adapter unmerged, or merge into the float model before "
                "quantize_model and train again"
            )
        layer.spec = replace(layer.spec, weight_levels=_finer(layer.weight_levels))
    if layer.weight_levels != had:
        logger.warning_once(
            f"A LoRA adapter was merged into layers of {had} levels, which are too few for it: "
            f"they have {layer.weight_levels} now and take more memory when packed. Unmerging "
            f"takes that back. For {had} levels, merge into the float model before "
            "quantize_model and train again."
        )


def _finer(levels: int) -> int:
    """The next finer grid, of half the step; with a zero if ``levels`` have one.

    >>> _finer(15), _finer(16), _finer(200)
    (31, 32, 256)
    """
    return min(2 * levels + levels % 2, MAX_LEVELS - levels % 2)
