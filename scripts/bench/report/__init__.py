"""Tables and plots of the JSON files in ``results/``: ``render`` writes the pages, ``plots`` draws.

- ``summary``: the table of README; ``jobs``, ``quality``, ``speed``, ``norms``: those of results;
- ``targets``: what was aimed at; ``lines``: lines that carry their names.
"""
