"""Laws of training: exact resume, exact accumulation, ranks that agree, no half checkpoint."""

import copy
import math
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    BartConfig,
    BartForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from maqd_hf import MaQDConfig, pack_model, quantize_model
from maqd_hf.models.finding import gated_norms
from maqd_hf.nn import ActivationQuantizer, BatchContext, LinearSpec, MaQDLinear, PackedLinear
from maqd_hf.training import rates as default_rates
from maqd_hf.training.callbacks import GateSchedule, QuantizerMonitor
from maqd_hf.training.trainer import MaQDTrainer, MaQDTrainingArguments, last_complete_checkpoint
from tests.support.ranks import run_ranks

LENGTH, STEPS = 24, 6


def blocks(count: int = 48) -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(259, (count, LENGTH), generator=generator).tolist()
    return [{"input_ids": row, "labels": row} for row in rows]


def uneven_blocks() -> list[dict[str, list[int]]]:
    """Blocks of which the labels count from another position on in each."""
    rows = blocks()
    for i, row in enumerate(rows):
        row["labels"] = [-100] * (i * 5 % LENGTH) + row["labels"][i * 5 % LENGTH :]
    return rows


def to_qat(model: nn.Module, **settings: Any) -> Any:
    """Quantised in place, with activation steps that need no calibration."""
    quantize_model(model, MaQDConfig(**settings))
    for module in model.modules():
        if isinstance(module, ActivationQuantizer) and module.log_step is not None:
            module.set_step(0.05)
    return model


@pytest.fixture
def qat(tiny_llama: LlamaForCausalLM) -> LlamaForCausalLM:
    return to_qat(copy.deepcopy(tiny_llama))


def arguments(folder: Path, **settings: Any) -> MaQDTrainingArguments:
    defaults: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "logging_steps": 2,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return MaQDTrainingArguments(**defaults | settings)


def trainer_for(
    model: nn.Module, folder: Path, kind: type[MaQDTrainer] = MaQDTrainer, **settings: Any
) -> MaQDTrainer:
    own = ("teacher", "train_dataset", "callbacks")
    init = {name: settings.pop(name) for name in own if name in settings}
    init.setdefault("train_dataset", blocks())
    return kind(model, arguments(folder, **settings), eval_dataset=blocks(8), **init)


def assert_equal_states(a: nn.Module, b: nn.Module, tolerance: float = 0.0) -> None:
    ours, theirs = a.state_dict(), b.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(
            tensor,
            theirs[name],
            rtol=0,
            atol=tolerance,
            equal_nan=True,
            msg=lambda m, n=name: n + m,
        )


# ---------------------------------------------------------------------------------------- the loss


def first_gradients(model: nn.Module, folder: Path, **settings: Any) -> dict[str, Tensor]:
    """Gradients of the first optimizer step."""
    seen: dict[str, Tensor] = {}

    class Keep(TrainerCallback):
        def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            named = model.named_parameters()
            seen.update({n: p.grad.clone() for n, p in named if p.grad is not None})

    settings = {"max_grad_norm": 0.0, "max_steps": 1, "lbn_end": 1.0} | settings
    trainer_for(model, folder, callbacks=[Keep()], **settings).train()
    return seen


def assert_close_gradients(a: dict[str, Tensor], b: dict[str, Tensor], rtol: float = 1e-4) -> None:
    assert a.keys() == b.keys() and len(a) > 20
    for name, gradient in a.items():
        assert (gradient - b[name]).norm() <= rtol * b[name].norm() + 1e-9, name


@pytest.mark.parametrize("weight", [1.0, 0.4])
def test_the_training_loss_is_the_whole_kl(
    tiny_llama: LlamaForCausalLM, qat: LlamaForCausalLM, tmp_path: Path, weight: float
) -> None:
    data = uneven_blocks()[:4]
    reference = copy.deepcopy(qat).train()
    rows, labels = (torch.tensor([row[k] for row in data]) for k in ("input_ids", "labels"))
    counted = labels[:, 1:] != -100
    logits = reference(input_ids=rows).logits[:, :-1][counted]
    q = tiny_llama(input_ids=rows).logits[:, :-1][counted].log_softmax(-1)
    log_p = logits.log_softmax(-1)
    divergence = functional.kl_div(log_p, q, reduction="sum", log_target=True)
    entropy = functional.cross_entropy(logits, labels[:, 1:][counted], reduction="sum")
    loss = (weight * divergence + (1 - weight) * entropy) / counted.sum()
    loss.backward()

    settings = {"distillation_weight": weight, "kl_chunk_tokens": 7, "train_dataset": data}
    gradients = first_gradients(qat, tmp_path, teacher=tiny_llama, **settings)
    wanted = {n: p.grad for n, p in reference.named_parameters() if p.grad is not None}
    assert_close_gradients(gradients, wanted)
    trainer = trainer_for(copy.deepcopy(qat), tmp_path, teacher=tiny_llama, max_steps=1, **settings)
    state = to_qat(copy.deepcopy(tiny_llama)).state_dict()
    trainer.model.load_state_dict(state)
    assert trainer.train().training_loss == pytest.approx(loss.item(), rel=1e-5)


@pytest.mark.parametrize("distilled", [True, False])
def test_accumulated_batches_equal_one_large_batch(
    tiny_llama: LlamaForCausalLM, tmp_path: Path, distilled: bool
) -> None:
    """Uneven labels: means of means would differ. Statistics are per sample, so gradients agree."""
    gradients = []
    for accumulation in (1, 4):
        gradients.append(
            first_gradients(
                to_qat(copy.deepcopy(tiny_llama)),
                tmp_path,
                teacher=copy.deepcopy(tiny_llama) if distilled else None,
                train_dataset=uneven_blocks(),
                per_device_train_batch_size=8 // accumulation,
                gradient_accumulation_steps=accumulation,
            )
        )
    assert_close_gradients(gradients[1], gradients[0])


def test_padding_counts_nowhere(qat: LlamaForCausalLM, tmp_path: Path) -> None:
    """Left or right padding with labels of its own changes no gradient."""
    plain = blocks(4)
    for row in plain:
        row["attention_mask"] = [1] * LENGTH

    def padded(left: int, right: int) -> list[dict[str, list[int]]]:
        fill = {"input_ids": 7, "labels": 7, "attention_mask": 0}
        return [{k: [fill[k]] * left + v + [fill[k]] * right for k, v in r.items()} for r in plain]

    start = copy.deepcopy(qat)
    wanted = first_gradients(qat, tmp_path, train_dataset=plain)
    for left, right in ((0, 5), (5, 0)):
        model = copy.deepcopy(start)
        gradients = first_gradients(model, tmp_path, train_dataset=padded(left, right))
        assert_close_gradients(gradients, wanted)


def test_evaluate_reports_the_models_own_loss_as_perplexity(
    tiny_llama: LlamaForCausalLM, qat: LlamaForCausalLM, tmp_path: Path
) -> None:
    metrics = trainer_for(qat, tmp_path, teacher=tiny_llama).evaluate()
    rows = torch.tensor([row["input_ids"] for row in blocks(8)])
    with torch.no_grad():
        loss = qat.eval()(input_ids=rows, labels=rows).loss.item()
    assert metrics["eval_loss"] == pytest.approx(loss, rel=1e-5)
    assert metrics["eval_perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)


def test_distillation_approaches_the_teacher(
    tiny_llama: LlamaForCausalLM, qat: LlamaForCausalLM, tmp_path: Path
) -> None:
    trainer = trainer_for(
        qat, tmp_path, teacher=tiny_llama, max_steps=40, logging_steps=5, scale_learning_rate=1e-2
    )
    trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert losses[-1] < 0.6 * max(losses)
    assert all(norm.gate.item() == 1 for norm in gated_norms(qat).values())


def test_a_classifier_distills_whole_logits(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=259,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_labels=3,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    teacher = BertForSequenceClassification(config)
    model = to_qat(copy.deepcopy(teacher))
    data = [{"input_ids": row["input_ids"], "labels": i % 3} for i, row in enumerate(blocks())]
    trainer = trainer_for(model, tmp_path, teacher=teacher, train_dataset=data, max_steps=2)
    trainer.eval_dataset = data[:8]
    assert trainer.train().training_loss < 0.1 < trainer.evaluate()["eval_loss"]
    assert "eval_perplexity" not in trainer.evaluate()


def tiny_classifier() -> BertForSequenceClassification:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=259,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_labels=3,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.2,
    )
    return BertForSequenceClassification(config)


def padded_texts() -> list[dict[str, Any]]:
    """Texts of different lengths, padded to one, with a class each."""
    rows = []
    for i, row in enumerate(blocks(4)):
        mask = [1] * (LENGTH - 3 * i) + [0] * (3 * i)
        rows.append({"input_ids": row["input_ids"], "attention_mask": mask, "labels": i % 3})
    return rows


def slow_hidden_loss(student: nn.Module, teacher: nn.Module, rows: list[dict[str, Any]]) -> Tensor:
    """KL of the logits plus the hidden distance, text by text, without a batch."""
    total = torch.zeros(())
    for row in rows:
        length = sum(row.get("attention_mask", [1] * len(row["input_ids"])))
        ids = torch.tensor(row["input_ids"])[None, :length]
        ours, theirs = (m(input_ids=ids, output_hidden_states=True) for m in (student, teacher))
        if "attention_mask" in row:
            p, q, labels = ours.logits, theirs.logits, 1
        else:
            p, q, labels = ours.logits[0, :-1], theirs.logits[0, :-1], length - 1
        total = total + functional.kl_div(
            p.log_softmax(-1), q.log_softmax(-1), reduction="sum", log_target=True
        )
        ours, theirs = ours.hidden_states[-1], theirs.hidden_states[-1]
        gap = (ours - theirs).square().sum(-1) / theirs.square().sum(-1)
        total = total + 0.7 * labels * gap.mean()
    return total


@pytest.mark.parametrize("kind", ["classifier", "causal"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_hidden_distillation_equals_its_slow_reference(
    tiny_llama: LlamaForCausalLM, tmp_path: Path, kind: str, accumulation: int
) -> None:
    teacher = tiny_classifier() if kind == "classifier" else tiny_llama
    rows = padded_texts() if kind == "classifier" else blocks(4)
    labels = len(rows) * (1 if kind == "classifier" else LENGTH - 1)
    settings = {"embedding_levels": None, "layer_batch_norm": False, "first_token": "shared"}
    model = to_qat(copy.deepcopy(teacher), **settings)
    reference = copy.deepcopy(model).train()
    loss = slow_hidden_loss(reference, teacher.eval(), rows) / labels
    loss.backward()
    got = first_gradients(
        model,
        tmp_path,
        teacher=teacher,
        train_dataset=rows,
        hidden_distillation=0.7,
        per_device_train_batch_size=4 // accumulation,
        gradient_accumulation_steps=accumulation,
    )
    wanted = {n: p.grad for n, p in reference.named_parameters() if p.grad is not None}
    for name in [name for name in wanted if name.endswith("key.bias")]:
        del wanted[name], got[name]  # zero but for rounding: the softmax does not see them
    assert_close_gradients(wanted, got)


def test_conv1d_models_and_folders_as_teachers(tiny_gpt2: GPT2LMHeadModel, tmp_path: Path) -> None:
    tiny_gpt2.save_pretrained(tmp_path / "teacher")
    model = to_qat(copy.deepcopy(tiny_gpt2))
    trainer = trainer_for(model, tmp_path, teacher=tmp_path / "teacher", max_steps=1)
    assert not trainer.teacher.training
    assert 0 < trainer.train().training_loss < 1


def test_a_model_that_passes_its_base_model_by(tmp_path: Path) -> None:
    """The decoder of an encoder-decoder, as a causal model, calls what its base model wraps."""
    size = {"d_model": 32, "decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 48}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    teacher = BartForCausalLM(BartConfig(**size, **ids, vocab_size=259, dropout=0.0)).eval()
    model = to_qat(copy.deepcopy(teacher), weight_levels=None, activation_levels=None)
    loss = trainer_for(model, tmp_path, teacher=teacher, max_steps=1).train().training_loss
    assert abs(loss) < 1e-6, "it starts as its teacher"
    trainer = trainer_for(model, tmp_path, teacher=teacher, max_steps=1, hidden_distillation=1.0)
    with pytest.raises(ValueError, match="hidden_distillation finds no hidden states"):
        trainer.train()


# -------------------------------------------------------------------------- parameters and the gate


def test_what_decays_and_what_has_its_own_learning_rate(
    qat: LlamaForCausalLM, tmp_path: Path
) -> None:
    trainer = trainer_for(qat, tmp_path, weight_decay=0.1, scale_learning_rate=3e-4)
    groups = trainer.create_optimizer().param_groups
    of = {id(p): (g["weight_decay"], g["lr"]) for g in groups for p in g["params"]}
    names = {name: of.get(id(p)) for name, p in qat.named_parameters()}
    assert names["model.embed_tokens.weight"] == (0.1, 1e-3)
    layer = "model.layers.0.mlp.up_proj."
    assert names[layer + "weight"] == (0.0, 1e-3)
    assert names[layer + "weight_offset"] == (0.0, 1e-3)
    assert names[layer + "weight_log_scale"] == (0.0, 3e-4)
    assert names[layer + "activation.log_step"] == (0.0, 3e-4)
    assert names[layer + "weight_step"] is None  # not trained
    assert names["model.norm.weight"] == (0.0, 1e-3)
    decaying = [n for n, settings in names.items() if settings and settings[0]]
    assert decaying == ["model.embed_tokens.weight"]


@pytest.mark.parametrize("inputs", [15, 255, None])
@pytest.mark.parametrize("levels", [2, 4, 8, 16, 255])
def test_rates_nobody_gives_follow_the_levels(
    tiny_llama: LlamaForCausalLM, tmp_path: Path, levels: int, inputs: int | None
) -> None:
    model = copy.deepcopy(tiny_llama)
    quantize_model(model, MaQDConfig(weight_levels=levels, activation_levels=inputs))
    assert default_rates.usual_levels(model) == (levels, inputs)
    trainer = trainer_for(model, tmp_path, learning_rate=None)
    rates = {group["lr"] for group in trainer.create_optimizer().param_groups}
    latents = default_rates.learning_rate(levels, inputs)
    assert rates == {latents, default_rates.SCALE_RATE * latents}
    assert 1e-5 <= latents <= 1e-3


def test_the_gate_is_a_function_of_the_step(qat: LlamaForCausalLM, tmp_path: Path) -> None:
    schedule = GateSchedule(0.2, 0.6)
    assert [schedule.gate(s, 10) for s in (0, 2, 4, 6, 10)] == [0, 0, pytest.approx(0.5), 1, 1]
    assert [GateSchedule(0.5, 0.5).gate(s, 10) for s in (4, 5)] == [0, 1]
    with pytest.raises(ValueError, match="0 <= start <= end <= 1"):
        GateSchedule(0.5, 0.4)

    class Watch(TrainerCallback):
        gates: list[float]

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            self.gates.append(float(next(iter(gated_norms(qat).values())).gate))

    watch = Watch()
    watch.gates = []
    trainer_for(qat, tmp_path, lbn_start=0.0, lbn_end=0.5, callbacks=[watch]).train()
    assert watch.gates == pytest.approx([0, 1 / 3, 2 / 3, 1, 1, 1])


def test_fixed_statistics_end_the_training(qat: LlamaForCausalLM, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"fixed from 0\.3 on: needs 0\.4"):
        GateSchedule(0.0, 0.4, fixed=0.3)
    seen: list[tuple[bool, float]] = []
    norm = gated_norms(qat)["model.layers.0.input_layernorm"]

    class Watch(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            seen.append((norm.fixed, float(norm.running_log_ms)))

    settings: dict[str, Any] = {"lbn_start": 0.0, "lbn_end": 0.5, "lbn_fixed": 0.5}
    trainer_for(qat, tmp_path, callbacks=[Watch()], **settings).train()
    assert [fixed for fixed, _ in seen] == [False, False, True, True, True, True]
    assert len({average for _, average in seen[2:]}) == 1 < len({average for _, average in seen})
    assert not norm.fixed


def test_only_selected_norms_open_and_open_ones_stay(qat: LlamaForCausalLM, tmp_path: Path) -> None:
    norms = gated_norms(qat)
    norms["model.layers.1.input_layernorm"].gate.fill_(0.7)
    patterns = ["*.post_attention_layernorm", "model.layers.1.*"]
    trainer_for(qat, tmp_path, max_steps=1, lbn_end=1.0, lbn_start=1.0, lbn_norms=patterns).train()
    gates = {name.removeprefix("model.layers."): norm.gate.item() for name, norm in norms.items()}
    assert gates.pop("0.input_layernorm") == 0
    assert set(gates.values()) == {1.0}
    with pytest.raises(ValueError, match=r"'\*\.ln_1' matches no gated norm"):
        trainer_for(qat, tmp_path, lbn_norms=["*.ln_1"]).train()
    schedule = GateSchedule(1.0, 1.0)
    schedule._norms = [norm := norms["model.layers.0.input_layernorm"]]
    norm.gate.fill_(0.7)
    schedule._set(type("State", (), {"global_step": 0, "max_steps": 9}))  # type: ignore[arg-type]
    assert norm.gate.item() == pytest.approx(0.7)


# ------------------------------------------------------------------------------- stop and go again


def finished(model: nn.Module, folder: Path, **settings: Any) -> MaQDTrainer:
    trainer = trainer_for(model, folder, **settings)
    trainer.train()
    return trainer


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


class InterruptAt(TrainerCallback):
    """Ctrl-C in the middle of a step, or an exception after it."""

    def __init__(self, step: int, times: int = 1, after: bool = False) -> None:
        self.step, self.times, self.after = step, times, after

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step + 1 == self.step and not self.after:
            for _ in range(self.times):
                signal.raise_signal(signal.SIGINT)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step and self.after:
            raise KeyboardInterrupt


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


# ----------------------------------------------------------------------------- ways to run a model


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(
    tiny_llama: LlamaForCausalLM, tmp_path: Path, reentrant: bool
) -> None:
    plain = finished(to_qat(copy.deepcopy(tiny_llama)), tmp_path, max_steps=2)
    new = any(field.name == "activation_checkpointing" for field in fields(TrainingArguments))
    option = "activation_checkpointing" if new else "gradient_checkpointing"  # renamed in 5.2x
    settings = {option: True, f"{option}_kwargs": {"use_reentrant": reentrant}}
    forwards = []
    model = to_qat(copy.deepcopy(tiny_llama))
    model.model.layers[0].input_layernorm.register_forward_hook(lambda *args: forwards.append(1))
    checkpointed = finished(model, tmp_path, max_steps=2, **settings)
    assert len(forwards) == 1 + 2 * 2  # the probe, and twice a step
    assert_equal_states(plain.model, checkpointed.model)


def test_autocast_trains_float32_latents(
    tiny_llama: LlamaForCausalLM, qat: LlamaForCausalLM, tmp_path: Path
) -> None:
    start = copy.deepcopy(qat)
    wanted = first_gradients(start, tmp_path, teacher=tiny_llama)
    got = first_gradients(qat, tmp_path, teacher=tiny_llama, bf16=True)
    assert {p.dtype for p in qat.parameters()} == {torch.float32}
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        if name in wanted:
            assert (got[name] - wanted[name]).norm() < 0.2 * wanted[name].norm()
            assert not torch.equal(got[name], wanted[name])


@pytest.mark.slow
def test_compiled_training_equals_eager(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    settings = {"teacher": tiny_llama, "max_steps": 2, "optim": "sgd", "learning_rate": 1e-2}
    plain = finished(to_qat(copy.deepcopy(tiny_llama)), tmp_path, **settings)
    settings |= {"torch_compile": True, "torch_compile_backend": "eager"}
    compiled = finished(to_qat(copy.deepcopy(tiny_llama)), tmp_path, **settings)
    assert_equal_states(plain.model, compiled.model, 1e-5)
    assert math.isfinite(compiled.evaluate()["eval_loss"])


def test_unknown_activation_steps_are_calibrated_before_the_first_step(
    tiny_llama: LlamaForCausalLM, tmp_path: Path
) -> None:
    quantize_model(tiny_llama, MaQDConfig(weight_levels=None, activation_levels=255))
    quantizers = [m for m in tiny_llama.modules() if isinstance(m, ActivationQuantizer)]
    assert quantizers and not any(q.calibrated for q in quantizers)
    trainer = finished(tiny_llama, tmp_path, max_steps=1, logging_steps=1)
    assert all(q.calibrated for q in quantizers)
    assert math.isfinite(trainer.state.log_history[0]["loss"])


def test_logs_look_into_the_quantizers(qat: LlamaForCausalLM, tmp_path: Path) -> None:
    with torch.no_grad():
        for module in qat.modules():
            if isinstance(module, MaQDLinear):
                module.weight_step.mul_(1e3)  # only the two middle levels are used
    hooks = [list(module._forward_hooks) for module in qat.modules()]
    trainer = finished(qat, tmp_path, max_steps=4, quantizer_logging_steps=4, scale_learning_rate=0)
    early, late = [log for log in trainer.state.log_history if "loss" in log]
    assert "lbn_gate" not in early
    assert late["lbn_gate"] == 1
    assert 0 <= late["activation_clipped"] < 1
    assert late["weight_unused_levels"] == 14 and 0.99 < late["weight_entropy"] <= 1
    assert late["weight_clipped"] == 0
    assert late["lbn_spread"] > 0
    assert [list(module._forward_hooks) for module in qat.modules()] == hooks


def test_the_share_of_clipped_activations_is_exact() -> None:
    quantizer = ActivationQuantizer(LinearSpec(None, 3), BatchContext())
    quantizer.set_step(1.0)
    monitor = QuantizerMonitor()
    state = TrainerState(global_step=1, logging_steps=2)
    args, control = TrainingArguments("unused", use_cpu=True), TrainerControl()
    monitor.on_step_begin(args, state, control, model=quantizer)
    quantizer(torch.tensor([[-9.0, -1.4, 1.4, 1.6]]))
    monitor.on_step_end(args, state, control)
    quantizer(torch.tensor([[9.0]]))
    assert monitor.metrics(quantizer) == {"activation_clipped": 0.5}
    assert monitor.metrics(quantizer) == {}


# ------------------------------------------------------------------------------------ packed models


def test_packed_models_evaluate_and_refuse_to_train(qat: LlamaForCausalLM, tmp_path: Path) -> None:
    finished(qat, tmp_path)
    expected = trainer_for(qat, tmp_path).evaluate()["eval_loss"]
    pack_model(qat)
    assert any(isinstance(module, PackedLinear) for module in qat.modules())
    qat.save_pretrained(tmp_path / "packed")
    for model in (qat, LlamaForCausalLM.from_pretrained(tmp_path / "packed")):
        trainer = trainer_for(model, tmp_path)
        assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, abs=1e-3)
        with pytest.raises(ValueError, match="cannot be trained: train the state='qat'"):
            trainer.train()


# ------------------------------------------------------------------------------- refused, by name


def test_contradictions_are_refused(
    tiny_llama: LlamaForCausalLM, qat: LlamaForCausalLM, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="give MaQDTrainingArguments"):
        MaQDTrainer(qat, TrainingArguments(str(tmp_path), use_cpu=True))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="shares trainable parameters"):
        trainer_for(qat, tmp_path, teacher=qat)
    with pytest.raises(ValueError, match="label_smoothing_factor"):
        trainer_for(qat, tmp_path, teacher=tiny_llama, label_smoothing_factor=0.1)
    other = copy.deepcopy(tiny_llama)
    other.config.vocab_size = 300
    with pytest.raises(ValueError, match="vocab_size=300, the model 259"):
        trainer_for(qat, tmp_path, teacher=other)
    with pytest.raises(ValueError, match="hidden_distillation needs a teacher"):
        trainer_for(qat, tmp_path, hidden_distillation=1.0)
    other.config.vocab_size, other.config.hidden_size = 259, 32
    with pytest.raises(ValueError, match="hidden_size=32, the model 64"):
        trainer_for(qat, tmp_path, teacher=other, hidden_distillation=1.0)
    with pytest.raises(ValueError, match="hidden_distillation=-1"):
        arguments(tmp_path, hidden_distillation=-1.0)
    with pytest.raises(ValueError, match="scale_learning_rate"):
        arguments(tmp_path, scale_learning_rate=-1.0)


def test_a_teacher_may_share_frozen_parameters(
    tiny_llama: LlamaForCausalLM, tmp_path: Path
) -> None:
    model = copy.deepcopy(tiny_llama)
    model.model.embed_tokens.weight = tiny_llama.model.embed_tokens.weight
    model.lm_head.weight = tiny_llama.lm_head.weight
    to_qat(model)
    model.model.embed_tokens.weight.requires_grad_(False)
    before = copy.deepcopy(tiny_llama.state_dict())
    trainer = finished(model, tmp_path, teacher=tiny_llama, max_steps=2)
    assert not any(name.startswith("teacher") for name in trainer.model.state_dict())
    assert all(torch.equal(v, before[n]) for n, v in tiny_llama.state_dict().items())


# ------------------------------------------------------------------------------------------- ranks

RUNS = ("ddp", "interrupted", "ddp bf16", "fsdp", "fsdp bf16")


def settings_of(ranks: int) -> dict[str, Any]:
    """4 steps of 4 samples, whatever the number of ranks; with SGD errors stay in proportion."""
    settings: dict[str, Any] = {"per_device_train_batch_size": 4 // ranks, "max_steps": 4}
    settings |= {"optim": "sgd", "learning_rate": 0.1, "save_strategy": "steps", "save_steps": 4}
    return settings | {"train_dataset": uneven_blocks()}


class ShardingTrainer(MaQDTrainer):
    """accelerate shards on accelerators only, and on a CPU would quietly take DDP instead."""

    def create_accelerator_and_postprocess(self) -> None:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        super().create_accelerator_and_postprocess()


def worker(folder: Path) -> None:
    """One rank of two: all runs, one after the other; leaves the states they end with."""
    rank = int(os.environ["RANK"])
    for name in RUNS:
        AcceleratorState._reset_state()
        settings = settings_of(2) | {"bf16": name.endswith("bf16")}
        if name.startswith("fsdp"):
            settings |= {"fsdp": True, "fsdp_config": {"version": 2}, "kind": ShardingTrainer}
        if name == "interrupted" and rank == 1:
            settings["callbacks"] = [InterruptAt(3)]
        teacher = LlamaForCausalLM.from_pretrained(folder / "float")
        model = to_qat(copy.deepcopy(teacher))
        trainer = trainer_for(model, folder / name, teacher=teacher, **settings)
        try:
            trainer.train()
        except KeyboardInterrupt:
            assert name == "interrupted" and trainer.state.global_step == 3
        state = trainer.accelerator.get_state_dict(trainer.model)
        torch.save((type(trainer.model_wrapped).__name__, state), folder / f"{name}-{rank}.pt")


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a float model, and of what two processes made of it."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=259,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        initializer_range=0.1,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "float")
    run_ranks(__file__, str(folder))
    return folder


def outcome(folder: Path, name: str, wrapped: str) -> list[dict[str, Tensor]]:
    """The states of rank 0 and 1 after the run ``name``, whose model was a ``wrapped``."""
    found = [torch.load(folder / f"{name}-{rank}.pt") for rank in (0, 1)]
    assert {kind for kind, _ in found} == {wrapped}
    return [state for _, state in found]


def assert_same_result(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float) -> None:
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert (tensor - b[name]).abs().max() <= tolerance, name


@pytest.mark.slow
def test_two_ranks_equal_one_and_agree(two_ranks: Path, tmp_path: Path) -> None:
    first, second = outcome(two_ranks, "ddp", "DistributedDataParallel")
    assert_same_result(first, second, 0.0)
    teacher = LlamaForCausalLM.from_pretrained(two_ranks / "float")
    alone = finished(to_qat(copy.deepcopy(teacher)), tmp_path, teacher=teacher, **settings_of(1))
    assert_same_result(first, alone.model.state_dict(), 2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["", " bf16"])
def test_sharded_ranks_equal_whole_ones(two_ranks: Path, kind: str) -> None:
    sharded, _ = outcome(two_ranks, f"fsdp{kind}", "FSDPLlamaForCausalLM")  # gathered on rank 0
    whole, _ = outcome(two_ranks, f"ddp{kind}", "DistributedDataParallel")
    assert_same_result(sharded, whole, 1e-6)
    folder = two_ranks / f"fsdp{kind}" / "checkpoint-4"
    saved = LlamaForCausalLM.from_pretrained(folder).state_dict()
    assert_same_result(saved, sharded, 0.0)


@pytest.mark.slow
def test_an_interrupted_rank_stops_all_at_the_same_step(two_ranks: Path) -> None:
    first, second = outcome(two_ranks, "interrupted", "DistributedDataParallel")
    assert_same_result(first, second, 0.0)
    folder = two_ranks / "interrupted"
    assert last_complete_checkpoint(folder) == str(folder / "checkpoint-3")


if __name__ == "__main__":
    worker(Path(sys.argv[1]))
