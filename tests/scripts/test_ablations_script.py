"""The script that changes one setting at a time, on data of a few kilobytes."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset


def test_rows_differ_in_one_setting_and_are_not_repeated(
    tiny_llama: Any,
    byte_tokenizer: Any,
    sample_text: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    script = import_module("scripts.experiments.ablations")
    monkeypatch.setattr(script, "BLOCK", 32)
    model = tmp_path / "data" / "models" / "stories260K"
    tiny_llama.save_pretrained(model)
    byte_tokenizer.save_pretrained(model)
    for text in (script.STORIES, script.WIKIPEDIA):
        (tmp_path / "data" / text).mkdir()
        rows = Dataset.from_dict({"text": [sample_text[:20_000]]})
        rows.to_parquet(tmp_path / "data" / text / "train.parquet")
    arguments = script.Arguments(
        data_dir=tmp_path / "data",
        results=tmp_path / "results" / "ablations.json",
        rows=["as it is", "surrogate tanh", "latents in bfloat16", "text: *"],
        seeds=[0],
        steps=3,
    )
    runs = script.main(arguments)
    names = ["as it is", "surrogate tanh", "latents in bfloat16"]
    names += ["text: Wikipedia", "text: the model's own"]
    assert [run["name"] for run in runs] == names
    first, *others = runs
    assert all(run["start"] == first["start"] for run in others[:2]), "one start, then they differ"
    assert all(run["trained"] != first["trained"] for run in others)
    assert runs == json.loads(arguments.results.read_text("utf-8"))
    assert script.main(arguments) == runs
    assert "surrogate tanh" in capsys.readouterr().out
