"""Write the training step by hand. Handloom does the rest, on TensorFlow, JAX and PyTorch.

The public names are listed in `__init__.pyi`, one line each; they are imported when they are first used, so that
`handloom --help` need not wait for a backend.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
