"""Experiments of the method, one question each; ``docs/notebook.md`` has what they answered."""
