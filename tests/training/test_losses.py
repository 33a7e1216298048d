"""Laws of the loss: the whole KL, exact accumulation, padding that counts nowhere."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    BartConfig,
    BartForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    GPT2LMHeadModel,
    LlamaForCausalLM,
)

from maqd_hf.models.finding import gated_norms
from tests.support.training import (
    LENGTH,
    blocks,
    first_gradients,
    to_qat,
    trainer_for,
    uneven_blocks,
)


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
