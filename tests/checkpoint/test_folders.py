"""Models on mount points, and of users who may not write there."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import transformers as hf
from transformers import PreTrainedModel

from maqd_hf import pack_model, quantize_model, save_model
from maqd_hf.checkpoint import switching
from scripts.experiments.kill_saves import kill_saves
from tests.support.children import as_nobody, on_a_mount
from tests.support.families import tiny

READ_ONLY = 0o555


def make(seed: int, packed: bool = True) -> PreTrainedModel:
    model = tiny("llama-tied", seed)
    quantize_model(model, weight_levels=15, embedding_levels=15, activation_scaling="token")
    if packed:
        pack_model(model)
    return model


def holds(path: Path, model: PreTrainedModel) -> bool:
    tensors = hf.AutoModelForCausalLM.from_pretrained(path).state_dict()
    return all(torch.equal(tensor, tensors[name]) for name, tensor in model.state_dict().items())


def files_of(path: Path) -> dict[str, bytes]:
    return {str(f.relative_to(path)): f.read_bytes() for f in path.rglob("*") if f.is_file()}


# ----------------------------------------------------------------------------- who may only read


@pytest.fixture
def public() -> Iterator[Path]:
    """A folder that every user can reach, which those of pytest are not."""
    path = Path(tempfile.mkdtemp())
    path.chmod(0o755)
    yield path
    for folder in [path, *(p for p in path.rglob("*") if p.is_dir())]:
        folder.chmod(0o755)
    shutil.rmtree(path)


def saved(model: PreTrainedModel, path: Path) -> Path:
    """``path`` with ``model`` in it, which was once saved and loaded: all code is imported then."""
    save_model(model, path)
    assert holds(path, model)
    path.chmod(READ_ONLY)
    return path


WRITERS: dict[str, Callable[[PreTrainedModel, Path], object]] = {
    "save_model": save_model,
    "save_pretrained": lambda model, path: model.save_pretrained(path),
}


@pytest.mark.parametrize("packed", [False, True], ids=["qat", "packed"])
@pytest.mark.parametrize("writer", WRITERS)
def test_saving_where_one_may_not_write_says_so_and_leaves_nothing(
    writer: str, packed: bool, public: Path
) -> None:
    model, new = make(1, packed), make(2, packed)
    path = saved(model, public / "model")
    before = files_of(public)
    public.chmod(READ_ONLY)

    def refused() -> None:
        for target in (path, public / "other", public / "deep" / "other"):
            with pytest.raises(OSError, match=rf"Permission denied: '{target.parent}") as told:
                WRITERS[writer](new, target)
            if writer == "save_model":
                assert f"{target} was not saved and is as it was before" in str(told.value)
                assert f"user {os.geteuid()} may not write there" in str(told.value)

    as_nobody(refused)
    assert files_of(public) == before and [*public.iterdir()] == [path]
    assert holds(path, model)


@pytest.mark.parametrize("packed", [False, True], ids=["qat", "packed"])
def test_a_model_is_read_where_one_may_not_write(packed: bool, public: Path) -> None:
    model = make(1, packed)
    path = saved(model, public / "model")
    before = files_of(path)

    def read() -> None:
        with pytest.raises(PermissionError):
            (path / "new").touch()
        assert holds(path, model)

    as_nobody(read)
    assert files_of(path) == before


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_whoever_may_read_the_config_may_read_the_weights(mask: int, tmp_path: Path) -> None:
    """Whatever wrote them: safetensors makes files that only their writer may read."""
    before = os.umask(mask)
    try:
        save_model(make(1), tmp_path / "one", max_shard_size="8KB")
        make(1, packed=False).save_pretrained(tmp_path / "two")
    finally:
        os.umask(before)
    files = [*(tmp_path / "one").iterdir(), *(tmp_path / "two").iterdir()]
    assert {file.stat().st_mode & 0o777 for file in files} == {0o666 & ~mask}


def test_weights_that_one_may_not_read_are_not_called_damaged(public: Path) -> None:
    model, path = make(1), public / "model"
    saved(model, path)
    (path / "model.safetensors").chmod(0)

    def refused() -> None:
        with pytest.raises(PermissionError, match=r"may not read it.*model\.safetensors"):
            holds(path, model)

    as_nobody(refused)


def test_a_save_that_was_cut_off_is_read_where_one_may_not_write(
    public: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the switch the folder holds the new model, before anything was tidied up."""
    path, model = public / "model", make(2)
    save_model(make(1), path)

    def crashed(*_: object) -> None:
        raise OSError(errno.EIO, "the writer is gone")

    with monkeypatch.context() as patch:
        patch.setattr(switching, "_complete", crashed)
        with pytest.raises(OSError, match="holds the new model"):
            save_model(model, path)
    assert switching.is_switched(path)
    before = files_of(path)
    path.chmod(READ_ONLY)
    as_nobody(lambda: check(holds(path, model)))
    assert files_of(path) == before
    path.chmod(0o755)
    assert holds(path, model)


def check(true: bool) -> None:
    assert true


# ---------------------------------------------------------------------------------- mount points


@pytest.fixture
def mount(tmp_path: Path) -> Path:
    path = tmp_path / "mount"
    path.mkdir()
    return path


def mounted(mount: Path, size: str, work: Callable[[], None]) -> None:
    try:
        on_a_mount(mount, size, work)
    except AssertionError as error:
        if "PermissionError" in str(error) and os.geteuid() != 0:
            pytest.skip("this system lets only root mount")
        raise


@pytest.mark.parametrize("shard_size", ["50GB", "8KB"], ids=["whole", "sharded"])
def test_a_mount_point_holds_the_model_and_stays_one(mount: Path, shard_size: str) -> None:
    link, (old, new) = mount.parent / "link", (make(1), make(2))
    link.symlink_to(mount)

    def work() -> None:
        (mount / "mine").write_text("mine")
        for model, path in [(old, mount), (new, mount), (old, link)]:
            assert save_model(model, path, max_shard_size=shard_size) == path
            assert os.path.ismount(mount) and holds(mount, model)
        left = {name.partition("-")[0].partition(".")[0] for name in files_of(mount)}
        assert left == {"mine", "config", "generation_config", "model"}

    mounted(mount, "16m", work)
    assert [*mount.iterdir()] == [], "all of it went to the mounted file system"


def test_a_killed_save_on_a_mount_point_leaves_the_old_or_the_new_model(mount: Path) -> None:
    def work() -> None:
        counts = kill_saves(mount, packed=True, shard_size="8KB", kills=6, seed=1)
        assert counts["old"] + counts["new"] == 6
        assert counts["broken"] == counts["left behind"] == 0
        assert os.path.ismount(mount)

    mounted(mount, "16m", work)


def test_a_full_file_system_holds_the_model_that_the_error_names(mount: Path) -> None:
    """However little is free when the save begins, from nothing to enough for all of it."""
    old, new = make(1), make(2)
    new.save_pretrained(mount.parent / "new")
    size = sum(map(len, files_of(mount.parent / "new").values()))
    said = []

    def work() -> None:
        for free in range(0, 4 * size, size // 4):
            save_model(old, mount)
            fill(mount, free)
            try:
                save_model(new, mount)
            except OSError as error:
                state = "as it was before" if holds(mount, old) else "holds the new model"
                assert state in str(error) and "No space left" in str(error)
                said.append(state)
            else:
                said.append("saved")
            (mount / "filler").unlink()
            assert holds(mount, old if said[-1] == "as it was before" else new)
        assert said[0] == "as it was before" and said[-1] == "saved"

    mounted(mount, "16m", work)


def fill(folder: Path, free: int) -> None:
    """Leave at most ``free`` bytes, rounded up to blocks, on the file system of ``folder``."""
    system = os.statvfs(folder)
    (folder / "filler").write_bytes(bytes(system.f_bavail * system.f_bsize - free))
