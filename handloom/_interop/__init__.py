"""Tensors and data of any library, whichever is the backend; models written for other runtimes."""
