"""Block-wise reconstruction: every block is trained to give the outputs of its float original.

It loses to end-to-end training at equal cost, and no user command calls it; the experiments do.

- ``reconstruct``: ``reconstruct_blocks``, block after block;
- ``training``: the loss and the optimizer steps of one block;
- ``store``: finished blocks in a folder, so that a run that was cut off continues.
"""

from .reconstruct import BlockwiseReport, reconstruct_blocks

__all__ = ["BlockwiseReport", "reconstruct_blocks"]
