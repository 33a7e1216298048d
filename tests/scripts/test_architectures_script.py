"""scripts/experiments/architectures.py: what counts as working, refused, failed and not tried."""

import json
from importlib import import_module

import pytest


@pytest.fixture
def script():
    return import_module("scripts.experiments.architectures")


def rows_of(file):
    return {row["name"]: row for row in json.loads(file.read_text("utf-8"))["rows"]}


def test_outcomes_are_told_apart(best, script, tmp_path, monkeypatch, capsys):
    """A decoder with a native step, an encoder, an encoder-decoder, one that has no small form."""
    file = tmp_path / "results" / "architectures.json"
    names = ["LlamaForCausalLM", "BertForMaskedLM", "MBartForConditionalGeneration"]
    script.main(["--results", str(file), "--classes", *names])
    llama, bert, bart = (rows_of(file)[name] for name in names)
    assert (llama["result"], llama["native"]) == ("works", True)
    assert (bert["result"], bert["native"]) == ("works", False)
    assert bart["result"] == "refused" and "encoder-decoder" in bart["reason"]
    assert "works: 2" in capsys.readouterr().out
    with monkeypatch.context() as patch:
        patch.setattr(script, "MOST_WEIGHTS", 1000)
        script.main(["--results", str(file), "--classes", "GPT2LMHeadModel"])
    gpt2 = rows_of(file)["GPT2LMHeadModel"]
    assert gpt2["result"] == "not tried" and "million weights" in gpt2["reason"]

    def broken(*args, **kwargs):
        raise OSError("no such file")

    monkeypatch.setattr(script, "pack_model", broken)
    script.main(["--results", str(file), "--classes", "LlamaForCausalLM"])
    rows = rows_of(file)
    assert rows["LlamaForCausalLM"]["result"] == "failed"
    assert "no such file" in rows["LlamaForCausalLM"]["reason"]
    assert rows["BertForMaskedLM"] == bert, "what is known of others stays"


def test_what_differs_after_loading_has_failed(script, monkeypatch):
    distances = iter([0.0, 0.0, 1.0])
    monkeypatch.setattr(script, "apart", lambda one, other: next(distances))
    outcome = script.attempt("GPT2LMHeadModel", "causal language models")
    assert outcome.result == "failed" and "loaded and saved are 1.0e+00 apart" in outcome.reason
