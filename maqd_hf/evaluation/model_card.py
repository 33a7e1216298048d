"""Model cards whose every number is read from a file that a command wrote.

`write_card` turns the folder of a run into its README.md:

    run/metrics.json       what was measured and recorded (see `RunRecord`); required
    run/model/config.json  the packed model; its `quantization_config` gives the settings
    run/plot.png           shown if it is there
    run/README.md          written

A number that metrics.json lacks is printed as "not measured": nothing is filled in by hand.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, TypedDict

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..models.names import collapse

NOT_MEASURED = "not measured"


class Evaluation(TypedDict, total=False):
    """One text (or task) on which the float and the packed model were measured alike."""

    text: str
    """What it was measured on, for people: "WikiText-2 raw, test". Required."""
    dataset: str
    """Its id on the Hub ("Salesforce/wikitext"); `text` stands in if there is none."""
    config: str
    split: str
    metric: str
    """Its name, "perplexity" if there is none."""
    values: dict[str, float | None]
    """What was measured: {"float": ..., "packed": ...}."""
    protocol: str
    """One sentence: join, window, stride, BOS, tokens counted."""


class Metrics(TypedDict, total=False):
    """The measured part of metrics.json. Every key may be missing."""

    evaluations: list[Evaluation]
    bits_per_weight: float
    packed_bytes: int
    float_bytes: int
    command: str
    """The command that wrote the numbers."""


class RunRecord(Metrics, total=False):
    """metrics.json: what was measured, and the arguments of `model_card` beside it."""

    model_id: str
    base_model: str | None
    task: str
    license: str | None
    report: dict[str, Any] | str
    training: dict[str, Any] | None


def model_card(
    model_id: str,
    *,
    base_model: str | None,
    metrics: Metrics,
    report: Mapping[str, Any] | str,
    config: Mapping[str, Any],
    training: Mapping[str, Any] | None = None,
    license: str | None = None,
    task: str = "text-generation",
    plot: str | None = None,
) -> ModelCard:
    """The card of a packed model.

    Args:
        model_id: id on the Hub ("name" or "user/name"); the usage block loads it.
        base_model: id of the float model, None if it was trained from scratch.
        metrics: the measured numbers; each one that is missing reads "not measured".
        report: what was converted and what was not, as text or as lists of module names by
            heading, for example {"static norms": [...], "norms per token": [...]}.
        config: the settings, as in `quantization_config`; only scalars are shown.
        training: the record of the training as scalars, None if there was none.
        license: license id of the Hub, None to refer to the base model.
        task: pipeline tag of the Hub.
        plot: path of a picture beside the card.

    Raises:
        ValueError: an evaluation without a "text".

    >>> card = model_card("me/tiny", base_model=None, metrics={"bits_per_weight": 4.25},
    ...                   report={"static norms": []}, config={"weight_levels": 16})
    >>> print(card.text[card.text.index("| bits"):].splitlines()[0])
    | bits per weight | 4.25 |
    >>> print(card.text[card.text.index("| file"):].splitlines()[0])
    | file size, packed | not measured |
    """
    evaluations = metrics.get("evaluations", [])
    for evaluation in evaluations:
        if "text" not in evaluation:
            raise ValueError(
                f'an evaluation needs "text", the name of what it was measured on; got {evaluation}'
            )
    name = model_id.split("/")[-1]
    template = files("maqd_hf.evaluation").joinpath("templates/model_card.md")
    card: ModelCard = ModelCard.from_template(
        _front_matter(name, base_model, evaluations, license, task),
        template_str=template.read_text("utf-8"),
        model_name=name,
        base_model=base_model,
        model_id=model_id,
        task=task,
        evaluations=_evaluation_table(evaluations),
        protocols=_bullets(
            f"{e['text']}: {e.get('protocol', 'not recorded')}" for e in evaluations
        ),
        bits_per_weight=_number(metrics.get("bits_per_weight")),
        packed_size=_size(metrics.get("packed_bytes")),
        float_size=_size(metrics.get("float_bytes")),
        command=metrics.get("command"),
        settings=_scalar_table("setting", config),
        report=_report(report),
        training=_scalar_table("training", training) if training else "Not recorded.",
        license=license,
        plot=plot,
    )
    return card


def write_card(run_dir: str | Path) -> Path:
    """Write `run_dir`/README.md from the files of the run (named at the head of this module).

    Raises:
        FileNotFoundError: metrics.json or model/config.json is missing.
        ValueError: metrics.json has no "model_id", or the model is not quantized by maqd_hf.
    """
    run_dir = Path(run_dir)
    record: RunRecord = json.loads((run_dir / "metrics.json").read_text("utf-8"))
    model_config = json.loads((run_dir / "model" / "config.json").read_text("utf-8"))
    config = model_config.get("quantization_config", {})
    if config.get("quant_method") != "maqd":
        raise ValueError(
            f"{run_dir / 'model'} is no maqd_hf model: its config.json has quant_method "
            f"{config.get('quant_method')!r}, not 'maqd'. Save the packed model there first."
        )
    if "model_id" not in record:
        raise ValueError(
            f'{run_dir / "metrics.json"} has no "model_id", the name under which the card tells '
            "the reader to load the model; write it there."
        )
    card = model_card(
        record["model_id"],
        base_model=record.get("base_model"),
        metrics=record,
        report=record.get("report", "Not recorded."),
        config=config,
        training=record.get("training"),
        license=record.get("license"),
        task=record.get("task", "text-generation"),
        plot="plot.png" if (run_dir / "plot.png").is_file() else None,
    )
    path = run_dir / "README.md"
    card.save(path)
    return path


def _front_matter(
    name: str,
    base_model: str | None,
    evaluations: Sequence[Evaluation],
    license: str | None,
    task: str,
) -> ModelCardData:
    """What the Hub reads from a card: where the model comes from, and the measured numbers."""
    results = list(_eval_results(evaluations, task))
    data = ModelCardData(
        base_model=base_model,
        eval_results=results or None,
        library_name="transformers",
        license=license,
        model_name=name if results else None,
        pipeline_tag=task,
        tags=["maqd", "quantized"],
    )
    if base_model:
        data["base_model_relation"] = "quantized"
    return data


def _eval_results(evaluations: Iterable[Evaluation], task: str) -> Iterable[EvalResult]:
    """The front matter's model-index: finite measured numbers only, at full precision."""
    for evaluation in evaluations:
        metric = evaluation.get("metric", "perplexity")
        values = evaluation.get("values", {})
        for state in ("packed", "float"):
            value = values.get(state)
            if value is not None and math.isfinite(value):
                yield EvalResult(
                    task_type=task,
                    dataset_type=evaluation.get("dataset", evaluation["text"]),
                    dataset_name=evaluation["text"],
                    dataset_config=evaluation.get("config"),
                    dataset_split=evaluation.get("split"),
                    metric_type=metric,
                    metric_value=value,
                    metric_name=f"{metric}, {state}",
                )


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; a bar inside a cell is escaped.

    >>> print(markdown_table(("levels", "bits"), [("16", "4")]))
    | levels | bits |
    | --- | --- |
    | 16 | 4 |
    """
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines
    )


def _evaluation_table(evaluations: Sequence[Evaluation]) -> str:
    rows = [
        (
            evaluation["text"],
            evaluation.get("metric", "perplexity"),
            *(_number(evaluation.get("values", {}).get(state)) for state in ("float", "packed")),
        )
        for evaluation in evaluations
    ]
    if not rows:
        rows = [("any text", "perplexity", NOT_MEASURED, NOT_MEASURED)]
    return markdown_table(("measured on", "metric", "float", "packed"), rows)


def _report(report: Mapping[str, Any] | str) -> str:
    """Text as it is; lists of module names as one line per heading, layer numbers collapsed."""
    if isinstance(report, str):
        return f"```text\n{report.strip()}\n```"
    return _bullets(f"{heading}: {_modules(names)}" for heading, names in report.items())


def _modules(names: Any) -> str:
    """`layers.0.norm, layers.1.norm` -> "2 (`layers.*.norm`)"; a mapping keeps its reasons."""
    if isinstance(names, Mapping):
        reasons: dict[str, list[str]] = {}
        for name, reason in names.items():
            reasons.setdefault(str(reason), []).append(name)
        return "; ".join(f"{_modules(group)}, {why}" for why, group in reasons.items()) or "none"
    if isinstance(names, str) or not isinstance(names, Iterable):
        return str(names)
    names = list(names)
    patterns = collapse(names, star=True)
    return f"{len(names)} ({', '.join(f'`{p}`' for p in patterns)})" if names else "none"


def _scalar_table(heading: str, values: Mapping[str, Any]) -> str:
    rows = [
        (name.replace("_", " "), "none" if value is None else str(value))
        for name, value in values.items()
        if not isinstance(value, (Mapping, list, tuple))
    ]
    return markdown_table((heading, "value"), rows)


def _bullets(items: Iterable[str]) -> str:
    return "\n".join(f"- {item}" for item in items)


def _number(value: float | None) -> str:
    return NOT_MEASURED if value is None else f"{value:.5g}"


def _size(size: int | None) -> str:
    return NOT_MEASURED if size is None else f"{size / 1e6:.2f} MB ({size:,} bytes)"
