"""Recipes: one algorithm a file, each runnable by name (`handloom run gan-digits`) and short enough to learn from.

A recipe is a file with a docstring and a function `main(run_dir, epochs=...)`, which trains, leaves what is worth
looking at in `run_dir`, and returns one line that says how good the result is.
"""
