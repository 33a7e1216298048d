"""A feed-forward block in integers gives the codes of the simulated one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from maqd_hf import MaQDConfig, pack_model, quantize_model
from maqd_hf.calibration import calibrate_activations
from maqd_hf.calibration.static_norms import calibrate_norm_statistics
from maqd_hf.evaluation.integer_block import IntegerLinear, IntegerMLP, shift_right
from maqd_hf.functional import quantize
from maqd_hf.models.finding import gated_norms
from maqd_hf.nn import LinearSpec, MaQDLinear, PackedLinear
from tests.support.families import example, tiny


class NoFloats(TorchDispatchMode):
    """Fails at the first operation that makes or reads a float tensor."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, result)):
            assert not (isinstance(leaf, Tensor) and leaf.is_floating_point()), func
        return result


def packed_layer(levels: int, offset: bool, group: int | None, activations: int) -> PackedLinear:
    spec = LinearSpec(levels, activations, weight_offset=offset, group_size=group)
    layer = MaQDLinear(32, 24, bias=True, spec=spec)
    nn.init.normal_(layer.weight, mean=0.02)
    layer.reset_quantizer("search")
    nn.init.normal_(layer.bias)
    layer.activation.set_step(0.03)
    return PackedLinear.from_qat(layer)


@pytest.mark.parametrize("levels", [2, 3, 4, 16, 255, 256])
@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize("group", [None, 8])
@pytest.mark.parametrize("activations", [15, 255])
def test_a_layer_gives_the_packed_layers_output(
    levels: int, offset: bool, group: int | None, activations: int
) -> None:
    layer = packed_layer(levels, offset, group, activations)
    center = (activations - 1) // 2
    codes = torch.randint(-center, center + 1, (2, 5, 32), dtype=torch.int8)
    with torch.no_grad():
        expected = layer(codes.float() * layer.activation_step).double()
    fine = IntegerLinear(layer, 2.0**-20, 1 << 30)
    with NoFloats():
        counted = fine(codes)
    assert (counted * 2.0**-20 - expected).abs().max() < 2e-6 * expected.abs().max() + 2.0**-20
    coarse = IntegerLinear(layer, 0.05, 127)(codes)
    own = quantize(expected, 255, 0.05) - 127
    assert (coarse - own).abs().max() <= 1
    assert (coarse != own).float().mean() < 0.01
    assert coarse.abs().max() <= 127


def test_rounding_is_to_the_nearest() -> None:
    value = torch.arange(-40, 41)
    assert torch.equal(shift_right(value, 3), torch.floor(value / 8 + 0.5).long())
    assert torch.equal(shift_right(value, 0), value)
    assert torch.equal(shift_right(value, -2), 4 * value)


FUNCTIONS = {
    "llama-tied": nn.functional.silu,
    "gpt2": lambda x: nn.functional.gelu(x, approximate="tanh"),
}


def packed_block(family: str, **settings: Any) -> tuple[nn.Module, dict[str, nn.Module]]:
    """A packed tiny model with static norms, and the modules of its second block's MLP."""
    model = tiny(family)
    quantize_model(model, MaQDConfig(first_token="shared", rotation=None, **settings))
    for norm in gated_norms(model).values():
        for affine in norm.parameters():
            nn.init.uniform_(affine, 0.2, 2)
    ids = torch.randint(2, 60, (8, 12))
    calibrate_activations(model, ids, progress=False)
    calibrate_norm_statistics(model, ids)
    for norm in gated_norms(model).values():
        norm.gate.fill_(1)
    pack_model(model)
    if family == "gpt2":
        block = model.transformer.h[1]
        return model, {"norm": block.ln_2, "up": block.mlp.c_fc, "down": block.mlp.c_proj}
    block = model.model.layers[1]
    parts = {"norm": block.post_attention_layernorm, "gate": block.mlp.gate_proj}
    return model, {**parts, "up": block.mlp.up_proj, "down": block.mlp.down_proj}


@pytest.mark.parametrize("family", FUNCTIONS)
@pytest.mark.parametrize("norm_affine", ["keep", "fold"])
@pytest.mark.parametrize(("levels", "group"), [(3, None), (16, None), (16, 8)])
def test_a_block_gives_the_codes_of_the_packed_one(
    family: str, levels: int, group: int | None, norm_affine: str
) -> None:
    model, parts = packed_block(
        family, weight_levels=levels, group_size=group, norm_affine=norm_affine
    )
    assert parts["norm"].spec.folded == (group is None or norm_affine == "keep")
    assert (parts["norm"].weight is None) == (norm_affine == "fold")
    seen: dict[str, Tensor] = {}
    for name, module in parts.items():
        keep = lambda _m, args, out, name=name: seen.update({name: args[0], f"{name}.out": out})  # noqa: E731
        module.register_forward_hook(keep)
    with torch.no_grad():
        model(**example(model, batch=16))
    mlp = IntegerMLP(function=FUNCTIONS[family], **parts)
    residual = mlp.to_fixed(seen["norm"])
    with NoFloats():
        inputs = mlp.input_codes(residual)
        hidden = mlp.hidden_codes(inputs)
        output = mlp(residual)
    readers = ("gate", "up") if "gate" in parts else ("up",)
    for name, codes in [*zip(readers, inputs, strict=True), ("down", hidden)]:
        own = quantize(seen[name], 255, parts[name].activation_step) - 127
        assert codes.dtype == torch.int8
        assert (codes - own).abs().max() <= 1
        assert (codes != own).float().mean() < 0.005
        assert len(codes.unique()) > 50
    equal = (hidden == quantize(seen["down"], 255, parts["down"].activation_step) - 127).all(-1)
    assert equal.float().mean() > 0.5
    error = (output * 2.0**-mlp.fraction_bits - seen["down.out"])[equal].abs().max()
    assert error < 1e-5 * seen["down.out"].abs().max()


def test_what_is_not_integer_is_refused() -> None:
    _, parts = packed_block("llama-tied")
    silu = nn.functional.silu
    token = PackedLinear.from_qat(MaQDLinear(8, 8, spec=LinearSpec(activation_scaling="token")))
    with pytest.raises(ValueError, match="no static activation step"):
        IntegerLinear(token, 1.0, 127)
    with pytest.raises(ValueError, match="256 activation levels"):
        IntegerLinear(packed_layer(16, True, None, 256), 1.0, 127)
    with pytest.raises(ValueError, match="down has no static"):
        IntegerMLP(function=silu, **{**parts, "down": token})
    with pytest.raises(ValueError, match="not ReLU beyond"):
        IntegerMLP(function=torch.tanh, **parts)
    _, bert = packed_norm_and_layers()
    with pytest.raises(ValueError, match="the norm is not static"):
        IntegerMLP(function=silu, **bert)


def packed_norm_and_layers() -> tuple[nn.Module, dict[str, nn.Module]]:
    """BERT: its norms also feed the residual stream, so that they are not folded."""
    model = tiny("bert-mlm")
    quantize_model(model, MaQDConfig(first_token="shared"))
    calibrate_activations(model, torch.randint(2, 60, (4, 12)), progress=False)
    pack_model(model)
    layer = model.bert.encoder.layer[0]
    norm = layer.attention.output.LayerNorm
    return model, {"norm": norm, "up": layer.intermediate.dense, "down": layer.output.dense}
