"""Values that were made from tensors and are kept while these do not change."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any, Generic, TypeVar

from torch import Tensor

T = TypeVar("T")


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
    return [
        number
        for tensor in tensors
        if tensor is not None
        for number in (tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version)
    ]
