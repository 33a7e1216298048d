"""Noticing that tensors and modules changed, for what was made from them and is kept."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from operator import attrgetter
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.utils import swap_tensors

T = TypeVar("T")
_version = attrgetter("_version")


class CountedModule(nn.Module):
    """A module whose attributes are rarely assigned.

    ``assignments`` counts the assignments to all such modules together.
    """

    assignments = 0

    def __setattr__(self, name: str, value: Any) -> None:
        if not torch.compiler.is_compiling():  # a graph would have to be made anew for every count
            CountedModule.assignments += 1
        super().__setattr__(name, value)


class FrozenParameter(nn.Parameter):
    """A parameter without gradient, of which no edit goes unnoticed.

    Edits through ``data`` count as edits in place, and ``counter``, where there is one, counts the
    edits of this parameter and of all others that share it (``count_together``). Copies and
    pickles are plain parameters.

    >>> import torch
    >>> weight = freeze(nn.Parameter(torch.zeros(2), requires_grad=False))
    >>> (counter,) = count_together([weight])
    >>> _ = weight.data.add_(1)
    >>> weight.data = torch.ones(2)
    >>> counter._version
    2
    """

    counter: Tensor | None = None

    @property
    def data(self) -> Tensor:
        return self.detach()  # which counts edits for both

    @data.setter
    def data(self, value: Tensor) -> None:
        Tensor.data.__set__(self, value)  # type: ignore[attr-defined]
        if not self.is_inference():
            increment_version(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:
        if id(self) not in memo:
            memo[id(self)] = nn.Parameter(self.detach().clone(), self.requires_grad)
        copied: nn.Parameter = memo[id(self)]
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        return nn.Parameter(self.detach(), self.requires_grad).__reduce_ex__(protocol)


def freeze(parameter: Tensor) -> Tensor:
    """``parameter`` itself, as a ``FrozenParameter`` from now on, if it is one without gradient."""
    if type(parameter) is nn.Parameter and not parameter.requires_grad:
        parameter.__class__ = FrozenParameter
    return parameter


def count_together(parameters: Iterable[Tensor]) -> list[Tensor]:
    """Let frozen parameters count their edits together, and return the counters.

    A counter is a tensor whose ``_version`` is the count. One comparison then sees an edit of any
    of the parameters. Those that have a counter keep it; one that somebody works on at this moment
    stays without. To a ``Stamp`` each has changed once.
    """
    shared = torch.empty(0)
    found = {}
    for parameter in parameters:
        if not isinstance(parameter, FrozenParameter) or parameter.is_inference():
            continue
        if parameter.counter is None:
            _join(parameter, shared)
        if parameter.counter is not None:
            found[id(parameter.counter)] = parameter.counter
    return list(found.values())


def _join(parameter: FrozenParameter, counter: Tensor) -> None:
    """Give ``parameter`` the version counter of ``counter``: a detached tensor shares that of its
    origin, and keeps it when it is given other data."""
    twin = counter.detach()
    twin.data = parameter.detach()
    twin = freeze(nn.Parameter(twin, requires_grad=False))
    twin.__dict__.update({**parameter.__dict__, "counter": counter})
    with suppress(RuntimeError):  # somebody else holds it
        swap_tensors(parameter, twin)


class Stamp:
    """A mark of tensors that tells whether they are still what they were.

    It holds their memory: a new tensor could take the place of a freed one unnoticed. Tensors made
    under ``torch.inference_mode`` do not count their changes, so changes in place are not seen.

    >>> import torch
    >>> tensor = torch.zeros(2)
    >>> stamp = Stamp([tensor, None])
    >>> stamp.fits([tensor, None]), stamp.fits([tensor.add_(1), None])
    (True, False)
    """

    def __init__(self, tensors: Iterable[Tensor | None]) -> None:
        self._kept = [tensor.detach() for tensor in tensors if tensor is not None]
        self._state = _state(self._kept)

    def fits(self, tensors: Iterable[Tensor | None]) -> bool:
        """Whether these are the marked tensors, unchanged."""
        return _state(tensors) == self._state


class Derived(Generic[T]):
    """A value that a module makes from its tensors, made again whenever one of them has changed.

    A copy or a pickle of it is empty: values for the library hold pointers, which mean nothing
    elsewhere. Threads that find it empty each make the value, from the same tensors.

    >>> import copy, torch
    >>> tensor, made = torch.zeros(2), Derived()
    >>> made.get([tensor], lambda: "first"), made.get([tensor], lambda: "second")
    ('first', 'first')
    >>> copy.deepcopy(made).get([tensor], lambda: "of the copy")
    'of the copy'
    >>> made.get([tensor.add_(1)], lambda: "second")
    'second'
    """

    def __init__(self) -> None:
        self._known: tuple[object, Stamp, T] | None = None

    def get(
        self, tensors: Collection[Tensor | None], make: Callable[[], T], setting: object = None
    ) -> T:
        """The value that ``make`` returned for these tensors and this very ``setting``."""
        known = self._known
        if known is None or known[0] is not setting or not known[1].fits(tensors):
            known = self._known = (setting, Stamp(tensors), make())
        return known[2]

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()


def _state(tensors: Iterable[Tensor | None]) -> list[int]:
    """Where the tensors lie, and how often each was changed in place."""
    present = [tensor for tensor in tensors if tensor is not None]
    try:  # asked at every token for every tensor of a model
        return [*map(Tensor.data_ptr, present), *map(_version, present)]
    except RuntimeError:
        counted = [tensor for tensor in present if not tensor.is_inference()]
        return [*map(Tensor.data_ptr, present), *map(_version, counted)]
