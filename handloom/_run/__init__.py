"""The training loop, and everything around its steps."""
