"""Laws of several processes: they agree, equal one process, and stop together."""

import copy
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
)

from maqd_hf.training.trainer import MaQDTrainer, last_complete_checkpoint
from tests.support.ranks import run_ranks
from tests.support.training import (
    InterruptAt,
    finished,
    to_qat,
    trainer_for,
    uneven_blocks,
)

RUNS = ("ddp", "interrupted", "ddp bf16", "fsdp", "fsdp bf16", "chosen norms")


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
        if name == "chosen norms":
            settings["lbn_norms"] = None
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


@pytest.mark.slow
def test_ranks_choose_the_same_norms_and_statistics(two_ranks: Path) -> None:
    first, second = outcome(two_ranks, "chosen norms", "DistributedDataParallel")
    assert_same_result(first, second, 0.0)
    gates = {float(value) for name, value in first.items() if name.endswith(".gate")}
    assert gates <= {0.0, 1.0} and 1.0 in gates


if __name__ == "__main__":
    worker(Path(sys.argv[1]))
