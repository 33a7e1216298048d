"""The compiled library on a machine that others use too (csrc/crowd.c, csrc/spin.c)."""

import ctypes
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from maqd_hf.kernels import NativeWeight, loader
from maqd_hf.packing import pack_codes

MS = 1_000_000  # of the library's nanoseconds


class Crowd(ctypes.Structure):
    """``maqd_crowd`` of internal.h."""

    _fields_ = [
        ("limit", ctypes.c_int32),
        *((name, ctypes.c_int64) for name in ("until", "pause", "asleep", "wall")),
    ]


class Machine:
    """Runs of a millisecond, one after the other, on a clock of its own."""

    def __init__(self, threads):
        self.crowd, self.threads, self.now = Crowd(), threads, 0

    def run(self, milliseconds, asleep):
        """Threads that runs took; ``asleep(used)``: what each of the waiting ones slept, 0..1."""
        took = []
        for _ in range(milliseconds):
            used = self.size()
            self.now += MS
            lost = int(asleep(used) * (used - 1) * MS)
            loader.library().maqd_crowd_note(
                ctypes.byref(self.crowd),
                self.threads,
                used,
                *(ctypes.c_int64(n) for n in (lost, MS, self.now)),
            )
            took.append(used)
        return took

    def size(self):
        return loader.library().maqd_crowd_threads(
            ctypes.byref(self.crowd), self.threads, ctypes.c_int64(self.now)
        )


@pytest.mark.parametrize("threads", [1, 2, 3, 16])
def test_a_quiet_machine_gives_every_thread(threads):
    assert set(Machine(threads).run(500, lambda used: 0.45)) == {threads}


def test_one_that_is_crowded_gives_one_and_tries_more_now_and_then():
    machine = Machine(2)
    took = machine.run(10_000, lambda used: 0.7)
    assert took[:10] == [2] * 10, "a window before it is judged"
    assert took[10:60] == [1] * 50
    assert took.count(2) < 0.02 * len(took)
    assert 2 in took[-2100:], "it never stops trying"


def test_it_comes_back_within_the_longest_pause():
    machine = Machine(2)
    machine.run(10_000, lambda used: 0.7)
    took = machine.run(2_000, lambda used: 0.1)
    assert took[1_010:] == [2] * 990
    # and what was long ago is forgotten: the next pause is a short one
    took = machine.run(100, lambda used: 0.7)
    assert took[10:60] == [1] * 50 and took[60] == 2


def test_it_goes_down_by_halves_to_what_the_machine_has_room_for():
    machine = Machine(16)
    took = machine.run(5_000, lambda used: 0.9 if used > 4 else 0.1)
    assert {1, 2}.isdisjoint(took) and {16, 8, 4} <= set(took)
    assert took.count(4) > 0.9 * len(took)
    assert machine.run(5_000, lambda used: 0.1)[-1] == 16


def test_a_single_hiccup_changes_nothing():
    machine = Machine(2)
    took = [machine.run(1, lambda used, late=i % 10 == 0: float(late))[0] for i in range(300)]
    assert set(took) == {2}


def test_results_beside_busy_processes_are_the_same_to_the_bit(best):
    codes = pack_codes(torch.randint(0, 4, (512, 512)), 4)
    native = NativeWeight(codes, 4, 512, torch.rand(512, 1), None, None, 255)
    x, before = torch.randn(64, 512), torch.get_num_threads()
    burn = [sys.executable, "-c", "while True: pass"]
    others = [subprocess.Popen(burn) for _ in range(os.cpu_count() or 1)]
    try:
        torch.set_num_threads(1)
        expected = native(x, None)
        torch.set_num_threads(2)
        end = time.monotonic() + 1
        while time.monotonic() < end:
            assert torch.equal(native(x, None), expected)
    finally:
        torch.set_num_threads(before)
        for process in others:
            process.kill()
            process.wait()


TASKS = Path("/proc/self/task")
CORES = len(os.sched_getaffinity(0)) if TASKS.exists() else 1


def libgomp():
    """Whether the OpenMP of this process is the one that csrc/spin.c knows how to calm."""
    return TASKS.exists() and "libgomp" in Path("/proc/self/maps").read_text("utf-8")


def tasks():
    return len(list(TASKS.glob("*")))


def becomes(count, seconds):
    """Whether so many threads are left within ``seconds``."""
    end = time.monotonic() + seconds
    while tasks() != count and time.monotonic() < end:
        time.sleep(0.01)
    return tasks() == count


@pytest.mark.parametrize("told", [True, False])
def test_threads_that_stop_the_spinning_end_when_told_or_when_nobody_speaks(told):
    library = loader.library()
    library.maqd_spin_less(0)
    time.sleep(0.3)  # those of the test before
    before = tasks()
    for _ in range(3):  # once more does not mean more of them
        library.maqd_spin_less(1)
    assert becomes(before + CORES * libgomp(), 1)
    if told:
        library.maqd_spin_less(0)
    assert becomes(before, 1 if told else 3)


SPINNING = """
import time, torch
from maqd_hf.kernels import loader

torch.set_num_threads(2)
x = torch.zeros(100_000)  # enough for both
for crowded in (0, 1):
    loader.library().maqd_spin_less(crowded)
    time.sleep(0.2)
    began = time.process_time()
    for _ in range(100):
        x.add_(1)
        time.sleep(0.005)
    print(time.process_time() - began)
"""


def test_threads_without_work_leave_the_cores_to_others():
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_"))}
    run = [sys.executable, "-c", SPINNING]
    found = subprocess.run(run, env=environment, capture_output=True, text=True, check=True)
    quiet, crowded = map(float, found.stdout.split())
    # with one core nobody spins in the first place
    wanted = 0.5 if libgomp() and CORES > 1 else 1.5
    assert crowded < wanted * quiet, f"{quiet} s of CPU, {crowded} when told that others want it"
