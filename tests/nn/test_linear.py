"""Laws of ``MaQDLinear`` and its activation quantizer."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from maqd_hf.functional import scaled_round_clip, stored_scale, token_step
from maqd_hf.nn import ActivationQuantizer, BatchContext, LinearSpec, MaQDLinear, Masks
from tests.support import reference

WEIGHT_ONLY = LinearSpec(activation_levels=None)


def calibrated(layer: MaQDLinear, step: float = 0.1) -> MaQDLinear:
    assert isinstance(layer.activation, ActivationQuantizer)
    layer.activation.set_step(step)
    return layer


# --------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize("group_size", [None, 8, 24])
@pytest.mark.parametrize("start", ["search", "gaussian"])
@pytest.mark.parametrize("levels", [2, 3, 4, 16, 255])
def test_weight_is_the_composed_formula_and_starts_near_the_float_one(
    levels: int, start: str, group_size: int | None
) -> None:
    linear = nn.Linear(24, 6)
    nn.init.normal_(linear.weight, mean=0.01, std=0.02)
    spec = replace(WEIGHT_ONLY, weight_levels=levels, group_size=group_size)
    layer = MaQDLinear.from_linear(linear, spec, start=start)  # type: ignore[arg-type]
    slow = reference.fake_quantized_weight(
        layer.weight, layer.weight_step, layer.weight_scale(), layer.weight_offset, levels
    )
    torch.testing.assert_close(layer.quantized_weight(), slow, rtol=1e-5, atol=1e-7)
    # error of an ideal uniform quantizer of a Gaussian, relative to its variance, with a margin
    bound = {2: 0.45, 3: 0.26, 4: 0.17, 16: 0.02, 255: 1e-3}[levels]
    error = (layer.quantized_weight() - linear.weight).square().mean()
    assert error.item() / linear.weight.var().item() < bound


@pytest.mark.parametrize("levels", [2, 3, 4, 16])
@pytest.mark.parametrize("value", [0.0, 0.3, -20.0])
def test_a_constant_row_starts_as_itself(value: float, levels: int) -> None:
    linear = nn.Linear(16, 3)
    with torch.no_grad():
        linear.weight[1] = value
    for start in ("search", "gaussian"):
        layer = MaQDLinear.from_linear(
            linear, replace(WEIGHT_ONLY, weight_levels=levels), None, start
        )
        row = layer.quantized_weight()[1]
        torch.testing.assert_close(row, linear.weight[1], rtol=1e-6, atol=1e-5)


def test_scale_fit_is_least_squares() -> None:
    layer = MaQDLinear.from_linear(nn.Linear(64, 5), replace(WEIGHT_ONLY, weight_levels=4))
    centered = layer.weight - layer.weight.mean(1, keepdim=True)
    residual = layer.quantized_weight() - layer.weight.mean(1, keepdim=True) - centered
    units = layer.weight_units()
    torch.testing.assert_close((residual * units).sum(1), torch.zeros(5), atol=1e-5, rtol=0)


def test_set_grid_speaks_in_units_of_the_weight() -> None:
    layer = MaQDLinear.from_linear(nn.Linear(12, 3), replace(WEIGHT_ONLY, group_size=4))
    step = stored_scale(torch.rand(3, 3) * 0.02 + 0.01)
    offset = torch.randn(3, 1)
    layer.set_grid(step, offset)
    centered = (layer.weight - layer.weight.mean(1, keepdim=True)).detach().view(3, 3, 4)
    expected = scaled_round_clip(centered, 16, step.unsqueeze(-1)).view(3, 12) + offset
    torch.testing.assert_close(layer.quantized_weight(), expected, rtol=1e-5, atol=1e-6)


def test_training_sees_the_scales_that_will_be_stored() -> None:
    """Values are codes times numbers of 16 bits; the gradient passes to the scale learned."""
    layer = MaQDLinear.from_linear(
        nn.Linear(36, 5), replace(WEIGHT_ONLY, group_size=12, weight_offset=False)
    )
    stored = layer.weight_log_scale.exp().bfloat16().float()
    assert not torch.equal(stored, layer.weight_log_scale.exp())
    units = layer.weight_units().view(5, 3, 12)
    assert torch.equal(layer.quantized_weight(), (units * stored.unsqueeze(-1)).flatten(1))
    incoming = torch.randn(5, 36)
    (grad,) = torch.autograd.grad(layer.quantized_weight(), layer.weight_log_scale, incoming)
    exact = (units * incoming.view(5, 3, 12)).sum(-1) * layer.weight_log_scale.exp()
    torch.testing.assert_close(grad, exact)


def test_broken_weights_are_refused() -> None:
    linear = nn.Linear(4, 4)
    with torch.no_grad():
        linear.weight[2, 1] = float("nan")
    with pytest.raises(ValueError, match=r"\(4, 4\) holds NaN or infinity.*checkpoint"):
        MaQDLinear.from_linear(linear)


def test_group_size_must_divide_the_width() -> None:
    with pytest.raises(ValueError, match=r"group_size=5 does not divide the input width 12.*None"):
        MaQDLinear.from_linear(nn.Linear(12, 3), replace(WEIGHT_ONLY, group_size=5))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight_levels": 1}, "weight_levels=1 is outside 2..256.*bits"),
        ({"activation_levels": 257}, "activation_levels=257"),
        ({"weight_levels": True}, "weight_levels=True must be an int"),
        ({"activation_scaling": "row"}, "activation_scaling='row'.*'static', 'token' or 'group'"),
        ({"first_token": "other"}, "first_token='other'.*'own' or 'shared'"),
        ({"group_size": 0}, "group_size=0.*positive int"),
        ({"group_size": 4.0}, "group_size=4.0.*positive int"),
        ({"surrogate": "x"}, "surrogate='x' is unknown.*clip"),
    ],
)
def test_bad_settings_name_value_and_remedy(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LinearSpec(**settings)  # type: ignore[arg-type]


# ----------------------------------------------------------------------------------- from linear


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_a_copy_of_256_levels_is_close_to_its_float_layer(kind: str, bias: bool) -> None:
    if kind == "conv1d":
        source: nn.Module = Conv1D(5, 12)
        nn.init.normal_(source.bias)
        weight = source.weight.t()
    else:
        source = nn.Linear(12, 5, bias=bias)
        weight = source.weight
    layer = MaQDLinear.from_linear(source, LinearSpec(256, None))
    assert torch.equal(layer.weight, weight) and layer.weight.dtype == torch.float32
    x = torch.randn(3, 12)
    torch.testing.assert_close(layer(x), source(x), rtol=0.05, atol=0.02)
    assert (layer.bias is None) == (getattr(source, "bias", None) is None)


@pytest.mark.parametrize(
    ("source", "latent"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_latents_are_at_least_float32_and_the_output_follows_the_input(
    source: torch.dtype, latent: torch.dtype
) -> None:
    layer = calibrated(MaQDLinear.from_linear(nn.Linear(8, 4, dtype=source)))
    assert layer.weight.dtype == layer.weight_step.dtype == layer.weight_log_scale.dtype == latent
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        x = torch.randn(2, 3, 8).to(dtype)
        assert layer(x).dtype == dtype
        torch.testing.assert_close(layer(x), layer(x.double()).to(dtype), rtol=0.05, atol=0.05)


def test_casting_a_model_narrows_no_latent_and_no_scale() -> None:
    layer = calibrated(MaQDLinear.from_linear(nn.Linear(8, 4)))
    before = {name: p.clone() for name, p in layer.named_parameters() if name != "bias"}
    layer.bfloat16()
    for name, value in before.items():
        assert torch.equal(dict(layer.named_parameters())[name], value), name
    assert layer(torch.randn(2, 8).bfloat16()).dtype == torch.bfloat16
    assert layer.double().weight.dtype == torch.float64


def test_meta_layers_are_built_without_memory_and_filled_later() -> None:
    layer = MaQDLinear.from_linear(nn.Linear(8, 4, device="meta"))
    assert {p.device.type for p in layer.parameters()} == {"meta"}


def test_float_weights_keep_quantized_inputs() -> None:
    linear = nn.Linear(8, 4)
    layer = calibrated(MaQDLinear.from_linear(linear, LinearSpec(None, 15)), 1.0)
    x = torch.randn(2, 8) * 4
    assert torch.equal(layer(x), linear(scaled_round_clip(x, 15, 1.0)))
    assert {name for name, _ in layer.named_parameters()} == {
        "weight",
        "bias",
        "activation.log_step",
    }


# ----------------------------------------------------------------------------------- activations


@pytest.mark.parametrize("surrogate", ["clip", "triangle"])
def test_static_step_is_learned_as_its_logarithm(surrogate: str) -> None:
    spec = LinearSpec(activation_levels=15, surrogate=surrogate)
    quantizer = ActivationQuantizer(spec, BatchContext())
    quantizer.set_step(0.3)
    x = torch.randn(2, 5, 8, requires_grad=True)
    incoming = torch.randn(2, 5, 8)
    y = quantizer(x)
    torch.testing.assert_close(y, reference.round_clip(x.detach(), 15, 0.3))
    y.backward(incoming)
    expected = sum(
        g * reference.step_gradient(surrogate, v, 0.3, 15)
        for v, g in zip(x.flatten().tolist(), incoming.flatten().tolist(), strict=True)
    )
    assert quantizer.log_step.grad.item() == pytest.approx(0.3 * expected, rel=1e-3)


def test_an_input_without_a_calibrated_step_stays_float_and_nothing_is_trained() -> None:
    """It is said, and never NaN: not before the step is set, not after the layer was reset or has
    loaded a state without a step."""
    layer, uncalibrated = MaQDLinear(8, 4), MaQDLinear(8, 4).state_dict()
    assert isinstance(layer.activation, ActivationQuantizer)
    for take_away in (
        lambda: None,
        layer.activation.reset_parameters,
        lambda: layer.load_state_dict(uncalibrated),
        lambda: layer.activation.set_step(float("nan")),
    ):
        take_away()
        assert not layer.activation.calibrated
        x = torch.randn(1, 8)
        with pytest.warns(
            UserWarning, match=r"stay float.*never calibrated.*calibrate_activations"
        ):
            y = layer(x)
        assert torch.equal(y, nn.functional.linear(x, layer.quantized_weight(), layer.bias))
        with pytest.raises(ValueError, match=r"levels=255.*never calibrated"):
            y.sum().backward()
        assert calibrated(layer).activation.calibrated
        assert bool(layer(torch.randn(1, 8)).isfinite().all())


def test_a_calibrated_step_is_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A look makes a GPU wait, so neither a forward nor a training step may repeat it."""
    layer, looks = calibrated(MaQDLinear(8, 4)), []
    seen = property(lambda self: looks.append(self) or True)
    monkeypatch.setattr(ActivationQuantizer, "calibrated", seen)
    for _ in range(3):
        layer(torch.randn(1, 8)).sum().backward()
        layer.activation.log_step.data.mul_(0.9)
        with torch.no_grad():
            layer.activation.log_step.mul_(0.9)
    assert len(looks) == 1


@pytest.mark.parametrize("known", [True, False])
def test_a_compiled_forward_refuses_an_uncalibrated_step(known: bool) -> None:
    """Where no forward has run yet, the step is looked at when the graph is traced."""
    layer = MaQDLinear(8, 4, spec=LinearSpec(16, 255))
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    if known:
        x = torch.randn(1, 8)
        calibrated(layer)
        assert torch.equal(compiled(x), layer(x))
    else:
        with pytest.raises(Exception, match="never calibrated"):
            compiled(torch.randn(1, 8))


def test_token_steps_cannot_be_set() -> None:
    layer = MaQDLinear(8, 4, spec=LinearSpec(activation_scaling="token"))
    assert isinstance(layer.activation, ActivationQuantizer) and layer.activation.calibrated
    assert [name for name, _ in layer.activation.named_parameters()] == []
    with pytest.raises(ValueError, match="each token"):
        layer.activation.set_step(1.0)


@pytest.mark.parametrize("levels", [4, 255])
def test_token_scaling_is_per_token(levels: int) -> None:
    layer = MaQDLinear(8, 4, spec=LinearSpec(16, levels, "token"))
    x = torch.randn(2, 3, 8)
    for b in range(2):
        for t in range(3):
            step = x[b, t].abs().max() / ((levels - 1) / 2)
            expected = reference.round_clip(x[b, t], levels, step.item())
            torch.testing.assert_close(layer.activation(x)[b, t], expected, rtol=1e-4, atol=1e-5)


def test_group_scaling_is_per_group_of_a_token() -> None:
    layer = MaQDLinear(24, 4, spec=LinearSpec(16, 15, "group", group_size=8))
    x = torch.randn(2, 3, 24) * torch.tensor([0.01, 1.0, 100.0]).repeat_interleave(8)
    y = layer.activation(x)
    turned = x.permute(2, 1, 0).contiguous().permute(2, 1, 0)  # other strides
    assert torch.equal(layer.activation(turned), y)
    for own, rounded in zip(x.split(8, -1), y.split(8, -1), strict=True):
        torch.testing.assert_close(rounded, scaled_round_clip(own, 15, token_step(own, 15)))
    one = replace(layer.spec, group_size=None)
    token = replace(one, activation_scaling="token")
    layers = [MaQDLinear(24, 4, spec=spec) for spec in (one, token)]
    assert torch.equal(layers[0].activation(x), layers[1].activation(x))


def test_steps_of_groups_want_zero_among_the_levels() -> None:
    with pytest.raises(ValueError, match=r"activation_levels=16: .*odd.*15 or 255"):
        LinearSpec(16, 16, "group", group_size=8)
    assert LinearSpec(16, 16, "group").input_group is None
    assert LinearSpec(16, None, "group", group_size=8).activation_levels is None


def test_a_group_of_few_levels_survives_a_large_neighbor() -> None:
    """One large channel costs its own group its levels, and no other."""
    linear, x = nn.Linear(128, 32, bias=False), torch.randn(16, 128)
    x[:, 3] *= 100
    errors = {}
    for scaling in ("token", "group"):
        layer = MaQDLinear.from_linear(linear, LinearSpec(None, 15, scaling, group_size=32))
        errors[scaling] = float((layer(x) - linear(x)).detach().norm())
    assert errors["group"] < 0.7 * errors["token"]


@pytest.mark.parametrize("surrogate", ["clip", "arctan"])
def test_gradients_pass_a_group_grid(surrogate: str) -> None:
    spec = LinearSpec(None, 15, "group", group_size=8, surrogate=surrogate)
    layer, x = MaQDLinear(24, 4, spec=spec), torch.randn(5, 24, requires_grad=True)
    (grad,) = torch.autograd.grad(layer.activation(x).sum(), x)
    assert grad.shape == x.shape and bool(grad.isfinite().all())
    assert surrogate != "clip" or bool((grad == 1).all())


def test_first_token_keeps_a_step_of_its_own() -> None:
    context = BatchContext()
    spec = LinearSpec(16, 255, "static", first_token="own")
    layer = calibrated(MaQDLinear(8, 4, spec=spec, context=context), 1.0)
    x = torch.randn(2, 4, 8) * 20
    x[:, 0] *= 1000  # massive: 127 is the top of the static grid
    first = torch.zeros(2, 4, dtype=torch.bool)
    first[:, 0] = True
    with context.given(Masks(first=first)):
        y = layer.activation(x)
    own = scaled_round_clip(x, 255, token_step(x, 255))
    shared = scaled_round_clip(x, 255, 1.0)
    assert torch.equal(y[:, 0], own[:, 0]) and torch.equal(y[:, 1:], shared[:, 1:])
    assert torch.equal(layer.activation(x), shared)  # outside a call, nothing known: static for all
    layer.activation.spec = replace(spec, first_token="shared")
    with context.given(Masks(first=torch.ones(2, 4, dtype=torch.bool))):
        assert torch.equal(layer.activation(x), shared)


# --------------------------------------------------------------------------------------- training


def test_every_parameter_but_the_grid_learns() -> None:
    layer = calibrated(MaQDLinear.from_linear(nn.Linear(16, 4), LinearSpec(group_size=8)))
    layer(torch.randn(3, 16)).square().sum().backward()
    learned = {name for name, p in layer.named_parameters() if p.grad is not None and p.grad.any()}
    assert learned == {"weight", "bias", "weight_log_scale", "weight_offset", "activation.log_step"}
    assert not layer.weight_step.requires_grad


def test_training_from_scratch_learns_a_float_target() -> None:
    layer, x = MaQDLinear(16, 4, spec=WEIGHT_ONLY), torch.randn(64, 16)
    target = nn.Linear(16, 4)(x).detach()
    optimizer = torch.optim.Adam(layer.parameters(), 1e-2)
    losses = []
    for _ in range(100):
        loss = (layer(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]


def test_copies_pickles_checkpointing_and_compile_agree() -> None:
    layer = calibrated(MaQDLinear.from_linear(nn.Linear(16, 8), LinearSpec(4, 15, group_size=4)))
    x = torch.randn(2, 3, 16, requires_grad=True)
    expected = layer(x)
    (grad,) = torch.autograd.grad(expected.square().sum(), x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), expected)
    again = checkpoint(layer, x, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(again.square().sum(), x)[0], grad)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected)
    torch.testing.assert_close(torch.autograd.grad(compiled(x).square().sum(), x)[0], grad)
