"""Noticing that tensors changed, for what was made from them and is kept."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from operator import attrgetter
from typing import Any, Generic, TypeVar

from torch import Tensor

T = TypeVar("T")
_version = attrgetter("_version")


class Stamp:
    """Says whether tensors are still what they were.

    Holds their memory, or a new tensor could take the place of an old one unnoticed. Tensors made
    under ``torch.inference_mode`` count no changes: those in place are not seen.

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
        return _state(tensors) == self._state


class Derived(Generic[T]):
    """What a module made from its tensors, made again whenever one of them changed.

    A copy or a pickle of it is empty: what the library is given holds pointers, and those do not
    travel.

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
        """What ``make`` returned for these tensors and this very ``setting``."""
        known = self._known
        if known is None or known[0] is not setting or not known[1].fits(tensors):
            known = self._known = (setting, Stamp(tensors), make())
        return known[2]

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()


def _state(tensors: Iterable[Tensor | None]) -> list[int]:
    present = [tensor for tensor in tensors if tensor is not None]
    try:  # asked at every token for every tensor of a model
        return [*map(Tensor.data_ptr, present), *map(_version, present)]
    except RuntimeError:
        counted = [tensor for tensor in present if not tensor.is_inference()]
        return [*map(Tensor.data_ptr, present), *map(_version, counted)]
