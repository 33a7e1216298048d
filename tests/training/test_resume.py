"""Laws of stopping: exact resume, interrupts that save, no half checkpoint."""

import copy
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import (
    LlamaForCausalLM,
)

from maqd_hf import MaQDConfig, quantize_model
from maqd_hf.training.trainer import MaQDTrainer, last_complete_checkpoint
from tests.support.training import (
    STEPS,
    InterruptAt,
    assert_equal_states,
    finished,
    to_qat,
    trainer_for,
)


def assert_equal_optimizers(a: MaQDTrainer, b: MaQDTrainer) -> None:
    ours, theirs = a.optimizer.state_dict(), b.optimizer.state_dict()
    assert ours["param_groups"] == theirs["param_groups"]
    for key, entry in ours["state"].items():
        for name, value in entry.items():
            assert torch.equal(value, theirs["state"][key][name]), (key, name)


def test_resume_equals_uninterrupted_bit_for_bit(
    tiny_llama: LlamaForCausalLM, tmp_path: Path
) -> None:
    settings = {"teacher": tiny_llama, "save_steps": 3, "save_strategy": "steps"}
    settings |= {"gradient_accumulation_steps": 2, "lr_scheduler_type": "linear"}
    models = [copy.deepcopy(tiny_llama) for _ in range(2)]
    for model in models:
        quantize_model(model, MaQDConfig(weight_levels=4))  # calibrated by train
    whole = finished(models[0], tmp_path, **settings)
    shutil.rmtree(tmp_path / f"checkpoint-{STEPS}")
    resumed = trainer_for(models[1], tmp_path, **settings)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == STEPS
    assert_equal_states(whole.model, resumed.model)
    assert_equal_optimizers(whole, resumed)


@pytest.fixture(autouse=True)
def interruptible() -> Iterator[None]:
    """A shell starts what runs in its background with interrupts ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("after", [False, True], ids=["ctrl-c", "exception"])
def test_an_interrupt_leaves_a_checkpoint_to_resume_from(
    tiny_llama: LlamaForCausalLM, tmp_path: Path, after: bool
) -> None:
    handler = signal.getsignal(signal.SIGINT)
    whole = finished(to_qat(copy.deepcopy(tiny_llama)), tmp_path / "whole")
    stopped = trainer_for(
        to_qat(copy.deepcopy(tiny_llama)), tmp_path, callbacks=[InterruptAt(4, after=after)]
    )
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    assert signal.getsignal(signal.SIGINT) is handler
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")
    resumed = trainer_for(to_qat(copy.deepcopy(tiny_llama)), tmp_path)
    resumed.train(resume_from_checkpoint=True)
    assert_equal_states(whole.model, resumed.model)


def test_a_second_interrupt_stops_at_once(qat: LlamaForCausalLM, tmp_path: Path) -> None:
    trainer = trainer_for(qat, tmp_path, callbacks=[InterruptAt(2, times=2)])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert trainer.state.global_step == 1
    assert last_complete_checkpoint(tmp_path) is None


def test_a_checkpoint_cut_off_while_written_is_not_resumed(
    qat: LlamaForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="no complete checkpoint"):
        trainer_for(qat, tmp_path).train(resume_from_checkpoint=True)
    trainer = trainer_for(qat, tmp_path, save_strategy="steps", save_steps=2)
    save, saved = trainer._save_rng_state, []

    class Killed(Exception):
        pass

    def killed(folder: str) -> None:
        saved.append(folder)
        if len(saved) == 2:
            raise Killed
        save(folder)

    monkeypatch.setattr(trainer, "_save_rng_state", killed)
    with pytest.raises(Killed):
        trainer.train()
    half = tmp_path / "checkpoint-4"
    assert (half / "model.safetensors").exists()
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    (half / "trainer_state.json").write_text('{"global_step": 4, ')
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    with pytest.raises(ValueError, match="cut off while being written"):
        trainer_for(qat, tmp_path).train(resume_from_checkpoint=str(half))


def test_a_saved_qat_model_loads_as_it_was(qat: LlamaForCausalLM, tmp_path: Path) -> None:
    finished(qat, tmp_path, save_strategy="steps", save_steps=STEPS)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / f"checkpoint-{STEPS}")
    assert_equal_states(qat, loaded)
    assert loaded.config.quantization_config.state == "qat"
    again = trainer_for(loaded, tmp_path, max_steps=1)
    again.train()
