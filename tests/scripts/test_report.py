"""scripts/bench/report and docs/settings.md: pages say what results and code say, and no more."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import MISSING, Field, fields
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from matplotlib import pyplot
from matplotlib.text import Text

from maqd_hf import MaQDConfig, MaQDTrainingArguments
from maqd_hf.evaluation.model_card import NOT_MEASURED
from scripts.bench.report import lines, render
from scripts.bench.report.summary import SPEEDS, six_rows

ROOT = Path(__file__).parents[2]


# ---------------------------------------------------------------------------------------- tables


def rows_of(text: str) -> dict[str, list[str]]:
    """Cells of a Markdown table's rows, by the first of them."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {first: rest for first, *rest in cells[2:]}


def write(root: Path, **files: Any) -> Path:
    (root / "results").mkdir(exist_ok=True)
    for name, content in files.items():
        (root / "results" / f"{name}.json").write_text(json.dumps(content), "utf-8")
    return root


def test_pages_say_what_results_say():
    assert render.main(["--check"]) == 0


def test_a_page_that_was_edited_by_hand_is_stale_until_it_is_rendered(tmp_path):
    shutil.copytree(ROOT / "results", tmp_path / "results")
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text("before\n<!-- table -->\n99\n<!-- /table -->\nafter\n")
    asked = ["--root", str(tmp_path)]
    assert render.main([*asked, "--check"]) == 1
    assert render.main(asked) == 0
    assert render.main([*asked, "--check"]) == 0
    text = (tmp_path / "README.md").read_text("utf-8")
    assert text.startswith("before\n<!-- table -->\n| weights |") and text.endswith("-->\nafter\n")
    assert "99\n" not in text


def test_a_cell_that_no_file_holds_is_not_measured(tmp_path):
    rows = rows_of(six_rows(write(tmp_path)))
    assert len(rows) == 6
    assert all(cells == [NOT_MEASURED] * 3 for cells in rows.values())


def test_cells_of_the_six_rows_are_those_of_the_files(tmp_path):
    model = {"model": "smollm2-135m-instruct", "busy": 0, "threads": 2}
    run = {"table": "llm", "method": "MaQD", "start": "gptq", "samples": 1, "block_size": 1}
    text = {"wikitext": {"perplexity": 41.26}}
    write(
        tmp_path,
        main_job={"float_bytes": 7_000_000},
        quality={
            "runs": [
                {**run, "name": "MaQD M=4 g64", "tokens": 1, "texts": text},
                {**run, "name": "MaQD M=4 g64", "tokens": 2,
                 "texts": {"wikitext": {"perplexity": 40.04}}},
                {**run, "table": "rules", "name": "MaQD M=3 g64", "texts": text},
            ]
        },
        **{SPEEDS.removesuffix(".json"): {
            "models": [
                {**model, "name": "maqd 2 bit g64, 8-bit head", "file_bytes": 2_400_000,
                 "tokens_per_second": 12.4},
                {**model, "name": "maqd 2 bit g64, 8-bit head", "file_bytes": 1, "threads": 1,
                 "tokens_per_second": 99.0},
                {**model, "name": "maqd ternary, 8-bit head", "file_bytes": 2_000_000,
                 "tokens_per_second": 13.6},
            ]
        }},
    )  # fmt: skip
    rows = rows_of(six_rows(tmp_path))
    assert rows["16 bit, float"] == ["7 MB", NOT_MEASURED, NOT_MEASURED]
    assert rows["2 bit, 4 levels"] == ["2 MB", "40.0", "12"]
    assert rows["1.6 bit, 3 levels"] == [NOT_MEASURED] * 3, "one scale a row is another model"


@pytest.mark.parametrize("section", render.SECTIONS, ids=lambda section: section.title)
def test_the_file_and_the_command_of_a_section_exist(section):
    assert list((ROOT / "results").glob(section.files))
    name = section.command.split()[2 if " -m " in section.command else 1]
    path = name.removesuffix(".py").replace(".", "/") + ".py"
    assert (ROOT / path).exists()
    assert all((ROOT / "docs" / "plots" / file).exists() for _, file in section.pictures)


# ----------------------------------------------------------------------------------------- plots


@pytest.fixture
def axes():
    figure, axes = pyplot.subplots(figsize=(8, 5), dpi=110)
    yield axes
    pyplot.close(figure)


@pytest.mark.parametrize("ours", [False, True])
def test_no_two_series_are_alike(ours):
    assert len({str(lines.style(index, ours)) for index in range(60)}) == 60


def test_names_of_lines_that_end_together_do_not_overlap(axes):
    drawn = [
        axes.plot([0, 1], [0, 1 + index / 100], label=f"line {index}")[0] for index in range(12)
    ]
    drawn += axes.plot([0, 0.5], [1, 1], label="a line that ends before the others")
    axes.figure.subplots_adjust(right=0.7)
    lines.label_lines(axes, drawn)
    axes.figure.canvas.draw()
    boxes = [Text.get_window_extent(text) for text in axes.texts]  # without the tie
    assert {text.get_text() for text in axes.texts} == {line.get_label() for line in drawn}
    for index, box in enumerate(boxes):
        others = (other for other in boxes[index + 1 :])
        assert not any(
            min(box.x1, other.x1) > max(box.x0, other.x0) + 1
            and min(box.y1, other.y1) > max(box.y0, other.y0) + 1
            for other in others
        )
        assert box.x1 <= axes.figure.bbox.x1


def test_no_ceiling_of_the_roofline_lies_below_a_point():
    plots = import_module("scripts.bench.report.plots")
    for name in ("speed.json", "speed-avx512.json"):
        figure = plots.roofline(json.loads((ROOT / "results" / name).read_text("utf-8")))
        drawn = figure.axes[0].lines
        (roof,) = (line for line in drawn if line.get_linewidth() == 2)
        (left, low), (_, top), _ = roof.get_xydata()
        for line in (line for line in drawn if not str(line.get_label()).startswith("_")):
            for x, y in line.get_xydata():
                assert y <= 1.0001 * min(top, low / left * x)
        pyplot.close(figure)


# -------------------------------------------------------------------------------------- settings


def default_of(field: Field[Any]) -> str:
    if field.default is not MISSING:
        return repr(field.default)
    return repr(field.default_factory()) if field.default_factory is not MISSING else "required"


def own_training_arguments() -> list[Field[Any]]:
    own = MaQDTrainingArguments.__annotations__
    return [field for field in fields(MaQDTrainingArguments) if field.name in own]


def arguments_of(script: str, name: str) -> list[Field[Any]]:
    return list(fields(getattr(import_module(f"scripts.{script}"), name)))


@pytest.mark.parametrize(
    "heading, expected",
    [
        ("MaQDConfig", lambda: fields(MaQDConfig)),
        ("MaQDTrainingArguments", own_training_arguments),
        ("scripts/qat_llm.py", lambda: arguments_of("qat_llm", "JobArguments")),
        ("scripts/qat_encoder.py", lambda: arguments_of("qat_encoder", "JobArguments")),
        ("scripts/quantize_ptq.py", lambda: arguments_of("quantize_ptq", "Arguments")),
        ("scripts/evaluate_model.py", lambda: arguments_of("evaluate_model", "Arguments")),
    ],
)
def test_the_page_of_settings_has_every_setting_with_its_default(heading, expected):
    page = (ROOT / "docs" / "settings.md").read_text("utf-8")
    section = re.split(r"^## ", page, flags=re.MULTILINE)
    (text,) = (part for part in section if part.splitlines()[0] == heading)
    rows = re.findall(r"^\| `(\w+)` \| `(.+?)` \|", text, re.MULTILINE)
    assert len(rows) == len(dict(rows))
    assert dict(rows) == {field.name: default_of(field) for field in expected()}
