"""Checkpoints: what is saved, as which bytes, and when; `hl.Checkpointer` and `hl.load_checkpoint` are its public face.

Nothing is imported here: the command line reads checkpoints without a backend.
"""
