"""Static activation steps from real inputs."""

import copy

import pytest
import torch
from transformers import BertForMaskedLM, GPT2LMHeadModel, LlamaForCausalLM

from maqd_hf import quantize_model
from maqd_hf.calibration import (
    best_step,
    calibrate_activations,
)
from maqd_hf.functional import dequantize, grid_center, quantize
from maqd_hf.models.finding import modules_of
from maqd_hf.nn import MaQDLinear


@pytest.mark.parametrize("levels", [3, 15, 16, 255])
@pytest.mark.parametrize("tail", [0.0, 30.0])
def test_the_best_step_is_near_that_of_brute_force(levels, tail):
    torch.manual_seed(0)
    rows = torch.randn(100, 32)
    rows[::10, 3] += tail

    def error(step):
        gap = dequantize(quantize(rows, levels, step), levels, step) - rows
        return float((gap.square().sum(1) / rows.square().sum(1)).mean())

    full = float(rows.abs().max()) / grid_center(levels)
    brute = min(error(full * 1.005**-k) for k in range(1400))
    assert error(best_step(rows, levels)) <= 1.05 * brute


def test_silence_has_step_one_and_ignored_features_have_no_say():
    assert best_step(torch.zeros(4, 3), 255) == 1.0
    rows = torch.tensor([[1.0, 100.0], [-1.0, 100.0]])
    only_first = best_step(rows, 3, torch.tensor([1.0, 0.0]))
    assert only_first == pytest.approx(1.0, rel=0.05)


@pytest.mark.parametrize("family", ["tiny_llama", "tiny_gpt2", "tiny_bert"])
def test_calibrate_sets_every_step_and_the_model_works(request, ids, family):
    model: LlamaForCausalLM | GPT2LMHeadModel | BertForMaskedLM = request.getfixturevalue(family)
    with torch.no_grad():
        wanted = model(ids).logits
    quantize_model(model, weight_levels=255, activation_levels=255)
    steps = calibrate_activations(model, ids, progress=False)
    layers = dict(modules_of(model, MaQDLinear))
    assert set(steps) == set(layers)
    assert all(layer.activation.calibrated for layer in layers.values())
    with torch.no_grad():
        gap = model(ids).logits - wanted
    assert float(gap.square().mean().sqrt() / wanted.std()) < 0.05


def test_layers_with_one_input_share_its_step_and_first_tokens_do_not_count(tiny_llama, ids):
    quantize_model(tiny_llama, weight_levels=16, first_token="own")
    start = copy.deepcopy(tiny_llama)
    steps = calibrate_activations(tiny_llama, ids, progress=False)
    block = "model.layers.0."
    q, k, v = (steps[f"{block}self_attn.{n}_proj"] for n in "qkv")
    assert q == k == v
    assert steps[f"{block}mlp.gate_proj"] == steps[f"{block}mlp.up_proj"]
    loud = int(ids.max()) + 1  # a token that occurs first only, and then is enormous
    with torch.no_grad():
        start.model.embed_tokens.weight[loud] = 1e4
        start.model.layers[0].self_attn.o_proj.weight_log_scale.fill_(-99)
    data = torch.cat([torch.full((8, 1), loud), ids[:, 1:]], dim=1)
    again = calibrate_activations(start, data, progress=False)
    assert again[f"{block}mlp.down_proj"] < 10 * steps[f"{block}mlp.down_proj"]


def test_per_token_scaling_needs_no_calibration(tiny_llama, ids):
    quantize_model(tiny_llama, activation_scaling="token", layer_batch_norm=False)
    assert calibrate_activations(tiny_llama, ids, progress=False) == {}
