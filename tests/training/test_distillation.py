"""The chunked loss against its slow reference; the deferred head against the usual forward."""

import copy
from types import MethodType

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    BertForMaskedLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2LMHeadModel,
    LlamaForCausalLM,
)

from maqd_hf.nn import LinearSpec, MaQDLinear
from maqd_hf.training.distillation import (
    IGNORE,
    HiddenLoss,
    Logits,
    Objective,
    deferred_head,
    distillation_loss,
    head_is_deferrable,
    head_of,
    hidden_distance,
    last_hidden_states,
)

TOKENS, WIDTH, WORDS = 37, 16, 91


def naive_loss(logits: Tensor, expected: Tensor, labels: Tensor, objective: Objective) -> Tensor:
    heat = objective.temperature
    q, p = (expected / heat).softmax(-1), (logits / heat).softmax(-1)
    divergence = (q * (q.log() - p.log())).sum()
    entropy = functional.cross_entropy(logits, labels, reduction="sum")
    return objective.weight * heat**2 * divergence + (1 - objective.weight) * entropy


def example(dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], Logits, Tensor]:
    torch.manual_seed(0)
    student = [torch.randn(TOKENS, WIDTH), torch.randn(WORDS, WIDTH) / 2, torch.randn(WORDS)]
    teacher = Logits(torch.randn(TOKENS, 24).to(dtype), torch.randn(WORDS, 24).to(dtype) / 2)
    leaves = [t.to(dtype).requires_grad_() for t in student]
    return leaves, teacher, torch.randint(WORDS, (TOKENS,))


@pytest.mark.parametrize("chunk", [1, 10, TOKENS, 1000])
@pytest.mark.parametrize(("heat", "weight"), [(1.0, 1.0), (2.0, 1.0), (1.0, 0.3), (3.0, 0.7)])
def test_chunks_equal_the_naive_loss_and_its_gradients(
    chunk: int, heat: float, weight: float
) -> None:
    leaves, teacher, labels = example()
    objective = Objective(heat, weight, chunk)
    expected = naive_loss(
        functional.linear(*leaves), teacher.hidden @ teacher.weight.t(), labels, objective
    )
    wanted = torch.autograd.grad(expected * 0.37, leaves)
    loss = distillation_loss(Logits(*leaves), teacher, labels, objective)
    got = torch.autograd.grad(loss * 0.37, leaves)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_float32_stays_within_a_millionth() -> None:
    leaves, teacher, labels = example()
    exact = distillation_loss(Logits(*leaves), teacher, labels, Objective())
    leaves, teacher, labels = example(torch.float32)
    loss = distillation_loss(Logits(*leaves), teacher, labels, Objective(chunk_tokens=8))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=1e-6)


def test_without_a_teacher_it_is_the_cross_entropy() -> None:
    (hidden, weight, bias), _, labels = example()
    loss = distillation_loss(Logits(hidden, weight, bias), None, labels, Objective(chunk_tokens=5))
    expected = functional.cross_entropy(hidden @ weight.t() + bias, labels, reduction="sum")
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)


def test_whole_logits_take_the_same_loss() -> None:
    leaves, teacher, labels = example()
    logits = functional.linear(*leaves).detach().requires_grad_()
    whole_teacher = Logits(teacher.hidden @ teacher.weight.t())
    split = distillation_loss(Logits(*leaves), teacher, labels, Objective(2.0, 0.5))
    whole = distillation_loss(Logits(logits), whole_teacher, labels, Objective(2.0, 0.5, 7))
    assert whole.item() == pytest.approx(split.item(), rel=1e-12)
    (grad,) = torch.autograd.grad(whole, logits)
    naive = naive_loss(logits, whole_teacher.hidden, labels, Objective(2.0, 0.5))
    torch.testing.assert_close(grad, torch.autograd.grad(naive, logits)[0], rtol=1e-10, atol=1e-12)


def test_autocast_multiplies_in_bfloat16_and_sums_in_float32() -> None:
    leaves, teacher, labels = example(torch.float32)
    exact = distillation_loss(Logits(*leaves), teacher, labels, Objective())
    wanted = torch.autograd.grad(exact, leaves)
    with torch.autocast("cpu", torch.bfloat16):
        loss = distillation_loss(Logits(*leaves), teacher, labels, Objective())
    got = torch.autograd.grad(loss, leaves)
    assert loss.dtype == torch.float32 and loss.item() != exact.item()
    assert loss.item() == pytest.approx(exact.item(), rel=2e-2)
    for a, b in zip(got, wanted, strict=True):
        assert a.dtype == torch.float32
        assert (a - b).norm() < 2e-2 * b.norm()


def test_frozen_heads_cost_no_gradient_and_a_second_backward_is_refused() -> None:
    (hidden, weight, _), teacher, labels = example()
    loss = distillation_loss(Logits(hidden, weight.detach()), teacher, labels, Objective())
    loss.backward(retain_graph=True)
    assert hidden.grad is not None and weight.grad is None
    with pytest.raises(RuntimeError, match="already differentiated"):
        loss.backward()


@pytest.mark.parametrize(
    ("settings", "message"),
    [((0.0,), "temperature=0.0"), ((1.0, 1.5), "weight=1.5"), ((1.0, 1.0, 0), "chunk_tokens=0")],
)
def test_impossible_objectives_are_refused(settings: tuple[float, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Objective(*settings)  # type: ignore[arg-type]


def naive_distance(student: Tensor, teacher: Tensor, counted: Tensor) -> Tensor:
    """Token by token."""
    found = []
    for ours, theirs, mask in zip(student, teacher, counted, strict=True):
        tokens = [
            ((a - b) ** 2).sum() / (b**2).sum()
            for a, b, count in zip(ours, theirs, mask, strict=True)
            if count
        ]
        found.append(sum(tokens) / max(len(tokens), 1))
    return torch.stack([torch.as_tensor(value, dtype=student.dtype) for value in found])


def test_the_hidden_distance_equals_the_naive_one_and_its_gradient() -> None:
    student = torch.randn(4, 7, WIDTH, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(4, 7, WIDTH, dtype=torch.float64) * torch.logspace(-3, 3, 7).view(7, 1)
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3, [0] * 2 + [1] * 5, [0] * 7])
    wanted = naive_distance(student, teacher, mask)
    got = hidden_distance(student, teacher, mask)
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=0)
    assert got[3] == 0
    weights = torch.tensor([1.0, 2.0, -1.0, 1.0], dtype=torch.float64)
    ours, theirs = (torch.autograd.grad((d * weights).sum(), student)[0] for d in (got, wanted))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    everywhere = hidden_distance(student, teacher)
    torch.testing.assert_close(everywhere, naive_distance(student, teacher, torch.ones(4, 7)))
    assert hidden_distance(teacher, teacher).max() == 0
    rounded = hidden_distance(student.bfloat16(), teacher.bfloat16(), mask)
    assert rounded.dtype == torch.float32, "summed in float32"


def test_padding_may_hold_anything() -> None:
    student, teacher, mask = torch.randn(2, 3, 4), torch.randn(2, 3, 4), torch.ones(2, 3)
    mask[1, 2] = 0
    wanted = hidden_distance(student, teacher, mask)
    student[1, 2], teacher[1, 2] = torch.inf, 0
    assert torch.equal(hidden_distance(student, teacher, mask), wanted)


@pytest.mark.parametrize("labels", [[3, IGNORE], [[3, 4, IGNORE], [IGNORE] * 3]])
def test_a_sample_weighs_as_much_as_it_has_labels(labels: list) -> None:
    ours, theirs = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    first = hidden_distance(ours, theirs)[0]
    labels = torch.tensor(labels)
    found = HiddenLoss([ours], [theirs], None, 0.5)(labels)
    torch.testing.assert_close(found, 0.5 * first * labels.dim())


def test_last_hidden_states_are_what_the_head_reads(tiny_llama: LlamaForCausalLM) -> None:
    ids = torch.randint(259, (2, 9))
    with last_hidden_states(tiny_llama) as hidden:
        output = tiny_llama(input_ids=ids, output_hidden_states=True)
    torch.testing.assert_close(tiny_llama.lm_head(hidden[0]), output.logits)
    assert torch.equal(hidden[0], output.hidden_states[-1])
    kept = hidden[0]
    tiny_llama(input_ids=ids)
    assert hidden[0] is kept, "nothing is recorded outside the context"


def test_a_deferred_head_moves_into_the_loss(tiny_llama: LlamaForCausalLM) -> None:
    ids = torch.randint(259, (2, 9))
    expected = tiny_llama(input_ids=ids).logits
    seen = []

    def loss_function(logits: Tensor, labels: Tensor, **kwargs: object) -> Tensor:
        hidden, weight, bias = head_of(tiny_llama, logits)
        seen.append(functional.linear(hidden, weight, bias))
        return logits.sum()

    with deferred_head(tiny_llama, loss_function):
        output = tiny_llama(input_ids=ids, labels=ids)
    assert output.logits.shape == (2, 9, tiny_llama.config.hidden_size)
    torch.testing.assert_close(seen[0], expected, rtol=0, atol=0)
    after = tiny_llama(input_ids=ids, labels=ids)
    assert torch.equal(after.logits, expected)
    shifted = functional.cross_entropy(expected[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert after.loss.item() == pytest.approx(shifted.item(), rel=1e-6)


def test_a_quantized_head_is_rounded_once(tiny_llama: LlamaForCausalLM) -> None:
    head = MaQDLinear.from_linear(tiny_llama.lm_head, LinearSpec(4, 255, "token"))
    tiny_llama.lm_head = head
    assert head_is_deferrable(tiny_llama)
    hidden = torch.randn(5, 64)
    got, weight, bias = head_of(tiny_llama, hidden)
    torch.testing.assert_close(functional.linear(got, weight, bias), head(hidden))


def test_the_probe_tells_true_logits_from_changed_ones(
    tiny_llama: LlamaForCausalLM, tiny_gpt2: GPT2LMHeadModel, tiny_bert: BertForMaskedLM
) -> None:
    assert head_is_deferrable(tiny_llama.train())
    assert tiny_llama.training
    assert head_is_deferrable(tiny_gpt2)
    assert not head_is_deferrable(tiny_bert)  # has no loss_function of the model's to replace
    assert not head_is_deferrable(nn.Linear(2, 2))
    config = Gemma2Config(
        vocab_size=20,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        head_dim=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        final_logit_softcapping=30.0,
    )
    assert not head_is_deferrable(Gemma2ForCausalLM(config))
    scaled = copy.deepcopy(tiny_llama)
    forward = type(scaled).forward

    def louder(self: LlamaForCausalLM, **kwargs: object) -> object:
        output = forward(self, **kwargs)
        output.logits = output.logits * 2
        return output

    scaled.forward = MethodType(louder, scaled)
    assert not head_is_deferrable(scaled)
