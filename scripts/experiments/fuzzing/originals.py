"""The checkpoints that are changed: the smallest of every format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from maqd_hf import MaQDConfig, pack_model, quantize_model, save_model
from maqd_hf.calibration import calibrate_activations
from maqd_hf.checkpoint.version1 import checksum
from maqd_hf.models.names import Names

IDS = torch.arange(2, 14).unsqueeze(0)

GRIDS: dict[str, dict[str, Any]] = {
    "packed": {"weight_levels": 16, "activation_levels": 255, "embedding_levels": 255},
    "sharded": {"weight_levels": 3, "group_size": 16, "activation_scaling": "token"},
    "trainable": {"weight_levels": 4, "activation_levels": 15, "embedding_levels": 16},
    "encoder": {"weight_levels": 16, "activation_levels": 255},
    "version1": {"weight_levels": 16, "activation_levels": 255},
}
"""The kinds of checkpoints and what their layers are quantized to."""


def _tiny(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "vocab_size": 48}
    sizes |= {"num_hidden_layers": 1, "num_attention_heads": 4, "max_position_embeddings": 64}
    if kind == "encoder":
        return BertModel(BertConfig(**sizes)).eval()
    return LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2)).eval()


def write_originals(root: Path) -> None:
    """A checkpoint of every kind, in a folder of its name under ``root``."""
    for kind, grid in GRIDS.items():
        model = _tiny(kind)
        quantize_model(model, MaQDConfig(**grid))
        calibrate_activations(model, [{"input_ids": IDS}], progress=False)
        if kind != "trainable":
            pack_model(model)
        save_model(model, root / kind, max_shard_size="8KB" if kind == "sharded" else "5GB")
        if kind == "version1":
            as_version_one(root / kind, model)


def as_version_one(folder: Path, model: PreTrainedModel) -> None:
    """Rewrite the config of ``model`` in ``folder`` as releases before the digest wrote it."""
    old = {"folded": "absorbed", "folded_into": "absorbed_by"}
    path, names = folder / "config.json", Names(model)
    config = json.loads(path.read_text("utf-8"))
    ours = config["quantization_config"]
    del ours["digest"]
    ours["format_version"] = 1
    ours["norm_affine"] = "absorb" if ours["norm_affine"] == "fold" else "keep"
    for name, entry in ours["modules"].items():
        ours["modules"][name] = {old.get(k, k): v for k, v in entry.items()}
        if ours["state"] == "packed":
            ours["modules"][name]["crc32"] = checksum(model.get_submodule(names.absolute(name)))
    path.write_text(json.dumps(config), "utf-8")
