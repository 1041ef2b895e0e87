"""The Keras model over the loop."""
