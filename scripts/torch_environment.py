"""Settings that OpenMP and torch read from the environment when torch is imported.

Import this module before torch.
"""

import os

# Threads that spin while they wait slow a busy machine down tenfold; on a machine that does nothing
# else OMP_WAIT_POLICY=active, which a user may set, is faster: a training step takes 3.0 s and not
# 4.2 (notebook: "Threads that spin while they wait").
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# Tensors beyond 2 MiB lie on large pages: a training step takes 3.24 s and not 3.69 (notebook:
# "Large pages for training").
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
