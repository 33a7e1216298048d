"""Checkpoints of format version 1, which held a CRC-32 of each packed layer and of nothing else."""

from __future__ import annotations

import zlib

import torch
from torch import Tensor, nn
from transformers.utils import logging

from ..config import MaQDConfig
from ..models.finding import modules_of
from ..models.names import Names
from ..nn import LayerBatchNorm
from ..nn.kinds import LINEARS, OURS, TABLES
from .digest import DigestError

logger = logging.get_logger(__name__)


class VersionOneCheck:
    """``integrity.FileCheck`` for format version 1: it takes the checksums out of ``config``.

    One line in the log says what cannot be checked.
    """

    def __init__(self, config: MaQDConfig) -> None:
        packed = config.state == "packed"
        what = "float tensors and config.json" if packed else "tensors and config.json"
        logger.warning(
            f"This checkpoint has format version 1: its {what} hold no checksum and cannot be "
            "checked; save the model again to have all of it checked from then on."
        )
        modules = config.modules or {}
        self._crc32 = {name: entry.pop("crc32", None) for name, entry in modules.items()}
        missing = next((name for name, crc in self._crc32.items() if crc is None), None)
        if packed and missing is not None:
            raise DigestError(
                "config.json says format_version=1 and state='packed' but holds no crc32 of "
                f"{missing}: it was edited; download or save the checkpoint again"
            )

    def check_architecture(self) -> None:
        """Do nothing: the file holds no sums of the architecture."""

    def check_settings(self) -> None:
        """Do nothing: the checksums of the layers cover their settings."""

    def check_tensors(self, model: nn.Module) -> None:
        """Raise ``DigestError`` unless the layers of ``model`` have the checksums of the file."""
        names = Names(model)
        for name, module in modules_of(model, *OURS):
            expected = self._crc32.get(names.relative(name))
            if expected is None or any(t.is_meta for t in module.state_dict().values()):
                continue
            found = checksum(module)
            if found != expected:
                raise DigestError(
                    f"{name} is not what was saved (CRC-32 {found:08x}, config.json says "
                    f"{expected}): the file was damaged, or config.json was edited; download or "
                    "save the checkpoint again"
                )


def checksum(module: nn.Module) -> int:
    """CRC-32 of one of our layers: its settings and its tensors, in the order of their names."""
    crc = zlib.crc32(_meaning(module).encode())
    for name, tensor in sorted(module.state_dict(keep_vars=True).items()):
        if tensor.numel():
            crc = zlib.crc32(_bytes(tensor), zlib.crc32(name.encode(), crc))
    return crc


def _meaning(module: nn.Module) -> str:
    """The settings without which the tensors would mean something else, as text."""
    if isinstance(module, LINEARS):
        spec = module.spec
        grid = f"{spec.weight_levels}/{spec.group_size}/{module.in_features}"
        inputs = f"{spec.activation_levels}/{spec.activation_scaling}/{spec.first_token}"
        turned = f" {spec.rotation}" if spec.rotation else ""
        ratio = spec.activation_clip_ratio
        clipped = f" clip {ratio!r}" if ratio != 1 else ""
        return f"linear {grid} {inputs}{turned}{clipped}"
    if isinstance(module, TABLES):
        return f"embedding {module.levels}/{module.embedding_dim} {module.output_scale!r}"
    assert isinstance(module, LayerBatchNorm)
    norm = module.spec
    flags = f"{norm.centered}/{norm.statistics}/{norm.first_token}/{norm.folded}"
    return f"norm {flags} {module.eps!r}"


def _bytes(tensor: Tensor) -> memoryview:
    tensor = tensor.detach()
    exact = tensor if tensor.dtype == torch.int32 else tensor.float()  # a tied bias may be bfloat16
    return exact.cpu().contiguous().numpy().data.cast("B")
