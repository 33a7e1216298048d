"""A packed model in processes: forked ones answer alike, and many calls take no more memory.

Two libraries below torch do not survive a fork. libgomp's child waits for threads that it does not
have as soon as it opens a parallel region, so children have one thread here, as PyTorch's own data
loaders give them. MKL's child walks a list of memory blocks for ever after threads of its parent
have ended, in a product of plain torch too (notebook: "Children that MKL never lets go"). So the
law is about what this package computes itself: the whole native step, and packed layers by their
own forward, without the float products of attention.
"""

import os
import signal
import subprocess
import sys

import pytest

SETUP = """
import os, sys, torch
from transformers import LlamaConfig, LlamaForCausalLM
from maqd_hf import MaQDConfig, pack_model, quantize_model, use_native
torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(
    vocab_size=300, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2)).eval()
quantize_model(
    model, MaQDConfig(weight_levels=16, embedding_levels=255, activation_scaling="token"))
pack_model(model)
native = sys.argv[1] == "native"
use_native(model, native)
"""
FORK = """
import threading
torch.set_num_threads(2)
ids = torch.randint(3, 300, (4, 100))
layer = model.model.layers[0]
@torch.no_grad()
def logits():
    if native:
        return model(input_ids=ids).logits
    hidden = layer.post_attention_layernorm(model.model.embed_tokens(ids))
    return model.lm_head(layer.mlp(hidden))
wanted = logits()
threads = [threading.Thread(target=logits) for _ in range(3)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
child = os.fork()
if child == 0:
    torch.set_num_threads(1)
    os._exit(0 if torch.equal(logits(), wanted) else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
GENERATE = """
torch.set_num_threads(1)
def used():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
def calls(count):
    for call in range(count):
        ids = torch.full((1, 4 + call % 5), 7)
        model.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0)
calls(int(sys.argv[2]) // 4)
before = used()
calls(int(sys.argv[2]))
print((used() - before) / int(sys.argv[2]))
"""


def run(code: str, *words: str, timeout: float = 120) -> str:
    """What a process printed; its whole group is killed after ``timeout`` seconds."""
    environment = {
        n: v for n, v in os.environ.items() if n not in ("MAQD_KERNEL", "OMP_NUM_THREADS")
    }
    process = subprocess.Popen(
        [sys.executable, "-c", SETUP + code, *words],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        printed, errors = process.communicate(timeout=timeout)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, errors[-2000:]
    return printed


@pytest.mark.parametrize("step", ["native", "own"])
def test_a_child_forked_after_threads_ran_answers_like_its_parent(step: str) -> None:
    run(FORK, step)


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads Linux's /proc")
@pytest.mark.parametrize("calls", [80, pytest.param(2000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("step", ["native", "own"])
def test_memory_is_flat_over_calls(step: str, calls: int) -> None:
    """A leak of one logits row, let alone a cache, a call would be beyond the bound."""
    grown = float(run(GENERATE, step, str(calls), timeout=60 + calls))
    assert grown < 1200 if calls > 1000 else grown < 8192, f"{grown:.0f} bytes a call"
