"""Checkpoints: what is saved of a run, how it is written, and when."""
