"""A damaged or edited checkpoint never becomes a model."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from maqd_hf import pack_model, quantize_model
from maqd_hf.checkpoint.version1 import checksum
from maqd_hf.models.finding import modules_of
from maqd_hf.nn import LinearSpec, MaQDLinear, PackedLinear
from tests.support.families import example, output, tiny

Edit = Callable[[dict[str, Any]], None]
LAYER = "layers.1.mlp.up_proj"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed Llama with a folded static norm, a tied embedding and static activations."""
    model = tiny("llama-tied")
    quantize_model(model, weight_levels=15, embedding_levels=15, activation_scaling="static")
    for _, layer in modules_of(model, MaQDLinear):
        layer.activation.set_step(0.02)
    model.train()
    output(model, example(model))
    model.model.layers[1].input_layernorm.gate.fill_(1)
    pack_model(model)
    path = tmp_path_factory.mktemp("good")
    model.save_pretrained(path)
    return path


@pytest.fixture
def copied(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "copy"))


def load(path: Path) -> PreTrainedModel:
    return hf.AutoModelForCausalLM.from_pretrained(path)


def test_an_untouched_checkpoint_loads(copied: Path) -> None:
    model = load(copied)
    assert output(model, example(model)).isfinite().all()


# ------------------------------------------------------------------------------------ the file


def test_a_truncated_file_is_refused(copied: Path) -> None:
    file = copied / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(Exception, match=r"(?i)incomplete|header|safetensor"):
        load(copied)


def test_every_kind_of_tensor_is_protected_against_a_single_flipped_bit(copied: Path) -> None:
    file = copied / "model.safetensors"
    tensors = load_file(file)
    kinds = [
        "embed_tokens.weight",
        "embed_tokens.weight_scale",
        f"{LAYER}.weight",
        f"{LAYER}.weight_scale",
        f"{LAYER}.weight_offset",
        f"{LAYER}.activation_step",
        "layers.1.input_layernorm.running_log_ms",
        "norm.weight",
    ]
    for kind in kinds:
        name = f"model.{kind}"
        damaged = {n: t.clone() for n, t in tensors.items()}
        bits = damaged[name].view(torch.int32).view(-1)
        bits[-1] ^= 1  # the lowest bit: the smallest change there is
        save_file(damaged, file, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=rf"{kind.rpartition('.')[0]} is not what was saved"):
            load(copied)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_scale_that_is_not_finite_is_refused(copied: Path, value: float) -> None:
    file = copied / "model.safetensors"
    tensors = load_file(file)
    tensors[f"model.{LAYER}.weight_scale"][3] = value
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"{LAYER}.weight_scale holds NaN or infinity"):
        load(copied)


@pytest.mark.parametrize("part", ["weight", "weight_scale", "weight_offset", "activation_step"])
def test_a_missing_tensor_is_named(copied: Path, part: str) -> None:
    file = copied / "model.safetensors"
    tensors = load_file(file)
    del tensors[f"model.{LAYER}.{part}"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"{LAYER}.{part} is missing from the checkpoint"):
        load(copied)


def test_a_tensor_of_another_shape_is_refused(copied: Path) -> None:
    file = copied / "model.safetensors"
    tensors = load_file(file)
    name = f"model.{LAYER}.weight"
    tensors[name] = tensors[name][:, :-1].contiguous()
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises((RuntimeError, ValueError), match=r"(?i)mismatch"):
        load(copied)


# ---------------------------------------------------------------------------------- the config


def _module(entry: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = entry["modules"][LAYER]
    return found


EDITS: dict[str, tuple[Edit, str]] = {
    "levels of the same word size": (lambda c: c.update(weight_levels=16), "not what was saved"),
    "activation levels": (lambda c: c.update(activation_levels=15), "not what was saved"),
    "first token": (lambda c: c.update(first_token="shared"), "not what was saved"),
    "levels of one layer": (lambda c: _module(c).update(weight_levels=16), "not what was saved"),
    "embedding levels": (
        lambda c: c["modules"]["embed_tokens"].update(levels=16),
        "embed_tokens is not what was saved",
    ),
    "norm": (
        lambda c: c["modules"]["layers.1.input_layernorm"].update(folded=False),
        "layers.1.input_layernorm is not what was saved",
    ),
    "another clip ratio": (
        lambda c: c.update(activation_clip_ratio=0.5),
        "is not what was saved",
    ),
    "levels out of range": (lambda c: c.update(weight_levels=1), "weight_levels=1 is outside"),
    "a module that is not there": (
        lambda c: c["modules"].update({"layers.9.x": _module(c)}),
        r"'layers\.9\.x' that LlamaForCausalLM does not have",
    ),
    "a module of another kind": (
        lambda c: c["modules"].update({"norm": _module(c)}),
        "'norm'.*should be a Linear",
    ),
    "unknown kind": (lambda c: _module(c).update(kind="lstm"), f"{LAYER}.*lstm"),
    "no kind": (
        lambda c: _module(c).pop("kind"),
        rf"{LAYER}.*kind=None must be 'linear' or ",
    ),
    "unknown setting": (lambda c: _module(c).update(bits=4), r"unknown fields \['bits'\]"),
    "unknown norm setting": (
        lambda c: c["modules"]["norm"].update(bits=4),
        r"'norm'.*bits",
    ),
    "unknown field": (lambda c: c.update(bits=4), r"unknown fields \['bits'\]"),
    "another format": (lambda c: c.update(format_version=3), "format_version=3.*install"),
    "no modules": (lambda c: c.pop("modules"), "lists no converted modules"),
    "another state": (lambda c: c.update(state="frozen"), "state='frozen'"),
}


@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_config_is_refused_by_what_is_wrong_in_it(copied: Path, edit: str) -> None:
    change, message = EDITS[edit]
    file = copied / "config.json"
    config = json.loads(file.read_text())
    change(config["quantization_config"])
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        load(copied)


NORM = "layers.0.input_layernorm"
WRONG_ENTRIES: list[tuple[str, str, Any, str]] = [
    (LAYER, "bias", 1, "of type bool"),
    (LAYER, "weight_levels", 3.0, "of type int or null"),
    (LAYER, "surrogate", ["clip"], "of type str"),
    (LAYER, "activation_scaling", "row", "of type 'static' or 'token' or 'group'"),
    (LAYER, "kind", ["linear"], "'linear' or 'embedding' or 'norm'"),
    ("embed_tokens", "levels", "255", "of type int"),
    ("embed_tokens", "output_scale", float("inf"), "of type finite float"),
    (NORM, "eps", "1e-6", "of type finite float"),
    (NORM, "eps", -1e-6, "at least 0"),
    (NORM, "centered", "relu", "of type bool"),
    (NORM, "pooling", "", "of type 'mean' or 'geometric'"),
    (NORM, "momentum", 2, r"in \(0, 1\]"),
    (NORM, "folded_into", "norm", r"of type list\[str\]"),
]


@pytest.mark.parametrize(("module", "field", "value", "allowed"), WRONG_ENTRIES)
def test_a_wrong_value_in_a_module_is_named_with_its_place_and_what_is_allowed(
    copied: Path, module: str, field: str, value: Any, allowed: str
) -> None:
    file = copied / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"]["modules"][module][field] = value
    file.write_text(json.dumps(config))
    place = re.escape(f"config.json: quantization_config.modules['{module}'].{field}={value!r} ")
    with pytest.raises(ValueError, match=f"{place}must be {allowed}"):
        load(copied)


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("num_hidden_layers", 2**31, r"in 0\.\.\d+, the number of tensors"),
        ("num_hidden_layers", -1, r"in 0\.\.\d+, the number of tensors"),
        ("architectures", 1, "a list of strings or null"),
    ],
)
def test_what_cannot_be_built_is_refused_before_it_is_built(
    copied: Path, field: str, value: Any, allowed: str
) -> None:
    file = copied / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {field: value}))
    ours = rf"config\.json: {field}={value} must be {allowed}"
    theirs = f"Validation error for field '{field}'"  # of configs that check their types themselves
    with pytest.raises(Exception, match=f"{ours}|{theirs}"):
        load(copied)


@pytest.mark.parametrize("field", ["quant_method", "quantization_config"])
def test_latent_weights_are_not_loaded_as_a_plain_model(field: str, tmp_path: Path) -> None:
    """transformers passes over what it does not know, and so over a damaged word of ours."""
    model = tiny("llama-untied")
    quantize_model(model, weight_levels=4)
    model.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(file.read_text().replace(f'"{field}":', f'"{field}_":'))
    if field == "quant_method":
        file.write_text(file.read_text().replace(f'"{field}_":', '"quant_method": "mbqd", "x":'))
    with pytest.raises(ValueError, match=r"weight_log_scale.*config.json.*is not 'maqd'"):
        load(tmp_path)


def test_packed_words_read_as_qat_latents(copied: Path) -> None:
    file = copied / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"]["state"] = "qat"
    file.write_text(json.dumps(config))
    with pytest.raises((RuntimeError, ValueError), match=r"(?i)mismatch|missing"):
        load(copied)


def test_a_module_left_out_of_the_config(copied: Path) -> None:
    file = copied / "config.json"
    config = json.loads(file.read_text())
    del config["quantization_config"]["modules"][LAYER]
    file.write_text(json.dumps(config))
    with pytest.raises((RuntimeError, ValueError), match=r"(?i)mismatch"):
        load(copied)


# ------------------------------------------------------------------------------------- checksum


def test_checksum_is_stable_and_sees_settings_and_tensors() -> None:
    torch.manual_seed(0)
    layer = MaQDLinear(40, 30, True, LinearSpec(5, None))
    packed = PackedLinear.from_qat(layer)
    assert checksum(packed) == checksum(PackedLinear.from_qat(layer))
    other = PackedLinear.from_qat(layer)
    other.spec = LinearSpec(5, 255, "token")
    assert checksum(other) != checksum(packed)
    for parameter in packed.parameters():
        before = checksum(packed)
        parameter.data.view(torch.int32).view(-1)[7 % parameter.numel()] ^= 1 << 30
        assert checksum(packed) != before


def test_checking_134_million_weights_takes_less_than_a_third_of_a_second() -> None:
    """The layers of a 135 M model at 4 bit: 53 MB of words."""
    layer = PackedLinear(4096, 32_832, False, LinearSpec(16, None))
    layer.weight.data.random_()
    layer.weight_scale.data.fill_(1)
    layer.weight_offset.data.fill_(0)
    start = time.process_time()
    checksum(layer)
    assert time.process_time() - start < 0.3
