"""Benchmarks beside the rivals; each writes a JSON file of ``results/``, which ``report`` renders.

- ``quality`` (``quality_task``, ``quality_rules``, ``quality_peers``): perplexity per bit;
- ``speed`` (``speed_models``, ``speed_kernels``, ``speed_rivals``): tokens a second of whole
  models, and products of single matrices;
- ``zero_shot``, ``training``, ``gpu``: tasks; time and memory of a training step; the GPU;
- ``import_time``: what importing the package costs; its figures stand in ``docs/notebook.md``.
"""
