"""A save that fails, is killed or meets another never damages what was there."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import resource
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from transformers import PreTrainedModel

from maqd_hf import pack_model, quantize_model, save_model
from maqd_hf.checkpoint import switching
from scripts.experiments.kill_saves import kill_saves
from tests.support.families import tiny


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed Llama."""
    path = tmp_path_factory.mktemp("good")
    packed().save_pretrained(path)
    return path


@pytest.fixture
def copied(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "copy"))


def packed(seed: int = 0) -> PreTrainedModel:
    model = tiny("llama-tied", seed)
    quantize_model(model, weight_levels=15, embedding_levels=15, activation_scaling="token")
    pack_model(model)
    return model


def load(path: Path) -> PreTrainedModel:
    return hf.AutoModelForCausalLM.from_pretrained(path)


def holds(path: Path, model: PreTrainedModel) -> bool:
    return same_tensors(load(path).state_dict(), model)


def same_tensors(tensors: dict[str, torch.Tensor], model: PreTrainedModel) -> bool:
    return all(torch.equal(tensor, tensors[name]) for name, tensor in model.state_dict().items())


def same_files(path: Path) -> dict[str, bytes]:
    return {str(f.relative_to(path)): f.read_bytes() for f in path.rglob("*") if f.is_file()}


def test_save_model_replaces_the_weights_and_nothing_else(tmp_path: Path, good: Path) -> None:
    model, path = load(good), tmp_path / "deep" / "model"
    save_model(model, path, max_shard_size="8KB")
    (path / "README.md").write_text("mine")
    assert len(list(path.glob("*.safetensors"))) > 1
    assert save_model(model, str(path)) == path
    names = {file.name for file in path.iterdir()}
    assert names == {"README.md", "config.json", "generation_config.json", "model.safetensors"}
    assert list(path.parent.iterdir()) == [path]
    again = load(path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)


def test_save_model_saves_what_else_is_given(tmp_path: Path, good: Path) -> None:
    class Tokenizer:
        def save_pretrained(self, path: Path) -> None:
            (Path(path) / "tokenizer.json").write_text("{}")

    save_model(load(good), tmp_path / "m", Tokenizer())
    assert (tmp_path / "m" / "tokenizer.json").exists()


def test_a_full_disk_leaves_the_old_checkpoint_alone(copied: Path, tmp_path: Path) -> None:
    """RLIMIT_FSIZE makes every write beyond 4 kB fail, as a full disk would."""
    before, model = same_files(copied), load(copied)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(OSError, match="was not saved and is as it was before"):
            save_model(model, copied)
        with pytest.raises(OSError, match="was not saved"):
            save_model(model, tmp_path / "new")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert same_files(copied) == before
    assert {p.name for p in tmp_path.iterdir()} == {"copy"}
    load(copied)


def test_an_interrupt_leaves_the_old_checkpoint_alone(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, model = same_files(copied), load(copied)

    def interrupted(path: Path, **kwargs: Any) -> None:
        (Path(path) / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(model, "save_pretrained", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_model(model, copied)
    assert same_files(copied) == before and list(copied.parent.iterdir()) == [copied]


# ----------------------------------------------------------------------------- killed while saving


@pytest.mark.parametrize("shard_size", ["50GB", "8KB"], ids=["whole", "sharded"])
@pytest.mark.parametrize("packed", [False, True], ids=["qat", "packed"])
def test_a_killed_save_leaves_the_whole_old_or_the_whole_new_model(
    packed: bool, shard_size: str, tmp_path: Path
) -> None:
    counts = kill_saves(tmp_path / "model", packed, shard_size, kills=6, seed=len(shard_size))
    assert counts["old"] + counts["new"] == 6
    assert counts["broken"] == counts["left behind"] == 0


def files_of(path: Path) -> set[str]:
    return {file.name for file in path.iterdir()}


@pytest.mark.parametrize("sizes", [("50GB", "20KB"), ("20KB", "50GB"), ("20KB", "16KB")])
def test_every_step_of_the_switch_loads_and_is_completed_by_the_next_save(
    sizes: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The writer stops before each change in turn, without tidying up after itself."""
    old, new = packed(1), packed(2)
    new.save_pretrained(tmp_path / "plain", max_shard_size=sizes[1])
    stops, step = 0, 0
    while stops == step:
        step += 1
        path = tmp_path / str(step)
        save_model(old, path, max_shard_size=sizes[0])
        with monkeypatch.context() as patch:
            stops += stopped_before_change(step, new, path, sizes[1], patch)
        tensors = load(path).state_dict()
        assert same_tensors(tensors, old) or same_tensors(tensors, new)
        save_model(new, path, max_shard_size=sizes[1])
        assert same_files(path) == same_files(tmp_path / "plain")
    assert stops >= 9


class Stopped(BaseException):
    """The end of the writer."""


def stopped_before_change(
    step: int, model: PreTrainedModel, path: Path, size: str, patch: pytest.MonkeyPatch
) -> bool:
    changes = 0

    def stopping(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal changes
            changes += 1
            if changes >= step:  # whatever the writer would still do, it is gone
                raise Stopped
            return function(*args, **kwargs)

        return call

    for name in ("replace", "link"):
        patch.setattr(os, name, stopping(getattr(os, name)))
    for name in ("replace", "rename", "unlink"):  # in Python 3.10 not by way of os
        patch.setattr(Path, name, stopping(getattr(Path, name)))
    patch.setattr(shutil, "rmtree", stopping(shutil.rmtree))
    try:
        save_model(model, path, max_shard_size=size)
    except Stopped:
        return True
    return False


# -------------------------------------------------------------------------------- kinds of folder


def test_a_folder_behind_a_symlink_stays_one(tmp_path: Path) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    link.symlink_to(target)
    for seed in (1, 2):
        model = packed(seed)
        assert save_model(model, link) == link
        assert link.is_symlink() and holds(target, model)


def test_files_that_are_links_are_replaced_and_not_written_through(
    copied: Path, tmp_path: Path
) -> None:
    """As in the cache of the Hub, whose files are links to blobs."""
    blob = tmp_path / "blob"
    (copied / "model.safetensors").rename(blob)
    (copied / "model.safetensors").symlink_to(blob)
    before = blob.read_bytes()
    model = packed(3)
    save_model(model, copied)
    assert blob.read_bytes() == before and holds(copied, model)


def test_the_folder_itself_is_never_moved(copied: Path) -> None:
    """What a mount point, or a folder that somebody stands in, would not survive."""
    before = copied.stat().st_ino, copied.parent.stat().st_mtime_ns
    save_model(packed(4), copied)
    assert (copied.stat().st_ino, copied.parent.stat().st_mtime_ns) == before


def test_a_file_system_without_hard_links_gets_copies(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any, **__: Any) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refused)
    model = packed(5)
    save_model(model, copied)
    assert holds(copied, model) and files_of(copied) == set(same_files(copied))


def test_only_files_of_the_checkpoint_that_was_there_are_deleted(tmp_path: Path) -> None:
    path = tmp_path / "m"
    save_model(packed(1), path, max_shard_size="8KB")
    mine = [
        "model_teacher.safetensors",
        "model-notes.safetensors",
        ".maqd",
        "notes/model.safetensors",
    ]
    for name in mine:
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_bytes(b"mine")
    save_model(packed(2), path)
    assert all((path / name).read_bytes() == b"mine" for name in mine)
    assert len(list(path.glob("model-0*"))) == 0


def test_an_index_that_points_outside_is_not_followed(copied: Path) -> None:
    outside = copied.parent / "outside.safetensors"
    outside.write_bytes(b"mine")
    index = {"weight_map": {"x": "../outside.safetensors"}}
    (copied / "model.safetensors.index.json").write_text(json.dumps(index))
    save_model(packed(6), copied)
    assert outside.read_bytes() == b"mine"
    assert not (copied / "model.safetensors.index.json").exists()


def test_what_crashes_left_is_removed_and_nothing_else(copied: Path) -> None:
    (copied / ".maqd-save-0123456789ab").mkdir()
    (copied / ".maqd-save-0123456789ab" / "model.safetensors").write_bytes(b"half")
    (copied / "model-maqd-0123456789ab.safetensors").write_bytes(b"half")
    save_model(packed(7), copied)
    assert files_of(copied) == {"config.json", "generation_config.json", "model.safetensors"}


# ----------------------------------------------------------------------------- writers and errors


def test_of_two_writers_the_second_is_refused(copied: Path) -> None:
    model, before = packed(8), same_files(copied)

    class Slow:
        def save_pretrained(self, staging: Path) -> None:
            with pytest.raises(OSError, match="another save_model is writing there; wait"):
                save_model(model, copied)
            held = multiprocessing.get_context("fork").Process(target=refused_elsewhere)
            held.start()
            held.join()
            assert held.exitcode == 0
            assert {k: v for k, v in same_files(copied).items() if k in before} == before

    def refused_elsewhere() -> None:
        with pytest.raises(OSError, match="another save_model is writing there"):
            save_model(model, copied)

    save_model(model, copied, Slow())
    assert holds(copied, model)


def test_errors_say_what_failed_and_which_model_is_there(
    copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OSError, match=r"file was not saved and is as it was before: it is a file"):
        save_model(packed(), tmp_path / "file")

    def broken(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left")

    model = packed(9)
    monkeypatch.setattr(switching, "_link", broken)
    with pytest.raises(OSError, match=r"holds the new model, but tidying up failed.*No space left"):
        save_model(model, copied)
    assert holds(copied, model)
    monkeypatch.undo()
    save_model(model, copied)
    assert files_of(copied) == {"config.json", "generation_config.json", "model.safetensors"}


def test_everything_is_flushed_before_the_switch(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed, switched = Counter[int](), []
    fsync, replace = os.fsync, os.replace

    def seen_fsync(handle: int) -> None:
        flushed[os.fstat(handle).st_ino] += 1
        fsync(handle)

    def seen_replace(source: Any, target: Any) -> None:
        if Path(target) == copied / "config.json":
            inodes = {f.name: f.stat().st_ino for f in copied.rglob("*")} | {
                ".": copied.stat().st_ino
            }
            new = [
                n for n in inodes if n.startswith("model-maqd-") or n == "generation_config.json"
            ]
            switched.append(all(flushed[inodes[n]] for n in [*new, "."]))
            assert flushed[os.stat(source).st_ino]
        replace(source, target)

    monkeypatch.setattr(os, "fsync", seen_fsync)
    monkeypatch.setattr(os, "replace", seen_replace)
    save_model(packed(10), copied)
    assert switched == [True, True]
