"""The parts of ``fuzz_checkpoints``: the originals, what is changed in them, and the judge."""
