"""Laws of the packed layers: what was trained is what runs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from maqd_hf.functional import grid_center
from maqd_hf.nn import (
    BatchContext,
    LinearSpec,
    MaQDEmbedding,
    MaQDLinear,
    Masks,
    PackedEmbedding,
    PackedLinear,
)
from maqd_hf.packing import unpack_codes, words_per_row


def trained(
    spec: LinearSpec, in_features: int = 24, out_features: int = 5, bias: bool = True
) -> MaQDLinear:
    """A layer whose every parameter has left its start value."""
    layer = MaQDLinear(in_features, out_features, bias, spec, BatchContext())
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if name == "activation.log_step":
                parameter.fill_(-2.0)
            elif name != "weight_step":
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return layer


def assert_agree(layer: MaQDLinear, packed: PackedLinear, x: torch.Tensor) -> None:
    """Codes and weights bit for bit, and here, in one block, outputs too."""
    assert layer.spec.weight_levels is not None
    codes = unpack_codes(packed.weight.data, layer.spec.weight_levels, layer.in_features)
    assert torch.equal(codes.float(), layer.weight_codes())
    assert torch.equal(packed.dequantized_weight(), layer.quantized_weight())
    assert torch.equal(packed.quantize_input(x), layer.activation(x))
    assert torch.equal(packed(x), layer(x))


@pytest.mark.parametrize("levels", range(2, 257))
def test_every_number_of_levels_packs_exactly(levels: int) -> None:
    layer = trained(LinearSpec(levels, levels))
    assert_agree(layer, PackedLinear.from_qat(layer), torch.randn(3, 24))


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (33, 3), (64, 1), (129, 17)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("offset", [True, False])
@pytest.mark.parametrize("scaling", ["static", "token", None])
@pytest.mark.parametrize("levels", [2, 3, 16])
def test_simulated_equals_packed(
    levels: int, scaling: str | None, offset: bool, bias: bool, shape: tuple[int, int]
) -> None:
    activations = None if scaling is None else 255
    spec = LinearSpec(levels, activations, scaling or "static", weight_offset=offset)  # type: ignore[arg-type]
    layer = trained(spec, *shape, bias=bias)
    packed = PackedLinear.from_qat(layer)
    assert (packed.weight_offset is None, packed.bias is None) == (not offset, not bias)
    for lead in [(), (3,), (2, 4), (0, 4)]:
        assert_agree(layer, packed, torch.randn(*lead, shape[0]))


@pytest.mark.parametrize("group_size", [1, 3, 8, 24])
@pytest.mark.parametrize("levels", [3, 4, 255])
def test_groups_pack_exactly(levels: int, group_size: int) -> None:
    layer = trained(LinearSpec(levels, 15, group_size=group_size))
    packed = PackedLinear.from_qat(layer)
    assert packed.weight_scale.shape == (5, 24 // group_size)
    assert_agree(layer, packed, torch.randn(2, 3, 24))


def test_groups_of_a_float64_layer_pack_exactly() -> None:
    """Their scales are rounded in training already; only the offset becomes float32."""
    layer = trained(LinearSpec(15, None, group_size=8, weight_offset=False)).double()
    packed = PackedLinear.from_qat(layer)
    assert torch.equal(packed.weight_scale.double(), layer.weight_scale())
    assert torch.equal(packed.dequantized_weight().double(), layer.quantized_weight())


CASTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "half": lambda module: module.half(),
    "bfloat16": lambda module: module.bfloat16(),
    "float": lambda module: module.float(),
    "double": lambda module: module.double(),
    "there and back": lambda module: module.half().float().to(torch.bfloat16),
    "device": lambda module: module.to("cpu", torch.float16),
}


@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("group_size", [None, 8])
def test_no_cast_changes_what_a_packed_layer_computes(group_size: int | None, cast: str) -> None:
    packed = PackedLinear.from_qat(trained(LinearSpec(7, 255, group_size=group_size)))
    packed.weight_scale.data *= 1e-6  # beyond float16
    x, scale = torch.randn(4, 24), packed.weight_scale.clone()
    before, weight = packed(x), packed.dequantized_weight()
    CASTS[cast](packed)
    assert torch.equal(packed.weight_scale.double(), scale.double())
    assert group_size is None or packed.weight_scale.dtype == torch.bfloat16
    assert torch.equal(packed.dequantized_weight().float(), weight)
    assert torch.equal(packed(x), before)


def test_an_empty_copy_on_another_device_has_the_scales_dtype() -> None:
    packed = PackedLinear.from_qat(trained(LinearSpec(7, 255, group_size=8)))
    assert packed.to("meta").weight_scale.dtype == torch.bfloat16
    assert packed.to_empty(device="cpu").weight_scale.dtype == torch.bfloat16


@pytest.mark.parametrize("first_token", ["own", "shared"])
def test_first_token_and_later_masks_are_seen_by_both(first_token: str) -> None:
    layer = trained(LinearSpec(4, 255, first_token=first_token))  # type: ignore[arg-type]
    packed = PackedLinear.from_qat(layer)
    x = torch.randn(2, 4, 24) * 5
    x[:, 0] *= 1000
    plain = packed(x)
    masks = Masks(first=torch.tensor([[True, False, False, False]] * 2))
    with layer.activation.context.given(masks):
        assert_agree(layer, packed, x)
        assert torch.equal(packed(x), plain) == (first_token == "shared")


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.bfloat16, 0.0), (torch.float16, 0.0), (torch.float64, 1e-6)]
)
def test_inputs_of_other_dtypes_give_outputs_of_theirs(
    dtype: torch.dtype, tolerance: float
) -> None:
    """A float64 layer keeps its scales in float32 once packed: 1e-6, all else is exact."""
    layer = trained(LinearSpec(16, 255))
    if dtype == torch.float64:
        layer = layer.double()
    packed = PackedLinear.from_qat(layer)
    x = torch.randn(2, 3, 24).to(dtype)
    assert packed(x).dtype == layer(x).dtype == dtype
    torch.testing.assert_close(packed(x), layer(x), rtol=tolerance, atol=tolerance)


def test_packed_parameters_are_frozen_words_named_weight() -> None:
    packed = PackedLinear.from_qat(trained(LinearSpec(3, 255, group_size=8)))
    state = packed.state_dict()
    assert {name: (tuple(t.shape), t.dtype) for name, t in state.items()} == {
        "weight": ((5, words_per_row(24, 3)), torch.int32),
        "weight_scale": ((5, 3), torch.bfloat16),
        "weight_offset": ((5, 1), torch.float32),
        "activation_step": ((1,), torch.float32),
        "bias": ((5,), torch.float32),
    }
    assert not any(p.requires_grad for p in packed.parameters())
    assert not list(packed.buffers())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("group_size", [None, 8])
def test_the_first_parameter_is_a_float_one(group_size: int | None, bias: bool) -> None:
    """Swin v2 casts its table of coordinates to the dtype of a Sequential's first parameter."""
    layer = trained(LinearSpec(4, None, group_size=group_size), bias=bias)
    assert next(PackedLinear.from_qat(layer).parameters()).is_floating_point()
    table = PackedEmbedding.from_qat(MaQDEmbedding(10, 8, levels=15))
    assert next(table.parameters()).is_floating_point()


def test_a_plain_linear_refuses_packed_weights() -> None:
    packed = PackedLinear.from_qat(trained(LinearSpec(16, None)))
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        nn.Linear(24, 5).load_state_dict(packed.state_dict(), strict=False)


def test_gradient_passes_through_a_packed_layer() -> None:
    layer = trained(LinearSpec(4, 15, surrogate="triangle"))
    packed = PackedLinear.from_qat(layer)
    x = torch.randn(3, 24, requires_grad=True)
    incoming = torch.randn(3, 5)
    (through_packed,) = torch.autograd.grad(packed(x), x, incoming)
    (through_layer,) = torch.autograd.grad(layer(x), x, incoming)
    torch.testing.assert_close(through_packed, through_layer)
    assert bool(through_packed.any())


def test_packing_before_calibration_is_refused() -> None:
    with pytest.raises(ValueError, match=r"in_features=24.*never calibrated.*'token'"):
        PackedLinear.from_qat(MaQDLinear(24, 5))


def test_float_weights_are_not_packed() -> None:
    with pytest.raises(ValueError, match="needs weight_levels"):
        PackedLinear.from_qat(trained(LinearSpec(None, 255)))


def test_compiled_equals_eager() -> None:
    packed = PackedLinear.from_qat(trained(LinearSpec(3, 255)))
    x = torch.randn(2, 24)
    compiled = torch.compile(packed, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), packed(x))


# ------------------------------------------------------------------------------------- embedding


@pytest.mark.parametrize("output_scale", [1.0, 3.0])
@pytest.mark.parametrize("levels", [2, 3, 15, 16, 255, 256])
def test_packed_embedding_equals_the_trained_one(levels: int, output_scale: float) -> None:
    table = MaQDEmbedding.from_embedding(nn.Embedding(11, 7, 2), levels, output_scale)
    packed = PackedEmbedding.from_qat(table)
    assert torch.equal(packed.dequantized_weight(), table.quantized_weight())
    for shape in [(), (4,), (2, 3), (2, 0)]:
        ids = torch.randint(0, 11, shape)
        assert torch.equal(packed(ids), table(ids))


def test_a_tied_packed_head_shares_the_words_and_agrees_with_the_trained_head() -> None:
    table = MaQDEmbedding.from_embedding(nn.Embedding(11, 24), 15)
    head = table.as_linear(LinearSpec(255, None, weight_offset=False))
    packed_table, packed_head = PackedEmbedding.from_qat(table), PackedLinear.from_qat(head)
    assert_agree(head, packed_head, torch.randn(2, 24))
    packed_table.tie(packed_head)
    for name in ("weight", "weight_scale", "weight_offset"):
        assert getattr(packed_head, name) is getattr(packed_table, name)
    assert_agree(head, packed_head, torch.randn(2, 24))


def test_packed_weights_reach_both_ends_of_the_grid() -> None:
    layer = trained(LinearSpec(4, None), 400, 2)
    units = unpack_codes(PackedLinear.from_qat(layer).weight.data, 4, 400) - grid_center(4)
    assert units.unique().tolist() == [-1.5, -0.5, 0.5, 1.5]
