"""The scripts that measure Layer-Batch Normalization, on data of a few kilobytes."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, Features, Image, Value


@pytest.fixture
def data(tmp_path: Path, sample_text: str) -> Path:
    """A folder of texts and of 32 x 32 pictures whose brightness is their class."""
    folder = tmp_path / "data"
    (folder / "text").mkdir(parents=True)
    (folder / "text" / "tinyshakespeare.txt").write_text(sample_text[:20_000], "utf-8")
    for start, source in enumerate(("tinystories", "imdb", "wiki-sample")):
        (folder / source).mkdir()
        rows = Dataset.from_dict({"text": [sample_text[5000 * start :][:5000]]})
        rows.to_parquet(folder / source / "train.parquet")
    labels = torch.randint(10, (40,)).tolist()
    pictures = [(torch.full((32, 32, 3), 25 * label)).byte().numpy() for label in labels]
    features = Features({"image": Image(), "label": Value("int64")})
    (folder / "cifar10").mkdir()
    rows = Dataset.from_dict({"image": pictures, "label": labels}, features=features)
    rows.to_parquet(folder / "cifar10" / "train.parquet")
    return folder


def test_every_family_and_norm_trains_at_every_batch_size(
    data: Path, tmp_path: Path, capsys: Any
) -> None:
    script = import_module("scripts.experiments.lbn_batch_size")
    arguments = script.Arguments(
        data_dir=data,
        results=tmp_path / "rows.json",
        norms=["float", "lbn", "lbn, final float", "lbn, fixed end", "batch"],
        batch_sizes=[4, 1],
        text_samples=4,
        pictures=4,
        held_out_pictures=8,
    )
    rows = script.main(arguments)
    assert json.loads(arguments.results.read_text("utf-8")) == rows
    assert len(rows) == 4 * 5 * 2
    assert {row["family"]: row["steps"] for row in rows if row["batch_size"] == 1} == dict.fromkeys(
        script.FAMILIES, 4
    )
    for row in rows:
        assert 0 < row["loss"] < 400 and ("accuracy" in row) == (row["family"] in ("bert", "vit"))
        if row["norm"] in ("float", "lbn, fixed end"):  # one statistic in training and after
            assert row["trained"] == pytest.approx(row["loss"], rel=1e-4)
    assert "batch" in capsys.readouterr().out
    seconds = [row["seconds"] for row in rows]
    assert [row["seconds"] for row in script.main(arguments)] == seconds  # nothing ran again
    table = import_module("scripts.bench.report.render").batch_sizes(rows)
    assert "| vit | Batch Normalization |" in table and "%)" in table


def test_the_best_rate_of_each_norm_and_size_counts() -> None:
    targets = import_module("scripts.bench.report.targets")

    def row(norm: str, rate: float, seed: int, loss: float, size: int = 32) -> dict[str, Any]:
        key = {"family": "llama", "norm": norm, "batch_size": size, "seed": seed, "samples": 4}
        return {**key, "learning_rate": rate, "loss": loss}

    rows = [
        *(row("float", 2e-3, seed, loss) for seed, loss in enumerate((2.0, 2.2))),
        *(row("float", 1e-3, seed, loss) for seed, loss in enumerate((2.1, 2.3))),
        row("float", 4e-3, 0, 1.0),  # one lucky seed
        *(row("lbn", 2e-3, seed, loss) for seed, loss in enumerate((2.6, 2.1))),
        *(row("lbn", 1e-3, seed, loss) for seed, loss in enumerate((2.0, 2.3))),
        *(row(norm, 1e-3, seed, 3.0, 8) for norm in ("float", "lbn") for seed in range(2)),
    ]
    kept = targets.at_best_rate(rows)
    chosen = {(r["norm"], r["batch_size"]): r["learning_rate"] for r in kept}
    assert chosen == {("float", 32): 2e-3, ("lbn", 32): 1e-3, ("float", 8): 1e-3, ("lbn", 8): 1e-3}
    (target,) = targets.batch_size_targets(rows)
    assert target.found == pytest.approx(2.15 - 2.1)
    accuracies = [{**r, "accuracy": r["loss"]} for r in rows]  # the more the better
    kept = targets.at_best_rate(accuracies)
    assert {r["learning_rate"] for r in kept if r["batch_size"] == 32} == {1e-3, 2e-3}
    assert all(r["learning_rate"] == 1e-3 for r in kept if r["norm"] == "float")


def test_every_norm_of_a_family_is_replaced() -> None:
    script = import_module("scripts.experiments.lbn_batch_size")
    for family in script.FAMILIES:
        model = script.build(family)
        script.set_norms(model, family, "lbn")
        gates = [float(norm.gate) for norm in script.gated_norms(model).values()]
        assert gates == [1.0] * (2 * 3 + 1)


def test_static_norms_of_a_language_model_are_measured_once(
    tiny_llama: Any, byte_tokenizer: Any, sample_text: str, tmp_path: Path
) -> None:
    folder = tmp_path / "data" / "models" / "stories260K"
    tiny_llama.save_pretrained(folder)
    byte_tokenizer.save_pretrained(folder)
    (tmp_path / "data" / "tinystories").mkdir()
    rows = Dataset.from_dict({"text": [sample_text[:30_000]]})
    rows.to_parquet(tmp_path / "data" / "tinystories" / "train.parquet")
    script = import_module("scripts.experiments.lbn_pretrained")
    arguments = script.Arguments(
        data_dir=tmp_path / "data",
        results=tmp_path / "rows.json",
        tables=["stories260K"],
        steps=2,
        tolerance=10.0,
    )
    found = {row["norms"]: row for row in script.main(arguments)}
    assert {name: len(row["static"]) for name, row in found.items()} == {
        "per token": 0,
        "static": 4,
        "selected": 4,
    }
    assert [choice["name"] for choice in found["selected"]["choices"]] == found["static"]["static"]
    for row in found.values():
        assert row["loss"] == pytest.approx(row["trained"], abs=0.02)
    assert "4 of 4" in import_module("scripts.bench.report.render").pretrained_norms(
        list(found.values())
    )


def test_static_norms_of_an_encoder_are_measured(
    tiny_bert: Any, byte_tokenizer: Any, tmp_path: Path
) -> None:
    tiny_bert.bert.save_pretrained(tmp_path / "encoder")
    byte_tokenizer.save_pretrained(tmp_path / "encoder")
    (tmp_path / "sst2").mkdir()
    for split, count in (("train", 64), ("validation", 16)):
        labels = torch.randint(2, (count,)).tolist()
        texts = [f"{'ab'[label] * 3} {split} {i}" for i, label in enumerate(labels)]
        rows = Dataset.from_dict({"text": texts, "label": labels})
        rows.to_parquet(tmp_path / "sst2" / f"{split}.parquet")
    script = import_module("scripts.experiments.lbn_pretrained")
    arguments = script.Arguments(
        data_dir=tmp_path,
        results=tmp_path / "rows.json",
        tables=["minilm-l6"],
        norms=["static", "selected"],
        tolerance=10.0,
        encoder=str(tmp_path / "encoder"),
        encoder_steps=2,
        encoder_folder=tmp_path / "run",
    )
    for row in script.main(arguments):
        assert len(row["static"]) == row["gated"] == 4
        assert row["loss"] == pytest.approx(row["trained"], abs=0.02)
        assert 0 <= row["accuracy"] <= 1


def test_a_static_block_in_integers_gives_nearly_the_packed_codes(
    tiny_llama: Any, byte_tokenizer: Any, sample_text: str, tmp_path: Path
) -> None:
    tiny_llama.save_pretrained(tmp_path / "llama")
    byte_tokenizer.save_pretrained(tmp_path / "llama")
    (tmp_path / "text.txt").write_text(sample_text[:1000], "utf-8")
    script = import_module("scripts.experiments.static_inference")
    (row,) = script.main(
        script.Arguments(
            models=[str(tmp_path / "llama")],
            text=str(tmp_path / "text.txt"),
            results=tmp_path / "rows.json",
            windows=2,
        )
    )
    left = {form: cost["left"]["reductions"] for form, cost in row["costs"].items()}
    assert left == {"float": 5, "per token": 5 + 14, "static": 1}
    assert len(row["blocks"]) == 2
    for block in row["blocks"]:
        for stage in ("inputs", "hidden, from equal inputs"):
            assert block[stage]["most"] <= 1
            assert block[stage]["differ"] < 0.005 * block[stage]["codes"]
        assert block["output error, from equal hidden"] < 1e-5
    assert "hidden, from equal inputs" in import_module(
        "scripts.bench.report.render"
    ).static_inference([row])


def test_batch_sizes_are_judged_by_means_over_the_seeds_at_the_worst_size() -> None:
    """... and by the better way of those that were tried at all."""
    targets = import_module("scripts.bench.report.targets")

    def row(norm: str, size: int, loss: float, seed: int = 0, **more: Any) -> dict[str, Any]:
        key = {"family": "gpt2", "samples": 8, "seed": seed, "batch_size": size}
        return {**key, "norm": norm, "loss": loss, "learning_rate": 1e-3, **more}

    rows = [
        row("float", 1, 2.0),
        row("float", 1, 4.0, seed=1),
        row("float", 8, 3.0),
        row("lbn", 1, 2.0),
        row("lbn", 1, 4.5, seed=1),
        row("lbn", 8, 2.0),
        row("lbn, fixed end", 1, 2.015),
        row("lbn, fixed end", 1, 3.999, seed=1),
        row("lbn, fixed end", 8, 3.005),
        row("lbn, eased in", 1, 1.0),
        row("lbn, eased in", 8, 1.0, samples=9),
        row("batch", 1, 1.0),
        row("batch", 1, 1.0, seed=1),
        row("batch", 8, 1.0),
        row("float", 1, 1.0, family="vit", accuracy=0.5),
        row("lbn", 1, 0.5, family="vit", accuracy=0.49),
    ]
    gpt2, vit = targets.batch_size_targets(rows)
    assert gpt2.found == pytest.approx(0.007) and gpt2.met
    assert all(part in gpt2.what for part in ("fixed end", "2 sizes", "2 seeds"))
    assert vit.found == pytest.approx(1.0) and not vit.met and vit.unit == " points"


def test_static_norms_are_judged_by_what_they_lose_against_norms_per_token() -> None:
    targets = import_module("scripts.bench.report.targets")
    run = {"model": "m", "steps": 2, "seed": 0, "gated": 3}
    found = targets.static_norm_targets(
        [
            {**run, "norms": "per token", "loss": 1.0, "static": []},
            {**run, "norms": "static", "loss": 1.05, "static": ["a", "b", "c"]},
            {**run, "norms": "selected", "loss": 1.02, "static": ["a"]},
            {**run, "norms": "static", "loss": 1.0, "static": ["a"], "steps": 3},
        ]
    )
    assert [(target.met, round(target.found, 2)) for target in found] == [
        (False, 0.05),
        (True, 0.02),
    ]
    assert found[0].cells()[2] == "0.050 nats" and found[0].cells()[3].startswith("missed: ")
