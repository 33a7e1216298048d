"""Tables and plots of the JSON files in ``results/``: ``render`` writes the pages, ``plots`` draws.

``targets`` says what was aimed at; ``quality``, ``speed`` and ``norms`` make the tables.
"""
