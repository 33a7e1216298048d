"""scripts/qat_encoder.py on a tiny BERT: every stage, the rows, and a float model found again."""

import json
from importlib import import_module

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, BertConfig, BertModel

import maqd_hf


@pytest.fixture
def script():
    return import_module("scripts.qat_encoder")


@pytest.fixture
def encoder(tmp_path, byte_tokenizer):
    """The folder of a saved tiny encoder."""
    config = BertConfig(
        vocab_size=len(byte_tokenizer),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
        pad_token_id=byte_tokenizer.pad_token_id,
    )
    BertModel(config).save_pretrained(tmp_path / "encoder")
    byte_tokenizer.save_pretrained(tmp_path / "encoder")
    return tmp_path / "encoder"


@pytest.fixture
def labeled_texts(tmp_path):
    """A file of texts whose first letter is their class."""
    draw = torch.Generator().manual_seed(0)
    labels = torch.randint(2, (160,), generator=draw).tolist()
    lengths = torch.randint(1, 30, (160,), generator=draw).tolist()
    rows = enumerate(zip(labels, lengths, strict=True))
    texts = ["ab"[label] * 3 + f" {i} " + "c" * length for i, (label, length) in rows]
    data = tmp_path / "texts.parquet"
    Dataset.from_dict({"text": texts, "label": labels}).to_parquet(data)
    return data


@pytest.fixture
def job(tmp_path, encoder, labeled_texts):
    """Arguments of a job on the tiny encoder, as words of a command line."""
    options = {
        "model": encoder,
        "dataset": labeled_texts,
        "eval_rows": 40,
        "max_length": 32,
        "output_dir": tmp_path / "run",
        "results": tmp_path / "rows.json",
        "float_epochs": 6,
        "float_learning_rate": 5e-3,
        "qat_learning_rate": 1e-3,
        "calibration_rows": 16,
        "lbn_tolerance": 10,
        "per_device_train_batch_size": 8,
        "num_train_epochs": 1,
        "warmup_steps": 0,
        "seed": 0,
        "bf16": "false",
        "use_cpu": "true",
        "disable_tqdm": "true",
    }
    return lambda **more: [
        word
        for key, value in {**options, **more}.items()
        if value is not None
        for word in (f"--{key}", *(map(str, value) if isinstance(value, list) else [str(value)]))
    ]


def test_every_stage_from_an_encoder_to_a_packed_classifier(script, job, tmp_path, capsys):
    rows = script.main(job(weight_levels=[16], activation_levels=[255, 15]))
    assert [(r["weight_levels"], r["activation_levels"]) for r in rows] == [(16, 255), (16, 15)]
    first = rows[0]
    assert list(first["accuracy"]) == ["float", "start", "trained", "packed"]
    assert first["accuracy"]["float"] > 0.9, "the first letter is easily learnt"
    assert first["accuracy"]["packed"] == first["accuracy"]["trained"] > 0.9
    assert first["agreement_with_float"] > 0.9
    assert (first["train_rows"], first["eval_rows"]) == (120, 40)
    assert first["examples"] == 120 and first["steps"] == 15
    assert first["norms"]["static"], "a tolerance of 10 nats admits every norm"
    assert json.loads((tmp_path / "rows.json").read_text("utf-8")) == rows
    assert "W16 A15" in capsys.readouterr().out
    rendered = import_module("scripts.bench.report.render").encoders(rows)
    assert "16 (4 bit) / 15 (3.9 bit)" in rendered
    assert f"| {100 * first['accuracy']['packed']:.2f} |" in rendered

    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "w16-a255")
    size = maqd_hf.model_size(model)
    assert size.bits_per_weight == first["bits_per_weight"]
    assert 0 < first["file_bytes"] - size.file_bytes < 100_000

    again = script.main(job(weight_levels=[16]))  # finds the float model, replaces its row
    known = json.loads((tmp_path / "rows.json").read_text("utf-8"))
    assert [r["activation_levels"] for r in known] == [255, 15]
    assert again[0]["seconds"]["float"] == first["seconds"]["float"]
    assert again[0]["accuracy"] == first["accuracy"], "same seed, same model"

    with pytest.raises(SystemExit, match="trained with other settings"):
        script.main(job(weight_levels=[16], float_epochs=2))

    folder = tmp_path / "run" / "float"
    other = {"model": folder, "output_dir": tmp_path / "other", "bf16": "true"}
    rows = script.main(job(weight_levels=[3], **other))
    assert rows[0]["accuracy"]["float"] == first["accuracy"]["float"]
    assert not (tmp_path / "other" / "float").exists(), "it is a classifier already"


def test_the_trained_model_is_measured_in_float32(script, job, monkeypatch, tmp_path):
    ids, seen = torch.arange(3, 35).view(4, 8), []

    def pack(model):
        with torch.no_grad():
            seen.append(model.eval()(input_ids=ids).logits)
        return maqd_hf.pack_model(model)

    monkeypatch.setattr(script, "pack_model", pack)
    script.main(job(weight_levels=[16], bf16="true", float_epochs=1))
    packed = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "w16-a255")
    with torch.no_grad():
        torch.testing.assert_close(seen[0], packed(input_ids=ids).logits, rtol=1e-4, atol=1e-5)


def test_held_out_texts_are_held_out(script, job, tmp_path):
    rows = {"text": ["x", "y", "z", "x", "u", "v"], "label": [0, 1, 0, 0, 1, 1]}
    Dataset.from_dict(rows).to_parquet(tmp_path / "train.parquet")
    Dataset.from_dict({"text": ["x", "w"], "label": [0, 1]}).to_parquet(
        tmp_path / "validation.parquet"
    )
    (tmp_path / "texts.parquet").unlink()
    (args, training) = script.parse(job(dataset=tmp_path, eval_rows=None))
    train, held_out = script.load_rows(args, training.seed)
    assert sorted(train["text"]) == ["u", "v", "y", "z"]
    assert held_out["text"] == ["x", "w"]
    args.dataset, args.eval_rows = str(tmp_path / "train.parquet"), 2
    train, held_out = script.load_rows(args, training.seed)
    assert len(held_out) == 2 and not set(train["text"]) & set(held_out["text"])
    args.eval_rows = None
    with pytest.raises(SystemExit, match="--eval_rows"):
        script.load_rows(args, training.seed)


def test_the_dataset_must_be_named(script, capsys):
    with pytest.raises(SystemExit):
        script.parse([])
    assert "--dataset" in capsys.readouterr().err
