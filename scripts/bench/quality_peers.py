"""Other packages' quantization, each through its own interface, for `scripts.bench.quality`.

All quantize the Linear layers of the base model, in groups of 64 where the package lets one choose,
and leave embedding and output head alone. What comes back holds the dequantized weights in plain
Linear layers: quality is measured here, and the packages' own kernels are made for other machines.

Bits a weight are codes plus what the package stores for a group: a 16-bit scale and zero point
(HQQ, quanto), a 16-bit scale (torchao, auto-round and GPTQModel are symmetric here), a 32-bit
absmax (bitsandbytes). Packages are imported where they are used: each is optional.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

QAT = "torchao QAT, 8-bit inputs"
AUTO_ROUND_STEPS = 50  # optimizer steps a layer; its own default is 200, hours on a small CPU

Linears = dict[str, nn.Linear]


def base_linears(model: PreTrainedModel) -> Linears:
    """The linear layers of the base model, by name."""
    found = model.base_model.named_modules()
    return {name: layer for name, layer in found if isinstance(layer, nn.Linear)}


@torch.no_grad()
def _replace_weights(model: PreTrainedModel, weights: dict[str, Tensor]) -> None:
    for name, layer in base_linears(model).items():
        layer.weight.copy_(weights[name])


def hqq(model: PreTrainedModel, bits: int, group: int, ids: Tensor, folder: str) -> float:
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    config = BaseQuantizeConfig(nbits=bits, group_size=group, axis=1)
    for layer in base_linears(model).values():
        found = HQQLinear(
            layer,
            config,
            compute_dtype=torch.float32,
            device=str(layer.weight.device),
            del_orig=False,
        )
        layer.weight = nn.Parameter(found.dequantize().view_as(layer.weight))
    return bits + 32 / group


def quanto(model: PreTrainedModel, bits: int, group: int, ids: Tensor, folder: str) -> float:
    """quanto chooses its groups: the largest of 128, 64 and 32 that divides the width."""
    from optimum.quanto import freeze, qint2, qint4, quantize

    quantize(model.base_model, weights={4: qint4, 2: qint2}[bits])
    freeze(model.base_model)
    stored = 0.0
    layers = base_linears(model)
    for layer in layers.values():
        found: Any = layer.weight
        stored += 32 * found.numel() / (getattr(found, "_group_size", None) or group)
    count = sum(layer.weight.numel() for layer in layers.values())
    _densify(model, lambda layer: layer.weight.dequantize())
    return bits + stored / count


def torchao(model: PreTrainedModel, bits: int, group: int, ids: Tensor, folder: str) -> float:
    from torchao.quantization import IntxWeightOnlyConfig, PerGroup, quantize_

    dtype = getattr(torch, f"int{bits}")
    quantize_(model.base_model, IntxWeightOnlyConfig(dtype, PerGroup(group)))
    _densify(model, lambda layer: layer.weight.dequantize())
    return bits + 16 / group


def torchao_inputs(
    model: PreTrainedModel, bits: int, group: int, ids: Tensor, folder: str
) -> float:
    """torchao with inputs in 8 bits, one asymmetric step a token; it runs on its own tensors."""
    from torchao.quantization import quantize_

    quantize_(model.base_model, _torchao_config(bits, group))
    return bits + 16 / group


def torchao_qat(model: PreTrainedModel, bits: int, group: int, ids: Tensor, folder: str) -> float:
    """torchao prepared for training; ``finish_qat`` converts the trained model."""
    from torchao.quantization import quantize_
    from torchao.quantization.qat import QATConfig

    quantize_(model.base_model, QATConfig(_torchao_config(bits, group), step="prepare"))
    model.maqd_bench_config = _torchao_config(bits, group)
    return bits + 16 / group


def finish_qat(model: PreTrainedModel) -> PreTrainedModel:
    """Convert a model that ``torchao_qat`` prepared, in place."""
    from torchao.quantization import quantize_
    from torchao.quantization.qat import QATConfig

    quantize_(model.base_model, QATConfig(model.maqd_bench_config, step="convert"))
    return model


def _torchao_config(bits: int, group: int) -> Any:
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig, PerGroup

    return Int8DynamicActivationIntxWeightConfig(getattr(torch, f"int{bits}"), PerGroup(group))


def bitsandbytes(model: PreTrainedModel, bits: int, group: int, ids: Tensor, folder: str) -> float:
    """bitsandbytes' NF4: 16 levels that are not evenly spaced."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    for layer in base_linears(model).values():
        codes, state = quantize_4bit(layer.weight.data, blocksize=group, quant_type="nf4")
        layer.weight.data = dequantize_4bit(codes, state).view_as(layer.weight)
    return bits + 32 / group


def gptqmodel(model: PreTrainedModel, bits: int, group: int, ids: Tensor, folder: str) -> float:
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # fails on two cores without
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

    config = QuantizeConfig(bits=bits, group_size=group)
    found: Any = GPTQModel.load(folder, config, device="cpu", backend=BACKEND.TORCH)
    rows = [{"input_ids": row[None], "attention_mask": torch.ones_like(row)[None]} for row in ids]
    found.quantize(rows, batch_size=4, backend=BACKEND.TORCH)
    with tempfile.TemporaryDirectory() as place:
        found.save(place)
        packed: Any = GPTQModel.load(place, device="cpu", backend=BACKEND.TORCH)
        weights = {
            name.split("model.", 1)[1]: layer.dequantize_weight().T.float()
            for name, layer in packed.model.named_modules()
            if hasattr(layer, "dequantize_weight")
        }
    _replace_weights(model, weights)
    return bits + 16 / group


def auto_round(model: PreTrainedModel, bits: int, group: int, ids: Tensor, folder: str) -> float:
    from auto_round import AutoRound
    from transformers import AutoTokenizer

    rows: Any = [{"input_ids": row} for row in ids]
    rounder = AutoRound(
        model,
        AutoTokenizer.from_pretrained(folder),
        bits=bits,
        group_size=group,
        sym=True,
        iters=AUTO_ROUND_STEPS,
        nsamples=len(ids),
        seqlen=ids.shape[1],
        batch_size=4,
        dataset=torch.utils.data.DataLoader(rows, batch_size=4),
        device_map="cpu",
        enable_torch_compile=False,
    )
    rounder.quantize()
    return bits + 16 / group


def _densify(model: PreTrainedModel, weight_of: Callable[[nn.Linear], Tensor]) -> None:
    """Replace every layer by a plain Linear with the weight that ``weight_of`` gives."""
    for name, layer in base_linears(model).items():
        dense = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, "meta")
        dense.weight = nn.Parameter(weight_of(layer).detach().float())
        dense.bias = layer.bias
        model.base_model.set_submodule(name, dense)


Quantize = Callable[[PreTrainedModel, int, int, Tensor, str], float]
_FUNCTIONS: dict[str, tuple[Quantize, tuple[int, ...]]] = {
    "HQQ": (hqq, (4, 3, 2)),
    "quanto": (quanto, (4, 2)),
    "torchao": (torchao, (4, 3, 2)),
    "torchao, 8-bit inputs": (torchao_inputs, (4, 2)),
    QAT: (torchao_qat, (4, 2)),
    "bitsandbytes NF4": (bitsandbytes, (4,)),
    "GPTQModel": (gptqmodel, (4, 3, 2)),
    "auto-round": (auto_round, (4, 2)),
}
PEERS: dict[str, tuple[int, ...]] = {name: widths for name, (_, widths) in _FUNCTIONS.items()}
CALIBRATED = {"GPTQModel", "auto-round"}  # those that use ``ids``


def quantize_peer(
    peer: str, model: PreTrainedModel, bits: int, group: int, ids: Tensor, folder: str
) -> float:
    """Quantize ``model`` in place by ``peer`` and return its bits a weight, scales included.

    Args:
        ids: (samples, tokens) for packages that calibrate.
        folder: where ``model`` comes from, for packages that load it themselves.

    Raises:
        ImportError: the package is not installed; others as the package has them.
    """
    return _FUNCTIONS[peer][0](model, bits, group, ids, folder)
