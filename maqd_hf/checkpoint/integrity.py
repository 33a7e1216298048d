"""Is what was loaded what was saved? A wrong weight must stop the load, not spoil the answers.

transformers fills what a checkpoint lacks with uninitialised memory, and a flipped bit gives a
model that is only slightly wrong. So every tensor of our layers must have come from the file, and
each packed layer's CRC-32 (of its tensors and of the settings that give them a meaning) stands in
``config.json``.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..config import MaQDConfig
from ..kernels import release
from ..models.finding import modules_of
from ..models.names import Names
from ..nn import LayerBatchNorm, MaQDEmbedding, MaQDLinear, PackedEmbedding, PackedLinear
from ..nn.kinds import OURS


def _meaning(module: nn.Module) -> str:
    """The settings without which the tensors would mean something else, as text."""
    if isinstance(module, (PackedLinear, MaQDLinear)):
        spec = module.spec
        grid = f"{spec.weight_levels}/{spec.group_size}/{module.in_features}"
        inputs = f"{spec.activation_levels}/{spec.activation_scaling}/{spec.first_token}"
        turned = f" {spec.rotation}" if spec.rotation else ""
        ratio = spec.activation_clip_ratio
        clipped = f" clip {ratio!r}" if ratio != 1 else ""
        return f"linear {grid} {inputs}{turned}{clipped}"
    if isinstance(module, (PackedEmbedding, MaQDEmbedding)):
        return f"embedding {module.levels}/{module.embedding_dim} {module.output_scale!r}"
    assert isinstance(module, LayerBatchNorm)
    norm = module.spec
    flags = f"{norm.centered}/{norm.statistics}/{norm.first_token}/{norm.folded}"
    return f"norm {flags} {module.eps!r}"


def _bytes(tensor: Tensor) -> memoryview:
    tensor = tensor.detach()
    exact = tensor if tensor.dtype == torch.int32 else tensor.float()  # a tied bias may be bfloat16
    return exact.cpu().contiguous().numpy().data.cast("B")


def checksum(module: nn.Module) -> int:
    """CRC-32 of one of our layers: its settings and its tensors, in the order of their names."""
    crc = zlib.crc32(_meaning(module).encode())
    for name, tensor in sorted(module.state_dict(keep_vars=True).items()):
        if tensor.numel():
            crc = zlib.crc32(_bytes(tensor), zlib.crc32(name.encode(), crc))
    return crc


def check_shapes(model: nn.Module, expected: Mapping[str, torch.Size]) -> None:
    """Raise ``ValueError`` if a tensor has not the shape its layer was built with.

    transformers 5.0 takes tensors of any shape once a quantizer is present.
    """
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor.shape != expected.get(name, tensor.shape):
            raise ValueError(
                f"shape mismatch: {name} is {tuple(tensor.shape)} in the checkpoint and "
                f"{tuple(expected[name])} in {type(model).__name__}: its config.json and its "
                "safetensors do not belong together; download or save it again"
            )


def check_loaded(model: nn.Module, config: MaQDConfig) -> None:
    """Raise ``ValueError`` unless all tensors of our layers came from the file as they were saved.

    Offloaded layers (on meta) cannot be looked at and are skipped.
    """
    names = Names(model)
    for name, module in modules_of(model, *OURS):
        tensors = module.state_dict(keep_vars=True)
        if any(tensor.is_meta for tensor in tensors.values()):
            continue
        for tensor_name, tensor in tensors.items():
            _check_tensor(f"{name}.{tensor_name}", tensor)
        expected = (config.modules or {}).get(names.relative(name), {}).get("crc32")
        found = checksum(module)
        if expected is not None and found != expected:
            raise ValueError(
                f"{name} is not what was saved (CRC-32 {found:08x}, config.json says "
                f"{expected:08x}): the file was damaged, or config.json was edited; download or "
                "save the checkpoint again"
            )
        if isinstance(module, (PackedLinear, PackedEmbedding)):
            release(module.weight)  # the file's pages are needed one layer at a time


def _check_tensor(name: str, tensor: Tensor) -> None:
    if not getattr(tensor, "_is_hf_initialized", False):
        raise ValueError(
            f"{name} is missing from the checkpoint: its config.json and its safetensors do not "
            "belong together, or the file was cut; download or save it again"
        )
    uncalibrated = name.endswith("activation.log_step")  # NaN there says "not calibrated yet"
    if tensor.is_floating_point() and not uncalibrated and not bool(tensor.isfinite().all()):
        raise ValueError(f"{name} holds NaN or infinity: the checkpoint is damaged")
