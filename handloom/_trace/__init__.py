"""Functions compiled and differentiated, and what happens inside Keras while they are."""
