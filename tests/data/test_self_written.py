"""Text the model writes itself."""

import pytest
import torch

from maqd_hf.data.self_written import generated_blocks


def test_blocks_of_the_asked_size_and_seed(tiny_llama):
    before = torch.get_rng_state()
    blocks = generated_blocks(tiny_llama, 100, 16, batch_size=3, seed=1, progress=False)
    assert torch.equal(torch.get_rng_state(), before)
    assert len(blocks) == 7 and blocks.column_names == ["input_ids", "labels"]
    assert all(len(row["input_ids"]) == 16 and row["labels"] == row["input_ids"] for row in blocks)
    again = generated_blocks(tiny_llama, 100, 16, batch_size=3, seed=1, progress=False)
    other = generated_blocks(tiny_llama, 100, 16, batch_size=3, seed=2, progress=False)
    assert again["input_ids"][:] == blocks["input_ids"][:] != other["input_ids"][:]


def test_it_is_the_models_own_text(tiny_llama):
    """A model whose head knows one token writes that one, end of text or not."""
    eos = tiny_llama.generation_config.eos_token_id = 1
    tiny_llama.set_output_embeddings(torch.nn.Linear(tiny_llama.config.hidden_size, 259))
    with torch.no_grad():
        tiny_llama.lm_head.weight.zero_()
        tiny_llama.lm_head.bias.zero_()[eos] = 100.0
    blocks = generated_blocks(tiny_llama, 20, 10, progress=False)
    assert all(row["input_ids"][1:] == [eos] * 9 for row in blocks)
    assert tiny_llama.generation_config.eos_token_id == eos


def test_what_cannot_be_is_said(tiny_llama, tiny_bert):
    with pytest.raises(ValueError, match="block_size=1"):
        generated_blocks(tiny_llama, 10, 1)
    with pytest.raises(ValueError, match="give a causal LM"):
        generated_blocks(tiny_bert, 10, 5)
