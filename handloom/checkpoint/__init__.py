"""Checkpoints: the format on disk, the directory of a run, and the state of a model; see `hl.Checkpointer`.

Nothing is imported here: the command line reads checkpoints without a backend.
"""
