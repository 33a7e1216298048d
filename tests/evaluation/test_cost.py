"""``inference_cost`` against hand counts, and against the operations torch really runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from maqd_hf import MaQDConfig, inference_cost, pack_model, quantize_model, use_native
from maqd_hf.calibration import calibrate_activations
from maqd_hf.calibration.static_norms import calibrate_norm_statistics
from maqd_hf.decoding.forward import NativeForward
from maqd_hf.evaluation.cost import Count
from maqd_hf.kernels import loader
from maqd_hf.models.finding import gated_norms
from tests.support.families import example, tiny

aten = torch.ops.aten


def packed(family: str, static: bool = True, **settings: Any) -> nn.Module:
    """A packed tiny model, all its gated norms static or none."""
    model = tiny(family)
    quantize_model(model, MaQDConfig(**settings))
    ids = example(model, batch=4)["input_ids"]
    if settings.get("activation_scaling", "static") == "static":
        calibrate_activations(model, ids, progress=False)
    if static:
        calibrate_norm_statistics(model, ids)
        for norm in gated_norms(model).values():
            norm.gate.fill_(1)
    pack_model(model)
    return model


class ReducedRows(TorchDispatchMode):
    """Counts the rows that means, maxima and fused layer norms reduce."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        of = {
            aten.mean.dim: 1,
            aten.amax.default: 1,
            aten.linalg_vector_norm.default: 1,
            aten.native_layer_norm.default: 2,
        }
        if func in of:
            self.rows += of[func] * args[0].numel() // args[0].shape[-1]
        return func(*args, **(kwargs or {}))


FAMILIES = ("llama-tied", "qwen3", "gemma3", "gpt2", "gpt-neox", "bert-mlm", "distilbert")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scaling", ["static", "token"])
@pytest.mark.parametrize("static", [False, True])
def test_the_reductions_are_those_torch_runs(family: str, scaling: str, static: bool) -> None:
    model = packed(family, static, activation_scaling=scaling, first_token="shared")
    inputs = example(model, batch=1, tokens=5)
    with torch.no_grad(), ReducedRows() as counted:
        model(**inputs)
    cost = inference_cost(model)
    assert counted.rows == 5 * cost.left.reductions
    assert not cost.seldom


def test_steps_of_groups_are_reductions_that_torch_runs() -> None:
    settings = {"activation_scaling": "group", "group_size": 8, "first_token": "shared"}
    model = packed("llama-tied", **settings)
    with torch.no_grad(), ReducedRows() as counted:
        model(**example(model, batch=1, tokens=5))
    cost = inference_cost(model)
    assert counted.rows == 5 * cost.left.reductions
    one = inference_cost(packed("llama-tied", **settings | {"activation_scaling": "token"}))
    assert cost.left.reductions > 2 * one.left.reductions
    assert cost.left.multiplications > one.left.multiplications


def test_a_static_model_reduces_nothing_but_what_the_report_names() -> None:
    cost = inference_cost(packed("llama-tied"))
    assert cost.reduced == {"model.norm": "RMS norm per token"}
    assert (cost.left.reductions, cost.left.square_roots, cost.left.dynamic_scales) == (1, 1, 0)
    assert cost.saved.square_roots == 4
    assert cost.saved.dynamic_scales == 14
    every = inference_cost(packed("llama-tied", lbn_final_norm=True))
    assert every.reduced == {}
    assert (every.left.reductions, every.left.square_roots, every.left.dynamic_scales) == (0, 0, 0)


def test_what_stays_per_token_is_counted() -> None:
    cost = inference_cost(packed("llama-tied", static=False, activation_scaling="token"))
    assert cost.left.reductions == 5 + 14
    assert cost.left.dynamic_scales == 14
    assert cost.saved == cost.first_token == Count()


def test_the_first_token_is_counted_apart() -> None:
    own, shared = (inference_cost(packed("llama-tied", first_token=f)) for f in ("own", "shared"))
    assert own.left == shared.left
    assert shared.first_token == Count()
    extra = own.first_token
    assert (extra.reductions, extra.square_roots, extra.dynamic_scales) == (4 + 14, 4, 14)


def test_multiplications_are_those_counted_by_hand() -> None:
    """Tiny GPT-2: width 32, c_attn 96, c_proj 32, c_fc 128, c_proj from 128; 2 blocks, 3 levels.
    Scales of groups take no norm's constant, so each of its 2 norms multiplies by it; an input is
    multiplied to be rotated and to be quantized."""
    cost = inference_cost(packed("gpt2", weight_levels=3, weight_offset=False, group_size=16))
    groups = 96 * 2 + 32 * 2 + 128 * 2 + 32 * 8
    inputs = 2 * (32 + 32 + 32 + 128)
    norms = 2 * 32
    final_norm = 3 * 32
    assert cost.left.multiplications == 2 * (groups + inputs + norms) + final_norm
    assert cost.left.additions == 2 * (3 * 32 * 5 + 128 * 7)
    assert cost.left.integer_sums == 0
    assert cost.left.reductions == 4 + 2
    assert cost.left.square_roots == 1


def test_float_models_count_their_norms_and_heads() -> None:
    assert inference_cost(tiny("llama-tied")).left.reductions == 5
    assert inference_cost(tiny("qwen3")).left.reductions == 5 + 2 * (4 + 2)
    gpt2 = inference_cost(tiny("gpt2")).left
    assert (gpt2.reductions, gpt2.square_roots) == (10, 5)
    vit = inference_cost(tiny("vit"))
    assert vit.unit == "picture"
    assert vit.left.square_roots == 5 * 5  # 4 patches and the class token


def test_it_prints_and_is_json() -> None:
    full, cost = inference_cost(tiny("llama-tied")), inference_cost(packed("llama-tied"))
    assert "model.norm: RMS norm per token" in str(cost)
    assert cost.table(full).splitlines()[1].split() == ["reductions", "1", "18", "5"]
    assert cost.to_dict()["left"]["reductions"] == 1


def test_the_native_forward_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    if not loader.isas():
        return  # a build without a compiler has no native forward
    monkeypatch.delenv("MAQD_KERNEL")
    model = packed("llama-tied")
    before = model.forward
    assert isinstance(before, NativeForward)
    assert inference_cost(model).left.reductions == 1
    assert model.forward is before
    use_native(model, False)
    assert inference_cost(model).left.reductions == 1
    assert "forward" not in model.__dict__


def test_a_norm_of_an_unknown_kind_is_refused() -> None:
    class GroupNormalizer(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    model = tiny("llama-tied")
    model.model.norm = GroupNormalizer()
    with pytest.raises(ValueError, match=r"model\.norm \(GroupNormalizer\) is no norm"):
        inference_cost(model)
