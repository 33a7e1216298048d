"""scripts/evaluate_model.py on tiny models saved to a folder."""

import json
from importlib import import_module

import pytest
from datasets import Dataset
from transformers import BertConfig, BertForSequenceClassification

from maqd_hf.evaluation.perplexity import text_perplexity


@pytest.fixture
def script():
    return import_module("scripts.evaluate_model")


@pytest.fixture
def saved_llama(tiny_llama, byte_tokenizer, tmp_path):
    tiny_llama.save_pretrained(tmp_path / "llama")
    byte_tokenizer.save_pretrained(tmp_path / "llama")
    return str(tmp_path / "llama")


def run(script, *words):
    """The report of the script run with these words on its command line."""
    return script.main([str(word) for word in words])


def test_two_models_see_the_same_windows(
    script, saved_llama, tiny_llama, tiny_gpt2, byte_tokenizer, sample_text, tmp_path, capsys
):
    tiny_gpt2.save_pretrained(tmp_path / "gpt2")
    byte_tokenizer.save_pretrained(tmp_path / "gpt2")
    (tmp_path / "text.txt").write_text(sample_text[:2000], encoding="utf-8")
    output = tmp_path / "results.json"
    options = ["--window", 64, "--stride", 32, "--max_windows", 9, "--batch_size", 4]
    source = ["--model", saved_llama, tmp_path / "gpt2", "--dataset", tmp_path / "text.txt"]
    run(script, *source, *options, "--output", output)
    report = json.loads(output.read_text(encoding="utf-8"))
    first, second = report["results"]
    expected = text_perplexity(
        tiny_llama, byte_tokenizer, [sample_text[:2000]], 64, 32, max_windows=9
    )
    assert first["perplexity"] == pytest.approx(expected.perplexity, rel=1e-6)
    assert first["protocol"] == second["protocol"] == expected.protocol
    assert first["tokens"] == second["tokens"] == expected.tokens
    assert first["ratio_to_first"] == 1
    assert second["ratio_to_first"] == second["perplexity"] / first["perplexity"]
    assert first["bits_per_weight"] == 32
    assert set(report["versions"]) >= {"maqd_hf", "torch", "transformers"}
    printed = capsys.readouterr().out
    assert "bits/weight" in printed
    assert f"{first['perplexity']:.4f}" in printed
    assert expected.protocol in printed


def test_dtype_and_bos_of_separate_texts_are_those_asked_for(
    script, saved_llama, sample_text, tmp_path
):
    texts = sample_text[:1000].split("\n\n")
    Dataset.from_dict({"body": texts}).to_parquet(tmp_path / "x.parquet")
    source = ["--model", saved_llama, "--dataset", tmp_path / "x.parquet", "--window", 64]
    report = run(script, *source, "--dtype", "bfloat16", "--join", "separate", "--add_bos", "true")
    (row,) = report["results"]
    assert row["dtype"] == "bfloat16"
    assert row["tokens"] == sum(len(text.encode()) for text in texts)
    assert "each text on its own" in row["protocol"]
    assert "BOS in front of each" in row["protocol"]


def test_different_tokenizers_are_reported(
    script, saved_llama, tiny_llama, byte_tokenizer, sample_text, tmp_path, capsys
):
    byte_tokenizer.add_tokens(["the"])
    tiny_llama.resize_token_embeddings(len(byte_tokenizer))
    tiny_llama.save_pretrained(tmp_path / "other")
    byte_tokenizer.save_pretrained(tmp_path / "other")
    (tmp_path / "text.txt").write_text(sample_text[:500], encoding="utf-8")
    source = ["--model", saved_llama, tmp_path / "other", "--dataset", tmp_path / "text.txt"]
    run(script, *source, "--window", 64)
    assert "The tokenizers differ" in capsys.readouterr().out


def test_a_classifier_is_measured_by_its_accuracy(script, byte_tokenizer, tmp_path, capsys):
    config = BertConfig(
        vocab_size=len(byte_tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_labels=3,
    )
    model = BertForSequenceClassification(config)
    model.classifier.weight.data.zero_()
    model.classifier.bias.data = model.classifier.bias.new_tensor([0.0, 1.0, 0.0])  # always says 1
    model.save_pretrained(tmp_path / "bert")
    byte_tokenizer.save_pretrained(tmp_path / "bert")
    data = {"sentence": ["a", "bb", "ccc", "dd", "e"], "label": [1, 1, 0, 2, 1]}
    Dataset.from_dict(data).to_parquet(tmp_path / "x.parquet")
    common = ["--task", "classification", "--model", tmp_path / "bert", "--batch_size", 2]
    common += ["--dataset", tmp_path / "x.parquet"]
    report = run(script, *common)  # the only column of strings
    assert report["results"][0]["accuracy"] == pytest.approx(3 / 5)
    assert report["results"][0]["tokens"] == 9
    assert "0.6000" in capsys.readouterr().out
    report = run(script, *common, "--text_column", "sentence", "--max_texts", 3)
    assert report["results"][0]["accuracy"] == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="no column 'text' of strings; there are \\['sentence'\\]"):
        run(script, *common, "--text_column", "text")
