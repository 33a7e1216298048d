"""The shipped `evaluate` modules load offline and give what the plain functions give."""

import evaluate
import pytest

import maqd_hf.metrics
from maqd_hf.evaluation.perplexity import text_perplexity


def test_path_lists_what_there_is():
    with pytest.raises(ValueError, match="ships: accuracy, token_perplexity"):
        maqd_hf.metrics.path("perplexity")


def test_accuracy_is_the_share_of_equal_classes():
    metric = evaluate.load(maqd_hf.metrics.path("accuracy"))
    metric.add_batch(predictions=[0, 1, 2], references=[0, 1, 1])
    metric.add_batch(predictions=[1], references=[1])
    assert metric.compute() == {"accuracy": 0.75}


@pytest.mark.parametrize("join", ["\n\n", None])
def test_token_perplexity_is_that_of_the_package(tiny_llama, byte_tokenizer, sample_text, join):
    texts = sample_text[:1000].split("\n\n")
    options = {"window": 64, "stride": 32, "batch_size": 2, "join": join, "max_windows": 7}
    metric = evaluate.load(maqd_hf.metrics.path("token_perplexity"))
    values = metric.compute(
        predictions=texts, model=tiny_llama, tokenizer=byte_tokenizer, **options
    )
    expected = text_perplexity(tiny_llama, byte_tokenizer, texts, **options)
    assert values["perplexity"] == pytest.approx(expected.perplexity, rel=1e-9)
    assert values["tokens"] == expected.tokens
    assert values["bits_per_byte"] == pytest.approx(expected.bits_per_byte)
    assert values["protocol"] == expected.protocol


def test_token_perplexity_from_a_folder(tiny_llama, byte_tokenizer, sample_text, tmp_path):
    tiny_llama.save_pretrained(tmp_path)
    byte_tokenizer.save_pretrained(tmp_path)
    metric = evaluate.load(maqd_hf.metrics.path("token_perplexity"))
    texts = [sample_text[:300]]
    values = metric.compute(predictions=texts, model=str(tmp_path), window=64, device="cpu")
    expected = text_perplexity(tiny_llama, byte_tokenizer, texts, 64)
    assert values["perplexity"] == pytest.approx(expected.perplexity, rel=1e-6)


def test_errors_say_what_to_pass(tiny_llama):
    metric = evaluate.load(maqd_hf.metrics.path("token_perplexity"))
    with pytest.raises(ValueError, match="Pass model="):
        metric.compute(predictions=["a"])
    with pytest.raises(ValueError, match="Pass tokenizer="):
        metric.compute(predictions=["a"], model=tiny_llama)
