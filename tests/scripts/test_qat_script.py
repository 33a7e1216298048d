"""scripts/qat_llm.py on a tiny model: every stage, every file, and runs that were killed."""

import hashlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from datasets import load_from_disk
from transformers import AutoModelForCausalLM

import maqd_hf
from maqd_hf.evaluation.perplexity import text_perplexity


@pytest.fixture
def job(tmp_path, tiny_llama, byte_tokenizer, sample_text):
    """Arguments of a job on a saved tiny model and a text file."""
    source, text = tmp_path / "float", tmp_path / "text.txt"
    tiny_llama.save_pretrained(source)
    byte_tokenizer.save_pretrained(source)
    text.write_text(sample_text, "utf-8")
    options = {
        "model": source,
        "dataset": text,
        "eval_split": "train",
        "output_dir": tmp_path / "run",
        "group_size": 32,
        "block_size": 32,
        "eval_window": 32,
        "eval_windows": 4,
        "calibration_samples": 4,
        "new_tokens": 4,
        "max_steps": 4,
        "bf16": "false",
        "use_cpu": "true",
        "per_device_train_batch_size": 2,
    }
    return lambda **more: [f"--{k}={v}" for k, v in {**options, **more}.items()]


def test_every_stage_and_every_file(
    job, tmp_path, byte_tokenizer, sample_text, capsys, monkeypatch
):
    script, result = import_module("scripts.qat_llm"), tmp_path / "result.json"
    arguments = job(lbn_tolerance=10, metrics=result)
    monkeypatch.setattr(sys, "argv", ["qat_llm.py", *arguments])
    metrics = script.main(arguments)
    run = tmp_path / "run"
    assert json.loads(result.read_text("utf-8")) == metrics
    assert "--lbn_tolerance=10" in metrics["command"]
    assert str(run) not in metrics["command"] and str(result) not in metrics["command"]
    assert {f.name for f in run.iterdir()} >= {
        "arguments.json", "metrics.json", "plot.png", "README.md", "model",
    }  # fmt: skip
    assert json.loads((run / "metrics.json").read_text("utf-8")) == metrics
    assert list(metrics["perplexity"]) == ["float", "start", "trained", "reloaded"]
    assert metrics["perplexity"]["reloaded"] == pytest.approx(
        metrics["perplexity"]["trained"], rel=1e-3
    )
    assert metrics["report"]["static norms"], "a tolerance of 10 nats admits every norm"
    assert (run / "plot.png").read_bytes()[:4] == b"\x89PNG"
    assert "import maqd_hf" in (run / "README.md").read_text("utf-8")
    assert "perplexity" in capsys.readouterr().out

    model = AutoModelForCausalLM.from_pretrained(run / "model")
    assert maqd_hf.model_size(model).bits_per_weight == pytest.approx(metrics["bits_per_weight"])
    again = text_perplexity(model, byte_tokenizer, [sample_text], 32, max_windows=4).perplexity
    assert again == pytest.approx(metrics["perplexity"]["reloaded"], rel=1e-5)


def test_an_interrupted_run_resumes_to_the_same_model(job, tmp_path, monkeypatch):
    script = import_module("scripts.qat_llm")
    script.main(job())
    trainer = script.MaQDTrainer
    inner = trainer.training_step

    def interrupted(self, *args, **kwargs):
        if self.state.global_step == 2:
            raise KeyboardInterrupt
        return inner(self, *args, **kwargs)

    other = {"output_dir": tmp_path / "other", "save_strategy": "steps", "save_steps": 2}
    monkeypatch.setattr(trainer, "training_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        script.main(job(**other))
    monkeypatch.setattr(trainer, "training_step", inner)
    script.main(job(**other, resume_from_checkpoint="true"))
    first = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model").state_dict()
    second = AutoModelForCausalLM.from_pretrained(tmp_path / "other" / "model").state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("generated", [False, True])
def test_several_processes_train_as_one_with_as_many_samples_does(job, tmp_path, generated):
    qat_llm = import_module("scripts.qat_llm")
    script = Path(qat_llm.__file__)
    text = {"dataset": "generated", "eval_dataset": tmp_path / "text.txt"} if generated else {}
    alone = {"output_dir": tmp_path / "alone", "per_device_train_batch_size": 4}
    alone = qat_llm.main(job(**alone, **text))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*launcher, script, *job(**text)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("== training") == 1, "only the first process reports"
    run = tmp_path / "run"
    assert {f.name for f in run.iterdir()} == {
        "arguments.json", "metrics.json", "plot.png", "README.md", "model",
        *(["generated"] if generated else []),
    }  # fmt: skip
    assert done.stderr.count("writing:   0%") == generated, "only the first process writes"
    metrics = json.loads((run / "metrics.json").read_text("utf-8"))
    assert metrics["training"]["tokens"] == 2 * 4 * 2 * 32, "processes, steps, samples, tokens"
    assert metrics["training"]["tokens"] == alone["training"]["tokens"]
    assert metrics["perplexity"] == pytest.approx(alone["perplexity"], rel=1e-3)
    losses = [[entry["loss"] for entry in found["loss"]] for found in (metrics, alone)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)


def test_the_model_writes_its_own_text(job, tmp_path):
    """Held-out text is the given one; the training samples are the teacher's."""
    script = import_module("scripts.qat_llm")
    text = tmp_path / "text.txt"
    options = {"dataset": "generated", "eval_dataset": text, "lbn_tolerance": 0, "max_steps": 2}
    metrics = script.main(job(**options))
    assert metrics["training"]["steps"] == 2
    assert metrics["evaluations"][0]["text"] == f"{text}, train"
    kept = load_from_disk(tmp_path / "run" / "generated")
    assert len(kept) * len(kept[0]["input_ids"]) >= metrics["training"]["tokens"]


def test_a_folder_that_holds_something_else_is_not_touched(job, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("precious")
    script = import_module("scripts.qat_llm")
    with pytest.raises(SystemExit, match="not empty"):
        script.main(job())
    with pytest.raises(SystemExit, match="no complete checkpoint"):
        script.main(job(resume_from_checkpoint="true"))
    assert (tmp_path / "run" / "mine.txt").read_text() == "precious"


# ------------------------------------------------------------------------- runs that are killed


def start(arguments: list[str], killed_at: str, call: int, finished: list[str]) -> None:
    """In a process of its own: the main job, killed when ``killed_at`` is called for the
    ``call``-th time. A call of what belongs to a ``finished`` stage ends it with status 7."""
    torch.set_num_threads(1)
    script, counts = import_module("scripts.qat_llm"), {}

    def watch(name, action):
        owner = script if hasattr(script, name) else script.MaQDTrainer
        inner = getattr(owner, name)

        def outer(*args, **kwargs):
            action(name)
            return inner(*args, **kwargs)

        setattr(owner, name, outer)

    def kill(name):
        counts[name] = counts.get(name, 0) + 1
        if counts[name] == call:
            os.kill(os.getpid(), signal.SIGKILL)

    for name in finished:
        watch(name, lambda name: os._exit(7))
    if killed_at:
        watch(killed_at, kill)
    script.main(arguments)


def status(*arguments) -> int:
    """How ``start(*arguments)`` ended, in a child of a process that has imported the script."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["scripts.qat_llm"])
    child = context.Process(target=start, args=arguments)
    child.start()
    child.join(timeout=120)
    child.kill()
    return child.exitcode


def packed_digest(run: Path) -> str:
    return hashlib.sha256((run / "model" / "model.safetensors").read_bytes()).hexdigest()


WORK = ["calibrate", "select_static_norms", "training_step", "pack_model", "write_card"]
KILLS = [  # the stage by its place in WORK; what is called, for the how many-th time
    (0, "calibrate", 1),
    (0, "save_model", 1),
    (1, "select_static_norms", 1),
    (1, "save_model", 1),
    (2, "training_step", 6),
    (2, "_save_rng_state", 1),  # the model of a checkpoint is written, its trainer state is not
    (2, "save_model", 1),
    (3, "pack_model", 1),
    (3, "save_model", 1),
    (4, "package_versions", 1),
    (4, "write_card", 1),
]


def supervised(arguments: list[str], kills: list[tuple[int, str, int]], run: Path) -> None:
    """Repeat one command, killed at each of ``kills`` in turn, until it ends.

    No start repeats the work of a stage that was finished before the last kill."""
    finished = 0
    for stage, killed_at, call in kills:
        assert status(arguments, killed_at, call, WORK[:finished]) == -signal.SIGKILL, killed_at
        if killed_at == "training_step":
            assert list(run.glob("checkpoint-*")), "five steps without a checkpoint"
        finished = stage
    assert status(arguments, "", 0, WORK[:finished]) == 0


@pytest.fixture
def uninterrupted(job, tmp_path):
    """Arguments of a longer job, and the digest of what it packs."""
    options = {"lbn_tolerance": 10, "max_steps": 8, "checkpoint_share": 1}
    whole = tmp_path / "whole"
    assert status(job(**options, output_dir=whole), "", 0, []) == 0
    return options, packed_digest(whole)


@pytest.mark.parametrize(
    "kills",
    [
        [KILLS[2], KILLS[4], KILLS[7]],
        pytest.param(KILLS, marks=pytest.mark.slow),
    ],
    ids=["three stages", "all stages"],
)
def test_a_command_repeated_after_kills_packs_the_same_bytes(job, tmp_path, uninterrupted, kills):
    options, digest = uninterrupted
    run = tmp_path / "run"
    supervised(job(**options), kills, run)
    assert packed_digest(run) == digest
    left = {f.name for f in run.iterdir() if not f.name.startswith(".")}
    assert left == {"arguments.json", "metrics.json", "plot.png", "README.md", "model"}
    before = packed_digest(run), (run / "metrics.json").read_text("utf-8")
    assert status(job(**options), "", 0, WORK) == 0, "a finished run has nothing to do"
    assert (packed_digest(run), (run / "metrics.json").read_text("utf-8")) == before


def test_other_settings_than_the_runs_are_refused_by_name(job, tmp_path):
    script = import_module("scripts.qat_llm")
    metrics = script.main(job(max_steps=1))
    for changed, message in (
        ({"weight_levels": 4}, "weight_levels was 16 and is now 4"),
        ({"learning_rate": 0.5}, "learning_rate was 'None' and is now 0.5"),
        ({"activation_scaling": "static"}, "activation_scaling was 'token' and is now 'static'"),
    ):
        with pytest.raises(SystemExit, match=rf"{message}.*--overwrite"):
            script.main(job(max_steps=1, **changed))
    assert json.loads((tmp_path / "run" / "metrics.json").read_text("utf-8")) == metrics
    assert script.main(job(max_steps=1, metrics=tmp_path / "copy.json")) == metrics
    again = script.main(job(max_steps=1, weight_levels=4, overwrite="true"))
    assert again["bits_per_weight"] < metrics["bits_per_weight"]


def test_a_failed_start_does_not_block_the_next(job, tmp_path):
    script = import_module("scripts.qat_llm")
    with pytest.raises(OSError):
        script.main(job(model=tmp_path / "nowhere", weight_levels=4))
    (tmp_path / "run" / "metrics.json.part").write_text('{"secon')
    assert script.main(job(max_steps=1))["training"]["steps"] == 1


def test_a_folder_that_cannot_be_written_is_named(job):
    """No user writes below /proc; so it is with others' folders for a user without rights."""
    with pytest.raises(SystemExit, match=r"^/proc/run cannot be written .*--output_dir"):
        import_module("scripts.qat_llm").main(job(output_dir="/proc/run"))
