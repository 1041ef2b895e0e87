"""Functions that are compiled and differentiated, and observers of Keras while they run."""
