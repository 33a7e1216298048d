"""Fixtures of the trainings."""

import copy

import pytest
from transformers import (
    LlamaForCausalLM,
)

from tests.support.training import (
    to_qat,
)


@pytest.fixture
def qat(tiny_llama: LlamaForCausalLM) -> LlamaForCausalLM:
    return to_qat(copy.deepcopy(tiny_llama))
