"""What a training step saves must change no number and leave nothing behind."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from maqd_hf.training.memory import kept_memory, narrow_products


def test_products_under_autocast_are_the_same_and_the_weights_come_back() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 4))
    before = {name: p for name, p in model.named_parameters()}
    x = torch.randn(5, 8)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = model(x)
        with pytest.raises(KeyboardInterrupt), narrow_products(model, torch.bfloat16):
            assert model[0].weight.dtype == torch.bfloat16 == model[2].weight.dtype
            assert model[1].weight.dtype == torch.float32
            assert torch.equal(model(x), expected)
            raise KeyboardInterrupt
    assert all(p is before[name] for name, p in model.named_parameters())


def test_a_tied_embedding_stays_float32() -> None:
    head, table = nn.Linear(8, 20, bias=False), nn.Embedding(20, 8)
    head.weight = table.weight
    with narrow_products(nn.ModuleList([table, head]), torch.bfloat16):
        assert table.weight.dtype == torch.float32
    assert head.weight is table.weight


def test_nothing_happens_without_a_model_or_a_dtype() -> None:
    layer = nn.Linear(2, 2)
    with narrow_products(None, torch.bfloat16), narrow_products(layer, None), kept_memory(False):
        assert layer.weight.dtype == torch.float32


def test_kept_memory_ends_with_an_exception() -> None:
    with pytest.raises(ValueError), kept_memory():
        torch.empty(1 << 24).fill_(1)
        raise ValueError
    assert float(torch.ones(1 << 20).sum()) == 1 << 20
