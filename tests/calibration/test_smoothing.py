"""Laws of smoothing: the float function stays, the expected error falls, the rest does not move."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from maqd_hf import MaQDConfig, quantize_model
from maqd_hf.calibration import calibrate_activations, smooth
from maqd_hf.calibration.blocks import float_activations, float_weights
from maqd_hf.calibration.smoothing import Errors, choose_factors, find_edges
from maqd_hf.nn import MaQDLinear
from tests.support.families import FAMILIES, example, output, tiny

BLOCK = "model.layers.0."
LLAMA = {
    f"{BLOCK}input_layernorm": {"q_proj", "k_proj", "v_proj"},
    f"{BLOCK}post_attention_layernorm": {"gate_proj", "up_proj"},
    f"{BLOCK}self_attn.v_proj": {"o_proj"},
    f"{BLOCK}mlp.up_proj": {"down_proj"},
}
EXPECTED = {
    "llama-tied": LLAMA,
    "llama-untied": LLAMA,  # the base model returns what its last norm puts out
    "mistral": LLAMA,
    "gpt2": {"transformer.h.0.ln_1": {"c_attn"}, "transformer.h.0.ln_2": {"c_fc"}},
    "opt": {  # ReLU lets positive factors pass
        "model.decoder.layers.0.self_attn_layer_norm": {"q_proj", "k_proj", "v_proj"},
        "model.decoder.layers.0.final_layer_norm": {"fc1"},
        "model.decoder.layers.0.self_attn.v_proj": {"out_proj"},
        "model.decoder.layers.0.fc1": {"fc2"},
    },
    "bert": {"bert.encoder.layer.0.attention.self.value": {"dense"}},
}


def float_output(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    with float_activations(model), float_weights(model):
        return output(model, inputs)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_float_function_stays(family: str) -> None:
    model = tiny(family)
    quantize_model(model, MaQDConfig(embedding_levels=None))
    inputs = example(model, batch=3)
    before = float_output(model, inputs)
    weights = {n: m.weight.clone() for n, m in model.named_modules() if isinstance(m, MaQDLinear)}
    report = smooth(model, [inputs], progress=False)
    torch.testing.assert_close(float_output(model, inputs), before, rtol=1e-3, atol=1e-4)
    moved = {n for n, w in weights.items() if not torch.equal(model.get_submodule(n).weight, w)}
    assert bool(moved) == bool(report.weights)
    for name in report.weights:
        assert report.inputs[name][1] + report.weights[name][1] <= (
            report.inputs[name][0] + report.weights[name][0]
        )


@pytest.mark.parametrize("family", ["llama-tied", "bert"])
def test_half_precision_moves_the_same_channels(family: str) -> None:
    reports = []
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny(family).to(dtype)
        inputs = example(model)
        quantize_model(model, MaQDConfig(rotation=None))  # its sums would round too
        plain = {n: p.dtype for n, p in model.named_parameters()}
        before = float_output(model, inputs)
        reports.append(smooth(model, [inputs], progress=False))
        assert {n: p.dtype for n, p in model.named_parameters()} == plain
        change = float((float_output(model, inputs) - before).norm() / before.norm())
        assert change < torch.finfo(dtype).eps * 5
    assert reports[0].weights.keys() == reports[1].weights.keys()


@pytest.mark.parametrize("family", EXPECTED)
def test_channels_move_where_nobody_else_reads_them(family: str) -> None:
    model = tiny(family)
    quantize_model(model, MaQDConfig(embedding_levels=None, targets=["*"]))
    names = {m: n.rpartition(".")[2] for n, m in model.named_modules()}
    with float_activations(model), float_weights(model):
        edges = find_edges(model)
    found = {e.name: {names[layer] for layer in e.consumers} for e in edges}
    first = {n: readers for n, readers in found.items() if ".1." not in n}
    assert first == EXPECTED[family]


def test_layers_left_in_float_keep_their_norm() -> None:
    model = tiny("llama-tied")
    quantize_model(model, MaQDConfig(exclude=["*.k_proj", "*.down_proj"]))
    with float_activations(model), float_weights(model):
        names = {edge.name for edge in find_edges(model)}
    assert f"{BLOCK}input_layernorm" not in names and f"{BLOCK}mlp.up_proj" not in names
    assert f"{BLOCK}post_attention_layernorm" in names


@pytest.mark.parametrize("scaling", ["token", "static"])
def test_an_outlier_channel_is_shared_out(scaling: str) -> None:
    """gamma makes one channel a hundred times the others and its columns that much smaller."""
    model = tiny("llama-tied")
    for layer in model.model.layers:
        layer.input_layernorm.weight.data[3] *= 100
        for name in ("q_proj", "k_proj", "v_proj"):
            getattr(layer.self_attn, name).weight.data[:, 3] /= 100
    inputs = example(model, batch=8)
    exact = output(model, inputs)
    settings = {"activation_levels": 31, "activation_scaling": scaling, "embedding_levels": None}
    quantize_model(model, weight_levels=256, **settings)
    if scaling == "static":
        calibrate_activations(model, [inputs], progress=False)
    plain = (output(model, inputs) - exact).square().mean()
    report = smooth(model, [inputs], progress=False)
    if scaling == "static":
        calibrate_activations(model, [inputs], progress=False)
    smoothed = (output(model, inputs) - exact).square().mean()
    assert smoothed < 0.5 * plain
    before, after = report.inputs[f"{BLOCK}input_layernorm"]
    assert after < 0.2 * before and "smoothing: 8 sets" in str(report)


@pytest.mark.parametrize("settings", [{"activation_levels": None}, {"activation_levels": 15}])
def test_no_power_of_the_channels_maxima_is_better(settings: dict[str, int | None]) -> None:
    """SmoothQuant's and AWQ's rule, at the best of eleven powers."""
    model = tiny("llama-tied")
    scaling = {"activation_scaling": "token", "embedding_levels": None}
    quantize_model(model, weight_levels=16, **settings, **scaling)
    with float_weights(model), float_activations(model):
        edge = find_edges(model)[0]
    torch.manual_seed(0)
    x = torch.randn(500, edge.channels) * torch.randn(edge.channels).exp()
    x /= x.square().mean(-1, keepdim=True).sqrt()
    reach = x.square().mean(0)
    factors, before, after = choose_factors(edge, x, reach)
    assert sum(after) < sum(before)
    weight = torch.cat([layer.input_weight() for layer in edge.consumers]).detach()
    errors = Errors(x, reach, weight, edge)
    found = float(sum(errors(factors.log())))
    assert found == pytest.approx(sum(after), rel=1e-4)
    for power in torch.linspace(0, 1, 11).tolist():
        rule = x.abs().amax(0) ** power / weight.abs().amax(0) ** (1 - power)
        assert found < 1.01 * float(sum(errors(rule.log())))


def test_silent_inputs_move_nothing() -> None:
    model = tiny("llama-tied")
    quantize_model(model, embedding_levels=None)
    with float_weights(model), float_activations(model):
        edge = find_edges(model)[0]
    silent = torch.zeros(5, edge.channels)
    factors, _, _ = choose_factors(edge, silent, silent[0])
    assert torch.equal(factors, torch.ones(edge.channels))


def test_empty_data_is_refused_and_nothing_changes() -> None:
    model = tiny("llama-tied")
    quantize_model(model, embedding_levels=None)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="empty"):
        smooth(model, torch.zeros(0, 4, dtype=torch.long), progress=False)
    assert all(
        torch.equal(before[k], v) for k, v in model.state_dict().items() if "log_step" not in k
    )
