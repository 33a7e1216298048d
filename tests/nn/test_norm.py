"""Laws of Layer-Batch Normalization."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from typing import Literal

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from maqd_hf.nn import BatchContext, LayerBatchNorm, Masks, NormSpec
from maqd_hf.nn.norm import MOMENTUM_BATCH
from tests.support import reference
from tests.support.calls import masked

RMS = NormSpec(first_token="shared", pooling="mean")
LAYER = replace(RMS, centered=True, bias=True)
UNKNOWN = Masks()
STATISTICS = ("running_log_ms", "batches_seen", "gate")


def norm_of(spec: NormSpec, gate: float = 1.0, features: int = 8) -> LayerBatchNorm:
    norm = LayerBatchNorm(features, spec, 1e-6, BatchContext())
    norm.gate.fill_(gate)
    with torch.no_grad():
        for affine in (norm.weight, norm.bias):
            if affine is not None:
                affine.normal_(1, 0.3)
    return norm


def expected_training_output(norm: LayerBatchNorm, x: Tensor, masks: Masks = UNKNOWN) -> Tensor:
    spec = norm.spec
    y = reference.layer_batch_norm(
        x,
        eps=norm.eps,
        gate=norm.gate.item(),
        centered=spec.centered,
        geometric=spec.pooling == "geometric",
        valid=masks.valid,
        first=masks.first if spec.first_token == "own" else None,
    )
    y = y if norm.weight is None else y * norm.weight
    return y if norm.bias is None else y + norm.bias


# ------------------------------------------------------------------------- gate 0: the original


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("statistics", ["gated", "token"])
def test_a_closed_gate_is_the_original_norm(
    statistics: Literal["gated", "token"], dtype: torch.dtype, training: bool
) -> None:
    tolerance = 1e-5 if dtype == torch.float32 else 1e-10
    x = (torch.randn(3, 5, 8, dtype=dtype) * 7 + 2).requires_grad_()
    rms = norm_of(replace(RMS, statistics=statistics), 0).to(dtype).train(training)
    layer = norm_of(replace(LAYER, statistics=statistics), 0).to(dtype).train(training)
    pairs = [
        (rms, nn.functional.rms_norm(x, (8,), rms.weight, 1e-6)),
        (layer, nn.functional.layer_norm(x, (8,), layer.weight, layer.bias, 1e-6)),
    ]
    for norm, original in pairs:
        y = norm(x)
        assert y.dtype == dtype
        torch.testing.assert_close(y, original, rtol=tolerance, atol=tolerance)
        incoming = torch.randn_like(y)
        torch.testing.assert_close(
            torch.autograd.grad(y, x, incoming)[0],
            torch.autograd.grad(original, x, incoming)[0],
            rtol=10 * tolerance,
            atol=tolerance,
        )


@pytest.mark.parametrize("offset", [0.0, 300.0])
def test_bfloat16_is_computed_wide_and_rounded_once(offset: float) -> None:
    """A mean far above the spread would drown a bfloat16 centring."""
    x = (torch.randn(3, 5, 8) * 20 + offset).bfloat16()
    layer, rms = norm_of(LAYER, 0), norm_of(RMS, 0)
    original = nn.functional.layer_norm(x.float(), (8,), layer.weight, layer.bias, 1e-6)
    torch.testing.assert_close(layer(x), original.bfloat16(), rtol=2**-8, atol=2**-8)
    llama = LlamaRMSNorm(8, 1e-6)
    llama.weight = rms.weight
    torch.testing.assert_close(rms(x), llama(x).bfloat16(), rtol=2**-7, atol=2**-7)
    assert rms(x).dtype == layer(x).dtype == torch.bfloat16


# ------------------------------------------------------------------------------ gate 1: pooled


@pytest.mark.parametrize("pooling", ["mean", "geometric"])
@pytest.mark.parametrize("first_token", ["own", "shared"])
@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("gate", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("spec", [RMS, LAYER], ids=["rms", "layer"])
def test_training_equals_the_loops_with_gradient(
    spec: NormSpec, gate: float, padded: bool, first_token: str, pooling: str
) -> None:
    spec = replace(spec, first_token=first_token, pooling=pooling)  # type: ignore[arg-type]
    norm = norm_of(spec, gate).double()
    x = torch.randn(4, 6, 8, dtype=torch.float64) * torch.rand(4, 6, 1, dtype=torch.float64) * 9
    first = torch.zeros(4, 6, dtype=torch.bool)
    first[:, 0] = True
    masks = Masks(None, first)
    if padded:
        lengths = torch.tensor([6, 1, 3, 0])  # a whole one, one with its first token only, none
        valid = torch.arange(6) < lengths.unsqueeze(1)
        masks = Masks(valid, first & valid)
    x.requires_grad_()
    got, expected = masked(norm, x, masks), expected_training_output(norm, x, masks)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
    incoming = torch.randn_like(x)
    leaves = [x, *norm.parameters()]
    for a, b in zip(
        torch.autograd.grad(got, leaves, incoming),
        torch.autograd.grad(expected, leaves, incoming),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


def test_the_gradient_flows_through_the_pooled_statistic() -> None:
    x = torch.randn(2, 4, 8, dtype=torch.float64, requires_grad=True)
    norm = norm_of(RMS).double()
    assert torch.autograd.gradcheck(norm, (x,))
    (grad,) = torch.autograd.grad(norm(x), x, torch.randn_like(x))
    along = (grad * x).sum((1, 2))  # the output does not change with a sample's scale
    torch.testing.assert_close(along, torch.zeros_like(along), atol=1e-5, rtol=0)


@pytest.mark.parametrize("pooling", ["mean", "geometric"])
def test_a_batch_of_one_equals_a_batch_of_eight(pooling: Literal["mean", "geometric"]) -> None:
    norm = norm_of(replace(RMS, pooling=pooling))
    x = torch.randn(8, 5, 8) * torch.logspace(-2, 2, 8).view(8, 1, 1)
    together = norm(x)
    for b in range(8):
        torch.testing.assert_close(norm(x[b : b + 1]), together[b : b + 1])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("first_token", ["own", "shared"])
@pytest.mark.parametrize("pooling", ["mean", "geometric"])
def test_padding_changes_nothing(
    pooling: Literal["mean", "geometric"], first_token: Literal["own", "shared"], side: str
) -> None:
    spec = replace(LAYER, pooling=pooling, first_token=first_token)
    plain, padded = norm_of(spec), norm_of(spec)
    padded.load_state_dict(plain.state_dict())
    x, junk = torch.randn(2, 5, 8), torch.randn(2, 3, 8) * 1e4
    real = slice(3, 8) if side == "left" else slice(0, 5)
    longer = torch.cat([junk, x] if side == "left" else [x, junk], dim=1)
    mask = torch.zeros(2, 8, dtype=torch.bool)
    mask[:, real] = True
    expected = masked(plain, x, Masks(first=torch.tensor([[True] + [False] * 4] * 2)))
    got = masked(padded, longer, Masks(mask, mask & (mask.cumsum(1) == 1)))
    torch.testing.assert_close(got[:, real], expected)
    torch.testing.assert_close(padded.running_log_ms, plain.running_log_ms)


# --------------------------------------------------------------------------- running statistics


@pytest.mark.parametrize("pooling", ["mean", "geometric"])
@pytest.mark.parametrize("spec", [RMS, LAYER], ids=["rms", "layer"])
def test_eval_after_equal_batches_is_the_training_output(
    spec: NormSpec, pooling: Literal["mean", "geometric"]
) -> None:
    norm = norm_of(replace(spec, pooling=pooling))
    x = (torch.randn(1, 5, 8) * 3).expand(4, 5, 8)
    for _ in range(30):
        trained = norm(x)
    torch.testing.assert_close(norm.eval()(x), trained)
    assert norm.batches_seen.item() == 30


def test_running_average_is_a_mean_at_first_and_exponential_later() -> None:
    norm = norm_of(replace(RMS, momentum=0.25))
    expected, seen = 0.0, []
    for batch in range(10):
        x = torch.randn(3, 5, 8) * (batch + 1)
        own = x.square().mean(-1) + norm.eps
        seen.append(own.mean(1).log().mean().item())
        share = max(1 / (batch + 1), 1 - (1 - 0.25) ** (3 / MOMENTUM_BATCH))
        expected += share * (seen[-1] - expected)
        norm(x)
        if batch == 3:
            assert norm.running_log_ms.item() == pytest.approx(sum(seen) / 4, rel=1e-5)
    assert norm.running_log_ms.item() == pytest.approx(expected, rel=1e-5)


def test_the_running_average_spans_the_same_samples_at_every_batch_size() -> None:
    samples = torch.randn(1, 5, 8).expand(16, 5, 8)
    averages = []
    for size in (1, 2, 8, 16):
        norm = norm_of(RMS)
        norm.running_log_ms.fill_(3.0)
        norm.batches_seen.fill_(10_000)
        for batch in samples.split(size):
            norm(batch)
        averages.append(norm.running_log_ms.item())
    assert averages[0] < 2.9
    assert averages == pytest.approx([averages[0]] * 4, rel=1e-5)


def test_a_fixed_norm_trains_as_it_evaluates() -> None:
    norm = norm_of(NormSpec(weight=False))
    norm(torch.randn(2, 3, 8))
    before = norm.running_log_ms.clone()
    norm.fixed = True
    x = torch.randn(2, 3, 8, requires_grad=True)
    y = norm(x)
    assert torch.equal(norm.running_log_ms, before)
    assert torch.equal(y, norm.eval()(x))
    (grad,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(grad, torch.exp(-0.5 * before).expand_as(grad))  # a constant


def test_eval_observes_nothing_and_reset_forgets() -> None:
    norm = norm_of(RMS)
    norm(torch.randn(2, 3, 8))
    before = norm.running_log_ms.clone()
    norm.eval()(torch.randn(2, 3, 8) * 100)
    assert torch.equal(norm.running_log_ms, before) and norm.batches_seen.item() == 1
    norm.reset_statistics()
    assert [getattr(norm, name).item() for name in STATISTICS] == [0, 0, 0]


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_observes_once_and_changes_no_number(use_reentrant: bool) -> None:
    plain = norm_of(RMS)
    norm = copy.deepcopy(plain)
    for batch in range(3):
        x = (torch.randn(2, 3, 8) * (batch + 1)).requires_grad_()
        plain_grad = torch.autograd.grad(plain(x).square().sum() + x.sum(), x)[0]
        x.grad = None
        checkpoint(norm, x, use_reentrant=use_reentrant).square().sum().backward()
        torch.testing.assert_close(x.grad, plain_grad - 1, rtol=1e-4, atol=1e-5)
    for name in STATISTICS:
        assert torch.equal(getattr(norm, name), getattr(plain, name))
    assert norm.batches_seen.item() == 3


@pytest.mark.parametrize("pooling", ["mean", "geometric"])
def test_samples_of_first_tokens_or_padding_alone_do_not_poison(
    pooling: Literal["mean", "geometric"],
) -> None:
    norm = norm_of(replace(RMS, first_token="own", pooling=pooling))
    norm(torch.randn(2, 3, 8))
    before = {name: getattr(norm, name).clone() for name in STATISTICS}
    first = torch.ones(2, 1, dtype=torch.bool)
    out = masked(norm, torch.randn(2, 1, 8) * 1000, Masks(first=first))
    torch.testing.assert_close(out.square().mean(-1).detach(), out.new_ones(2, 1), rtol=2, atol=2)
    for name in STATISTICS:
        assert torch.equal(getattr(norm, name), before[name])
    # one sample with text, one with its first token and padding: only the first one counts
    x = torch.randn(2, 4, 8)
    valid = torch.tensor([[True] * 4, [True] + [False] * 3])
    first = torch.tensor([[True] + [False] * 3] * 2)
    y = masked(norm, x, Masks(valid, first))
    assert (
        float(y.detach().abs().max()) < 100
    )  # padding too stays harmless to the layers that follow
    alone = norm_of(norm.spec)
    alone.running_log_ms.copy_(before["running_log_ms"])
    alone.batches_seen.copy_(before["batches_seen"])
    masked(alone, x[:1], Masks(first=first[:1]))
    torch.testing.assert_close(norm.running_log_ms, alone.running_log_ms)


# --------------------------------------------------------------------------------------- static


@pytest.mark.parametrize("first_token", ["own", "shared"])
@pytest.mark.parametrize("spec", [RMS, LAYER], ids=["rms", "layer"])
def test_static_equals_the_open_gate_in_eval_and_folded_differs_by_the_scalar(
    spec: NormSpec, first_token: Literal["own", "shared"]
) -> None:
    gated = norm_of(replace(spec, first_token=first_token, weight=False, bias=False))
    masks = Masks(first=torch.tensor([[True, False, False]] * 2))
    masked(gated, torch.randn(2, 3, 8) * 5, masks)
    x = torch.randn(2, 3, 8) * 5
    expected = masked(gated.eval(), x, masks)
    static = copy.deepcopy(gated)
    static.spec = replace(gated.spec, statistics="static")
    torch.testing.assert_close(masked(static, x, masks), expected)
    torch.testing.assert_close(masked(static.train(), x, masks), expected)  # in training too
    static.spec = replace(static.spec, folded=True)
    scalar = torch.exp(-static.running_log_ms / 2)
    torch.testing.assert_close(masked(static, x, masks) * scalar, expected)
    assert abs(scalar.item() - 1) > 0.1
    rest = static(x)  # nothing known of the tokens
    centered = x - x.mean(-1, keepdim=True) if spec.centered else x
    torch.testing.assert_close(rest, centered)


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("statistics", ["token", "static"])
@pytest.mark.parametrize("first_token", ["own", "shared"])
@pytest.mark.parametrize("spec", [RMS, LAYER, replace(RMS, weight=False)], ids=str)
@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 4), (2, 4, 3), (2, 0)], ids=str)
@torch.no_grad()
def test_the_compiled_norm_is_the_same(
    shape: tuple[int, ...],
    spec: NormSpec,
    first_token: Literal["own", "shared"],
    statistics: Literal["token", "static"],
    folded: bool,
    isa: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    static = folded and statistics == "static"
    spec = replace(spec, statistics=statistics, first_token=first_token, folded=static)
    norm = norm_of(spec, features=37)
    norm.running_log_ms.fill_(1.3)
    masks = Masks(first=torch.tensor([[True, False, False], [False, True, False]]))
    x = torch.randn(*shape, 37) * 3 + 1
    for _ in range(2):  # a change is noticed
        found = masked(norm, x, masks)
        with monkeypatch.context() as patch:
            patch.setenv("MAQD_KERNEL", "reference")
            torch.testing.assert_close(found, masked(norm, x, masks), rtol=1e-5, atol=1e-5)
        norm.running_log_ms.add_(1)
        if norm.weight is not None:
            norm.weight.mul_(-1)


def test_the_compiled_norm_leaves_training_and_other_dtypes_to_torch(isa: str) -> None:
    norm = norm_of(replace(LAYER, statistics="token"))
    x = torch.randn(2, 3, 8, requires_grad=True)
    norm(x).square().sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0
    with torch.no_grad():
        again = pickle.loads(pickle.dumps(norm))
        torch.testing.assert_close(again(x), norm(x))
        assert norm(x.bfloat16()).dtype == torch.bfloat16
        torch.testing.assert_close(norm(x.double()).float(), norm(x))
        changed = copy.deepcopy(norm)
        changed.spec = replace(norm.spec, centered=False)
        assert not torch.allclose(changed(x), norm(x))


# --------------------------------------------------------------------------------- as a module


@pytest.mark.parametrize("shape", [(5, 8), (2, 5, 8), (2, 5, 3, 8)])
def test_other_shapes_pool_over_all_but_the_first_axis(shape: tuple[int, ...]) -> None:
    norm = norm_of(replace(RMS, weight=False))
    x = torch.randn(shape)
    y = norm(x)
    flat = x.view(shape[0], -1, 8)
    expected = reference.layer_batch_norm(flat, eps=norm.eps).view(shape)
    torch.testing.assert_close(y, expected)
    assert norm.eval()(x).shape == shape


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_casting_a_model_narrows_no_statistic(dtype: torch.dtype) -> None:
    norm = norm_of(RMS, 0.3).to(dtype)
    for _ in range(2):
        norm(torch.randn(2, 3, 8).to(dtype))
    assert {getattr(norm, name).dtype for name in STATISTICS} == {torch.float32}
    assert norm.batches_seen.item() == 2


def test_a_copy_has_the_state_and_gives_the_same() -> None:
    norm = norm_of(replace(RMS, first_token="own"))
    masks = Masks(first=torch.tensor([[True, False]]))
    x = torch.randn(1, 2, 8)
    masked(norm, x, masks)
    assert set(STATISTICS) < set(norm.state_dict())
    expected = masked(norm.eval(), x, masks)
    for other in (copy.deepcopy(norm), pickle.loads(pickle.dumps(norm))):
        assert torch.equal(masked(other, x, masks), expected)


@pytest.mark.parametrize("training", [True, False])
def test_compiled_equals_eager(training: bool) -> None:
    eager = norm_of(replace(LAYER, first_token="own"), 0.5).train(training)
    masks = Masks(first=torch.tensor([[True, False, False]] * 2))
    eager.running_log_ms.fill_(0.3)
    other = copy.deepcopy(eager)
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 3, 8)
    with other.context.given(masks):
        torch.testing.assert_close(compiled(x), masked(eager, x, masks))
    torch.testing.assert_close(other.running_log_ms, eager.running_log_ms)


@pytest.mark.parametrize("heads_first", [False, True])
def test_padding_does_not_count_per_head_either(heads_first: bool) -> None:
    """q/k norms see (B, T, H, D) or (B, H, T, D)."""
    norm = LayerBatchNorm(4, NormSpec(weight=False)).train()
    norm.gate.fill_(1)
    x = torch.randn(2, 5, 3, 4)
    valid = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    noisy = torch.where(valid[:, :, None, None], x, 100 * torch.randn_like(x))

    def run(x: torch.Tensor) -> torch.Tensor:
        y = masked(norm, x.transpose(1, 2) if heads_first else x, Masks(valid))
        return (y.transpose(1, 2) if heads_first else y)[valid]

    assert torch.allclose(run(x), run(noisy), rtol=1e-6)


def test_a_bad_batch_does_not_spoil_the_average() -> None:
    norm = LayerBatchNorm(4, NormSpec(weight=False)).train()
    good = torch.randn(2, 3, 4)
    norm(good)
    before = norm.running_log_ms.clone()
    norm(torch.full((2, 3, 4), float("nan")))
    assert torch.equal(norm.running_log_ms, before)
    assert norm.batches_seen == 1
