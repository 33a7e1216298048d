"""Calibration data as batches, in every form and as large as memory allows."""

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from maqd_hf import quantize_model
from maqd_hf.calibration import (
    blocks,
)
from maqd_hf.calibration.blocks import Entries, as_batches, counted_tokens, run_model
from maqd_hf.models.finding import gated_norms


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


# ---------------------------------------------------------------- forwards that start in the middle

SIZES = {"vocab_size": 60, "num_hidden_layers": 4}
DECODERS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(hidden_size=32, intermediate_size=48, **SIZES)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(n_embd=48, n_positions=64, **SIZES)),
}


@pytest.mark.parametrize("family", DECODERS)
def test_a_forward_from_a_block_on_sees_a_change_there_as_a_whole_one_does(family):
    torch.manual_seed(0)
    model = DECODERS[family]().eval()
    quantize_model(model, weight_levels=16, activation_scaling="token")
    ids = torch.randint(60, (3, 9))
    batches = as_batches(ids, model, batch_size=2)
    with torch.no_grad():
        entries = Entries(model, batches)
        assert entries.usable
        norms = gated_norms(model)
        calls = []
        model.get_submodule(entries.names[0]).register_forward_hook(lambda *_: calls.append(1))
        for name, norm in norms.items():
            norm.gate.fill_(1.0)
            for index, batch in enumerate(batches):
                got = entries.run(index, entries.block_of(name)).logits
                assert torch.equal(got, run_model(model, batch).logits), name
            norm.gate.fill_(0.0)
        assert {entries.block_of(name) for name in norms} == {0, 1, 2, 3}
    assert all("forward" not in vars(module) for module in model.modules())


def test_blocks_that_hand_something_on_by_another_way_run_whole(tiny_llama, ids):
    """The last block adds what the first one has seen, which nobody finds in its arguments."""
    quantize_model(tiny_llama, weight_levels=16, activation_scaling="token")
    first, last = tiny_llama.model.layers[0], tiny_llama.model.layers[-1]
    seen = []
    first.mlp.register_forward_hook(lambda module, args, output: seen.append(output))
    last.mlp.register_forward_hook(lambda module, args, output: output + seen.pop())
    batches = as_batches(ids[:2], tiny_llama)
    with torch.no_grad():
        entries = Entries(tiny_llama.eval(), batches)
        assert not entries.usable
        whole = run_model(tiny_llama, batches[0]).logits
        assert torch.equal(entries.run(0, 1).logits, whole)
