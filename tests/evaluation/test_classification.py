"""Predictions in the order of the texts, whatever the batches; errors that say what to do."""

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from maqd_hf import MaQDConfig, quantize_model
from maqd_hf.calibration import calibrate
from maqd_hf.evaluation.classification import classify

TEXTS = ["a", "the longest of all of these", "bb", "ccc c", "dd dd dd"]


@pytest.fixture
def classifier(byte_tokenizer):
    config = BertConfig(
        vocab_size=len(byte_tokenizer),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_labels=5,
        initializer_range=0.5,
        max_position_embeddings=32,
    )
    return BertForSequenceClassification(config)


def one_by_one(model, tokenizer, texts):
    model.eval()
    with torch.no_grad():
        rows = [model(**tokenizer(text, return_tensors="pt")).logits for text in texts]
    return torch.cat(rows).argmax(-1).tolist()


@pytest.mark.parametrize("batch_size", [1, 2, 5])
@pytest.mark.parametrize("quantized", [False, True])
def test_classes_are_those_of_each_text_alone(classifier, byte_tokenizer, batch_size, quantized):
    if quantized:
        quantize_model(classifier, MaQDConfig(weight_levels=16, first_token="shared"))
        calibrate(classifier, [byte_tokenizer(TEXTS, padding=True, return_tensors="pt")])
    wanted = one_by_one(classifier, byte_tokenizer, TEXTS)
    assert len(set(wanted)) > 1
    classifier.train()
    found = classify(classifier, byte_tokenizer, TEXTS, batch_size=batch_size)
    assert found.classes == wanted
    assert found.tokens == sum(map(len, TEXTS))
    assert found.tokens_per_second > 0
    assert classifier.training


def test_long_texts_are_cut(classifier, byte_tokenizer):
    found = classify(classifier, byte_tokenizer, ["abc", "x" * 100], max_length=8)
    assert found.classes == one_by_one(classifier, byte_tokenizer, ["abc", "x" * 8])
    assert found.tokens == 3 + 8


def test_nothing_to_classify_and_models_without_classes_are_refused(
    classifier, tiny_bert, byte_tokenizer
):
    with pytest.raises(ValueError, match="no texts"):
        classify(classifier, byte_tokenizer, [])
    with pytest.raises(ValueError, match="AutoModelForSequenceClassification"):
        classify(tiny_bert, byte_tokenizer, TEXTS)


def test_padding_alone_and_nan_have_no_class(classifier, byte_tokenizer):
    with pytest.raises(ValueError, match=r"text 1 of 2, '', has no token"):
        classify(classifier, byte_tokenizer, ["abc", ""])
    with pytest.raises(ValueError, match=r"text 0 of 1, '', has no token"):
        classify(classifier, byte_tokenizer, [""])
    with torch.no_grad():
        classifier.classifier.bias[0] = float("nan")
    with pytest.raises(FloatingPointError, match="not finite"):
        classify(classifier, byte_tokenizer, ["abc"])


def test_every_module_keeps_its_own_mode(classifier, byte_tokenizer):
    classifier.train()
    classifier.bert.encoder.eval()
    modes = {name: module.training for name, module in classifier.named_modules()}
    classify(classifier, byte_tokenizer, TEXTS)
    assert {name: module.training for name, module in classifier.named_modules()} == modes
    with pytest.raises(ValueError, match="no token"):
        classify(classifier, byte_tokenizer, [""])
    assert {name: module.training for name, module in classifier.named_modules()} == modes
