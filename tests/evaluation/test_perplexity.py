"""token_perplexity equals a plain loop over positions, and counts every token once."""

import math
from types import SimpleNamespace

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from maqd_hf.data.text import bos_token
from maqd_hf.evaluation import perplexity
from maqd_hf.evaluation.perplexity import plan_windows, text_perplexity, token_perplexity


def plain_nll(model, ids, window, stride, bos=None):
    """Slow reference: one forward pass per scored token's window, one token at a time."""
    size = window if bos is None else window - 1
    stride = min(stride, size)
    total, scored = 0.0, set()
    for start in range(0, len(ids), stride):
        piece = ids[start : start + size]
        row = piece if bos is None else [bos, *piece]
        with torch.no_grad():
            log_p = model(input_ids=torch.tensor([row])).logits[0].float().log_softmax(-1)
        for k, token in enumerate(piece):
            before = k - 1 if bos is None else k
            if before >= 0 and start + k not in scored:
                scored.add(start + k)
                total -= log_p[before, token].item()
        if start + size >= len(ids):
            break
    return total, len(scored)


@pytest.fixture
def ids(byte_tokenizer, sample_text):
    return torch.tensor(byte_tokenizer(sample_text[:500]).input_ids)


@pytest.mark.parametrize("bos", [None, 0])
@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize(
    ("window", "stride"), [(32, 32), (32, 8), (64, 63), (100, 1), (128, 50), (2, 2)]
)
def test_equals_plain_loop(tiny_llama, ids, window, stride, batch_size, bos):
    ids = ids[:211]
    result = token_perplexity(
        tiny_llama, ids, window, stride, batch_size=batch_size, bos_token_id=bos
    )
    nll, tokens = plain_nll(tiny_llama, ids.tolist(), window, stride, bos)
    assert result.tokens == tokens
    assert result.nll_sum == pytest.approx(nll, rel=1e-6)
    assert result.perplexity == pytest.approx(math.exp(nll / tokens), rel=1e-6)


def test_equals_plain_loop_without_logits_to_keep(tiny_llama, ids):
    class Bare(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, input_ids, attention_mask):
            return SimpleNamespace(logits=self.model(input_ids=input_ids).logits)

    result = token_perplexity(Bare(tiny_llama), ids, 64, 16)
    assert result.nll_sum == pytest.approx(plain_nll(tiny_llama, ids.tolist(), 64, 16)[0], rel=1e-6)


@pytest.mark.parametrize("length", [0, 1, 2, 7, 8, 9, 40, 41])
@pytest.mark.parametrize(("window", "stride"), [(8, 8), (8, 7), (8, 3), (8, 1), (2, 1)])
@pytest.mark.parametrize("bos", [False, True])
def test_every_token_is_scored_once(length, window, stride, bos):
    counts = [0] * length
    for w in plan_windows(length, window, stride, bos):
        assert w.end - w.start + bos <= window
        assert w.end - w.scored >= w.start + (not bos)  # each scored token has context
        for k in range(w.end - w.scored, w.end):
            counts[k] += 1
    size = window - bos
    without_context = set() if bos else {0}
    if not bos and stride == window:
        without_context = set(range(0, length, size))
    assert counts == [0 if k in without_context else 1 for k in range(length)]


def test_chunked_logits_change_nothing(tiny_llama, ids, monkeypatch):
    whole = token_perplexity(tiny_llama, ids, 64, batch_size=4)
    monkeypatch.setattr(perplexity, "LOGIT_ROWS", 5)
    parts = token_perplexity(tiny_llama, ids, 64, batch_size=4)
    assert parts.nll_sum == pytest.approx(whole.nll_sum, rel=1e-9)


def test_max_windows_scores_the_first_ones(tiny_llama, ids):
    result = token_perplexity(tiny_llama, ids, 32, max_windows=3)
    assert (result.windows, result.tokens) == (3, 93)
    assert result.nll_sum == pytest.approx(token_perplexity(tiny_llama, ids[:96], 32).nll_sum)


def test_a_model_in_bfloat16_has_nearly_the_same_perplexity(tiny_gpt2, ids):
    exact = token_perplexity(tiny_gpt2, ids, 64)
    rough = token_perplexity(tiny_gpt2.to(torch.bfloat16), ids, 64)
    assert exact.perplexity != rough.perplexity
    assert rough.perplexity == pytest.approx(exact.perplexity, rel=0.02)


def test_a_text_shorter_than_the_window_is_one_window(tiny_llama, byte_tokenizer):
    result = text_perplexity(tiny_llama, byte_tokenizer, ["Hello"], 64)
    assert (result.windows, result.tokens) == (1, 4)
    assert "1 window(s) of 64 positions" in result.protocol


def test_training_mode_and_gradients_are_left_alone(tiny_llama, ids):
    tiny_llama.train()
    token_perplexity(tiny_llama, ids, 64)
    assert tiny_llama.training
    assert all(p.grad is None for p in tiny_llama.parameters())


def test_huge_loss_is_infinite_not_an_error(tiny_llama, ids):
    tiny_llama.lm_head.weight.data.mul_(1e6)
    assert token_perplexity(tiny_llama, ids, 64).perplexity == math.inf


@pytest.mark.parametrize("chunk", [1, 100, 2**21])
def test_joined_texts_are_one_row(tiny_llama, byte_tokenizer, sample_text, monkeypatch, chunk):
    monkeypatch.setattr(perplexity, "CHUNK_CHARACTERS", chunk)
    texts = sample_text[:600].splitlines()
    whole = text_perplexity(tiny_llama, byte_tokenizer, ["\n".join(texts)], 64)
    joined = text_perplexity(tiny_llama, byte_tokenizer, iter(texts), 64, join="\n")
    assert joined.tokens == whole.tokens
    assert joined.nll_sum == pytest.approx(whole.nll_sum, rel=1e-9)
    assert joined.bits_per_byte == pytest.approx(whole.bits_per_byte)


def test_unjoined_texts_add_up_their_losses(tiny_llama, byte_tokenizer, sample_text):
    texts = [sample_text[:100], "", sample_text[100:300], "x"]  # the last has no context
    result = text_perplexity(tiny_llama, byte_tokenizer, texts, 64, join=None)
    alone = [text_perplexity(tiny_llama, byte_tokenizer, [texts[k]], 64) for k in (0, 2)]
    assert result.tokens == sum(r.tokens for r in alone)
    assert result.nll_sum == pytest.approx(sum(r.nll_sum for r in alone), rel=1e-9)
    assert "each text on its own" in result.protocol


def test_only_the_needed_text_is_read(tiny_llama, byte_tokenizer, monkeypatch):
    monkeypatch.setattr(perplexity, "CHUNK_CHARACTERS", 10)

    def texts():
        yield "a" * 200
        raise AssertionError("read on")

    result = text_perplexity(tiny_llama, byte_tokenizer, texts(), 32, max_windows=2)
    assert result.windows == 2


def test_bits_per_byte_of_a_byte_model(tiny_llama, byte_tokenizer, sample_text):
    text = sample_text[:400]
    result = text_perplexity(tiny_llama, byte_tokenizer, [text], 64, add_bos=True)
    assert result.tokens == len(text.encode())  # one token a byte, and BOS lets all be scored
    assert result.bits_per_byte == pytest.approx(result.nll_sum / math.log(2) / result.tokens)


def test_bos_follows_the_tokenizer(tiny_llama, byte_tokenizer, sample_text):
    text = [sample_text[:300]]
    plain = text_perplexity(tiny_llama, byte_tokenizer, text, 64)
    asked = text_perplexity(tiny_llama, byte_tokenizer, text, 64, add_bos=True)
    byte_tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    own = text_perplexity(tiny_llama, byte_tokenizer, text, 64)
    refused = text_perplexity(tiny_llama, byte_tokenizer, text, 64, add_bos=False)
    assert own.nll_sum == asked.nll_sum
    assert refused.nll_sum == plain.nll_sum
    assert own.tokens == 300 > plain.tokens


def test_errors_say_what_to_do(tiny_llama, byte_tokenizer, ids):
    with pytest.raises(ValueError, match="No text to score"):
        text_perplexity(tiny_llama, byte_tokenizer, [])
    with pytest.raises(ValueError, match="No text to score"):
        text_perplexity(tiny_llama, byte_tokenizer, ["", "a"], join=None)
    with pytest.raises(ValueError, match="Nothing to score"):
        token_perplexity(tiny_llama, ids[:1])
    with pytest.raises(ValueError, match=r"shape \(tokens,\), got \(1, 500\)"):
        token_perplexity(tiny_llama, ids[None])
    with pytest.raises(ValueError, match=r"stride must lie in 1..window=64, got 65"):
        token_perplexity(tiny_llama, ids, 64, 65)
    with pytest.raises(ValueError, match="window must be at least 2"):
        token_perplexity(tiny_llama, ids, 1)
    with pytest.raises(ValueError, match="max_windows"):
        token_perplexity(tiny_llama, ids, max_windows=0)
    byte_tokenizer.bos_token = None
    with pytest.raises(ValueError, match="bos_token is not set"):
        bos_token(byte_tokenizer, True)


def test_padding_alone_and_nan_have_no_perplexity(tiny_llama):
    padding = tiny_llama.config.pad_token_id
    with pytest.raises(ValueError, match=f"all 9 tokens are padding .token {padding}"):
        token_perplexity(tiny_llama, torch.full((9,), padding))
    with torch.no_grad():
        tiny_llama.model.norm.weight[0] = float("nan")
    with pytest.raises(FloatingPointError, match="NaN"):
        token_perplexity(tiny_llama, torch.arange(3, 12))


def test_every_module_keeps_its_own_mode_after_success_and_failure(tiny_llama):
    tiny_llama.train()
    tiny_llama.model.layers[0].eval()
    modes = {name: module.training for name, module in tiny_llama.named_modules()}
    token_perplexity(tiny_llama, torch.arange(3, 12))
    assert {name: module.training for name, module in tiny_llama.named_modules()} == modes
    with pytest.raises(IndexError):
        token_perplexity(tiny_llama, torch.full((9,), 10**6))
    assert {name: module.training for name, module in tiny_llama.named_modules()} == modes
