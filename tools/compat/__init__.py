"""`make compat`: a part of the suite with other versions of Python, Keras and the backends."""
