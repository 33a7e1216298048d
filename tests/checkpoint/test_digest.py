"""What is loaded is what was saved, tensor by tensor and field by field, or it is refused."""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from maqd_hf import MaQDTrainer, MaQDTrainingArguments, pack_model, quantize_model
from maqd_hf.checkpoint import integrity
from maqd_hf.checkpoint.digest import EXEMPT, tensor_sum
from scripts.experiments.fuzzing.originals import as_version_one
from tests.support.families import example, output, tiny

STATES = ("qat", "packed")
Config = dict[str, Any]


def converted(state: str, family: str = "llama-tied", seed: int = 0, **settings: Any) -> Any:
    model = tiny(family, seed)
    settings = {"embedding_levels": 15, "activation_scaling": "token"} | settings
    quantize_model(model, weight_levels=15, **settings)
    if state == "packed":
        pack_model(model)
    return model


@pytest.fixture(scope="module", params=STATES)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted model with a bias and a layer that stays float."""
    path = tmp_path_factory.mktemp(request.param)
    kept = {"exclude": ["layers.0.mlp.up_proj"], "embedding_levels": 255}
    converted(request.param, "llama-untied", **kept).save_pretrained(path)
    return path


@pytest.fixture
def copied(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def load(path: Path, **kwargs: Any) -> PreTrainedModel:
    return hf.AutoModelForCausalLM.from_pretrained(path, **kwargs)


def read(path: Path) -> Config:
    content: Config = json.loads((path / "config.json").read_text())
    return content


def edit(path: Path, change: Callable[[Config], object]) -> None:
    config = read(path)
    change(config)
    (path / "config.json").write_text(json.dumps(config))


def refused(path: Path, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(path)


# ------------------------------------------------------------------------------------- every field

CHANGES = {  # fields that a model class would not take any other value of
    "hidden_act": "gelu",
    "rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0},
    "rms_norm_eps": 1e-3,
    "num_hidden_layers": 3,
    "dtype": "bfloat16",
    "architectures": ["MistralForCausalLM"],
    "max_position_embeddings": 65,
    "num_attention_heads": 8,
    "attention_bias": False,
    "tie_word_embeddings": True,
    "pretraining_tp": 2,
}


def test_every_changed_or_removed_field_of_the_architecture_is_refused_by_name(
    copied: Path,
) -> None:
    whole = (copied / "config.json").read_text()
    fields = set(json.loads(whole)) - set(EXEMPT) - {"quantization_config", "model_type"}
    assert {"hidden_act", "rms_norm_eps", "rope_parameters", "num_hidden_layers"} <= fields
    tried = 0
    for name in sorted(set(CHANGES) & fields):
        edit(copied, lambda config, name=name: config.update({name: CHANGES[name]}))
        refused(copied, f"(digest mismatch: {name}=.*is not what was saved|mismatch)")
        (copied / "config.json").write_text(whole)
        tried += 1
    for name in sorted(fields - {"hidden_size", "intermediate_size", "vocab_size"}):
        edit(copied, lambda config, name=name: config.pop(name))
        refused(copied, f"digest mismatch: {name} was removed from config.json")
        (copied / "config.json").write_text(whole)
    edit(copied, lambda config: config.update(logit_scale=2.0))
    refused(copied, "digest mismatch: logit_scale was added to config.json")
    assert tried >= 8


def test_every_field_of_ours_is_refused_by_name(copied: Path) -> None:
    whole = (copied / "config.json").read_text()
    changes = {
        "activation_levels": 15,
        "surrogate": "arctan",
        "first_token": "shared",
        "lbn_momentum": 0.5,
        "weight_levels": 16,
        "layer_batch_norm": False,
        "exclude": [],
    }
    for name, value in changes.items():
        edit(copied, lambda c, n=name, v=value: c["quantization_config"].update({n: v}))
        refused(copied, rf"quantization_config\.{name}=.*is not what was saved")
        (copied / "config.json").write_text(whole)


@pytest.mark.parametrize("name", sorted(set(EXEMPT) - {"transformers_weights"}))
def test_what_does_not_change_the_function_may_be_edited(name: str, copied: Path) -> None:
    before = output(load(copied), ids := {"input_ids": torch.arange(2, 9)[None]})
    values: Config = {"id2label": {"0": "a"}, "label2id": {"a": 0}}
    values |= dict.fromkeys(["bos_token_id", "eos_token_id"], 2)
    values |= dict.fromkeys(["problem_type"], "regression")
    values |= dict.fromkeys([n for n in EXEMPT if n.endswith("implementation")], "eager")
    switches = ["use_cache", "return_dict", "output_attentions", "output_hidden_states"]
    values |= dict.fromkeys(switches, True)
    value = values.get(name, "other")
    edit(copied, lambda config: config.update({name: value}))
    torch.testing.assert_close(output(load(copied), ids), before)
    edit(copied, lambda config: config.pop(name))
    load(copied)


def test_numbers_may_be_spelled_as_json_likes(copied: Path) -> None:
    text = (copied / "config.json").read_text()
    assert "10000.0" in text
    (copied / "config.json").write_text(text.replace("10000.0", "10000"))
    load(copied)


def test_a_digest_that_is_missing_or_edited_is_refused(copied: Path) -> None:
    whole = (copied / "config.json").read_text()
    edit(copied, lambda config: config["quantization_config"].pop("digest"))
    refused(copied, "config.json holds no digest")
    for change in (
        lambda d: d.update(tensors="00000000" + d["tensors"][8:]),
        lambda d: d["config"].pop("rms_norm_eps"),
        lambda d: d.pop("whole"),
        lambda d: d.pop("tensors"),
        lambda d: d.update(config=7),
    ):
        (copied / "config.json").write_text(whole)
        edit(copied, lambda config, change=change: change(config["quantization_config"]["digest"]))
        refused(copied, "digest in config.json does not agree with itself")
    (copied / "config.json").write_text(whole)
    edit(copied, lambda config: config["quantization_config"].update(digest=[1]))
    refused(copied, r"quantization_config\.digest=\[1\] must be of type")


# ------------------------------------------------------------------------------------ every tensor


def test_one_changed_bit_of_any_tensor_is_refused_by_name(copied: Path) -> None:
    """Ours and the float ones, those of a trainable model too."""
    file, dice = copied / "model.safetensors", random.Random(0)
    whole = file.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8:start])
    header.pop("__metadata__")
    full = [name for name, entry in header.items() if 0 not in entry["shape"]]
    for name in [*dice.sample(full, 24), "model.layers.0.mlp.up_proj.weight"]:
        begin, end = header[name]["data_offsets"]
        damaged = bytearray(whole)
        damaged[start + dice.randrange(begin, end, 4)] ^= 1  # the lowest bit of a number
        file.write_bytes(damaged)
        module = name.rpartition(".")[0].replace(".", r"\.")
        refused(copied, rf"{module}(\.\w+)? (is not what was saved|holds NaN)")
    file.write_bytes(whole)
    load(copied)


def test_the_dtype_of_a_table_s_output_is_part_of_it(copied: Path) -> None:
    file = copied / "model.safetensors"
    tensors = load_file(file)
    name = "model.embed_tokens.output_like"
    tensors[name] = tensors[name].half()
    save_file(tensors, file, metadata={"format": "pt"})
    refused(copied, "embed_tokens is not what was saved: its tensor 'output_like'")


def test_float_tensors_that_are_missing_or_new_are_refused(copied: Path) -> None:
    file = copied / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.0.mlp.up_proj.weight"
    save_file({k: v for k, v in tensors.items() if k != name}, file, metadata={"format": "pt"})
    refused(copied, r"layers\.0\.mlp\.up_proj\.weight is missing|tensors are there, .* were saved")
    save_file(tensors | {"model.extra": torch.ones(1)}, file, metadata={"format": "pt"})
    refused(copied, r"model is not what was saved: its tensor 'extra'.*tensors are there")


@pytest.mark.parametrize("state", STATES)
def test_shards_of_two_saves_are_a_mixture(state: str, tmp_path: Path) -> None:
    for seed in (1, 2):
        converted(state, seed=seed).save_pretrained(tmp_path / str(seed), max_shard_size="8KB")
    shards = sorted((tmp_path / "1").glob("*.safetensors"))
    assert len(shards) >= 2
    load(tmp_path / "1")
    for shard in (shards[0], shards[-1]):
        whole = shard.read_bytes()
        shutil.copy(tmp_path / "2" / shard.name, shard)
        refused(tmp_path / "1", "digest mismatch: .* is not what was saved")
        shard.write_bytes(whole)
    shutil.copy(tmp_path / "2" / "config.json", tmp_path / "1")
    refused(tmp_path / "1", "digest mismatch")


def test_an_older_single_file_beside_new_shards_is_not_taken_for_them(tmp_path: Path) -> None:
    converted("packed", seed=1).save_pretrained(tmp_path)
    converted("packed", seed=2).save_pretrained(tmp_path, max_shard_size="8KB")
    refused(tmp_path, "digest mismatch: .* is not what was saved")


# --------------------------------------------------------------------------- every way of saving


@pytest.mark.parametrize("state", STATES)
def test_every_way_of_saving_writes_the_digest_of_what_it_wrote(state: str, tmp_path: Path) -> None:
    model = converted(state)
    model.save_pretrained(tmp_path / "plain")
    model.save_pretrained(tmp_path / "plain")  # over itself
    model.save_pretrained(tmp_path / "sharded", max_shard_size="8KB")
    model.save_pretrained(tmp_path / "state", state_dict=model.state_dict())
    model.save_pretrained(tmp_path / "variant", variant="v1")
    assert read(tmp_path / "plain") == read(tmp_path / "sharded") == read(tmp_path / "state")
    for name in ("plain", "sharded", "state"):
        load(tmp_path / name)
    load(tmp_path / "variant", variant="v1")
    model.to(torch.bfloat16).save_pretrained(tmp_path / "cast")
    assert load(tmp_path / "cast").dtype == torch.bfloat16
    assert load(tmp_path / "plain", dtype=torch.bfloat16).dtype == torch.bfloat16
    assert load(tmp_path / "plain", attn_implementation="eager", use_cache=False) is not None
    assert model.config.quantization_config.digest is None


def test_another_state_dict_is_what_the_digest_is_of(tmp_path: Path) -> None:
    model = converted("qat")
    other = {k: v + 1 if v.is_floating_point() else v for k, v in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=dict(other))  # which it empties
    assert torch.equal(load(tmp_path).state_dict()["model.norm.weight"], other["model.norm.weight"])


def test_checkpoints_of_a_trainer_are_checked_too(tmp_path: Path) -> None:
    rows = [{"input_ids": list(range(2, 14)), "labels": list(range(2, 14))}] * 4
    arguments = MaQDTrainingArguments(
        str(tmp_path), max_steps=2, save_steps=2, report_to=[], use_cpu=True, logging_steps=1
    )
    MaQDTrainer(converted("qat"), arguments, train_dataset=rows).train()
    checkpoint = tmp_path / "checkpoint-2"
    load(checkpoint)
    edit(checkpoint, lambda config: config.update(rms_norm_eps=0.5))
    refused(checkpoint, "rms_norm_eps=0.5 is not what was saved")


def test_a_save_on_another_rank_adds_nothing_to_what_transformers_writes(tmp_path: Path) -> None:
    saved = []
    for name, model in {"qat": converted("qat"), "plain": tiny("llama-tied")}.items():
        model.save_pretrained(tmp_path / name, is_main_process=False)
        saved.append(sorted(path.name for path in (tmp_path / name).iterdir()))
    assert saved[0] == saved[1] and "config.json" not in saved[0]


def test_models_that_are_not_converted_are_saved_as_before(tmp_path: Path) -> None:
    model = tiny("llama-tied")
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in read(tmp_path)
    model.resize_token_embeddings(70)
    assert model.config.vocab_size == 70


# ------------------------------------------------------------------------- layers dropped, new ones


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("kept", [slice(0, 1), slice(1, 2)], ids=["first", "last"])
def test_after_layers_were_dropped_the_file_describes_what_is_there(
    state: str, kept: slice, tmp_path: Path
) -> None:
    model = converted(state, norm_affine="fold")
    model.model.layers = model.model.layers[kept]
    model.config.num_hidden_layers = len(model.model.layers)
    for i, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = i
    expected = output(model, inputs := example(model))
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert torch.equal(output(again, inputs), expected)
    assert not any("layers.1" in name for name in again.config.quantization_config.modules)
    if state == "qat":
        pack_model(model)
        pack_model(again)
        assert torch.equal(output(again, inputs), output(model, inputs))


def test_a_layer_made_float_again_is_saved_as_one(tmp_path: Path) -> None:
    model = converted("qat")
    mlp = model.model.layers[0].mlp
    layer = mlp.up_proj
    mlp.up_proj = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
    model.save_pretrained(tmp_path)
    assert type(load(tmp_path).model.layers[0].mlp.up_proj) is nn.Linear


@pytest.mark.parametrize("state", STATES)
def test_only_what_another_class_adds_may_be_new(
    state: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = converted(state)
    model.save_pretrained(tmp_path)
    classifier = hf.AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
    assert any("score.weight" in text and "have to be trained" in text for text in caplog.messages)
    classifier.save_pretrained(tmp_path / "classifier")
    with pytest.raises(ValueError, match=r"score.weight is (missing|\(3, 32\)) "):
        hf.LlamaForSequenceClassification.from_pretrained(
            tmp_path / "classifier", num_labels=5, ignore_mismatched_sizes=True
        )
    with pytest.raises(ValueError, match=r"layers\.2\..* is missing from the checkpoint"):
        load(tmp_path, num_hidden_layers=3)
    base = hf.AutoModel.from_pretrained(tmp_path)
    assert torch.equal(base.norm.weight, model.model.norm.weight)


# --------------------------------------------------------------------------------------- version 1


@pytest.mark.parametrize("affine", ["keep", "fold"])
@pytest.mark.parametrize("state", STATES)
def test_version_1_loads_with_one_line_and_is_saved_as_version_2(
    state: str, affine: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = converted(state, norm_affine=affine)
    model.save_pretrained(tmp_path / "old")
    as_version_one(tmp_path / "old", model)
    caplog.clear()
    again = load(tmp_path / "old")
    lines = [text for text in caplog.messages if "format version 1" in text]
    assert len(lines) == 1 and "cannot be checked" in lines[0]
    assert torch.equal(output(again, inputs := example(model)), output(model, inputs))
    assert again.config.quantization_config == model.config.quantization_config
    again.save_pretrained(tmp_path / "new")
    model.save_pretrained(tmp_path / "fresh")
    assert read(tmp_path / "new") == read(tmp_path / "fresh")
    caplog.clear()
    load(tmp_path / "new")
    assert not [text for text in caplog.messages if "format version 1" in text]


def test_version_1_checks_what_it_has(tmp_path: Path) -> None:
    model = converted("packed")
    model.save_pretrained(tmp_path)
    as_version_one(tmp_path, model)
    edit(tmp_path, lambda config: config["quantization_config"].update(weight_levels=16))
    refused(tmp_path, r"not what was saved \(CRC-32")


@pytest.mark.parametrize("state", STATES)
def test_a_version_2_file_cannot_pass_for_version_1(state: str, tmp_path: Path) -> None:
    converted(state).save_pretrained(tmp_path)
    edit(tmp_path, lambda config: config["quantization_config"].pop("digest"))
    edit(tmp_path, lambda config: config["quantization_config"].update(format_version=1))
    refused(tmp_path, "it was edited")


# ------------------------------------------------------------------------------------ sum and cost


@pytest.mark.parametrize("size", [0, 1, 7, 1 << 10, (1 << 20) - 1, 1 << 20, (3 << 20) + 12_345])
def test_the_sum_of_a_tensor_sees_every_bit_and_every_exchange(size: int) -> None:
    dice = random.Random(size)
    data = bytearray(dice.randbytes(size))
    before = tensor_sum(memoryview(data))
    assert tensor_sum(memoryview(bytes(data))) == before
    for _ in range(20 if size else 0):
        at, bit = dice.randrange(size), 1 << dice.randrange(8)
        data[at] ^= bit
        assert tensor_sum(memoryview(data)) != before
        data[at] ^= bit
    for length in (4, 4096, 1 << 16):
        for _ in range(5 if size >= 2 * length else 0):
            a, b = (length * dice.randrange(size // length) for _ in "ab")
            other = bytearray(data)
            other[a : a + length], other[b : b + length] = (
                data[b : b + length],
                data[a : a + length],
            )
            assert (tensor_sum(memoryview(other)) == before) == (a == b)
    if size:
        assert tensor_sum(memoryview(data)[:-1]) != before


def test_the_check_takes_less_than_a_tenth_of_loading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Processor time of one process, the file in the page cache; the best of five."""
    sizes: dict[str, Any] = {"hidden_size": 512, "intermediate_size": 2048, "vocab_size": 512}
    config = hf.LlamaConfig(**sizes, num_hidden_layers=4, num_attention_heads=8)
    model = hf.LlamaForCausalLM(config)
    quantize_model(model, activation_scaling="token", start="gaussian")
    model.save_pretrained(tmp_path)
    spent = 0.0

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            nonlocal spent
            start = time.process_time()
            result = function(*args)
            spent += time.process_time() - start
            return result

        return call

    for name in ("__init__", "check_architecture", "check_settings", "check_tensors"):
        method = getattr(integrity.FileCheck, name)
        monkeypatch.setattr(integrity.FileCheck, name, timed(method))
    shares = []
    for _ in range(5):
        spent, start = 0.0, time.process_time()
        load(tmp_path)
        shares.append(spent / (time.process_time() - start))
    assert 0 < min(shares) < 0.1, shares
