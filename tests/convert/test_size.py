"""Laws of ``model_size``: it says what the file will weigh, before and after packing."""

from __future__ import annotations

import os
from math import ceil
from pathlib import Path

import pytest
import torch
import transformers as hf
from torch import nn

from maqd_hf import model_size, pack_model, quantize_model
from maqd_hf.packing import codes_per_word
from tests.support.families import FAMILIES, randomize, tiny


def small_llama() -> hf.LlamaForCausalLM:
    """4 layers of width 256: 4 M weights."""
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        vocab_size=2000,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    return randomize(hf.LlamaForCausalLM(config))


@pytest.mark.parametrize(
    ("levels", "group_size", "embedding"), [(16, None, 255), (3, 64, 15), (4, 32, None)]
)
def test_the_file_weighs_words_scales_and_what_is_kept(
    levels: int, group_size: int | None, embedding: int | None, tmp_path: Path
) -> None:
    model = small_llama()
    settings = {"weight_levels": levels, "group_size": group_size, "embedding_levels": embedding}
    report = quantize_model(model, **settings, activation_scaling="token")
    expected = model_size(model)
    pack_model(model)
    assert model_size(model) == expected == report.size

    words = scales = 0  # by hand, from the shapes
    layers = [(256, 256), (128, 256), (128, 256), (256, 256), (704, 256), (704, 256), (256, 704)]
    for rows, columns in layers * 4:
        words += 4 * rows * ceil(columns / codes_per_word(levels))
        scales += rows * (4 + (2 * columns // group_size if group_size else 4))
    kept = 9 * 4 * 256  # gamma of every norm
    if embedding is None:
        kept += 4 * 2000 * 256
    else:
        words += 4 * 2000 * ceil(256 / codes_per_word(embedding))
        scales += 4 * 2000 * 2
    statistics = 9 * 3 * 4
    assert (expected.words, expected.kept) == (words, kept)
    assert expected.scales == scales + statistics

    model.save_pretrained(tmp_path)
    on_disk = os.path.getsize(tmp_path / "model.safetensors")
    assert abs(on_disk / (words + scales + kept) - 1) < 0.02
    assert 0 < on_disk - expected.file_bytes < 150 * len(model.state_dict())


@pytest.mark.parametrize("family", FAMILIES)
def test_qat_and_packed_models_are_counted_alike(family: str) -> None:
    model = tiny(family)
    total = sum(p.numel() for p in model.parameters())
    embedding = None if family in ("vit", "t5-encoder") else 7
    quantize_model(model, weight_levels=5, activation_scaling="token", embedding_levels=embedding)
    qat = model_size(model)
    pack_model(model)
    packed = model_size(model)
    # a tied bias of BERT's head is one tensor before and after
    assert packed == qat
    assert 0 < qat.quantized_weights < qat.weights <= total


def test_a_float_model_has_its_own_bits_and_tied_tensors_count_once() -> None:
    model = tiny("llama-tied")
    size = model_size(model)
    assert (size.words, size.scales, size.quantized_weights) == (0, 0, 0)
    assert size.weights == sum(p.numel() for p in model.parameters())
    assert size.bits_per_weight == 32
    assert model_size(nn.Linear(10, 10).bfloat16()).file_bytes == 220


def test_the_table_says_the_bits_per_weight() -> None:
    model = small_llama()
    quantize_model(model, weight_levels=4, embedding_levels=255, activation_scaling="token")
    size = model_size(model)
    assert 2 < size.bits_per_quantized_weight < 4 and size.bits_per_weight > 2
    text = size.table()
    assert f"{size.bits_per_weight:.3f} bits a weight over all {size.weights:,}" in text
    rows = [line.split()[0] for line in text.splitlines()[:4]]
    assert rows == ["packed", "scales", "kept", "total"]
