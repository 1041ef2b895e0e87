"""Tensors and data of any library, on any backend; models exported for other runtimes."""
