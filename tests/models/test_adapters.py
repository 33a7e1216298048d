"""An adapter on a trainable layer means the same merged and unmerged, or its merge is refused."""

import copy
import subprocess
import sys

import peft
import pytest
import torch

from maqd_hf import MaQDConfig, pack_model, quantize_model
from maqd_hf.nn import MaQDLinear

IDS = torch.arange(3, 27).view(2, 12)


def adapted(model, **settings):
    """``model`` with a LoRA adapter that has an effect."""
    settings = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"} | settings
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**settings)).eval()
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    return wrapped


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


def distance(a, b):
    return float((a - b).norm() / b.norm())


def state(model):
    return {n: t.clone() for n, t in model.get_base_model().state_dict().items()}


@pytest.mark.parametrize("rotation", [None, "auto"])
@pytest.mark.parametrize(("levels", "tolerance"), [(256, 0.05), (None, 1e-4)])
def test_a_merged_adapter_says_what_it_said(tiny_llama, levels, tolerance, rotation):
    settings = {"weight_levels": levels, "activation_levels": None, "rotation": rotation}
    quantize_model(tiny_llama, MaQDConfig(**settings, layer_batch_norm=False))
    tiny_llama.eval()
    alone = logits(tiny_llama)
    model = adapted(tiny_llama)
    before, expected = state(model), logits(model)
    effect = distance(expected, alone)
    model.merge_adapter()
    error = distance(logits(model), expected)
    assert error < tolerance * effect and effect > 0.02
    model.unmerge_adapter()
    assert all(torch.equal(before[name], t) for name, t in state(model).items())
    merged = copy.deepcopy(model).merge_and_unload()
    assert type(merged.model.layers[0].self_attn.q_proj) is MaQDLinear
    assert distance(logits(merged), expected) == pytest.approx(error, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("levels", [3, 15, 16])
@pytest.mark.parametrize("rotation", [None, "auto"])
def test_a_grid_too_coarse_for_the_adapter_gets_the_levels_it_needs(
    tiny_llama, tmp_path, levels, rotation
):
    settings = {"weight_levels": levels, "activation_levels": None, "rotation": rotation}
    quantize_model(tiny_llama, MaQDConfig(**settings))
    tiny_llama.eval()
    alone = logits(tiny_llama)
    model = adapted(tiny_llama)
    before, expected = state(model), logits(model)
    model.merge_adapter()
    assert distance(logits(model), expected) < 0.25 * distance(expected, alone)
    layer = model.get_base_model().model.layers[0].self_attn
    finer = layer.q_proj.get_base_layer().weight_levels
    assert finer > levels and finer % 2 == levels % 2
    assert layer.k_proj.weight_levels == levels, "it has no adapter"
    model.unmerge_adapter()
    assert layer.q_proj.get_base_layer().weight_levels == levels
    assert all(torch.equal(before[name], t) for name, t in state(model).items())

    merged = model.merge_and_unload()
    expected = logits(merged)
    merged.save_pretrained(tmp_path / "qat")
    again = type(merged).from_pretrained(tmp_path / "qat").eval()
    assert again.model.layers[0].self_attn.q_proj.weight_levels == finer
    assert torch.equal(logits(again), expected)
    pack_model(again)
    assert distance(logits(again), expected) < 1e-5


def test_an_adapter_that_no_grid_keeps_is_refused(tiny_llama):
    quantize_model(tiny_llama, MaQDConfig(weight_levels=4, activation_levels=None))
    model = adapted(tiny_llama, lora_alpha=1e-4)
    before, expected = state(model), logits(model)
    with pytest.raises(ValueError, match=r"256 levels are too few.*unmerged"):
        model.merge_adapter()
    assert all(torch.equal(before[name], t) for name, t in state(model).items())
    assert torch.equal(logits(model), expected), "the adapter is still there, unmerged"
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    assert layer.get_base_layer().weight_levels == 4


def test_an_adapter_that_was_never_trained_changes_nothing(tiny_llama):
    quantize_model(tiny_llama, MaQDConfig(weight_levels=4, activation_levels=None))
    expected = logits(tiny_llama.eval())
    config = peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    merged = peft.get_peft_model(tiny_llama, config).merge_and_unload()
    assert torch.equal(logits(merged), expected)
    assert merged.model.layers[0].self_attn.q_proj.weight_levels == 4


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"target_modules": ["embed_tokens"]}])
def test_variants_and_tables_are_refused_at_the_call(tiny_llama, settings):
    config = MaQDConfig(weight_levels=256, activation_levels=None, embedding_levels=255)
    quantize_model(tiny_llama, config)
    with pytest.raises(ValueError, match=r"cannot be merged into a MaQD|not supported"):
        adapted(tiny_llama, **settings).merge_adapter()


def test_other_methods_are_refused_too(tiny_llama):
    quantize_model(tiny_llama, MaQDConfig(weight_levels=256, activation_levels=None))
    config = peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[])
    with pytest.raises(ValueError, match=r"cannot be merged into a MaQDLinear"):
        peft.get_peft_model(tiny_llama, config).merge_and_unload()


def test_float_layers_merge_as_before(tiny_llama):
    model = adapted(tiny_llama)
    expected = logits(model)
    assert distance(logits(model.merge_and_unload()), expected) < 1e-5


@pytest.mark.parametrize(("first", "second"), [("maqd_hf", "peft"), ("peft", "maqd_hf")])
def test_the_order_of_imports_does_not_matter(first, second):
    code = f"""
import {first}, {second}
from peft.tuners.ia3.layer import check_adapters_to_merge
from peft.tuners.lora.layer import Linear
for taught in (check_adapters_to_merge, Linear.merge, Linear.unmerge):
    assert taught.__globals__["__name__"] == "maqd_hf.models.adapters", taught
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
