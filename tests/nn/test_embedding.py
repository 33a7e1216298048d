"""Laws of ``MaQDEmbedding`` and of the head tied to it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from maqd_hf.nn import ActivationQuantizer, LinearSpec, MaQDEmbedding

SHARED = ("weight", "weight_step", "weight_log_scale", "weight_offset")


def table(levels: int = 15, rows: int = 11, dim: int = 8, **kwargs: object) -> MaQDEmbedding:
    return MaQDEmbedding.from_embedding(nn.Embedding(rows, dim), levels, **kwargs)  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(), (5,), (2, 3), (2, 0), (2, 2, 2)])
@pytest.mark.parametrize("levels", [2, 3, 16, 255])
def test_lookup_is_indexing_the_quantized_table(levels: int, shape: tuple[int, ...]) -> None:
    embedding = table(levels)
    ids = torch.randint(0, 11, shape)
    assert torch.equal(embedding(ids), embedding.quantized_weight()[ids])


def test_output_scale_multiplies_the_lookup_but_not_the_table() -> None:
    embedding = table(output_scale=3.0)
    ids = torch.tensor([[1, 2]])
    assert torch.equal(embedding(ids), embedding.quantized_weight()[ids] * 3.0)


def test_255_levels_are_close_to_float() -> None:
    source = nn.Embedding(11, 8, padding_idx=2)
    embedding = MaQDEmbedding.from_embedding(source, 255)
    ids = torch.arange(11)
    torch.testing.assert_close(embedding(ids), source(ids), rtol=0, atol=0.02)


@pytest.mark.parametrize("levels", [16, 15])
def test_padding_row_stays_zero_and_gets_no_gradient(levels: int) -> None:
    source = nn.Embedding(11, 8, padding_idx=2)
    embedding = MaQDEmbedding.from_embedding(source, levels)
    ids = torch.tensor([2, 3, 2])
    out = embedding(ids)
    assert float(out[0].detach().abs().max()) < 1e-5
    out.sum().backward()
    for name in ("weight", "weight_log_scale", "weight_offset"):
        assert not getattr(embedding, name).grad[2].any()
    assert embedding.weight_offset.grad[3].item() == 8


def test_gradient_of_a_lookup_equals_that_of_the_whole_table() -> None:
    embedding = table(4)
    ids = torch.tensor([[1, 5, 1], [0, 5, 9]])
    incoming = torch.randn(2, 3, 8)
    leaves = [embedding.weight, embedding.weight_log_scale, embedding.weight_offset]
    by_lookup = torch.autograd.grad(embedding(ids), leaves, incoming)
    by_table = torch.autograd.grad(embedding.quantized_weight()[ids], leaves, incoming)
    for got, expected in zip(by_lookup, by_table, strict=True):
        torch.testing.assert_close(got, expected)
        assert bool(got.any())


@pytest.mark.parametrize("spec", [LinearSpec(4, 255, group_size=2, weight_offset=False), None])
def test_a_tied_head_holds_the_same_parameters_and_the_same_grid(spec: LinearSpec | None) -> None:
    embedding = table(15)
    head = embedding.as_linear(spec or LinearSpec(15, None))
    for name in SHARED:
        assert getattr(head, name) is getattr(embedding, name)
    assert torch.equal(head.quantized_weight(), embedding.quantized_weight())
    if isinstance(head.activation, ActivationQuantizer):
        head.activation = head.activation.to_empty(device="cpu")
        head.activation.set_step(0.05)
    x = torch.randn(3, 8)
    expected = head.activation(x) @ embedding.quantized_weight().t()
    torch.testing.assert_close(head(x), expected)


def test_gradient_reaches_the_shared_table_from_both_sides() -> None:
    embedding = table(15)
    head = embedding.as_linear(LinearSpec(15, None))
    ids = torch.tensor([4])
    incoming = torch.randn(1, 11)
    hidden = embedding(ids)
    from_head = torch.autograd.grad(head(hidden.detach()), embedding.weight, incoming)[0]
    through = head.quantized_weight().detach()
    from_lookup = torch.autograd.grad(hidden, embedding.weight, incoming @ through)[0]
    head(embedding(ids)).backward(incoming)
    torch.testing.assert_close(embedding.weight.grad, from_head + from_lookup)
    assert bool(from_head.any()) and bool(from_lookup.any())


def test_a_fresh_table_is_ready_to_use() -> None:
    embedding = MaQDEmbedding(11, 8, 16)
    error = embedding.quantized_weight() - embedding.weight
    assert error.square().mean().item() / embedding.weight.var().item() < 0.05


@pytest.mark.parametrize("levels", [1, 257, 4.0, True])
def test_bad_levels_are_refused(levels: object) -> None:
    with pytest.raises(ValueError, match=f"{levels!r}"):
        MaQDEmbedding(4, 4, levels)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_latents_are_at_least_float32(dtype: torch.dtype) -> None:
    embedding = MaQDEmbedding.from_embedding(nn.Embedding(4, 4, dtype=dtype), 16)
    wide = torch.promote_types(dtype, torch.float32)
    assert {p.dtype for p in embedding.parameters() if p.numel()} == {wide}
    assert embedding(torch.tensor([1])).dtype == dtype  # what the layers after it expect
