"""What OpenMP and torch read from the environment when torch is imported: import this before it."""

import os

# Spinning threads slow a busy machine down tenfold (a GPTQ block: 42 s against 4).
# On a machine that does nothing else OMP_WAIT_POLICY=active, given by the user, is faster: a step
# of training SmolLM2-135M on 256 tokens, two threads of Zen 3, takes 3.0 s and not 4.2; 3.4 s with
# GOMP_SPINCOUNT=20000, which beside one busy process takes 11.3 s where sleeping threads take 6.2.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# Tensors beyond 2 MiB on large pages. Fresh memory of 50 MB then takes 6 ms and not 21 (Zen 4, a
# virtual machine): logits, gradients and casts of heads are such memory in every step. A training
# step of SmolLM2-135M on 256 tokens, one thread, median of 6: 3.24, 3.46, 2.77 s with it, in turn
# with 3.69, 4.15, 3.49 s without. GLIBC_TUNABLES=glibc.malloc.hugetlb=1, for which it is too late
# here, does more: 2.66, 2.69, 2.83 s.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
