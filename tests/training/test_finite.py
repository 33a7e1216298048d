"""NaN never passes in silence: not an empty batch, not a diverging run, not an unknown step."""

import copy
import json
import math
import os
import sys
from pathlib import Path

import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from maqd_hf import MaQDConfig, pack_model, quantize_model
from maqd_hf.evaluation import token_perplexity
from maqd_hf.nn import MaQDLinear
from maqd_hf.training import MaQDTrainer, MaQDTrainingArguments, last_complete_checkpoint
from tests.support.ranks import run_ranks

FULL = {"input_ids": [5, 6, 7, 8], "labels": [5, 6, 7, 8], "attention_mask": [1] * 4}
EMPTY = {
    "one token": {"input_ids": [5], "labels": [5], "attention_mask": [1]},
    "padding": {"input_ids": [0] * 4, "labels": [0] * 4, "attention_mask": [0] * 4},
    "ignored": {"input_ids": [5, 6, 7, 8], "labels": [-100] * 4, "attention_mask": [1] * 4},
}


def decoder():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config)


def encoder():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return BertForMaskedLM(config)


def qat(model, **settings):
    settings = {"weight_levels": 16, "activation_scaling": "token"} | settings
    quantize_model(model, MaQDConfig(**settings))
    return model


def trainer_for(model, folder, rows, *, teacher=None, callbacks=None, kind=MaQDTrainer, **settings):
    defaults = {
        "output_dir": str(folder),
        "max_steps": 2,
        "per_device_train_batch_size": 1,
        "per_device_eval_batch_size": 1,
        "train_sampling_strategy": "sequential",
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
    }
    if kind is Trainer:
        return Trainer(model, TrainingArguments(**defaults | settings), train_dataset=rows)
    args = MaQDTrainingArguments(**{"lbn_norms": ["*"], **defaults, **settings})
    return kind(model, args, train_dataset=rows, teacher=teacher, callbacks=callbacks)


def gradients(model, folder, rows, **settings):
    """Gradients of the first step, and its loss."""
    seen = {}

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, *args, **kwargs):
            named = model.named_parameters()
            seen.update({n: p.grad.clone() for n, p in named if p.grad is not None})

    settings = {"max_steps": 1, "max_grad_norm": 0.0} | settings
    trainer = trainer_for(model, folder, rows, callbacks=[Watch()], **settings)
    return seen, trainer.train().training_loss


# ------------------------------------------------------------------------------------ empty batches


WAYS = ("labels", "distilled", "hidden", "whole logits", "masked tokens")


@pytest.mark.parametrize(
    ("way", "empty"),  # a masked token needs none before it
    [(w, e) for w in WAYS for e in EMPTY if (w, e) != ("masked tokens", "one token")],
)
def test_a_batch_without_a_predicted_token_counts_nothing(tmp_path, way, empty):
    """Alone it has loss 0 and gradient 0; beside another it changes neither."""
    masked = way == "masked tokens"
    teacher = encoder() if masked else decoder()
    settings = {"teacher": None if way in ("labels", "masked tokens") else copy.deepcopy(teacher)}
    settings["hidden_distillation"] = float(way == "hidden")
    settings["distillation_weight"] = 0.5
    start = qat(copy.deepcopy(teacher))
    if way == "whole logits":
        start.lm_head.register_forward_hook(lambda module, args, output: output * 1.0)

    def step(rows, **more):
        return gradients(copy.deepcopy(start), tmp_path, rows, **settings | more)

    got, loss = step([EMPTY[empty]])
    assert loss == 0 and len(got) > 10
    assert all(bool((gradient == 0).all()) for gradient in got.values())
    wanted, alone = step([FULL])
    got, loss = step([FULL, EMPTY[empty]], gradient_accumulation_steps=2)
    assert loss == pytest.approx(alone, rel=1e-5)
    for name, gradient in wanted.items():
        torch.testing.assert_close(got[name], gradient, msg=name)


def test_evaluation_leaves_empty_batches_out_and_says_when_all_are(tmp_path):
    trainer = trainer_for(qat(decoder()), tmp_path, [FULL])
    alone = trainer.evaluate([FULL])["eval_loss"]
    assert trainer.evaluate([FULL, *EMPTY.values()])["eval_loss"] == pytest.approx(alone)
    with pytest.raises(ValueError, match="none of the 3 samples has a label that counts"):
        trainer.evaluate(list(EMPTY.values()))
    trainer.args.logging_nan_inf_filter = False
    assert trainer.evaluate([FULL, *EMPTY.values()])["eval_loss"] == pytest.approx(alone)
    with torch.no_grad():
        trainer.model.model.norm.weight[0] = math.nan
    with pytest.raises(FloatingPointError, match="evaluation loss of a batch is nan"):
        trainer.evaluate([FULL, FULL])


# ----------------------------------------------------------------------------------- diverging runs


class SpoilAt(TrainerCallback):
    """Makes something infinite or NaN in step ``step`` (from 1)."""

    def __init__(self, step, what):
        self.step, self.what = step, what

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if self.what == "loss" and state.global_step + 1 == self.step:
            model.model.norm.register_forward_hook(lambda module, given, y: y * math.nan)
        if self.what == "gradient" and state.global_step + 1 == self.step:
            model.model.norm.weight.register_hook(lambda gradient: gradient * math.inf)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if self.what == "parameter" and state.global_step == self.step:
            with torch.no_grad():
                model.model.norm.weight[0] = math.nan


@pytest.mark.parametrize("clip", [0.0, 1.0])
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_diverging_run_stops_at_its_first_such_step(tmp_path, what, clip):
    model = qat(decoder())
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 1, "max_grad_norm": clip}
    trainer = trainer_for(model, tmp_path, [FULL] * 6, callbacks=[SpoilAt(3, what)], **settings)
    with pytest.raises(FloatingPointError, match=rf"step 3 of 6: the {what}.*is 0.01"):
        trainer.train()
    assert trainer.state.global_step == 2
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    last = last_complete_checkpoint(tmp_path)
    assert last == str(tmp_path / "checkpoint-2")
    saved = dict(LlamaForCausalLM.from_pretrained(last).named_parameters())
    assert all(torch.equal(saved[n], p) for n, p in model.named_parameters())


@pytest.mark.parametrize("step", [2, 3])
def test_nothing_is_saved_of_parameters_that_are_not_finite(tmp_path, step):
    """Nor does a training end with them as if nothing had happened."""
    settings = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1, "logging_steps": 1}
    spoil = SpoilAt(step, "parameter")
    trainer = trainer_for(qat(decoder()), tmp_path, [FULL] * 3, callbacks=[spoil], **settings)
    with pytest.raises(FloatingPointError, match=f"after step {step}.*model.norm.weight"):
        trainer.train()
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / f"checkpoint-{step - 1}")
    settings = {"max_steps": 3, "logging_steps": 1, "save_strategy": "no"}
    spoil = SpoilAt(3, "parameter")
    trainer = trainer_for(qat(decoder()), tmp_path / "b", [FULL] * 3, callbacks=[spoil], **settings)
    with pytest.raises(FloatingPointError, match="after step 3"):
        trainer.train()


class Remember(TrainerCallback):
    """What the files of the last checkpoint held when it was written."""

    def on_save(self, args, state, control, **kwargs):
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        self.saved = folder, contents(folder)


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


SPOILED = ("loss", "gradient", "parameter")


def diverge(folder):
    """One rank of two, of which the second diverges in step 3; leaves what each was told."""
    rank = int(os.environ["RANK"])
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 1}
    for what in SPOILED:
        callbacks = [remember := Remember()] + [SpoilAt(3, what)] * (rank == 1)
        model, path = qat(decoder()), folder / what
        trainer = trainer_for(model, path, [FULL] * 12, callbacks=callbacks, **settings)
        try:
            trainer.train()
        except FloatingPointError as error:
            told = {"error": str(error), "step": trainer.state.global_step}
            if rank == 0:  # which writes the last file of a checkpoint
                checkpoint, saved = remember.saved
                told |= {"last": checkpoint.name, "untouched": contents(checkpoint) == saved}
            (folder / f"{what}-{rank}.json").write_text(json.dumps(told))


@pytest.fixture(scope="module")
def diverged(tmp_path_factory):
    """The folder that two ranks trained in; a rank that waits for the other would time out."""
    folder = tmp_path_factory.mktemp("diverged")
    run_ranks(__file__, str(folder), timeout=120)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("what", SPOILED)
def test_all_ranks_stop_at_the_first_step_in_which_one_diverges(diverged, what):
    told = [json.loads((diverged / f"{what}-{rank}.json").read_text()) for rank in (0, 1)]
    if what == "parameter":
        causes = ["after step 3 1 parameter"] * 2
    elif what == "loss":
        causes = ["step 3 of 6: the loss of another rank is not finite", "step 3 of 6: the loss is"]
    else:  # the ranks share their gradient
        causes = ["step 3 of 6: the gradient's norm is"] * 2
    for rank, cause in zip(told, causes, strict=True):
        assert cause in rank["error"] and "learning_rate is 0.01" in rank["error"]
        assert rank["step"] == (3 if what == "parameter" else 2)
    assert told[0]["last"] == "checkpoint-2" and told[0]["untouched"]
    last = last_complete_checkpoint(diverged / what)
    assert last == str(diverged / what / "checkpoint-2")
    saved = LlamaForCausalLM.from_pretrained(last)
    assert all(bool(p.isfinite().all()) for p in saved.parameters())


def test_the_log_of_a_layer_that_is_not_finite_leaves_it_out(tmp_path):
    model = qat(decoder())
    trainer = trainer_for(model, tmp_path, [FULL])
    for layer in (m for m in model.modules() if isinstance(m, MaQDLinear)):
        layer.weight.data.fill_(math.nan)
    assert "weight_entropy" not in trainer.monitor.metrics(model)


# ------------------------------------------------------------------------ what was never calibrated


@pytest.mark.parametrize("kind", [Trainer, MaQDTrainer])
def test_an_uncalibrated_step_is_refused_by_any_trainer_but_the_one_that_calibrates(tmp_path, kind):
    trainer = trainer_for(
        qat(decoder(), activation_scaling="static"), tmp_path, [FULL] * 8, kind=kind
    )
    before = copy.deepcopy(dict(trainer.model.named_parameters()))
    if kind is Trainer:
        with (
            pytest.warns(UserWarning, match="stay float"),
            pytest.raises(ValueError, match="never"),
        ):
            trainer.train()
        for name, parameter in trainer.model.named_parameters():
            assert torch.equal(parameter.nan_to_num(7.0), before[name].nan_to_num(7.0)), name
    else:
        assert math.isfinite(trainer.train().training_loss)


def test_nothing_is_measured_of_a_model_that_was_never_calibrated(tmp_path):
    """A forward of one's own has float inputs and says so; its loss is finite in both modes."""
    model, ids = qat(decoder(), activation_scaling="static"), torch.tensor([[5, 6, 7]])
    for mode in (model.train, model.eval):
        mode()
        with pytest.warns(UserWarning, match="inputs stay float"):
            assert bool(model(ids, labels=ids).loss.isfinite())
    for measure in (
        lambda: trainer_for(model, tmp_path, [FULL]).evaluate([FULL]),
        lambda: token_perplexity(model, torch.arange(9)),
        lambda: pack_model(model),
    ):
        with pytest.raises(ValueError, match=r"q_proj: the static .* never calibrated.*calibrate"):
            measure()


def test_a_model_that_was_never_quantized_is_refused_with_the_remedy(tmp_path):
    with pytest.raises(ValueError, match=r"never quantized: call maqd_hf.quantize_model"):
        trainer_for(decoder(), tmp_path, [FULL]).train()


def test_another_number_of_processes_cannot_resume(tmp_path):
    settings = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    trainer_for(qat(decoder()), tmp_path, [FULL] * 4, **settings).train()
    checkpoint = tmp_path / "checkpoint-1"
    (checkpoint / "rng_state.pth").rename(checkpoint / "rng_state_0.pth")
    (checkpoint / "rng_state_1.pth").write_bytes((checkpoint / "rng_state_0.pth").read_bytes())
    trainer = trainer_for(qat(decoder()), tmp_path, [FULL] * 4, **settings)
    with pytest.raises(ValueError, match=r"written by 2 process.*this run has 1.*nproc_per_node 2"):
        trainer.train(resume_from_checkpoint=str(checkpoint))


if __name__ == "__main__":
    diverge(Path(sys.argv[1]))
