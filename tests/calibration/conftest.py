"""Inputs that the tests of this room share."""

import pytest
import torch


@pytest.fixture
def ids() -> torch.Tensor:
    """(8, 32) token ids with structure: no token is likelier than its neighbors by chance."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, 200, (8, 32), generator=generator)


@pytest.fixture
def inputs() -> torch.Tensor:
    """(600, 64) strongly correlated inputs."""
    torch.manual_seed(2)
    return torch.randn(600, 64) @ torch.randn(64, 64) * torch.rand(64)
