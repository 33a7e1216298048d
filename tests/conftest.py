"""Fixtures for all tests: tiny models with random weights, a byte tokenizer, and real prose.

Nothing here needs a network; the Hub is switched off before anything that knows it is imported.
"""

import os
import sys

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ:  # a process for every core: more threads would only wait
    os.environ.setdefault("OMP_NUM_THREADS", "1")
# Exact laws are about the reference; tests/kernels compares the compiled paths with it.
os.environ.setdefault("MAQD_KERNEL", "reference")

from pydoc_data.topics import topics

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from maqd_hf.kernels import loader

CONTEXT = 128  # positions the tiny models have
SPECIAL_TOKENS = ("<s>", "</s>", "<pad>")  # ids 0, 1, 2


@pytest.fixture(params=list(loader.isas()))
def isa(request, monkeypatch):
    """Every instruction set of the compiled library that this machine runs, in turn."""
    monkeypatch.setenv("MAQD_KERNEL", request.param)
    return request.param


@pytest.fixture
def best(monkeypatch):
    """The instruction set a user gets; all else runs on the reference."""
    monkeypatch.delenv("MAQD_KERNEL")
    assert loader.chosen_isa() is not None, "no C compiler at install time"


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Every test draws the same numbers and may compile as often as any, alone or in any order."""
    torch.manual_seed(0)
    if "torch._dynamo" in sys.modules:  # it counts how often a function was compiled
        torch._dynamo.reset()


@pytest.fixture
def byte_tokenizer() -> PreTrainedTokenizerFast:
    """259 tokens: bos, eos, pad and every byte; adds no special token by itself."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*SPECIAL_TOKENS, *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    bos, eos, pad = SPECIAL_TOKENS
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=bos, eos_token=eos, pad_token=pad
    )


@pytest.fixture
def tiny_llama(byte_tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """2 layers of width 64, 4 query heads on 2 key/value heads, tied embedding, float32, eval."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(byte_tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        initializer_range=0.1,  # large enough that the logits depend on the context
        **_special_ids(byte_tokenizer),
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def tiny_gpt2(byte_tokenizer: PreTrainedTokenizerFast) -> GPT2LMHeadModel:
    """2 layers of width 64: LayerNorm, biases and Conv1D; float32, eval."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(byte_tokenizer),
        n_embd=64,
        n_layer=2,
        n_head=4,
        n_positions=CONTEXT,
        initializer_range=0.1,
        **_special_ids(byte_tokenizer),
    )
    return GPT2LMHeadModel(config).eval()


@pytest.fixture
def tiny_bert(byte_tokenizer: PreTrainedTokenizerFast) -> BertForMaskedLM:
    """2 layers of width 64: post-norm encoder with a masked-token head; float32, eval."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(byte_tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT,
        initializer_range=0.1,
        pad_token_id=byte_tokenizer.pad_token_id,
    )
    return BertForMaskedLM(config).eval()


def _special_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    return {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


@pytest.fixture(scope="session")
def sample_text() -> str:
    """60,000 characters of English prose: the language reference inside Python itself."""
    return "\n\n".join(topics[name] for name in sorted(topics))[:60_000]
