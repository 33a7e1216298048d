"""Norms in one compiled pass over a row, for inference; ``nn.norm`` trains them with plain torch.

In plain torch a norm is eight operators, which for one token cost several times what they compute.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .abi import NormStruct
from .loader import FLOATS, call, isa_number, pointer, threads_for


class NativeNorm:
    """A norm as the library runs it: ``y = (x - mean) * factor * weight + bias``.

    ``factor`` is 1 / rms of the token where ``token``; else ``constant``, but on first tokens, if
    ``own_first``, ``first_factor`` / rms. ``mean`` is subtracted where ``centered``. ``weight`` and
    ``bias`` are (features,) or None.

    Raises:
        ValueError: ``weight`` or ``bias`` of another shape, or not on the CPU.
    """

    def __init__(
        self,
        features: int,
        eps: float,
        *,
        token: bool = True,
        constant: float = 1.0,
        first_factor: float = 1.0,
        own_first: bool = False,
        centered: bool = False,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> None:
        self.features, self.own_first = features, own_first
        self._kept: list[Tensor | None] = []  # what the structure points to
        for tensor in (weight, bias):
            if tensor is not None and (tensor.shape != (features,) or not tensor.is_cpu):
                raise ValueError(
                    f"{tuple(tensor.shape)} on {tensor.device} for a norm of {features} features: "
                    f"want ({features},), cpu"
                )
            self._kept.append(None if tensor is None else tensor.detach().float().contiguous())
        self.struct = NormStruct(
            *(pointer(tensor) for tensor in self._kept),
            features,
            eps,
            constant,
            first_factor,
            token,
            own_first,
            centered,
        )

    def __call__(self, x: Tensor, first: Tensor | None = None) -> Tensor:
        """``x`` (..., features), float32, normalized; ``first`` (...) bool: first tokens.

        Raises:
            ValueError: other shapes or dtypes, or not on the CPU.
        """
        fits = x.shape[-1:] == (self.features,) and x.dtype == torch.float32 and x.is_cpu
        if not fits or (first is not None and first.shape != x.shape[:-1]):
            raise ValueError(
                f"x {tuple(x.shape)} of {x.dtype} on {x.device}, first "
                f"{None if first is None else tuple(first.shape)}: want (..., {self.features}) of "
                "float32 on the CPU, and (...)"
            )
        x = x.contiguous()
        first = None if first is None else first.bool().contiguous()
        out = torch.empty(x.shape, **FLOATS)
        rows, threads = x.numel() // self.features, threads_for(x.numel())
        call("maqd_normalize", self.struct, x, first, rows, out, isa_number(), threads)
        return out
