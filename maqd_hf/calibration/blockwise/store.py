"""Finished blocks kept in a folder, so that a run that was cut off goes on with the next one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..blocks import Batch


class BlockStore:
    """A folder with one safetensors file a block, whose header has the result and the run.

    ``settings`` are plain values; two runs are the same if these and the data are.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], batches: list[Batch]) -> None:
        digest = hashlib.sha256()
        for batch in batches:
            for key, value in sorted(batch.items()):
                digest.update(f"{key} {tuple(value.shape)}".encode())
                digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        self.folder = folder
        self.run = json.dumps({**settings, "data": digest.hexdigest()})

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    @torch.no_grad()
    def load(self, name: str, parameters: Mapping[str, Tensor]) -> dict[str, Any] | None:
        """Put a saved block's values into ``parameters`` and return its result.

        Returns None where the block was not saved.

        Raises:
            ValueError: the file is from a run with other settings, other data or another model.
        """
        path = self._path(name)
        if not path.is_file():
            return None
        wanted = {key: list(parameter.shape) for key, parameter in parameters.items()}
        with safe_open(path, framework="pt") as file:
            header = file.metadata()
            found = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
            if header["run"] != self.run or found != wanted:
                raise ValueError(
                    f"{path} is of a run with other settings, data or model ({header['run']}, now "
                    f"{self.run}): give another folder, or remove it to start again"
                )
            for key, parameter in parameters.items():
                parameter.copy_(file.get_tensor(key))
        result: dict[str, Any] = json.loads(header["result"])
        return result

    def save(self, name: str, parameters: Mapping[str, Tensor], result: Mapping[str, Any]) -> None:
        """Save a block, under another name first: a file that has the right name is whole."""
        self.folder.mkdir(parents=True, exist_ok=True)
        part = self.folder / f".{name}.part"
        tensors = {key: value.detach().contiguous() for key, value in parameters.items()}
        save_file(tensors, part, {"run": self.run, "result": json.dumps(dict(result))})
        part.replace(self._path(name))
