"""Processes forked from one that has imported what they need, and in which no backend has run: they start at once."""

import multiprocessing

forkserver = multiprocessing.get_context("forkserver")
# One server serves all tests of a process. These modules each child would import otherwise: the main module, what Keras
# seeds on every backend, the workers of a DataLoader, and runs that resume.
forkserver.set_forkserver_preload(["pytest", "tensorflow", "torch.utils.data", "tests.resume.processes"])
