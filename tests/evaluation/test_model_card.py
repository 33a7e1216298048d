"""A card says what was measured, and that something was not; it invents nothing."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from maqd_hf.evaluation.model_card import NOT_MEASURED, model_card, write_card

METRICS: Any = {
    "evaluations": [
        {
            "text": "WikiText-2 raw, test",
            "dataset": "Salesforce/wikitext",
            "config": "wikitext-2-raw-v1",
            "split": "test",
            "values": {"float": 32.412345, "packed": 45.0712},
            "protocol": "windows of 512 tokens, stride 512, 4,096 tokens counted",
        },
        {"text": "IMDB, test", "dataset": "stanfordnlp/imdb", "values": {"packed": 58.125}},
    ],
    "bits_per_weight": 4.3125,
    "packed_bytes": 81_234_567,
    "float_bytes": 269_060_552,
    "command": "python scripts/evaluate_model.py run/model",
}
REPORT = {
    "static norms": [f"model.layers.{i}.{n}_layernorm" for i in range(3) for n in ("in", "post")],
    "norms per token": ["model.norm"],
    "left in float": {"lm_head": "tied to the embedding"},
}
CONFIG = {"quant_method": "maqd", "weight_levels": 16, "group_size": None, "modules": ["a", "b"]}


def make(metrics: Any, **changes: Any) -> ModelCard:
    arguments: dict[str, Any] = {
        "base_model": "some/base",
        "report": REPORT,
        "config": CONFIG,
        "license": "apache-2.0",
    }
    return model_card("someone/tiny-maqd", metrics=metrics, **(arguments | changes))


def front_matter(card: ModelCard) -> Any:
    return card.data


def code_blocks(card: ModelCard) -> list[str]:
    return re.findall(r"```\w+\n(.*?)\n```", card.text, re.DOTALL)


def row(card: ModelCard, label: str) -> list[str]:
    """The cells of the table row that begins with `label`."""
    (line,) = (line for line in card.text.splitlines() if line.startswith(f"| {label} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_card_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    card = make(METRICS)
    card.save(tmp_path / "README.md")
    loaded = ModelCard.load(tmp_path / "README.md")
    assert loaded.content == card.content
    assert front_matter(loaded).to_dict() == front_matter(card).to_dict()


def test_the_front_matter_has_what_the_hub_asks_for() -> None:
    data = front_matter(make(METRICS))
    assert data.base_model == "some/base"
    assert data["base_model_relation"] == "quantized"
    assert data.license == "apache-2.0"
    assert data.library_name == "transformers"
    assert data.pipeline_tag == "text-generation"
    assert "maqd" in data.tags


def test_model_index_holds_the_measured_numbers_unrounded() -> None:
    results = front_matter(make(METRICS)).eval_results
    assert {(r.dataset_type, r.metric_name): r.metric_value for r in results} == {
        ("Salesforce/wikitext", "perplexity, packed"): 45.0712,
        ("Salesforce/wikitext", "perplexity, float"): 32.412345,
        ("stanfordnlp/imdb", "perplexity, packed"): 58.125,
    }
    assert results[0].dataset_config == "wikitext-2-raw-v1"
    assert results[0].dataset_split == "test"


def test_usage_is_five_lines_and_begins_with_the_import() -> None:
    lines = code_blocks(make(METRICS))[0].splitlines()
    assert lines[0] == "import maqd_hf"
    assert len(lines) == 5
    assert '"someone/tiny-maqd"' in lines[3]
    compile("\n".join(lines), "card", "exec")


def test_text_shows_every_number_of_the_metrics() -> None:
    card = make(METRICS)
    assert row(card, "WikiText-2 raw, test")[1:] == ["perplexity", "32.412", "45.071"]
    assert row(card, "IMDB, test")[1:] == ["perplexity", NOT_MEASURED, "58.125"]
    assert row(card, "bits per weight")[1] == "4.3125"
    assert row(card, "file size, packed")[1] == "81.23 MB (81,234,567 bytes)"
    assert row(card, "file size, float")[1] == "269.06 MB (269,060,552 bytes)"
    assert "WikiText-2 raw, test: windows of 512 tokens, stride 512" in card.text
    assert "IMDB, test: not recorded" in card.text
    assert METRICS["command"] in card.text


@pytest.mark.parametrize("metrics", [{}, {"evaluations": []}, {"bits_per_weight": None}])
def test_without_measurements_every_number_is_named_missing(metrics: Any) -> None:
    card = make(metrics)
    assert row(card, "any text")[2:] == [NOT_MEASURED] * 2
    for label in ("bits per weight", "file size, packed", "file size, float"):
        assert row(card, label)[1] == NOT_MEASURED
    assert front_matter(card).eval_results is None
    assert "model_name" not in front_matter(card).to_dict()


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_diverged_model_is_shown_but_not_indexed(value: float) -> None:
    card = make({"evaluations": [{"text": "IMDB", "values": {"packed": value}}]})
    assert row(card, "IMDB")[3] == str(value)
    assert front_matter(card).eval_results is None


def test_an_evaluation_must_say_what_it_was_measured_on() -> None:
    with pytest.raises(ValueError, match='needs "text"'):
        make({"evaluations": [{"values": {"packed": 1.0}}]})


def test_report_says_which_norms_are_static_and_which_are_not() -> None:
    text = make(METRICS).text
    names = "`model.layers.*.in_layernorm`, `model.layers.*.post_layernorm`"
    assert f"- static norms: 6 ({names})\n" in text
    assert "- norms per token: 1 (`model.norm`)\n" in text
    assert "- left in float: 1 (`lm_head`), tied to the embedding\n" in text
    assert "- static norms: none\n" in make({}, report={"static norms": []}).text
    assert code_blocks(make({}, report="42 of 43 layers"))[1] == "42 of 43 layers"


def test_settings_and_training_are_shown() -> None:
    card = make(METRICS, training={"optimizer_steps": 600, "teacher": None})
    assert row(card, "weight levels")[1] == "16"
    assert row(card, "group size")[1] == "none"
    assert row(card, "optimizer steps")[1] == "600"
    assert "modules" not in card.text.split("## Training")[0].split("## What was quantized")[1]
    assert "Not recorded." in make(METRICS).text


def test_nothing_of_the_template_is_left_and_the_paper_is_cited() -> None:
    for card in (make(METRICS), make({}, base_model=None, license=None)):
        assert not re.search(r"\{\{ |\{% | \}\}|\bNone\b|\n{3}", card.text)
        assert "2403.14999" in code_blocks(card)[-1]
        assert "pip install maqd_hf" in card.text
        assert "## Limits" in card.text
    assert "base_model_relation" not in front_matter(card).to_dict()


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    record = METRICS | {
        "model_id": "someone/tiny-maqd",
        "base_model": "some/base",
        "report": REPORT,
    }
    (tmp_path / "model").mkdir()
    (tmp_path / "metrics.json").write_text(json.dumps(record))
    (tmp_path / "model" / "config.json").write_text(json.dumps({"quantization_config": CONFIG}))
    return tmp_path


def test_write_card_reads_the_folder_of_a_run(run_dir: Path) -> None:
    path = write_card(run_dir)
    assert path == run_dir / "README.md"
    assert ModelCard.load(path).content == make(METRICS, license=None).content
    (run_dir / "plot.png").touch()
    assert "](plot.png)" in write_card(run_dir).read_text()


def test_write_card_names_what_the_folder_lacks(run_dir: Path) -> None:
    (run_dir / "metrics.json").write_text("{}")
    with pytest.raises(ValueError, match='has no "model_id"'):
        write_card(run_dir)
    (run_dir / "model" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="is no maqd_hf model"):
        write_card(run_dir)
    (run_dir / "metrics.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"metrics\.json"):
        write_card(run_dir)
