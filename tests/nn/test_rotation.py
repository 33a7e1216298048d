"""Laws of rotated inputs: the float function stays, and packing, saving and leaving keep them."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from maqd_hf import (
    MaQDConfig,
    dequantize_model,
    functional,
    pack_model,
    quantize_model,
    use_native,
)
from maqd_hf.calibration import calibrate, gptq, smooth
from maqd_hf.calibration.blocks import float_activations, float_weights
from maqd_hf.evaluation.integer_block import check_integer
from maqd_hf.kernels.hadamard import hadamard
from maqd_hf.nn import LinearSpec, MaQDLinear, PackedLinear
from maqd_hf.nn.kinds import LINEARS
from tests.support.families import FAMILIES, example, output, tiny


@pytest.mark.parametrize("size", [2, 8, 64, 128, 1024])
def test_hadamard_is_orthogonal_and_its_own_inverse(size: int) -> None:
    x = torch.randn(3, 2, 2 * size, dtype=torch.float64)
    turned = hadamard(x, size)
    torch.testing.assert_close(hadamard(turned, size), x)
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    first = torch.zeros(size, dtype=torch.float64)
    first[0] = 1
    torch.testing.assert_close(hadamard(first, size), torch.full_like(first, size**-0.5))


@pytest.mark.parametrize("size", [2, 8, 16, 64, 512])
def test_the_compiled_rotation_is_the_same_to_the_last_bit(isa: str, size: int) -> None:
    for shape in [(size,), (5, 3 * size), (2, 7, size)]:
        x = torch.randn(shape)
        assert torch.equal(hadamard(x, size), functional.hadamard(x, size))
    x = torch.randn(size, 6 * size).t()[:size]  # (size, size), not contiguous
    assert torch.equal(hadamard(x, size), functional.hadamard(x, size))
    assert hadamard(torch.empty(0, size), size).shape == (0, size)


def test_gradients_go_through_the_rotation(isa: str) -> None:
    x = torch.randn(4, 48)
    rotated = {}
    for name, rotate in (("compiled", hadamard), ("torch", functional.hadamard)):
        leaf = x.clone().requires_grad_()
        (rotate(leaf, 16) * torch.arange(48.0)).sum().backward()
        rotated[name] = leaf.grad
    torch.testing.assert_close(rotated["compiled"], rotated["torch"])


@pytest.mark.parametrize("bad", [-2, 0, 3, 12, 64])
def test_sizes_that_do_not_fit_raise_before_memory_is_touched(isa: str, bad: int) -> None:
    with pytest.raises(ValueError, match="power of two"):
        hadamard(torch.randn(2, 32 if bad == 64 else 24), bad)


def test_half_precision_is_rotated_in_float32() -> None:
    x = torch.randn(5, 128).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(hadamard(x, 128), hadamard(x.float(), 128).bfloat16())


def test_the_largest_power_of_two_that_divides_the_width_is_taken() -> None:
    sizes = [LinearSpec(rotation=512).rotation_size(width) for width in (576, 1536, 4096, 35)]
    assert sizes == [64, 512, 512, 1]
    for wrong in (1, 3, 96, -2, True, 8.0, "auto"):
        with pytest.raises(ValueError, match="power of two"):
            LinearSpec(rotation=wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("affine", ["keep", "fold"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_float_function_stays(family: str, affine: str) -> None:
    model = tiny(family)
    inputs = example(model)
    before = output(model, inputs)
    quantize_model(model, MaQDConfig(rotation=16, norm_affine=affine, activation_scaling="token"))
    with float_activations(model), float_weights(model):
        torch.testing.assert_close(output(model, inputs), before, rtol=1e-3, atol=1e-4)
        smooth(model, [inputs], progress=False)
        torch.testing.assert_close(output(model, inputs), before, rtol=1e-3, atol=1e-4)


def outliers(width: int = 128) -> tuple[nn.Linear, torch.Tensor]:
    """A layer and inputs of which one channel is fifty times the others."""
    x = torch.randn(64, width)
    x[:, 3] *= 50
    return nn.Linear(width, 32), x


def test_few_levels_fit_inputs_with_one_large_channel() -> None:
    layer, x = outliers()
    errors = []
    for rotation in (None, 128):
        spec = LinearSpec(None, 15, "token", rotation=rotation)
        error = MaQDLinear.from_linear(layer, spec)(x) - layer(x)
        errors.append(float(error.detach().norm()))
    assert errors[1] < 0.5 * errors[0]


@pytest.mark.parametrize("scaling", ["token", "static", "group"])
def test_packed_is_what_was_trained_and_reloads(tmp_path, scaling, isa) -> None:
    model = tiny("llama-untied")
    config = MaQDConfig(
        weight_levels=16, activation_levels=15, activation_scaling=scaling, group_size=8
    )
    quantize_model(model, config)
    assert model.config.quantization_config.rotation == 512
    sizes = {m.spec.rotation_size(m.in_features) for m in model.modules() if is_ours(m)}
    assert sizes == {32, 16}
    ids = example(model)["input_ids"]
    calibrate(model, ids, progress=False)
    model.eval()
    trained = output(model, {"input_ids": ids})
    pack_model(model)
    torch.testing.assert_close(output(model, {"input_ids": ids}), trained, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert any(isinstance(m, PackedLinear) and m.spec.rotation for m in again.modules())
    assert torch.equal(output(again, {"input_ids": ids}), output(model, {"input_ids": ids}))


def is_ours(module: nn.Module) -> bool:
    return isinstance(module, MaQDLinear)


@pytest.mark.parametrize("pack", [False, True])
def test_a_plain_model_comes_back_in_the_inputs_basis(pack: bool) -> None:
    model = tiny("llama-tied")
    inputs = example(model)
    settings = MaQDConfig(activation_levels=None, rotation=16, layer_batch_norm=False)
    quantize_model(model, settings)
    trained = output(model, inputs)
    if pack:
        pack_model(model)
    dequantize_model(model)
    assert not any(isinstance(m, LINEARS) for m in model.modules())
    torch.testing.assert_close(output(model, inputs), trained, rtol=1e-3, atol=1e-4)


def test_gptq_sees_rotated_inputs() -> None:
    """Weighted by unrotated inputs it would lose to rounding to nearest."""
    model = tiny("llama-tied")
    quantize_model(model, MaQDConfig(weight_levels=4, rotation=16, activation_scaling="token"))
    ids = torch.randint(3, 60, (16, 12))
    for result in gptq(model, ids, progress=False).layers.values():
        assert result.error < result.rounding_error


def test_layers_that_share_an_input_may_differ_in_rotation() -> None:
    model = tiny("llama-tied")
    config = MaQDConfig(
        weight_levels=4, rotation=None, overrides={"*.k_proj": {"rotation": 16}, "*.up_proj": {}}
    )
    quantize_model(model, config)
    inputs = example(model)
    with float_activations(model), float_weights(model):
        before = output(model, inputs)
        smooth(model, [inputs], progress=False)
        torch.testing.assert_close(output(model, inputs), before, rtol=1e-3, atol=1e-4)
    calibrate(model, inputs["input_ids"], progress=False)
    trained = output(model.eval(), inputs)
    pack_model(model)
    torch.testing.assert_close(output(model, inputs), trained, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scaling", ["token", "group"])
def test_a_compiled_graph_holds_the_rotation(scaling: Literal["token", "group"], isa: str) -> None:
    model = tiny("llama-tied").eval()
    quantize_model(model, MaQDConfig(rotation=16, activation_scaling=scaling, group_size=8))
    pack_model(model)
    layer = next(m for m in model.modules() if isinstance(m, PackedLinear))
    x = torch.randn(4, layer.in_features)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), layer(x))
    exported = torch.export.export(layer, (x,)).module()
    torch.testing.assert_close(exported(x), layer(x))


@pytest.mark.parametrize("tokens", [1, 3, 40])
@pytest.mark.parametrize("scaling", [None, "token", "group", "static"])
def test_the_packed_product_rotates_its_inputs_itself(
    scaling: Literal["token", "group", "static"] | None, tokens: int, isa: str
) -> None:
    """To the last bit what it makes of inputs that were rotated before."""
    levels = None if scaling is None else 15
    spec = LinearSpec(4, levels, scaling or "token", group_size=32, rotation=16)
    layer = MaQDLinear.from_linear(nn.Linear(96, 40), spec, start="range")
    if scaling == "static":
        layer.activation.set_step(0.3)
    turning = PackedLinear.from_qat(layer).native_weight()
    layer.spec = layer.activation.spec = replace(spec, rotation=None)
    layer.rotation = 1
    plain = PackedLinear.from_qat(layer).native_weight()
    x, step = torch.randn(tokens, 96), torch.tensor([0.3]) if scaling == "static" else None
    expected = plain(functional.hadamard(x, 16), step)
    assert torch.equal(turning(x, step), expected)
    assert not torch.allclose(plain(x, step), expected, rtol=0.1)


@pytest.mark.parametrize("tokens", [1, 2, 9])
def test_a_rotated_head_belongs_to_the_native_step(tokens: int, isa: str) -> None:
    model = tiny("llama-untied").eval()
    targets = ["*", "/lm_head"]
    config = MaQDConfig(rotation=16, targets=targets, activation_scaling="token")
    quantize_model(model, config)
    pack_model(model)
    assert model.lm_head.rotation == 16
    ids = torch.randint(3, 60, (2, tokens))
    own = output(model, {"input_ids": ids})
    use_native(model)
    with torch.no_grad():
        native = model(input_ids=ids).logits
    assert model.forward.decoder.head is not None
    torch.testing.assert_close(native, own, rtol=1e-3, atol=1e-3)


def test_inference_mode_sees_changes_in_place() -> None:
    """Its tensors have no version to tell by, so nothing may be remembered."""
    spec = LinearSpec(3, 255, "token", rotation=16)
    layer = PackedLinear.from_qat(MaQDLinear.from_linear(nn.Linear(32, 8, bias=False), spec))
    with torch.inference_mode():
        x = torch.randn(4, 32)
        first = layer(x)
        x.mul_(-1)
        torch.testing.assert_close(layer(x), -first)


def test_integers_are_not_rotated() -> None:
    layer = MaQDLinear.from_linear(nn.Linear(32, 8), LinearSpec(4, 255, rotation=16))
    layer.activation.set_step(0.1)
    with pytest.raises(ValueError, match="rotation=None"):
        check_integer(PackedLinear.from_qat(layer))
