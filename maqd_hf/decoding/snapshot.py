"""Noticing that anything a plan was made of has changed, at a cost that a token does not feel.

A prompt's call compares everything. Before a single token, whose weights have just driven all else
out of the processor's caches, a look at every module and tensor would cost a tenth of the token.
So events are counted there: torch numbers its hooks, this package's modules count assignments, and
frozen parameters count their edits together. What is left to look at is the structure of the stock
modules, some functions and the config. A count that moved means to compare everything again.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Sequence
from itertools import chain
from operator import attrgetter, is_, itemgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..kernels import loader
from ..nn import CountedModule, FrozenParameter, LayerBatchNorm, Stamp, count_together, freeze
from .families import FAMILIES
from .identity import (
    attention_functions,
    global_hooks,
    methods,
    names_read,
    own_attributes,
    read_globals,
)

_values: Callable[[dict[Any, Any]], Iterable[Any]] = dict.values
_version = attrgetter("_version")
_END = object()


class Snapshot:
    """The modules of a model with their classes, attributes, hooks and tensors, its config, and
    the functions that its forward runs, as they are now.

    Objects are compared by identity, numbers and containers by value; a tensor that was edited has
    changed. Frozen parameters of this package's modules count their edits together from now on.

    >>> model = nn.Sequential(nn.Linear(2, 2))
    >>> model.config = nn.Module()  # any object with attributes
    >>> snapshot = Snapshot(model)
    >>> snapshot.fits(), setattr(model[0], "in_features", 3), snapshot.fits()
    (True, None, False)
    """

    def __init__(self, model: Any) -> None:
        modules: list[nn.Module] = [*model.modules()]
        ours = [module for module in modules if isinstance(module, CountedModule)]
        packed = [freeze(parameter) for module in ours for parameter in module.parameters()]
        self._counters = count_together(packed)
        self._events = self._counted()
        self._config, self._fields = model.config, _kept(vars(model.config))
        family = FAMILIES.get(getattr(model.config, "model_type", ""))
        found = read_globals(model, family) if family else []
        self._code = _Code(model, found)
        tables = [table for module in modules for table in _tables(module)]
        self._all = _Structure(modules, [*tables, *global_hooks()])
        stock = [module for module in modules if not isinstance(module, CountedModule)]
        filled = [table for module in stock for table in _tables(module)[:3] if table]
        self._stock = _Structure(stock, filled, names_read(model, found))
        self._tensors = self._all.tensors
        self._stamp = Stamp(self._tensors)
        alone = [tensor for tensor in self._tensors if not _is_counted(tensor)]
        unread = {id(b) for norm in ours for b in norm.buffers()}
        self._placed = [t for t in alone if t.dtype == torch.float32 and id(t) not in unread]
        self._places = [*map(Tensor.data_ptr, self._placed)]
        self._copied = [t for t in alone if _is_copied(t)] + _statistics(modules)
        self._versions = [*map(_version, self._copied)]

    def fits(self, step: bool = False) -> bool:
        """Whether nothing has changed since.

        ``step``: by the counts alone, where none has moved. They miss what goes around the
        interfaces of torch: an entry put into a dictionary of a module's hooks or parameters by
        hand.
        """
        try:
            if vars(self._config) != self._fields or not self._code.fits():
                return False
            events = self._counted()
            if step and events == self._events:
                return (
                    [*map(_version, self._copied)] == self._versions
                    and [*map(Tensor.data_ptr, self._placed)] == self._places
                    and self._stock.fits()
                )
            if not (self._all.fits() and self._stamp.fits(self._tensors)):
                return False
        except (KeyError, RuntimeError, TypeError, ValueError):
            return False  # what was read is gone, or does not compare
        self._events = events
        return True

    def _counted(self) -> list[int]:
        numbers = RemovableHandle.next_id, CountedModule.assignments
        return [*numbers, *map(_version, self._counters)]


class _Code:
    """The functions that calls of a model's modules run, as they are now."""

    def __init__(self, model: Any, found: list[tuple[list[str], dict[str, Any]]]) -> None:
        self._config = model.config
        self._classes = [*{type(module) for module in model.modules()}]
        self._reads = [(itemgetter(*names), values) for names, values in found]
        self._known = self._now()

    def _now(self) -> list[object]:
        return [
            *map(methods, self._classes),
            *attention_functions(self._config),
            *(read(values) for read, values in self._reads),
            loader.chosen_isa(),
        ]

    def fits(self) -> bool:
        return self._now() == self._known


class _Structure:
    """Classes and attributes of modules, those called by ``names`` or all, and the contents of
    their ``tables``, as they are now."""

    def __init__(
        self,
        modules: Sequence[nn.Module],
        tables: Iterable[dict[Any, Any]],
        names: Container[str] | None = None,
    ) -> None:
        self._modules, self._types = modules, [*map(type, modules)]
        self._attributes = [vars(module) for module in modules]
        self._sizes = [*map(len, self._attributes)]
        self._empty, self._parts, self._other = _sorted(tables)
        self._known_parts = [*map(list, map(_values, self._parts))]
        self._contents = [*self._flat()]
        self._reads = []
        for module, values in zip(modules, self._attributes, strict=True):
            own = [name for name in own_attributes(module) if not name.startswith("_")]
            own = [name for name in own if names is None or name in names]
            if own or names is None:
                self._reads.append((itemgetter("training", "training", *own), values))
        self._known = [_kept(read(values)) for read, values in self._reads]

    @property
    def tensors(self) -> list[Tensor]:
        return [value for value in self._contents if isinstance(value, Tensor)]

    def _flat(self) -> Iterable[Any]:
        return chain(chain.from_iterable(map(_values, self._other)), (_END,))

    def fits(self) -> bool:
        return (
            [*map(type, self._modules)] == self._types
            and [*map(len, self._attributes)] == self._sizes
            and not any(self._empty)
            and [*map(list, map(_values, self._parts))] == self._known_parts
            and all(map(is_, self._flat(), self._contents))
            and [read(values) for read, values in self._reads] == self._known
        )


def _sorted(tables: Iterable[dict[Any, Any]]) -> tuple[list[dict[Any, Any]], ...]:
    """Those that are empty, those of modules alone, which compare as lists do, and the others:
    tensors that say the same are not the same."""
    found: tuple[list[dict[Any, Any]], ...] = [], [], []
    for table in tables:
        modules = all(isinstance(value, nn.Module) for value in table.values())
        found[0 if not table else 1 if modules else 2].append(table)
    return found


def _tables(module: nn.Module) -> list[dict[Any, Any]]:
    """The dictionaries of a module whose entries its ``forward`` may use."""
    return [
        module._parameters,
        module._buffers,
        module._modules,
        module._forward_hooks,
        module._forward_pre_hooks,
    ]


def _is_counted(tensor: Tensor) -> bool:
    return isinstance(tensor, FrozenParameter) and tensor.counter is not None


def _is_copied(tensor: Tensor) -> bool:
    """Whether the library would read a copy of ``tensor``: else it reads the tensor itself."""
    if tensor.is_inference():
        return False
    return tensor.dtype != torch.float32 or not tensor.is_contiguous()


def _statistics(modules: Iterable[nn.Module]) -> list[Tensor]:
    """The statistics of static norms, which are numbers to the library."""
    norms = [module for module in modules if isinstance(module, LayerBatchNorm)]
    static = [norm.running_log_ms for norm in norms if norm.spec.statistics == "static"]
    return [tensor for tensor in static if not tensor.is_inference()]


def _kept(value: Any) -> Any:
    """``value``, with containers copied: they may be edited in place."""
    if type(value) is dict:
        return {key: _kept(entry) for key, entry in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(_kept, value))
    return value
