"""Laws of ``folding``: the output before is the output after, or the refusal has a name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from maqd_hf import MaQDConfig, pack_model, quantize_model
from maqd_hf.convert.folding import fold_affine, fold_scale
from maqd_hf.models.finding import modules_of
from maqd_hf.nn import (
    ActivationQuantizer,
    LayerBatchNorm,
    LinearSpec,
    MaQDLinear,
    NormSpec,
    PackedLinear,
)
from tests.support.families import FAMILIES, VOCABULARY, WIDTH, example, output, tiny

FLOAT: dict[str, Any] = {"weight_levels": None, "activation_levels": None}


# ------------------------------------------------------------------------------ gamma and beta


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("beta", [False, True])
def test_fold_affine_is_exact(bias: bool, beta: bool) -> None:
    norm = LayerBatchNorm(8, NormSpec(centered=True, bias=beta), dtype=torch.float64)
    spec = LinearSpec(weight_levels=None, activation_levels=None)
    layers = [MaQDLinear(8, 5, bias, spec, dtype=torch.float64) for _ in range(2)]
    for parameter in [*norm.parameters(), *(p for layer in layers for p in layer.parameters())]:
        nn.init.normal_(parameter)
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    before = [layer(norm(x)) for layer in layers]
    fold_affine(norm, layers)
    assert norm.weight is None and norm.bias is None
    assert (norm.spec.weight, norm.spec.bias) == (False, False)
    for layer, expected in zip(layers, before, strict=True):
        assert (layer.bias is not None) == (bias or beta)
        assert (layer(norm(x)) - expected).abs().max() < 1e-12


def test_fold_scale_wants_a_static_norm_that_has_a_constant() -> None:
    spec = LinearSpec(activation_levels=None)
    packed = PackedLinear.from_qat(MaQDLinear(8, 5, True, spec))
    for wrong in (NormSpec(weight=False), NormSpec(statistics="static", folded=True)):
        with pytest.raises(ValueError, match="only a static norm has a constant"):
            fold_scale(LayerBatchNorm(8, wrong), [packed])


NOT_FOLDED = {  # what the report says, by the end of the norm's name; Mamba's norms all stay
    "llama-tied": {"norm": "model's output"},
    "llama-untied": {"norm": "model's output"},
    "mistral": {"norm": "model's output"},
    "qwen3": {"norm": "model's output", "q_norm": "feeds", "k_norm": "feeds"},
    "gemma3": {
        "norm": "model's output",
        "q_norm": "feeds",
        "k_norm": "feeds",
        "post_attention_layernorm": "feeds add",
        "post_feedforward_layernorm": "feeds add",
    },
    "gpt2": {"ln_f": "feeds"},
    "opt": {"final_layer_norm": "feeds"},
    "gpt-neox": {"final_layer_norm": "model's output"},
    "falcon": {"ln_f": "feeds"},
    "bert": {"LayerNorm": "feeds"},
    "bert-mlm": {"LayerNorm": "feeds"},
    "roberta": {"LayerNorm": "feeds"},
    "distilbert": {"LayerNorm": "feeds", "sa_layer_norm": "feeds", "output_layer_norm": "feeds"},
    "vit": {"layernorm": "feeds"},
    "mixtral": {"norm": "model's output", "post_attention_layernorm": "feeds"},
    "t5-encoder": {"final_layer_norm": "feeds"},
}


def test_every_family_with_norms_of_ours_is_here() -> None:
    assert set(FAMILIES) - set(NOT_FOLDED) == {"mamba"}


@pytest.mark.parametrize("family", NOT_FOLDED)
def test_the_affine_goes_into_the_consumers_or_the_refusal_is_named(family: str) -> None:
    model = tiny(family)
    report = quantize_model(model, MaQDConfig(**FLOAT, norm_affine="fold"))
    norms = dict(modules_of(model, LayerBatchNorm))
    assert set(norms) == set(report.norms) and len(norms) >= 4
    for name, norm in norms.items():
        if name in report.not_folded:
            assert norm.weight is not None
        else:
            assert norm.weight is None and norm.bias is None
    for name, reason in report.not_folded.items():
        expected = NOT_FOLDED[family][name.rpartition(".")[2]]
        assert expected in reason, f"{name}: {reason}"
    leaves = {name.rpartition(".")[2] for name in report.not_folded}
    assert leaves == set(NOT_FOLDED[family])


def test_the_final_norm_keeps_its_affine_because_the_base_model_returns_it() -> None:
    model = tiny("llama-untied")
    inputs = example(model)
    with torch.no_grad():
        before = model.model(**inputs).last_hidden_state
        report = quantize_model(model, **FLOAT, norm_affine="fold")
        after = model.model(**inputs).last_hidden_state
    assert "the model's output" in report.not_folded["model.norm"]
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)


def test_a_consumer_called_twice_or_by_keyword_is_seen() -> None:
    class Block(nn.Module):
        """Calls ``up`` by keyword on the norm's output and again on something else."""

        def __init__(self, mlp: nn.Module, again: bool) -> None:
            super().__init__()
            self.up, self.down, self.again = mlp.up_proj, mlp.down_proj, again

        def forward(self, x: Tensor) -> Tensor:
            y = self.down(self.up(input=x))
            return y + self.down(self.up(y)) if self.again else y

    for again in (False, True):
        model = tiny("llama-tied")
        for layer in model.model.layers:
            layer.mlp = Block(layer.mlp, again)
        inputs = example(model)
        before = output(model, inputs)
        report = quantize_model(model, MaQDConfig(**FLOAT, norm_affine="fold"))
        reason = report.not_folded.get("model.layers.0.post_attention_layernorm")
        assert (reason is not None and "is called 2 times" in reason) if again else reason is None
        torch.testing.assert_close(output(model, inputs), before, rtol=1e-5, atol=1e-5)


# ----------------------------------------------------------------------------- static statistics


def settle(model: nn.Module, gate: float = 1.0) -> None:
    """A few training-mode forwards for running statistics and activation steps; open gates."""
    torch.manual_seed(5)
    seen: dict[ActivationQuantizer, float] = {}

    def watch(module: ActivationQuantizer, args: tuple[Tensor, ...]) -> None:
        seen[module] = max(seen.get(module, 0.0), float(args[0].abs().max()))
        module.set_step(seen[module] / (module.levels / 2))

    quantizers = [q for _, q in modules_of(model, ActivationQuantizer) if q.log_step is not None]
    handles = [q.register_forward_pre_hook(watch) for q in quantizers]
    model.train()
    for _ in range(4):
        output(model, example(model, batch=4))
    model.eval()
    for handle in handles:
        handle.remove()
    for _, norm in modules_of(model, LayerBatchNorm):
        if norm.spec.statistics == "gated":
            norm.gate.fill_(gate)


ACTIVATIONS = {
    "float": {"activation_levels": None},
    "token": {"activation_scaling": "token"},
    "static": {"activation_scaling": "static"},
}


@pytest.mark.parametrize("norm_affine", ["keep", "fold"])
@pytest.mark.parametrize("first_token", ["own", "shared"])
@pytest.mark.parametrize("activations", ACTIVATIONS)
@pytest.mark.parametrize("family", NOT_FOLDED)
def test_folded_at_packing_output_before_is_output_after(
    family: str, activations: str, first_token: str, norm_affine: str
) -> None:
    """Float rounding only: 1e-5 of the largest logit.

    Quantized inputs: the constant moves from the input to the step, so a value that lies half-way
    between two levels may round the other way, one level of 255 in one input. So half the
    outputs, which no such value reaches, differ by float rounding alone; on average at most a tenth
    of what quantizing all inputs changes, and 2 % of the largest logit at most.
    """
    settings = {"weight_levels": 15, "first_token": first_token, "norm_affine": norm_affine}
    model, exact = tiny(family), tiny(family)
    quantize_model(model, **settings, **ACTIVATIONS[activations])
    quantize_model(exact, **settings, **ACTIVATIONS["float"])
    settle(model)
    settle(exact)
    inputs = example(model, batch=3)
    before = output(model, inputs)
    report = pack_model(model)
    after = output(model, inputs)
    static = [n for n, text in report.norms.items() if text.startswith("static")]
    assert len(static) >= 2
    error = (after - before).abs()
    if activations == "float":
        assert error.max() < 1e-5 * before.abs().max()
    else:
        assert error.max() < 0.02 * before.abs().max()
        assert error.mean() < 0.1 * (output(exact, inputs) - before).abs().mean()
        assert error.median() < 1e-5 * before.abs().max()
    folded = [n for n, text in report.norms.items() if "folded" in text]
    assert not folded or norm_affine == "fold"
    for name, norm in modules_of(model, LayerBatchNorm):
        assert (norm.spec.folded and norm.weight is None) == (name in folded)
        if name in static and norm.weight is not None:
            assert norm.spec.folded  # its constant went into gamma


def test_a_folded_rms_norm_passes_its_input_through() -> None:
    model = tiny("llama-tied")
    quantize_model(model, activation_levels=None, first_token="shared", norm_affine="fold")
    settle(model)
    pack_model(model)
    norm = model.model.layers[1].input_layernorm
    x = torch.randn(2, 5, WIDTH)
    assert norm(x) is x or torch.equal(norm(x), x)
    assert model.model.norm.spec.statistics == "token"  # the final norm is not gated


def test_norms_whose_consumers_do_not_all_pack_stay_static() -> None:
    model = tiny("llama-tied")
    quantize_model(
        model,
        activation_levels=None,
        norm_affine="fold",
        overrides={"*.up_proj": {"weight_levels": None}},
    )
    settle(model)
    inputs = example(model)
    before = output(model, inputs)
    report = pack_model(model)
    assert report.norms["model.layers.0.post_attention_layernorm"] == "static"
    assert "folded" in report.norms["model.layers.0.input_layernorm"]
    torch.testing.assert_close(output(model, inputs), before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("activations", ACTIVATIONS)
def test_scales_of_groups_take_no_constant(activations: str) -> None:
    """Rounded to 16 bits the product would differ by 1e-3; the norm keeps it, to float rounding."""
    model = tiny("llama-tied")
    settings = ACTIVATIONS[activations] | {"norm_affine": "fold"}
    quantize_model(model, weight_levels=15, group_size=8, **settings)
    settle(model)
    inputs = example(model, batch=3)
    before = output(model, inputs)
    report = pack_model(model)
    assert report.norms["model.layers.0.input_layernorm"] == "static"
    torch.testing.assert_close(output(model, inputs), before, rtol=1e-5, atol=1e-5)
    norm, layer = model.model.layers[0].input_layernorm, model.model.layers[0].self_attn.q_proj
    with pytest.raises(ValueError, match="one scale a row"):
        fold_scale(norm, [layer])


def test_static_affines_of_post_norm_models_do_not_look_at_the_token() -> None:
    model = tiny("bert")
    quantize_model(model, activation_levels=None, first_token="shared", lbn_final_norm=True)
    settle(model)
    pack_model(model)
    norm = model.bert.encoder.layer[0].output.LayerNorm
    assert norm.spec.statistics == "static" and norm.weight is not None and norm.bias is not None
    x = torch.randn(1, 4, WIDTH)
    x = x - x.mean(-1, keepdim=True)
    torch.testing.assert_close(norm(2 * x) - norm.bias, 2 * (norm(x) - norm.bias))


def test_padding_and_first_tokens_reach_the_norms_of_every_decoder() -> None:
    for family in ("llama-tied", "gpt2", "opt", "gpt-neox", "gemma3"):
        model = tiny(family).train()
        quantize_model(model, MaQDConfig(**FLOAT, first_token="own"))
        ids = torch.randint(2, VOCABULARY, (2, 8))
        mask = torch.ones_like(ids)
        mask[:, :3] = 0
        norm, seen = modules_of(model, LayerBatchNorm)[0][1], []
        norm.register_forward_hook(lambda norm, *_, seen=seen: seen.append(norm.context.masks))
        output(model, {"input_ids": ids, "attention_mask": mask})
        valid, first = seen[0]
        assert valid is not None and valid.tolist() == mask.bool().tolist(), family
        assert first is not None and first.sum(1).tolist() == [1, 1], family
