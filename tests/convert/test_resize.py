"""Adding and removing tokens keeps quantized tables and heads on their grids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from maqd_hf import pack_model, quantize_model
from maqd_hf.nn.kinds import PACKED, QUANTIZED
from tests.support.families import VOCABULARY, example, output, tiny

KINDS: dict[str, dict[str, Any]] = {
    "float table": {},
    "quantized table": {"embedding_levels": 15},
    "quantized head alone": {"targets": ["layers.*", "/lm_head"], "rotation": 8},
    "quantized table alone": {"embedding_levels": 15, "exclude": ["/lm_head"]},
}
CASES = [
    ("llama-tied", "float table"),
    ("llama-tied", "quantized table"),
    *[("llama-untied", kind) for kind in KINDS],
    ("gpt2", "quantized table"),
    ("bert-mlm", "quantized table"),
    ("gemma3", "quantized table"),
]


def converted(family: str, kind: str, state: str) -> PreTrainedModel:
    model = tiny(family)
    quantize_model(model, weight_levels=7, activation_scaling="token", **KINDS[kind])
    if state == "packed":
        pack_model(model)
    return model


def rows_of(model: PreTrainedModel) -> dict[str, int]:
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    names = {"table": table.num_embeddings}
    if isinstance(head, QUANTIZED):  # not all transformers say it of their own
        names["head"] = head.out_features
    for layer, where in ((table, "table"), (head, "head")):
        for name, tensor in layer.named_parameters():
            if "activation" not in name and tensor.numel():
                names[f"{where}.{name}"] = len(tensor)
    return names


@pytest.mark.parametrize("state", ["qat", "packed"])
@pytest.mark.parametrize(("family", "kind"), CASES)
def test_old_tokens_keep_their_bits_and_new_ones_work(
    family: str, kind: str, state: str, tmp_path: Path
) -> None:
    model, size = converted(family, kind, state), VOCABULARY + 5
    inputs = example(model)
    before = output(model, inputs)
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    table = model.resize_token_embeddings(size)
    assert table is model.get_input_embeddings() and model.config.vocab_size == size
    assert set(rows_of(model).values()) == {size}
    assert (model.get_output_embeddings().weight is table.weight) == tied
    after = output(model, inputs)
    assert after.shape[-1] == size
    torch.testing.assert_close(after[..., :VOCABULARY], before, rtol=1e-5, atol=1e-5)
    new = {"input_ids": torch.full((1, 4), size - 1)}
    expected = output(model, new)
    assert expected.isfinite().all()
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert torch.equal(output(again, new), expected)
    assert torch.equal(output(again, inputs), after)


@pytest.mark.parametrize("state", ["qat", "packed"])
@pytest.mark.parametrize(("family", "kind"), CASES)
def test_removing_tokens_gives_back_what_was_there(family: str, kind: str, state: str) -> None:
    model = converted(family, kind, state)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.resize_token_embeddings(VOCABULARY + 9)
    model.resize_token_embeddings(VOCABULARY)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("state", ["qat", "packed"])
def test_new_rows_start_at_the_mean_of_the_old_ones(state: str) -> None:
    model = converted("llama-tied", "quantized table", state)
    table = model.get_input_embeddings()

    def rows() -> torch.Tensor:
        return (
            table.dequantized_weight() if state == "packed" else table.quantized_weight().detach()
        )

    mean = rows().mean(0)
    model.resize_token_embeddings(VOCABULARY + 3)
    step = float((rows()[-1].max() - rows()[-1].min()) / 14)
    assert (rows()[-3:] - mean).abs().max() <= step
    torch.manual_seed(0)
    model.resize_token_embeddings(VOCABULARY + 300, mean_resizing=False)
    assert 0.5 < rows()[-200:].std() / model.config.initializer_range < 2


def test_a_resized_model_trains_and_packs() -> None:
    model = converted("llama-tied", "quantized table", "qat")
    model.resize_token_embeddings(pad_to_multiple_of=16)
    assert model.config.vocab_size == 80
    ids = torch.full((2, 6), 79)
    model.train()(input_ids=ids, labels=ids).loss.backward()
    table = model.get_input_embeddings()
    assert table.weight.grad[79].abs().sum() > 0 and not table.weight_step.requires_grad
    model.eval()
    before = output(model, {"input_ids": ids})
    pack_model(model)
    assert isinstance(table := model.get_input_embeddings(), PACKED) and len(table.weight) == 80
    torch.testing.assert_close(output(model, {"input_ids": ids}), before, rtol=1e-5, atol=1e-5)


def test_nothing_changes_where_nothing_is_asked_for() -> None:
    model = converted("llama-tied", "quantized table", "qat")
    before = model.get_input_embeddings().weight
    assert isinstance(model.resize_token_embeddings(), QUANTIZED)
    model.resize_token_embeddings(VOCABULARY)
    assert model.get_input_embeddings().weight is before


@pytest.mark.parametrize("rows", [0, -3])
def test_sizes_that_cannot_be_are_refused_at_the_call(rows: int) -> None:
    model = converted("llama-tied", "quantized table", "packed")
    with pytest.raises(ValueError, match=f"{rows} rows: an embedding needs at least one"):
        model.resize_token_embeddings(rows)
    assert set(rows_of(model).values()) == {VOCABULARY}
