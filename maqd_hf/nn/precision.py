"""The dtypes of our layers: what casting a model does to them, and where bfloat16 pays.

A cast of the model (``.half()``, ``.to(torch.bfloat16)``) leaves all tensors of our layers in
float32: eight bits of mantissa would move every level of a grid. Scales of groups are stored in 16
bits, which training knows of, and stay so. The outputs of the layers have the dtype of their input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

_NARROW = (torch.float16, torch.bfloat16)
Apply = Callable[[Tensor], Tensor]


def without_narrowing(
    fn: Apply, protected: Iterable[Tensor | None], scale: Tensor | None = None
) -> Apply:
    """The ``fn`` of ``nn.Module._apply``, changed so that it does not narrow our tensors.

    It moves the tensors ``protected`` without narrowing them, and a ``scale`` that is narrow
    already without casting it at all.
    """
    ids = {id(tensor) for tensor in protected if tensor is not None}

    def keep(tensor: Tensor) -> Tensor:
        new = fn(tensor)
        if new.dtype == tensor.dtype or id(tensor) not in ids:
            return new
        stays = tensor is scale if tensor.dtype in _NARROW else new.dtype in _NARROW
        return tensor.to(new.device) if stays else new

    return keep


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which ``x`` meets a weight: autocast's where it is on, else ``x``'s own."""
    device = x.device.type
    if x.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return x.dtype
    return torch.get_autocast_dtype(device)


def mark_output_dtype(module: nn.Module, dtype: torch.dtype | None) -> None:
    """Give an embedding an empty first parameter ``output_like`` of the dtype of its outputs.

    transformers takes a model's dtype from its first float parameter and writes it into
    ``config.json``. Our rows are float32, where a plain embedding's have the model's dtype.
    """
    rest = dict(module._parameters)
    device = next(p.device for p in rest.values() if p is not None)
    mark = nn.Parameter(torch.empty(0, dtype=dtype, device=device), requires_grad=False)
    module._parameters.clear()
    module.register_parameter("output_like", mark)
    module._parameters.update(rest)


def fast_bf16(device: torch.device | str) -> bool:
    """Whether ``device`` multiplies bfloat16 matrices faster than float32 ones."""
    kind = torch.device(device).type
    if kind == "cuda":
        return torch.cuda.is_bf16_supported()
    return kind == "cpu" and (
        torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    )
