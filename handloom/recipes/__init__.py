"""Recipes: one algorithm per file, each runnable by name (`handloom run gan-digits`) and short enough to learn from.

A recipe is a file with a docstring and a function `main(run_dir, epochs=...)`. The function trains, writes its results
to `run_dir`, and returns one line that says how good they are.
"""
