"""Laws of the trainer: parameter groups, gates, ways to run a model, what it refuses."""

import copy
import math
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
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
from maqd_hf.training.trainer import MaQDTrainer
from tests.support.training import (
    arguments,
    assert_equal_states,
    finished,
    first_gradients,
    to_qat,
    trainer_for,
)

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
