"""Which norms a training opens that was not told: those that can be static almost for nothing."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM, LlamaModel

from maqd_hf import MaQDConfig, MaQDTrainer, MaQDTrainingArguments, quantize_model
from maqd_hf.calibration import select_static_norms
from maqd_hf.models.finding import gated_norms
from maqd_hf.training.norms import affordable_norms, first_samples


def rows(count: int = 16, length: int = 32) -> list[dict[str, Tensor]]:
    ids = torch.randint(2, 64, (count, length), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row} for row in ids]


@pytest.fixture
def qat(tiny_llama: LlamaForCausalLM) -> LlamaForCausalLM:
    """A model of four norms, of which a tolerance of 0.02 nats admits some and refuses others."""
    model = copy.deepcopy(tiny_llama)
    quantize_model(model, MaQDConfig(weight_levels=16, activation_scaling="token"))
    return model


def trainer_for(model: Any, folder: Path, **settings: Any) -> MaQDTrainer:
    defaults: dict[str, Any] = {"per_device_train_batch_size": 4, "learning_rate": 1e-3}
    defaults |= {"report_to": [], "disable_tqdm": True, "use_cpu": True, "save_strategy": "no"}
    arguments = MaQDTrainingArguments(str(folder), **defaults | settings)
    return MaQDTrainer(model, arguments, train_dataset=rows())


def opened(model: Any) -> list[str]:
    return [name for name, norm in gated_norms(model).items() if norm.gate.item() == 1]


def test_by_default_those_open_that_select_static_norms_finds_on_the_first_samples(
    qat: LlamaForCausalLM, tmp_path: Path
) -> None:
    trainer = trainer_for(qat, tmp_path, max_steps=2)
    with torch.random.fork_rng():
        samples = first_samples(trainer.get_train_dataloader(), 512)
    assert sum(batch["input_ids"].numel() for batch in samples) == 512
    wanted = select_static_norms(copy.deepcopy(qat), samples, progress=False).static
    assert 0 < len(wanted) < len(gated_norms(qat))
    trainer.train()
    assert opened(qat) == wanted
    assert {norm.gate.item() for norm in gated_norms(qat).values()} == {0.0, 1.0}


@pytest.mark.parametrize(("asked", "share"), [(["*"], 1.0), ([], 0.0)])
def test_what_is_asked_for_opens_and_nothing_is_measured(
    qat: LlamaForCausalLM, tmp_path: Path, monkeypatch: Any, asked: list[str], share: float
) -> None:
    monkeypatch.delattr("maqd_hf.training.norms.select_static_norms")
    trainer_for(qat, tmp_path, max_steps=1, lbn_norms=asked, lbn_end=0.0).train()
    assert len(opened(qat)) == share * len(gated_norms(qat))


def test_a_resumed_training_opens_the_norms_of_its_checkpoint(
    qat: LlamaForCausalLM, tmp_path: Path, monkeypatch: Any
) -> None:
    start = copy.deepcopy(qat)
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    trainer_for(qat, tmp_path, **settings).train()
    monkeypatch.delattr("maqd_hf.training.norms.select_static_norms")  # no second choice
    again = trainer_for(start, tmp_path, **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert opened(start) == opened(qat) != []
    for name, tensor in qat.state_dict().items():
        assert torch.equal(tensor, start.state_dict()[name]), name


def test_norms_that_are_open_already_stay_so(qat: LlamaForCausalLM, monkeypatch: Any) -> None:
    monkeypatch.delattr("maqd_hf.training.norms.select_static_norms")
    for norm in gated_norms(qat).values():
        norm.gate.fill_(1.0)
    assert affordable_norms(qat, rows(1)) == list(gated_norms(qat))


def test_a_model_without_logits_keeps_its_norms_and_says_so(
    tiny_llama: LlamaForCausalLM, caplog: Any
) -> None:
    model = LlamaModel(tiny_llama.config)
    quantize_model(model, MaQDConfig(weight_levels=16, activation_scaling="token"))
    logging.getLogger("maqd_hf.training.norms").addHandler(caplog.handler)
    assert affordable_norms(model, [{"input_ids": torch.ones(1, 8, dtype=torch.long)}]) == []
    assert "returns no logits" in caplog.text and "lbn_norms=['*']" in caplog.text


def test_padding_alone_chooses_nothing(qat: LlamaForCausalLM) -> None:
    padding = {"input_ids": torch.ones(2, 8, dtype=torch.long), "attention_mask": torch.zeros(2, 8)}
    assert affordable_norms(qat, [padding, padding], progress=False) == []
    with pytest.raises(ValueError, match="no token of the data counts"):
        select_static_norms(qat, [padding], progress=False)
