"""Laws of ``quantize_model``: it changes nothing it should not, and names what it leaves."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from maqd_hf import MaQDConfig, dequantize_model, pack_model, quantize_model
from maqd_hf.models.finding import modules_of
from maqd_hf.nn import LayerBatchNorm, MaQDEmbedding, MaQDLinear, Masks, PackedLinear
from tests.support.families import DECODERS, FAMILIES, LAYER_NORM, WIDTH, example, output, tiny

FLOAT: dict[str, Any] = {"weight_levels": None, "activation_levels": None}
PER_TOKEN: dict[str, Any] = {"activation_scaling": "token"}


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_untouched(model: nn.Module, before: dict[str, Tensor], classes: list[type]) -> None:
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[n].nan_to_num(7.0), before[n].nan_to_num(7.0)) for n in before)
    assert [type(m) for m in model.modules()] == classes
    assert getattr(model.config, "quantization_config", None) is None


# ------------------------------------------------------------------------- conversion is exact


@pytest.mark.parametrize("family", FAMILIES)
def test_without_quantizers_and_with_closed_gates_nothing_changes(family: str) -> None:
    model = tiny(family)
    inputs = example(model)
    before = output(model, inputs)
    quantize_model(model, MaQDConfig(**FLOAT))
    after = output(model, inputs)
    assert before.abs().max() > 0.1
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", LAYER_NORM)
def test_in_float64_it_is_exact_to_1e_10(family: str) -> None:
    model = tiny(family).double()
    inputs = example(model)
    before = output(model, inputs)
    quantize_model(model, MaQDConfig(**FLOAT))
    assert (output(model, inputs) - before).abs().max() < 1e-10


class Float64RMSNorm(nn.RMSNorm):
    """Llama's norm without its cast to float32."""


@pytest.mark.parametrize("family", ["llama-tied", "mistral", "qwen3"])
def test_rms_families_are_exact_once_their_own_cast_is_gone(family: str) -> None:
    model = tiny(family).double()
    for name, norm in [(n, m) for n, m in model.named_modules() if "RMSNorm" in type(m).__name__]:
        exact = Float64RMSNorm(norm.weight.numel(), eps=norm.variance_epsilon).double()
        exact.weight = norm.weight
        model.set_submodule(name, exact)
    inputs = example(model)
    before = output(model, inputs)
    quantize_model(model, MaQDConfig(**FLOAT))
    assert len(modules_of(model, LayerBatchNorm)) >= 5
    assert (output(model, inputs) - before).abs().max() < 1e-10


@pytest.mark.parametrize("family", FAMILIES)
def test_the_error_falls_with_the_levels(family: str) -> None:
    def error(levels: int) -> float:
        model = tiny(family)
        inputs = example(model)
        before = output(model, inputs)
        quantize_model(model, MaQDConfig(weight_levels=levels, activation_levels=None))
        return float((output(model, inputs) - before).norm() / before.norm())

    assert error(255) < 0.06 and 8 * error(255) < error(4)


@pytest.mark.parametrize("levels", [2, 3, 4, 5, 7, 8, 15, 16, 255, 256])
def test_every_number_of_levels_trains_and_packs(levels: int) -> None:
    model = tiny("llama-tied")
    quantize_model(
        model,
        weight_levels=levels,
        activation_levels=levels,
        activation_scaling="token",
        embedding_levels=levels,
    )
    inputs = example(model)
    loss = model(**inputs, labels=inputs["input_ids"]).loss
    loss.backward()
    for _, layer in modules_of(model, MaQDLinear, MaQDEmbedding):
        assert layer.weight.grad.abs().sum() > 0 and layer.weight_log_scale.grad.isfinite().all()
        for row in layer.quantized_weight()[:3]:
            assert row.unique().numel() <= levels
    codes = {n: layer.weight_codes() for n, layer in modules_of(model, MaQDLinear)}
    simulated = output(model, inputs)
    pack_model(model)
    torch.testing.assert_close(output(model, inputs), simulated, rtol=1e-5, atol=1e-5)
    from_words = {n: layer for n, layer in modules_of(model, PackedLinear)}
    assert set(from_words) == set(codes)
    for name, layer in from_words.items():
        weight = layer.dequantized_weight() - layer.weight_offset
        packed = (weight / layer.weight_scale + (levels - 1) / 2).round()
        assert torch.equal(packed, codes[name])


# ------------------------------------------------------------------------ what the model keeps


def test_modes_hooks_and_random_numbers_are_left_alone() -> None:
    model = tiny("bert").train()
    model.bert.encoder.layer[0].eval()
    modes = {n: m.training for n, m in model.named_modules()}
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    quantize_model(model, MaQDConfig())
    assert torch.equal(torch.rand(4), expected)
    assert {n: m.training for n, m in model.named_modules() if n in modes} == modes
    assert not any(m.training for m in model.bert.encoder.layer[0].modules())


def test_an_eval_model_does_not_start_to_gather_statistics() -> None:
    model = tiny("llama-tied")
    quantize_model(model, MaQDConfig(**FLOAT))
    output(model, example(model))
    assert all(float(norm.batches_seen) == 0 for _, norm in modules_of(model, LayerBatchNorm))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_keep_float32_latents_and_their_own_outputs(
    dtype: torch.dtype,
) -> None:
    for family in ("llama-untied", "gemma3", "bert"):
        model = tiny(family).to(dtype)
        inputs = example(model)
        before = output(model, inputs)
        config = MaQDConfig(weight_levels=255, activation_levels=None, embedding_levels=255)
        quantize_model(model, config)
        ours = [p for _, m in modules_of(model, MaQDLinear, LayerBatchNorm) for p in m.parameters()]
        assert {p.dtype for p in ours} == {torch.float32}
        after = output(model, inputs)
        assert after.dtype == before.dtype == dtype == model.dtype
        assert (after - before).float().norm() / before.float().norm() < 0.05
        pack_uncalibrated_is_fine = pack_model(model)
        assert pack_uncalibrated_is_fine.state == "packed"
        assert output(model, inputs).dtype == dtype


def test_gemma_norms_keep_the_precision_of_one_plus_weight() -> None:
    model = tiny("gemma3").to(torch.bfloat16)
    norm = model.model.layers[0].post_attention_layernorm
    exact = norm.weight.float() + 1
    quantize_model(model, MaQDConfig())
    assert torch.equal(model.model.layers[0].post_attention_layernorm.weight, exact)


# -------------------------------------------------------------------------------- which layers


def test_every_layer_has_the_settings_that_name_it() -> None:
    model = tiny("llama-untied")
    report = quantize_model(
        model,
        MaQDConfig(
            weight_levels=4,
            group_size=16,
            activation_levels=None,
            embedding_levels=15,
            exclude=["layers.1.*_proj"],
            targets=["*.q_proj", "*.down_proj"],
            overrides={
                "layers.0.*": {"weight_levels": 3},
                "*.down_proj": {"weight_levels": 255, "group_size": None},
                "/lm_head": {"activation_levels": 255, "activation_scaling": "token"},
            },
        ),
    )
    specs = {name: layer.spec for name, layer in modules_of(model, MaQDLinear)}
    assert set(specs) == {
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.mlp.down_proj",
        "lm_head",
    }
    q, down = specs["model.layers.0.self_attn.q_proj"], specs["model.layers.0.mlp.down_proj"]
    assert (q.weight_levels, q.group_size) == (3, 16)
    assert (down.weight_levels, down.group_size) == (255, None)
    head = specs["lm_head"]
    assert (head.weight_levels, head.group_size, head.activation_levels) == (15, None, 255)
    assert report.kept["model.layers.0.self_attn.k_proj"] == "not in targets"
    assert "excluded by" in report.kept["model.layers.1.mlp.down_proj"]
    assert model.model.layers[0].self_attn.q_proj.weight_step.shape == (WIDTH, WIDTH // 16)


def test_a_head_shares_the_embeddings_grid_where_it_is_tied() -> None:
    tied, untied = tiny("llama-tied"), tiny("llama-untied")
    for model in (tied, untied):
        quantize_model(model, MaQDConfig(embedding_levels=15))
        assert isinstance(model.model.embed_tokens, MaQDEmbedding)
        assert model.lm_head.spec.weight_levels == 15
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    assert untied.lm_head.weight is not untied.model.embed_tokens.weight
    plain = tiny("llama-untied")
    report = quantize_model(plain, MaQDConfig(weight_levels=4, targets=["*.up_proj", "/lm_head"]))
    assert plain.lm_head.spec.weight_levels == 4  # named in targets: a layer like any other
    assert report.kept["model.embed_tokens"] == "embedding_levels is None"


@pytest.mark.parametrize("pattern", ["embed_tokens", "/lm_head"])
def test_excluding_one_of_a_tied_pair_keeps_both(pattern: str) -> None:
    model = tiny("llama-tied")
    report = quantize_model(model, MaQDConfig(embedding_levels=15, exclude=[pattern]))
    assert isinstance(model.model.embed_tokens, nn.Embedding)
    assert not isinstance(model.model.embed_tokens, MaQDEmbedding)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert "excluded by" in report.kept["model.embed_tokens"]
    assert "excluded by" in report.kept["lm_head"]


def test_mixture_of_experts_names_what_it_leaves() -> None:
    model = tiny("mixtral")
    report = quantize_model(model, MaQDConfig(weight_levels=4, **PER_TOKEN))
    experts = [name for name in report.kept if "experts" in name]
    assert len(experts) == 2 and all("not a layer" in report.kept[name] for name in experts)
    assert any(name.endswith("gate") or "router" in name for name in report.kept)
    accounted = {*report.linears, *report.kept, *report.norms, *report.embeddings}
    for name, module in model.named_modules():
        if any(p.dim() > 1 for p in module.parameters(recurse=False)):
            assert name in accounted, f"{name} is not in the report"
    assert "experts" in str(report)


def test_t5_wo_is_left_out_because_its_caller_asks_its_dtype() -> None:
    model = tiny("t5-encoder")
    report = quantize_model(model, MaQDConfig(weight_levels=4, **PER_TOKEN))
    left = {name: why for name, why in report.kept.items() if name.endswith(".wo")}
    assert len(left) == 2 and all("read by the model itself" in why for why in left.values())
    assert not any(name.endswith(".wo") for name in report.linears)
    inputs = example(model)
    simulated = output(model, inputs)
    pack_model(model)
    torch.testing.assert_close(output(model, inputs), simulated, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------------------------- refusals


class OddNorm(nn.Module):
    """Calls itself a norm, computes something else."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight, self.eps = weight, 1e-6

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x / x.abs().mean(-1, keepdim=True)


def test_an_unknown_norm_is_left_and_named() -> None:
    model = tiny("llama-tied")
    old = model.model.layers[0].input_layernorm
    model.model.layers[0].input_layernorm = OddNorm(old.weight)
    inputs = example(model)
    before = output(model, inputs)
    report = quantize_model(model, MaQDConfig(**FLOAT))
    assert "OddNorm computes neither" in report.kept["model.layers.0.input_layernorm"]
    assert isinstance(model.model.layers[0].input_layernorm, OddNorm)
    torch.testing.assert_close(output(model, inputs), before, rtol=1e-5, atol=1e-5)


def test_a_model_that_cannot_be_traced_keeps_its_affines_and_says_why() -> None:
    class Stubborn(hf.LlamaForCausalLM):
        def forward(self, input_ids: Tensor, special: Tensor, **kwargs: Any) -> Any:  # type: ignore[override]
            return super().forward(input_ids + 0 * special, **kwargs)

    model = tiny("llama-tied")
    model.__class__ = Stubborn
    inputs = {**example(model), "special": torch.tensor(1)}
    before = output(model, inputs)
    report = quantize_model(model, MaQDConfig(**FLOAT, norm_affine="fold"))
    assert set(report.not_folded) == set(report.norms)
    assert all("could not be traced (TypeError" in why for why in report.not_folded.values())
    assert "could not be traced (TypeError" in report.untraced and report.untraced in str(report)
    assert "untraced" in report.to_dict() and not quantize_model(tiny("llama-tied")).untraced
    assert "final norm" in report.norms["model.norm"]
    torch.testing.assert_close(output(model, inputs), before, rtol=1e-5, atol=1e-5)


def refused(model: nn.Module, message: str, config: MaQDConfig | None = None) -> None:
    before, classes = state_of(model), [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match=message):
        quantize_model(model, config or MaQDConfig())
    assert_untouched(model, before, classes)


def test_nothing_matched_is_an_error() -> None:
    refused(tiny("gpt2"), "nothing to convert in GPT2LMHeadModel", MaQDConfig(exclude=["h.*"]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"targets": ["*.q_prj"]}, r"targets pattern '\*\.q_prj' matches nothing.*q_proj"),
        ({"exclude": ["*.embed"]}, r"exclude pattern '\*\.embed' matches nothing"),
        ({"overrides": {"x": {"weight_levels": 3}}}, "overrides pattern 'x' matches nothing"),
        ({"group_size": 7}, r"group_size=7 does not divide the input width 32"),
    ],
)
def test_settings_that_do_not_fit_the_model(settings: dict[str, Any], message: str) -> None:
    refused(tiny("llama-tied"), message, MaQDConfig(**settings))


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.mlp.up_proj.weight",
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.0.input_layernorm.weight",
    ],
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_with_nan_are_refused_by_name(name: str, value: float) -> None:
    model = tiny("llama-untied")
    model.get_parameter(name).data.view(-1)[5] = value
    refused(model, f"{name} holds NaN or infinity")


def test_a_second_conversion_is_refused() -> None:
    model = tiny("gpt2")
    quantize_model(model, MaQDConfig(weight_levels=4, **PER_TOKEN))
    before = state_of(model)
    with pytest.raises(ValueError, match="quantized already"):
        quantize_model(model, MaQDConfig(weight_levels=4))
    pack_model(model)
    with pytest.raises(ValueError, match="quantized already"):
        quantize_model(model, MaQDConfig(weight_levels=4))
    with pytest.raises(ValueError, match="packed already"):
        pack_model(model)
    assert set(before) & set(model.state_dict())


def test_only_a_float_transformers_model_in_memory_is_taken() -> None:
    with pytest.raises(ValueError, match="Sequential is not a transformers model"):
        quantize_model(nn.Sequential(nn.Linear(4, 4)), MaQDConfig())
    with torch.device("meta"):
        model = hf.LlamaForCausalLM(FAMILIES["llama-tied"]()[1])
    with pytest.raises(ValueError, match="offloaded or not loaded"):
        quantize_model(model, MaQDConfig())
    config = hf.T5Config(d_model=32, d_ff=32, d_kv=8, num_layers=1, num_heads=2, vocab_size=16)
    refused(hf.T5ForConditionalGeneration(config), "encoder-decoder.*T5EncoderModel")
    with pytest.raises(ValueError, match="not a MaQD model"):
        pack_model(tiny("gpt2"))


def test_embeddings_that_cannot_be_shared_are_refused() -> None:
    refused(tiny("t5-encoder"), "shares its weight with", MaQDConfig(embedding_levels=255))
    refused(tiny("vit"), "no token embedding", MaQDConfig(embedding_levels=255))


def test_layers_that_share_a_weight_are_left_and_named() -> None:
    model = tiny("llama-tied")
    first, second = model.model.layers
    second.mlp.up_proj.weight = first.mlp.up_proj.weight
    second.mlp.down_proj = first.mlp.down_proj
    inputs = example(model)
    before = output(model, inputs)
    report = quantize_model(model, MaQDConfig(**FLOAT, norm_affine="fold"))
    assert "shares its weight with" in report.kept["model.layers.0.mlp.up_proj"]
    assert "shares its weight with" in report.kept["model.layers.0.mlp.down_proj"]
    torch.testing.assert_close(output(model, inputs), before, rtol=1e-5, atol=1e-5)
    assert "not converted" in report.not_folded["model.layers.0.post_attention_layernorm"]


def test_config_and_settings_together_are_refused() -> None:
    with pytest.raises(ValueError, match="not both"):
        quantize_model(tiny("gpt2"), MaQDConfig(), weight_levels=4)
    used = tiny("gpt2")
    quantize_model(used, MaQDConfig(weight_levels=4, **PER_TOKEN))
    with pytest.raises(ValueError, match="comes from a converted model"):
        quantize_model(tiny("gpt2"), used.config.quantization_config)


def test_the_config_given_is_not_written_to() -> None:
    config = MaQDConfig(weight_levels=4, **PER_TOKEN)
    before = copy.deepcopy(config)
    for _ in range(2):
        model = tiny("gpt2")
        quantize_model(model, config)
        pack_model(model)
    assert config == before


@pytest.mark.parametrize("family", DECODERS)
def test_deepcopy_is_independent(family: str) -> None:
    model = tiny(family)
    quantize_model(model, MaQDConfig(weight_levels=4, **PER_TOKEN))
    inputs = example(model)
    before = output(model, inputs)
    other = copy.deepcopy(model)
    mask = torch.ones_like(inputs["input_ids"])
    mask[:, :4] = 0
    ours, theirs = (modules_of(m, LayerBatchNorm)[0][1] for m in (model, other))
    seen: list[tuple[Masks, Masks]] = []
    theirs.register_forward_hook(lambda *_: seen.append((ours.context.masks, theirs.context.masks)))
    output(other, {**inputs, "attention_mask": mask})
    assert seen[0][0] == Masks() and seen[0][1].valid is not None  # the copy's hook, its context
    assert torch.equal(output(model, inputs), before)
    dequantize_model(other)
    assert torch.equal(output(model, inputs), before)
