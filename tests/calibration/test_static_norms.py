"""Laws of the search for norms that can be static."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from transformers import BertModel, GPT2LMHeadModel, LlamaForCausalLM, PreTrainedModel

from maqd_hf import pack_model, quantize_model
from maqd_hf.calibration import calibrate_activations
from maqd_hf.calibration.blocks import float_activations
from maqd_hf.calibration.static_norms import (
    NormChoice,
    NormSelection,
    calibrate_norm_statistics,
    select_static_norms,
)
from maqd_hf.functional import pooled_log_ms, token_log_ms
from maqd_hf.models.finding import gated_norms

TOKENS = torch.randint(3, 259, (3, 24), generator=torch.Generator().manual_seed(1))


def converted(model: PreTrainedModel, **settings: object) -> PreTrainedModel:
    quantize_model(model, weight_levels=None, activation_levels=None, **settings)
    return model


def divergence(model: PreTrainedModel, tokens: Tensor, names: Sequence[str]) -> float:
    """KL(gates closed || gates of ``names`` open) per token, written down plainly."""
    opened = copy.deepcopy(model).eval()
    for name in names:
        opened.get_submodule(name).gate.fill_(1.0)
    with torch.no_grad():
        p = copy.deepcopy(model).eval()(input_ids=tokens).logits.double().softmax(-1)
        q = opened(input_ids=tokens).logits.double().softmax(-1)
    return float((p * (p / q).log()).sum(-1).mean())


@pytest.fixture
def llama(tiny_llama: LlamaForCausalLM) -> PreTrainedModel:
    return converted(tiny_llama)


def test_statistics_are_the_mean_over_samples_of_the_pooled_ones(llama: PreTrainedModel) -> None:
    seen: dict[str, Tensor] = {}
    handles = [
        norm.register_forward_hook(lambda n, a, y, k=name: seen.update({k: a[0].detach()}))
        for name, norm in gated_norms(llama).items()
    ]
    llama(input_ids=TOKENS)
    for handle in handles:
        handle.remove()
    statistics = calibrate_norm_statistics(llama, TOKENS)
    assert set(statistics) == set(seen)
    for name, x in seen.items():
        token = token_log_ms(x[:, 1:], llama.get_submodule(name).eps)
        expected = pooled_log_ms(token, geometric=True).mean()
        assert statistics[name] == pytest.approx(float(expected), abs=1e-5)
        assert llama.get_submodule(name).batches_seen > 0  # pack_model asks for it


def test_calibrating_twice_forgets_the_first_text(llama: PreTrainedModel) -> None:
    once = calibrate_norm_statistics(llama, TOKENS[:1])
    calibrate_norm_statistics(llama, TOKENS[1:])
    assert calibrate_norm_statistics(llama, TOKENS[:1]) == once


def test_costs_are_divergences_from_the_own_output(llama: PreTrainedModel) -> None:
    selection = select_static_norms(llama, TOKENS, 1e9, progress=False)
    for choice in selection.choices:
        assert choice.alone == pytest.approx(divergence(llama, TOKENS, [choice.name]), abs=1e-5)
        assert choice.static and choice.reason
    assert selection.static == list(gated_norms(llama))
    assert selection.cost == pytest.approx(divergence(llama, TOKENS, selection.static), abs=1e-5)


def test_what_is_admitted_costs_at_most_the_tolerance(llama: PreTrainedModel) -> None:
    everything = select_static_norms(llama, TOKENS, 1e9, progress=False)
    tolerance = everything.cost / 2
    selection = select_static_norms(llama, TOKENS, tolerance, progress=False)
    assert 0 < len(selection.static) < len(everything.static)
    assert divergence(llama, TOKENS, selection.static) <= tolerance + 1e-6
    assert sorted(selection.static + selection.per_token) == sorted(gated_norms(llama))
    for choice in selection.choices:
        expensive = max(choice.alone + selection.cost, choice.joint or 0)
        assert choice.static or expensive > tolerance


def test_tolerance_zero_admits_nothing(llama: PreTrainedModel) -> None:
    selection = select_static_norms(llama, TOKENS, 0.0, progress=False)
    assert selection.static == [] and selection.cost == 0


def test_a_norm_that_damps_massive_tokens_stays_per_token(
    tiny_llama: LlamaForCausalLM,
) -> None:
    with torch.no_grad():
        tiny_llama.model.embed_tokens.weight *= 0.02  # all tokens alike, and small ...
        tiny_llama.model.layers[0].mlp.down_proj.weight *= 30  # ... so that layer 0 decides
        tiny_llama.model.embed_tokens.weight[7] *= 3000
    tokens = TOKENS.clone()
    tokens[:, 10] = 7
    model = converted(tiny_llama)
    alone = {c.name: c.alone for c in select_static_norms(model, tokens, progress=False).choices}
    calm = {c.name: c.alone for c in select_static_norms(model, TOKENS, progress=False).choices}
    first = "model.layers.0.input_layernorm"
    assert alone[first] > 10 * calm[first]


def test_one_bad_norm_in_a_chunk_does_not_cost_the_others(llama: PreTrainedModel) -> None:
    bad = "model.layers.1.input_layernorm"
    norm = llama.get_submodule(bad)
    norm.register_forward_hook(lambda n, a, y: y * float("nan") if n.gate > 0 else y)
    selection = select_static_norms(llama, TOKENS, 1e9, progress=False)
    assert selection.per_token == [bad]
    (choice,) = (c for c in selection.choices if c.name == bad)
    assert choice.alone == math.inf and choice.joint is None and "alone" in choice.reason
    assert json.loads(json.dumps(selection.to_dict(), allow_nan=False))["tolerance"] == 1e9


def test_quantized_weights_are_those_that_count(tiny_llama: LlamaForCausalLM) -> None:
    quantize_model(tiny_llama, weight_levels=3, activation_levels=None, embedding_levels=15)
    for choice in select_static_norms(tiny_llama, TOKENS, 1e9, progress=False).choices:
        expected = divergence(tiny_llama, TOKENS, [choice.name])
        assert choice.alone == pytest.approx(expected, abs=1e-5)


def test_rounding_errors_of_the_activations_are_not_a_cost(tiny_llama: LlamaForCausalLM) -> None:
    quantize_model(tiny_llama, weight_levels=None, activation_levels=15)
    calibrate_activations(tiny_llama, TOKENS, progress=False)
    selection = select_static_norms(tiny_llama, TOKENS, 1e9, progress=False)
    with torch.no_grad():
        quantized = tiny_llama(input_ids=TOKENS).logits.log_softmax(-1)
        with float_activations(tiny_llama):
            reference = tiny_llama(input_ids=TOKENS).logits.log_softmax(-1)
        for choice in selection.choices:
            gate = tiny_llama.get_submodule(choice.name).gate
            gate.fill_(1.0)
            static = tiny_llama(input_ids=TOKENS).logits.log_softmax(-1)
            gate.fill_(0.0)
            cost = (reference.exp() * (quantized - static)).sum(-1).mean()
            assert choice.alone == pytest.approx(float(cost), abs=1e-4)


def test_the_model_is_left_as_it_was(tiny_gpt2: GPT2LMHeadModel) -> None:
    quantize_model(tiny_gpt2, weight_levels=16, activation_levels=None, embedding_levels=255)
    model = tiny_gpt2
    before = model(input_ids=TOKENS).logits
    tensors = {name: id(tensor) for name, tensor in model.named_parameters()}
    model.train()
    model.transformer.h[0].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    select_static_norms(model, TOKENS, 1e9, progress=False)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert all(norm.gate == 0 for norm in gated_norms(model).values())
    assert {name: id(tensor) for name, tensor in model.named_parameters()} == tensors
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(model.eval()(input_ids=TOKENS).logits, before)


def test_padding_does_not_count(llama: PreTrainedModel) -> None:
    padded = torch.nn.functional.pad(TOKENS, (0, 9), value=2)
    batch = {"input_ids": padded, "attention_mask": (padded != 2).long()}
    plain = select_static_norms(llama, [TOKENS], 1e9, progress=False)
    masked = select_static_norms(llama, [batch], 1e9, progress=False)
    for a, b in zip(plain.choices, masked.choices, strict=True):
        assert a.alone == pytest.approx(b.alone, rel=1e-3)


def test_the_batch_size_does_not_matter(llama: PreTrainedModel) -> None:
    single = select_static_norms(llama, TOKENS, 1e9, batch_size=1, progress=False)
    triple = select_static_norms(llama, TOKENS, 1e9, batch_size=3, progress=False)
    for a, b in zip(single.choices, triple.choices, strict=True):
        assert a.alone == pytest.approx(b.alone, rel=1e-3)


def test_selected_norms_can_be_packed_static(tiny_llama: LlamaForCausalLM) -> None:
    quantize_model(tiny_llama, weight_levels=16, activation_levels=255)
    calibrate_activations(tiny_llama, TOKENS, progress=False)
    selection = select_static_norms(tiny_llama, TOKENS, 1e9, progress=False)
    for name in selection.static:
        tiny_llama.get_submodule(name).gate.fill_(1.0)
    before = tiny_llama.eval()(input_ids=TOKENS).logits
    report = pack_model(tiny_llama)
    assert all("static" in report.norms[name] for name in selection.static)
    assert torch.allclose(tiny_llama(input_ids=TOKENS).logits, before, atol=1e-4)


def test_errors_say_what_to_do(
    tiny_llama: LlamaForCausalLM, tiny_gpt2: GPT2LMHeadModel, tiny_bert: PreTrainedModel
) -> None:
    llama = converted(copy.deepcopy(tiny_llama))
    with pytest.raises(ValueError, match="tolerance=-1"):
        select_static_norms(llama, TOKENS, -1, progress=False)
    with pytest.raises(ValueError, match="tolerance=nan"):
        select_static_norms(llama, TOKENS, float("nan"), progress=False)
    with pytest.raises(ValueError, match="empty"):
        select_static_norms(llama, [], progress=False)
    with pytest.raises(ValueError, match="layer_batch_norm=True"):
        select_static_norms(converted(tiny_gpt2, layer_batch_norm=False), TOKENS, progress=False)
    uncalibrated = tiny_llama
    quantize_model(uncalibrated, weight_levels=None, activation_levels=255)
    with pytest.raises(ValueError, match="calibrate"):
        select_static_norms(uncalibrated, TOKENS, progress=False)
    headless = BertModel(copy.deepcopy(tiny_bert.config))
    with pytest.raises(ValueError, match="no logits"):
        select_static_norms(converted(headless), TOKENS, progress=False)


def test_the_report_is_readable() -> None:
    choices = [NormChoice(f"layers.{i}.norm", i < 3, 0.1 * i, None, "") for i in range(4)]
    text = str(NormSelection(0.05, 0.04, choices))
    assert "3 of 4" in text and "0.0400" in text
    assert "static: layers.{0-2}.norm" in text and "per token: layers.{3}.norm" in text
