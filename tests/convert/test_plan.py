"""Laws of ``probing`` and ``matching``: numbers decide, not names, and nothing is touched."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from transformers.models.gemma3.modeling_gemma3 import (
    Gemma3RMSNorm,
    Gemma3TextScaledWordEmbedding,
)
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm

from maqd_hf import MaQDConfig
from maqd_hf.convert.plan import plan_conversion
from maqd_hf.models.names import Names
from maqd_hf.models.probing import (
    NormKind,
    example_inputs,
    looks_like_norm,
    probe_embedding,
    probe_linear,
    probe_norm,
    trace_norms,
)
from tests.support.families import FAMILIES, WIDTH, tiny

# ---------------------------------------------------------------------------------------- norms


class LiarNorm(nn.LayerNorm):
    """A LayerNorm by name and an RMS norm with 1 + weight by deed."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * (1 + self.weight)


@pytest.mark.parametrize(
    ("norm", "kind"),
    [
        (nn.LayerNorm(8, eps=1e-5), NormKind(8, True, False, True, 1e-5)),
        (nn.LayerNorm(8, bias=False), NormKind(8, True, False, False, 1e-5)),
        (nn.RMSNorm(8, eps=1e-6), NormKind(8, False, False, False, 1e-6)),
        (LlamaRMSNorm(8, eps=1e-6), NormKind(8, False, False, False, 1e-6)),
        (Gemma3RMSNorm(8), NormKind(8, False, True, False, 1e-6)),
        (T5LayerNorm(8), NormKind(8, False, False, False, 1e-6)),
        (LiarNorm(8, bias=False), NormKind(8, False, True, False, 1e-5)),
    ],
)
def test_norms_are_recognized_by_what_they_compute(norm: nn.Module, kind: NormKind) -> None:
    before = {name: tensor.clone() for name, tensor in norm.state_dict().items()}
    assert looks_like_norm(norm) and probe_norm(norm) == kind
    assert all(torch.equal(norm.state_dict()[name], before[name]) for name in before)
    assert torch.equal(kind.gamma(norm), norm.weight.detach() + kind.unit_offset)
    assert probe_norm(norm.to(torch.bfloat16)) == kind
    assert probe_norm(norm.to("meta")) == kind


class Scaled(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return 2 * super().forward(x)


class Constant(nn.LayerNorm):
    """Its weight is a buffer, as in Falcon Mamba."""

    def __init__(self, features: int) -> None:
        super().__init__(features)
        del self.weight
        self.register_buffer("weight", torch.ones(features))


class Gated(nn.LayerNorm):
    def forward(self, x: Tensor, gate: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x) * gate


@pytest.mark.parametrize(
    ("norm", "reason"),
    [
        (Scaled(8), "Scaled computes neither"),
        (Gated(8), "Gated takes more than the hidden states"),
        (nn.BatchNorm1d(8), "BatchNorm1d has buffers"),
        (Constant(8), "Constant has no one-dimensional weight that is trained"),
        (nn.GroupNorm(2, 8), "GroupNorm"),
        (nn.LayerNorm(8, elementwise_affine=False), "LayerNorm has no one-dimensional weight"),
        (nn.LayerNorm((3, 8)), "LayerNorm has no one-dimensional weight"),
        (nn.RMSNorm(8), "RMSNorm has no eps"),
    ],
)
def test_other_norms_are_refused_by_name(norm: nn.Module, reason: str) -> None:
    found = probe_norm(norm)
    assert isinstance(found, str) and any(part in found for part in reason.split("|"))


def test_embeddings_are_probed_too() -> None:
    assert probe_embedding(nn.Embedding(5, 4)) == 1
    assert probe_embedding(Gemma3TextScaledWordEmbedding(5, 4, 0, embed_scale=3.5)) == 3.5
    assert probe_embedding(nn.Embedding(5, 4, max_norm=1.0)) == "has max_norm"

    class Odd(nn.Embedding):
        def forward(self, ids: Tensor) -> Tensor:
            return super().forward(ids).square()

    assert "something else" in str(probe_embedding(Odd(5, 4)))


# ---------------------------------------------------------------------------------------- trace


def test_a_trace_leaves_no_trace() -> None:
    model = tiny("llama-tied").train()
    model.model.layers[0].eval()
    modes = [m.training for m in model.modules()]
    norms = {n: m for n, m in model.named_modules() if looks_like_norm(m)}
    linears = {n: m for n, m in model.named_modules() if type(m) is nn.Linear}
    trace = trace_norms(model, norms, linears)
    assert not trace.failure and set(trace.uses) == set(norms) == set(trace.order)
    assert set(trace.calls) == set(linears) and set(trace.calls.values()) == {1}
    assert not trace.reads  # the tied head's weight is the embedding's own affair
    use = trace.uses["model.layers.0.input_layernorm"]
    assert [n.rpartition(".")[2] for n in use.consumers] == ["q_proj", "k_proj", "v_proj"]
    assert not use.others and use.runs == 1
    assert [m.training for m in model.modules()] == modes
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_weights_that_a_model_reads_itself_are_seen() -> None:
    model = tiny("llama-tied")
    mlp = model.model.layers[0].mlp
    mlp.forward = lambda x: nn.functional.linear(
        mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x), mlp.down_proj.weight
    )
    plan = plan_conversion(model, MaQDConfig())
    assert "read by the model itself (linear)" in plan.kept["model.layers.0.mlp.down_proj"]
    assert "model.layers.0.mlp.up_proj" in plan.linears
    attention = nn.MultiheadAttention(WIDTH, 4)
    model.model.layers[1].mlp.act_fn = attention  # never called, its out_proj is not a plain Linear
    plan = plan_conversion(model, MaQDConfig())
    assert "not a layer" in plan.kept["model.layers.1.mlp.act_fn.out_proj"]


def test_attention_that_hands_its_weights_to_torch_is_kept() -> None:
    size = {"hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 1}
    sound = {"conv_dim": (16, 16), "conv_stride": (5, 4), "conv_kernel": (10, 8)}
    groups = {"num_feat_extract_layers": 2, "num_conv_pos_embedding_groups": 4}
    config = hf.WavLMConfig(**size, **sound, **groups, num_attention_heads=4)
    plan = plan_conversion(hf.WavLMModel(config).eval(), MaQDConfig())
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        kept = plan.kept[f"encoder.layers.0.attention.{name}"]
        assert "read by the model itself (multi_head_attention_forward)" in kept
    assert "encoder.layers.0.feed_forward.output_dense" in plan.linears


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_whose_weight_the_model_reads_is_kept(tied: bool) -> None:
    """Mamba asks it for its dtype: as words it would turn hidden states into integers."""
    model = tiny("mamba")
    if not tied:
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    plan = plan_conversion(model, MaQDConfig(embedding_levels=15))
    assert "read by the model itself (dtype)" in plan.kept["lm_head"] and plan.head is None
    assert (plan.embedding is None) == ("backbone.embeddings" in plan.kept) == tied
    assert "read by the model itself (dtype)" in plan.kept["backbone.layers.0.norm"]


class Loud(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + 1


class Chatty(nn.Linear):
    def forward(self, input: Tensor) -> Any:
        return super().forward(input), None


class Quiet(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return input @ self.weight.t() + (0 if self.bias is None else self.bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_linear_of_another_class_is_converted_where_it_computes_the_same(
    dtype: torch.dtype,
) -> None:
    for kind in (Quiet, Loud, Chatty):
        assert probe_linear(kind(WIDTH, 48).to(dtype)) == (kind is Quiet)
    for kind in (Quiet, Loud):
        model = tiny("llama-tied").to(dtype)
        model.model.layers[0].mlp.up_proj.__class__ = kind
        plan = plan_conversion(model, MaQDConfig())
        assert ("model.layers.0.mlp.up_proj" in plan.linears) == (kind is Quiet)
        assert "model.layers.1.mlp.up_proj" in plan.linears
    assert "Loud is not a layer" in plan.kept["model.layers.0.mlp.up_proj"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_family_can_be_traced(family: str, dtype: torch.dtype) -> None:
    model = tiny(family).to(dtype)
    model(**example_inputs(model))
    plan = plan_conversion(model, MaQDConfig(norm_affine="fold"))
    assert not plan.untraced
    assert len(plan.linears) >= 8


# ----------------------------------------------------------------------------------------- plan


@pytest.mark.parametrize("family", FAMILIES)
def test_a_plan_touches_nothing(family: str) -> None:
    model = tiny(family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    classes = [type(m) for m in model.modules()]
    plan_conversion(model, MaQDConfig(weight_levels=3))
    assert [type(m) for m in model.modules()] == classes
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in before)


def test_names_are_the_same_for_every_head() -> None:
    _, config = FAMILIES["llama-tied"]()
    for model in (
        hf.LlamaModel(config),
        hf.LlamaForCausalLM(config),
        hf.LlamaForSequenceClassification(config),
    ):
        names, everything = Names(model), [n for n, _ in model.named_modules() if n]
        relative = {names.relative(n) for n in everything}
        assert "layers.0.mlp.up_proj" in relative
        assert all(names.absolute(names.relative(n)) == n for n in everything if n != "model")
    assert Names(hf.LlamaForCausalLM(config)).relative("lm_head") == "/lm_head"


@pytest.mark.parametrize(
    ("settings", "gated"),
    [
        ({}, {"input_layernorm", "post_attention_layernorm"}),
        ({"lbn_final_norm": True}, {"input_layernorm", "post_attention_layernorm", "norm"}),
        (
            {"lbn_qk_norm": True},
            {"input_layernorm", "post_attention_layernorm", "q_norm", "k_norm"},
        ),
    ],
)
def test_every_norm_gets_a_gate_but_those_left_out_by_name(
    settings: dict[str, Any], gated: set[str]
) -> None:
    plan = plan_conversion(tiny("qwen3"), MaQDConfig(**settings))
    assert {n.rpartition(".")[2] for n, norm in plan.norms.items() if norm.gated} == gated
    assert all(norm.not_gated for norm in plan.norms.values() if not norm.gated)


def test_norms_can_be_excluded_by_name() -> None:
    plan = plan_conversion(tiny("llama-tied"), MaQDConfig(exclude=["layers.0.*norm"]))
    assert "excluded by" in plan.kept["model.layers.0.input_layernorm"]
    assert "model.layers.0.input_layernorm" not in plan.norms


def test_heads_outside_the_base_model_are_kept_unless_named() -> None:
    plan = plan_conversion(tiny("bert-mlm"), MaQDConfig())
    dense = "cls.predictions.transform.dense"
    assert "outside the base model" in plan.kept[dense]
    plan = plan_conversion(tiny("bert-mlm"), MaQDConfig(targets=["*.query", f"/{dense}"]))
    assert dense in plan.linears and "bert.encoder.layer.0.output.dense" in plan.kept
