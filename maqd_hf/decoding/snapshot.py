"""Noticing that anything a plan was made of has changed, at a cost that a token does not feel.

Every call compares, so that a hook or an edit between two tokens is seen. What is compared is laid
out in flat lists once, and compared by loops that run in C: about 20 ns an entry, a thousandth of
a token of SmolLM2-135M for each thousand entries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import chain
from operator import is_, itemgetter
from typing import Any

from torch import Tensor, nn

from ..kernels import loader
from ..nn import Stamp
from .families import FAMILIES
from .identity import attention_functions, global_hooks, methods, own_attributes, read_globals

_values: Callable[[dict[Any, Any]], Iterable[Any]] = dict.values
_END = object()
Reads = list[tuple[Callable[[Any], Any], dict[str, Any]]]
"""What to read from which dictionary."""


class Snapshot:
    """The modules of a model with their classes, attributes, hooks and tensors, its config, and
    the functions that its forward runs, as they are now.

    Held by identity, numbers and containers by value; edits of a tensor in place count as changes.

    >>> model = nn.Sequential(nn.Linear(2, 2))
    >>> model.config = nn.Module()  # any object with attributes
    >>> snapshot = Snapshot(model)
    >>> snapshot.fits(), setattr(model[0], "in_features", 3), snapshot.fits()
    (True, None, False)
    """

    def __init__(self, model: Any) -> None:
        self._modules: list[nn.Module] = [*model.modules()]
        self._types = [*map(type, self._modules)]
        self._classes = [*set(self._types)]
        self._methods = [*map(methods, self._classes)]
        self._config = model.config
        self._attributes = [vars(module) for module in self._modules]
        self._sizes = [*map(len, self._attributes)]
        tables = [*chain.from_iterable(map(_tables, self._modules)), *global_hooks()]
        self._empty = [table for table in tables if not table]
        self._full = [table for table in tables if table]
        self._contents = [*self._flat()]
        self._reads = self._all_reads(model)
        self._known = [_kept(read(values)) for read, values in self._reads]
        self._fields = _kept(vars(self._config))
        self._surroundings = self._around()
        self._tensors = [value for value in self._contents if isinstance(value, Tensor)]
        self._stamp = Stamp(self._tensors)

    def fits(self) -> bool:
        """Whether nothing has changed since."""
        try:
            return (
                not any(self._empty)
                and all(map(is_, map(type, self._modules), self._types))
                and [*map(len, self._attributes)] == self._sizes
                and all(map(is_, self._flat(), self._contents))
                and [read(values) for read, values in self._reads] == self._known
                and [*map(methods, self._classes)] == self._methods
                and vars(self._config) == self._fields
                and self._around() == self._surroundings
                and self._stamp.fits(self._tensors)
            )
        except (KeyError, RuntimeError, TypeError, ValueError):
            return False  # what was read is gone, or does not compare

    def _flat(self) -> Iterable[Any]:
        return chain(chain.from_iterable(map(_values, self._full)), (_END,))

    def _all_reads(self, model: Any) -> Reads:
        """The attributes of all modules, and the functions that the forwards find in modules."""
        reads: Reads = []
        for module in self._modules:
            names = [name for name in own_attributes(module) if not name.startswith("_")]
            reads.append((itemgetter("training", "training", *names), vars(module)))
        family = FAMILIES.get(getattr(self._config, "model_type", ""))
        for names, values in read_globals(model, family) if family else ():
            reads.append((itemgetter(*names), values))
        return reads

    def _around(self) -> list[object]:
        """What is neither the model's nor the config's."""
        return [*attention_functions(self._config), loader.chosen_isa()]


def _tables(module: nn.Module) -> list[dict[Any, Any]]:
    """The dictionaries of a module whose entries its ``forward`` may use."""
    return [
        module._parameters,
        module._buffers,
        module._modules,
        module._forward_hooks,
        module._forward_pre_hooks,
    ]


def _kept(value: Any) -> Any:
    """``value``, with containers copied: they may be edited in place."""
    if type(value) is dict:
        return {key: _kept(entry) for key, entry in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(_kept, value))
    return value
