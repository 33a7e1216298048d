"""scripts/bench/quality.py and what it rests on: rows, resuming, rules, zero-shot scoring."""

import json
import math
import sys
from dataclasses import replace
from importlib import import_module
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from torch import nn

from maqd_hf.nn import MaQDLinear


@pytest.fixture
def job(tmp_path, tiny_llama, byte_tokenizer, sample_text):
    """Arguments of the benchmark on a tiny model and a folder with the texts it reads."""
    model, data = tmp_path / "float", tmp_path / "data"
    tiny_llama.save_pretrained(model)
    byte_tokenizer.save_pretrained(model)
    texts = Dataset.from_dict({"text": sample_text.split("\n\n")[:60]})
    for place in (
        "wikitext-2/wikitext-2-tokens-validation",
        "wikitext-2/wikitext-2-raw-test",
        "wiki-sample/enwiki-2016-105-articles",
        "imdb/train",
    ):
        (data / place).parent.mkdir(parents=True, exist_ok=True)
        texts.to_parquet(data / f"{place}.parquet")
    settings = {
        "model": str(model),
        "data_dir": data,
        "results": tmp_path / "quality.json",
        "tokens": 192,
        "block_size": 32,
        "batch_size": 2,
        "samples": 4,
        "window": 32,
        "windows": 2,
    }
    script = import_module("scripts.bench.quality")
    return script, lambda **more: script.Arguments(**{**settings, **more})


def test_rows_run_are_measured_on_both_texts_and_are_not_repeated(job, monkeypatch):
    script, arguments = job
    rows = ["float", "round to nearest M=4 g64", "MaQD M=4 g64", "SEQ M=4 g64"]
    found = script.main(arguments(rows=rows))
    assert [run["name"] for run in found.runs] == [*rows, "SEQ M=4 g64"]  # at two rates
    for run in found.runs:
        assert {name: t["tokens"] for name, t in run["texts"].items()} == {
            "wikitext": 62,
            "imdb": 62,
        }
        assert all(math.isfinite(text["perplexity"]) for text in run["texts"].values())
    assert [len(run.get("loss", ())) for run in found.runs] == [0, 0, 3, 3, 3]
    assert found.runs[0]["bits_per_weight"] == 32
    assert found.runs[1]["bits_per_weight"] == pytest.approx(2 + 0.5 + 32 / 64, abs=0.3)

    monkeypatch.setattr(script, "run_row", lambda *args: pytest.fail("repeated"))
    again = script.main(arguments(rows=rows))
    assert again.runs == json.loads(arguments().results.read_text("utf-8"))["runs"] == found.runs


@pytest.mark.parametrize("name", ["MaQD M=16 g64, 4-bit static inputs", "MaQD M=4 g64"])
def test_start_values_kept_for_the_next_row_are_those_it_would_compute(job, monkeypatch, name):
    script, arguments = job
    row = next(row for row in script.TABLES["llm"] if row.name == name)
    other = replace(row, surrogate="tanh")
    alone = script.quantized(other, script.Task("llm", arguments()))
    task = script.Task("llm", arguments())
    script.quantized(row, task)
    monkeypatch.setattr(script, "calibrate", lambda *args, **kwargs: pytest.fail("repeated"))
    after = script.quantized(other, task)
    layers = [layer for layer in after.modules() if isinstance(layer, MaQDLinear)]
    assert {layer.spec.surrogate for layer in layers} == {"tanh"}
    ids = task.calibration_ids(other)
    values, wanted = after.state_dict(), alone.state_dict()
    assert values.keys() == wanted.keys()
    assert all(torch.equal(values[key], wanted[key]) for key in wanted)
    assert torch.equal(after(ids).logits, alone(ids).logits)
    for changed in ({"weight_offset": False}, {"own_text": True}):
        with pytest.raises(pytest.fail.Exception, match="repeated"):
            script.quantized(replace(row, **changed), task)


def test_rows_that_change_the_training_alone_do_so(job):
    script, arguments = job
    names = ["MaQD M=4 g64", *(f"MaQD M=4 g64, scales {how}" for how in ("fixed", "at*"))]
    _, plain, fixed, slower = script.main(arguments(rows=names)).runs
    assert [run["scale_learning_rate"] for run in (plain, fixed, slower)] == [5e-3, 0, 5e-4]
    assert plain["loss"][0] == fixed["loss"][0] == slower["loss"][0]
    assert len({run["loss"][-1] for run in (plain, fixed, slower)}) == 3


def test_a_row_of_its_own_text_never_sees_the_texts_of_the_others(job):
    script, arguments = job
    (row,) = (row for row in script.TABLES["llm"] if row.own_text)
    task = script.Task("llm", arguments())
    task.blocks = None
    model = script.quantized(row, task)
    assert len(script.distill(model, row, task, 1e-3, 0)["loss"]) == 3
    assert len(task.own_blocks) == 192 // 32
    assert task.key(row, 0, None)["train"] == "text the float model wrote"


def test_more_tokens_are_another_run_of_trained_rows_only(job):
    script, arguments = job
    rows = ["float", "MaQD M=3 g64"]
    script.main(arguments(rows=rows))
    found = script.main(arguments(rows=rows, tokens=128))
    assert [(run["name"], run.get("tokens")) for run in found.runs] == [
        ("float", None),
        ("MaQD M=3 g64", 192),
        ("MaQD M=3 g64", 128),
    ]


def test_a_trained_model_is_kept_with_a_card_of_its_own_numbers(job, tmp_path):
    script, arguments = job
    found = script.main(arguments(rows=["float", "MaQD M=4 g64"], models=tmp_path / "models"))
    (folder,) = (tmp_path / "models").iterdir()
    record = json.loads((folder / "metrics.json").read_text("utf-8"))
    for evaluation in record["evaluations"]:
        float_run, trained = (run["texts"][evaluation["text"]] for run in found.runs)
        assert evaluation["values"]["float"] == float_run["perplexity"]
        assert evaluation["values"]["packed"] == pytest.approx(trained["perplexity"], rel=1e-3)
    card = (folder / "README.md").read_text("utf-8")
    assert f"{record['evaluations'][1]['values']['packed']:.5g}" in card


def test_a_training_cut_off_goes_on_where_it_was(job, tmp_path, monkeypatch):
    script, arguments = job
    rows, steps = ["MaQD M=4 g64"], []

    class Counted(script.AnyLayersTrainer):
        limit = 2

        def training_step(self, *args, **kwargs):
            if len(steps) == self.limit:
                raise RuntimeError("cut off")
            steps.append(self.state.global_step)
            return super().training_step(*args, **kwargs)

    whole = script.main(arguments(rows=rows)).runs[1]
    monkeypatch.setattr(script, "AnyLayersTrainer", Counted)
    kept = {"checkpoints": tmp_path / "kept", "save_steps": 1, "results": tmp_path / "other.json"}
    with pytest.raises(RuntimeError, match="cut off"):
        script.main(arguments(rows=rows, **kept))
    Counted.limit = None
    # the checkpoint holds what calibrating set
    monkeypatch.setattr(script, "calibrate", lambda *args, **kwargs: 1 / 0)
    found = script.main(arguments(rows=rows, **kept)).runs[1]
    assert steps == [0, 1, 2]
    assert found["loss"] == whole["loss"]
    assert found["texts"] == whole["texts"]
    assert not any((tmp_path / "kept").iterdir())


def test_a_missing_peer_is_named_and_the_others_run(job, monkeypatch, capsys):
    script, arguments = job
    monkeypatch.setitem(sys.modules, "hqq", None)
    found = script.main(arguments(rows=["HQQ 4 bit", "float"]))
    assert [run["name"] for run in found.runs] == ["float"]
    assert "hqq" in found.missing["HQQ 4 bit"]
    assert "HQQ 4 bit did not run" in capsys.readouterr().out
    assert "HQQ 4 bit" in json.loads(arguments().results.read_text("utf-8"))["missing"]


def test_an_error_of_our_own_is_not_hidden(job, monkeypatch):
    script, arguments = job
    monkeypatch.setattr(script, "quantize_model", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        script.main(arguments(rows=["MaQD M=4 g64"]))


def test_every_row_learns_from_the_same_answers_of_the_float_model(job):
    script, arguments = job
    task = script.Task("llm", arguments())
    ids = task.calibration_ids(script.TABLES["llm"][0])
    plain = task.teacher(ids).logits
    with script.remembering(task.teacher, task.said):
        first, second = task.teacher(ids).logits, task.teacher(ids.flip(0)).logits.flip(0)
    assert len(task.said) == len(ids)
    torch.testing.assert_close(first, plain)
    assert torch.equal(first, second)
    assert "forward" not in vars(task.teacher.base_model)


# ------------------------------------------------------------------------------------ the rules


def slow_lsq(weight, step, levels):
    """One number at a time: value, gradient of the weight, gradient of the step (unscaled)."""
    low, high = -(levels // 2), (levels - 1) // 2
    u = weight / step
    if u <= low:
        return low * step, 0.0, low
    if u >= high:
        return high * step, 0.0, high
    return round(u) * step, 1.0, round(u) - u


def slow_seq(weight, alpha, levels):
    half = levels / 2
    shift = 0.0 if levels % 2 else 0.5
    u = weight / alpha
    inside = max(-0.99, min(0.99, u))
    value = (round(inside * half - shift) + shift) / half
    clipped = inside != u
    return value * alpha, 0.0 if clipped else 1.0, value if clipped else value - u


@pytest.mark.parametrize("levels", [3, 4, 16])
@pytest.mark.parametrize("rule, slow", [("LSQ", slow_lsq), ("SEQ", slow_seq)])
def test_rules_equal_their_slow_references(rule, slow, levels):
    rules = import_module("scripts.bench.quality_rules")
    weight = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    step = (0.3 + torch.rand(3, 1, dtype=torch.float64)).requires_grad_()
    out = rules.RULES[rule][0](weight, step, levels)
    grad = torch.randn_like(out)
    out.backward(grad)
    scale = 1 / math.sqrt(8 * max((levels - 1) // 2, 1))
    for row in range(3):
        total = 0.0
        for column in range(8):
            value, slope, of_step = slow(weight[row, column].item(), step[row, 0].item(), levels)
            g = grad[row, column].item()
            assert out[row, column].item() == pytest.approx(value)
            assert weight.grad[row, column].item() == pytest.approx(g * slope)
            total += g * of_step * scale
        assert step.grad[row, 0].item() == pytest.approx(total)
    assert out.detach().div(step.detach()).unique().numel() <= 3 * levels


def test_absmean_is_ternary_with_one_scale_a_tensor_and_a_straight_gradient():
    rules = import_module("scripts.bench.quality_rules")
    weight = torch.randn(4, 8, requires_grad=True)
    out = rules.absmean(weight, torch.ones(1), 3)
    mean = weight.detach().abs().mean()
    expected = [[max(-1, min(1, round(w / mean.item()))) for w in row] for row in weight.tolist()]
    torch.testing.assert_close(out.detach() / mean, torch.tensor(expected).float())
    out.sum().backward()
    assert torch.equal(weight.grad, torch.ones_like(weight))


@pytest.mark.parametrize("rule", ["LSQ", "SEQ", "BitNet"])
def test_a_rule_replaces_the_layers_of_the_base_model_only(tiny_llama, rule):
    rules = import_module("scripts.bench.quality_rules")
    count = sum(type(m) is nn.Linear for m in tiny_llama.model.modules())
    rules.apply_rule(tiny_llama, rule, 3, 32)
    replaced = [m for m in tiny_llama.modules() if isinstance(m, rules.RuleLinear)]
    assert len(replaced) == count
    assert type(tiny_llama.lm_head) is nn.Linear
    for layer in replaced:
        for group in layer.quantized_weight().unflatten(1, (-1, 32)).flatten(0, 1):
            assert group.unique().numel() <= 3
    with pytest.raises(ValueError, match="unknown"):
        rules.apply_rule(tiny_llama, "guess", 3, None)


# ------------------------------------------------------------------------------------ zero-shot


class Characters:
    """A tokenizer: one id a character."""

    def __call__(self, text):
        return SimpleNamespace(input_ids=[ord(c) - 32 for c in text])


class Bigram(nn.Module):
    """Logits that depend on the last character only."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(96, 96))

    def forward(self, input_ids, attention_mask):
        return SimpleNamespace(logits=self.table[input_ids])


def test_a_choice_is_the_sum_over_its_own_tokens():
    zero_shot = import_module("scripts.bench.zero_shot")
    model = Bigram()
    question = zero_shot.multiple_choice("x", ["ab", "abcd"], 0)
    scores = zero_shot.score(model, Characters(), question)
    log_p = model.table.detach().log_softmax(-1)
    for found, choice in zip(scores, ["ab", "abcd"], strict=True):
        text = f": {choice}"  # the prompt ends in a colon
        expected = sum(log_p[ord(a) - 32, ord(b) - 32] for a, b in pairwise(text))
        assert found.log_likelihood == pytest.approx(expected.item(), rel=1e-5)


def test_the_length_decides_only_the_normed_accuracy():
    zero_shot = import_module("scripts.bench.zero_shot")
    question = zero_shot.multiple_choice("x", ["ab", "abcdéf"], 1)
    scores = [zero_shot.Score(-3.0, False), zero_shot.Score(-7.0, False)]
    assert question.sizes == [2, 7]  # bytes
    assert zero_shot.outcome(question, scores) == {"acc": False, "acc_norm": True}


def test_a_last_word_counts_when_every_token_is_the_likeliest():
    zero_shot = import_module("scripts.bench.zero_shot")
    model = Bigram()
    with torch.no_grad():
        model.table.zero_()
        for a, b in zip("y no", " no!", strict=True):
            model.table[ord(a) - 32, ord(b) - 32] = 5.0
    right, wrong = zero_shot.last_word("why no"), zero_shot.last_word("why on")
    found = zero_shot.accuracy(model, Characters(), [right, wrong, wrong])
    assert found["acc"] == pytest.approx(1 / 3)
    assert found["acc_stderr"] == pytest.approx(math.sqrt(2 / 9 / 2))
    assert found["questions"] == 3 and "acc_norm" not in found


def test_answers_are_asked_once_and_make_a_table(job, tmp_path):
    zero_shot, folder = import_module("scripts.bench.zero_shot"), tmp_path / "data" / "zeroshot"
    folder.mkdir()
    choices = {"query": ["a", "b"], "choices": [["x", "yy"], ["z", "w"]], "label": [1, 0]}
    Dataset.from_dict(choices).to_parquet(folder / "piqa_validation.parquet")
    Dataset.from_dict({"text": ["one two"]}).to_parquet(folder / "lambada_openai_test.parquet")
    arguments = zero_shot.Arguments(
        data_dir=tmp_path / "data",
        model=[str(tmp_path / "float")],
        task=["piqa", "lambada"],
        results=tmp_path / "zero_shot.json",
    )
    content = zero_shot.main(arguments)
    assert [(run["task"], run["questions"]) for run in content["runs"]] == [
        ("piqa", 2),
        ("lambada", 1),
    ]
    assert len(zero_shot.main(arguments)["runs"]) == 2
    table = import_module("scripts.bench.report.render").zero_shot(content)
    assert "| float |" in table and "2 of piqa" in table and "piqa, acc_norm" in table


# ------------------------------------------------------------------------------ plots and tables


def test_plots_and_table_are_made_from_what_is_there(job, tmp_path, capsys, monkeypatch):
    script, arguments = job
    monkeypatch.setitem(sys.modules, "hqq", None)
    found = script.main(arguments(rows=["float", "MaQD M=4 g64", "round*M=4*", "HQQ 2 bit"]))
    table = import_module("scripts.bench.report.render").quality(
        json.loads(arguments().results.read_text("utf-8"))
    )
    for run in found.runs:
        assert f"| {run['name']} |" in table
        assert f"{run['texts']['imdb']['perplexity']:,.1f}" in table
    assert "Did not run: HQQ 2 bit" in table
    folders = ["--results", str(tmp_path), "--output", str(tmp_path / "plots")]
    written = import_module("scripts.bench.report.plots").main(folders)
    assert {path.name for path in written} == {"quality.png", "quality_imdb.png", "loss.png"}
    assert all(path.stat().st_size > 1000 for path in written)
    assert "lbn_batch.png skipped" in capsys.readouterr().out


def test_plots_show_of_maqd_only_what_was_aimed_at():
    plots, text = import_module("scripts.bench.report.plots"), {"wikitext": {"perplexity": 40.0}}
    llm = {"table": "llm", "model": "m", "texts": text, "bits_per_weight": 2.25, "seed": 0}
    trained = {**llm, "method": "MaQD", "start": "gptq", "loss": [2.0, 1.0]}
    content = {
        "runs": [
            {**llm, "method": "float", "name": "float"},
            {**trained, "name": "MaQD M=4 g64"},
            {**trained, "name": "MaQD M=4 g64, no offset", "bits_per_weight": 2.0},
            {**trained, "name": "SEQ M=4 g64", "method": "SEQ"},
        ]
    }
    lines = {line.get_label(): line for line in plots.quality(content).axes[0].lines}
    assert list(lines) == ["MaQD, trained", "SEQ", "float"]
    assert list(lines["MaQD, trained"].get_xdata()) == [2.25]
    drawn = [line.get_label() for line in plots.losses(content).axes[0].lines]
    assert drawn == ["MaQD M=4 g64", "SEQ M=4 g64"]


def test_targets_are_judged_by_the_worse_text_and_the_best_run():
    targets = import_module("scripts.bench.report.targets")
    text = lambda a, b: {"wikitext": {"perplexity": a}, "imdb": {"perplexity": b}}  # noqa: E731
    eight = {"table": "llm", "method": "MaQD", "name": "MaQD M=8 g64", "samples": 32}
    runs = [
        {"table": "llm", "method": "float", "name": "float", "texts": text(20.0, 40.0)},
        {**eight, "tokens": 10, "texts": text(22, 50)},
        {**eight, "tokens": 20, "texts": text(23, 44)},
        {"table": "rules", "method": "MaQD", "name": "MaQD M=4 g64", "tokens": 20, "texts": {}},
    ]
    (found,) = targets.quality_targets(runs)
    assert found.what == "MaQD M=8 g64, 20 tokens"
    assert found.found == pytest.approx(15) and not found.met
    assert found.cells()[1:] == (
        "at most 12 %",
        "15.0 %",
        "missed: falls with the tokens, of which a million were allowed, and with those of the "
        "calibration",
    )
    runs.append({**eight, "tokens": 30, "texts": text(24, 44), "samples": 16})
    assert targets.quality_targets(runs) == [found]  # less calibration: says nothing of tokens
    runs.append({**eight, "tokens": 30, "texts": text(24, 44)})
    (found,) = targets.quality_targets(runs)
    assert found.cells()[0] == "MaQD M=8 g64, 20 tokens"
    assert found.cells()[3] == "missed: 30 tokens were no better"
    assert targets.quality_targets([]) == []


def test_targets_of_speed_are_ratios_of_one_run_and_need_their_rival():
    targets = import_module("scripts.bench.report.targets")
    shape = {"columns": 64, "tokens": 1}
    report = {
        "matrices": [
            {**shape, "rows": rows, "name": name, "seconds": seconds}
            for rows, name, seconds in (
                (1536, "maqd 2 bit", 9.0),  # too small to count
                (2048, "maqd 2 bit", 2.0),
                (4096, "maqd 2 bit", 3.0),
                (1536, "torch bf16", 9.0),
                (2048, "torch bf16", 22.0),
                (4096, "torch bf16", 27.0),
            )
        ]
    }
    (found,) = targets.speed_targets(report)
    assert found.found == 9 and not found.met and "missed" in found.cells()[-1]
    assert found.what == "one token, 2 bit, to torch bf16, worst of 2 matrices"
