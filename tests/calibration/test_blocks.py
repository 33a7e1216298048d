"""Calibration data as batches, in every form and as large as memory allows."""

import torch
from torch import nn

from maqd_hf.calibration import (
    blocks,
)
from maqd_hf.calibration.blocks import as_batches, counted_tokens


def test_a_batch_is_what_the_widest_layer_has_memory_for(tiny_llama, ids, monkeypatch):
    widest = max(m.in_features for m in tiny_llama.modules() if isinstance(m, nn.Linear))
    assert len(as_batches(ids, tiny_llama)) == 1
    monkeypatch.setattr(blocks, "_BATCH_BYTES", 4 * widest * (3 * ids.shape[1] + 1))
    assert [len(b["input_ids"]) for b in as_batches(ids[:7], tiny_llama)] == [3, 3, 1]
    monkeypatch.setattr(blocks, "_BATCH_BYTES", 1)
    assert len(as_batches(ids[:7], tiny_llama)) == 7
    # Eager attention keeps its scores: (samples, heads, tokens, tokens).
    tiny_llama.set_attn_implementation("eager")
    long = torch.zeros(5, 4 * widest, dtype=torch.long)
    scores = 4 * tiny_llama.config.num_attention_heads * long.shape[1] ** 2
    monkeypatch.setattr(blocks, "_BATCH_BYTES", 2 * scores)
    assert [len(b["input_ids"]) for b in as_batches(long, tiny_llama)] == [2, 2, 1]


def test_data_of_every_form_becomes_the_same_batches(tiny_llama, ids):
    mapping = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
    for data in (ids, list(ids.split(4)), iter([mapping])):
        batches = as_batches(data, tiny_llama, batch_size=4)
        assert torch.equal(torch.cat([b["input_ids"] for b in batches]), ids)
        assert all("labels" not in b for b in batches)
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0], [0, 1, 0, 0]])
    counted = counted_tokens({"input_ids": mask, "attention_mask": mask}, skip_first=True)
    assert counted.tolist() == [
        [False, False, False, True],
        [False, True, True, False],
        [False, True, False, False],  # its only token
    ]
