"""Laws of the two ways out of training: packing, and going back to float."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from maqd_hf import MaQDConfig, dequantize_model, pack_model, quantize_model
from maqd_hf.models.finding import modules_of
from maqd_hf.nn import LayerBatchNorm, MaQDEmbedding, MaQDLinear, PackedEmbedding, PackedLinear
from tests.support.families import FAMILIES, example, output, tiny

SETTINGS: dict[str, Any] = {"weight_levels": 7, "activation_scaling": "token"}
WEIGHT_ONLY: dict[str, Any] = {"weight_levels": 7, "activation_levels": None}
NO_TOKENS = ("vit", "t5-encoder")


def trained(family: str, **settings: Any) -> PreTrainedModel:
    """A converted model two optimizer steps away from its start."""
    model = tiny(family)
    if family not in NO_TOKENS:
        settings = {"embedding_levels": 15} | settings
    quantize_model(model, **settings)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=3e-3)
    model.train()
    for _ in range(2):
        result = model(**example(model))
        loss = (result.logits if "logits" in result else result.last_hidden_state).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def values_of(model: nn.Module) -> dict[str, Tensor]:
    """Every quantized weight, by module name."""
    simulated = {n: m.quantized_weight() for n, m in modules_of(model, MaQDLinear, MaQDEmbedding)}
    layers = modules_of(model, PackedLinear, PackedEmbedding)
    packed = {n: m.dequantized_weight() for n, m in layers}
    return {n: w.detach().clone() for n, w in (simulated | packed).items()}


# --------------------------------------------------------------------------------------- packing


@pytest.mark.parametrize("family", FAMILIES)
def test_simulated_and_packed_agree_bit_for_bit(family: str) -> None:
    """Weights equal bit for bit; logits too, as both run the same float matmul on this machine."""
    model = trained(family, **SETTINGS)
    inputs = example(model)
    simulated, weights = output(model, inputs), values_of(model)
    report = pack_model(model)
    packed = values_of(model)
    assert set(packed) == set(weights) and len(packed) >= 8
    assert all(torch.equal(packed[name], weights[name]) for name in weights)
    torch.testing.assert_close(output(model, inputs), simulated, rtol=1e-6, atol=1e-6)
    assert report.state == model.config.quantization_config.state == "packed"
    assert not modules_of(model, MaQDLinear, MaQDEmbedding) and not model.training
    floats = [p for _, m in modules_of(model, PackedLinear) for p in m.parameters()]
    assert not any(p.requires_grad for p in floats if p.dtype == torch.int32)


def test_codes_come_back_from_the_words() -> None:
    model = trained("llama-tied", **SETTINGS)
    codes = {n: m.weight_codes() for n, m in modules_of(model, MaQDLinear, MaQDEmbedding)}
    pack_model(model)
    for name, layer in modules_of(model, PackedLinear, PackedEmbedding):
        unit = (layer.dequantized_weight() - layer.weight_offset) / layer.weight_scale
        assert torch.equal((unit + (layer.levels - 1) / 2).round(), codes[name])


def refused(model: PreTrainedModel, message: str) -> None:
    before = {n: t.clone() for n, t in model.state_dict().items()}
    classes = [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match=message):
        pack_model(model)
    assert [type(m) for m in model.modules()] == classes
    assert model.config.quantization_config.state == "qat"
    after = model.state_dict()
    assert all(torch.equal(after[n].nan_to_num(7.0), before[n].nan_to_num(7.0)) for n in before)


def test_steps_that_were_never_calibrated_are_refused() -> None:
    model = tiny("gpt2")
    quantize_model(model, activation_scaling="static")
    refused(model, r"c_attn: the static activation step was never calibrated.*calibrate")


@pytest.mark.parametrize("gate", [0.5, 1e-3, 0.999])
def test_half_open_gates_are_refused(gate: float) -> None:
    model = trained("llama-tied", **SETTINGS)
    model.model.layers[1].input_layernorm.gate.fill_(gate)
    refused(model, rf"layers.1.input_layernorm: its gate stands at {gate:.3f}")


def test_an_open_gate_without_statistics_is_refused() -> None:
    model = tiny("llama-tied")
    quantize_model(model, **SETTINGS)
    model.model.layers[0].input_layernorm.gate.fill_(1)
    refused(model, "never saw a batch")


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.mlp.up_proj.weight",
        "model.layers.0.mlp.up_proj.weight_log_scale",
        "model.embed_tokens.weight",
        "model.norm.weight",
        "model.layers.1.input_layernorm.running_log_ms",
    ],
)
def test_diverged_training_is_refused(name: str) -> None:
    model = trained("llama-tied", **SETTINGS)
    model.state_dict()[name].view(-1)[0] = float("nan")
    refused(model, f"{name} holds NaN")


# --------------------------------------------------------------------------------- back to float

PLAIN = """
import sys, torch, transformers
assert "maqd_hf" not in sys.modules
for path in sys.argv[1:]:
    name = transformers.AutoConfig.from_pretrained(path).architectures[0]
    model, info = getattr(transformers, name).from_pretrained(path, output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    saved = torch.load(path + "/expected.pt")
    with torch.no_grad():
        out = model(**saved["inputs"])
    logits = out.logits if "logits" in out else out.last_hidden_state
    torch.testing.assert_close(logits, saved["output"], rtol=1e-5, atol=1e-5)
print("all equal")
"""


def test_plain_transformers_loads_what_dequantize_model_leaves(tmp_path: Path) -> None:
    paths = []
    for family in FAMILIES:
        for state in ("qat", "packed"):
            model = trained(family, **WEIGHT_ONLY, rotation=None)  # turned back, it is rounded
            inputs = example(model)
            before, weights = output(model, inputs), values_of(model)
            if state == "packed":
                pack_model(model)
            assert dequantize_model(model) == []
            after = output(model, inputs)
            torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)
            for name, weight in weights.items():
                plain = model.get_submodule(name)
                found = plain.weight.T if isinstance(plain, Conv1D) else plain.weight
                assert torch.equal(found, weight)
            assert not hasattr(model.config, "quantization_config")
            assert not any("maqd_hf" in type(m).__module__ for m in model.modules())
            assert not any(m._forward_pre_hooks for m in model.modules())
            paths.append(tmp_path / f"{family}-{state}")
            model.save_pretrained(paths[-1])
            torch.save({"inputs": inputs, "output": after}, paths[-1] / "expected.pt")
    command = [sys.executable, "-c", PLAIN, *map(str, paths)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0 and "all equal" in result.stdout, result.stderr[-2000:]


def test_a_dequantized_model_can_be_converted_again() -> None:
    model = trained("llama-tied", **SETTINGS)
    pack_model(model)
    dequantize_model(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    before = output(model, inputs := example(model))
    quantize_model(model, weight_levels=255, activation_levels=None)
    assert (output(model, inputs) - before).norm() / before.norm() < 0.05


def test_static_norms_are_left_and_named(tmp_path: Path) -> None:
    for family in ("llama-tied", "bert"):
        model = trained(family, **WEIGHT_ONLY)
        norms = [n for n, m in modules_of(model, LayerBatchNorm) if m.spec.statistics == "gated"]
        for name in norms:
            model.get_submodule(name).gate.fill_(1)
        inputs = example(model)
        before = output(model, inputs)
        pack_model(model)
        assert dequantize_model(model) == norms
        torch.testing.assert_close(output(model, inputs), before, rtol=1e-5, atol=1e-5)
        model.save_pretrained(tmp_path / family)
        again = type(model).from_pretrained(tmp_path / family)
        assert torch.equal(output(again, inputs), output(model, inputs))
        assert set(n for n, _ in modules_of(again, LayerBatchNorm)) == set(norms)


def test_biases_a_plain_layer_lacks_are_left_and_named(tmp_path: Path) -> None:
    model = tiny("gpt-neox")
    model.config.attention_bias = False
    model = type(model)(model.config).eval()
    for layer in model.gpt_neox.layers:
        nn.init.normal_(layer.input_layernorm.bias)
    inputs = example(model)
    quantize_model(model, **WEIGHT_ONLY, norm_affine="fold")
    before = output(model, inputs)
    left = dequantize_model(model)
    assert left == [f"gpt_neox.layers.{i}.attention.query_key_value" for i in range(2)]
    torch.testing.assert_close(output(model, inputs), before, rtol=1e-5, atol=1e-5)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert torch.equal(output(again, inputs), output(model, inputs))


@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_the_dtype_of_the_result(dtype: torch.dtype | None) -> None:
    model = tiny("gemma3").to(torch.bfloat16)
    quantize_model(model, **WEIGHT_ONLY, embedding_levels=15)
    dequantize_model(model, dtype)
    wanted = dtype or torch.bfloat16
    assert {p.dtype for p in model.parameters()} == {wanted}
    assert output(model, example(model)).dtype == wanted


def test_only_maqd_models_can_be_dequantized() -> None:
    with pytest.raises(ValueError, match="not a MaQD model"):
        dequantize_model(tiny("gpt2"))
    assert MaQDConfig().state == "qat"
