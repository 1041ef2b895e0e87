"""PyTorch."""

from handloom.backends.torch.backend import backend as backend
