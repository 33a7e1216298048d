"""Noticing that tensors changed, for what was made from them and is kept."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor


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


def _state(tensors: Iterable[Tensor | None]) -> list[int]:
    return [
        number
        for tensor in tensors
        if tensor is not None
        for number in (tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version)
    ]
