"""Traceable `keras.random` on torch: a step reads its seeds when it runs, not when it is traced.

Keras converts the state of a `SeedGenerator` to a Python number, and that to a `torch.Generator`. In a trace the number
would be a constant, and so would the dropout mask. While a step is traced, `torch_seed_generator` therefore returns the
seed as a tensor, and the sampling functions that receive it become the operations below. They give the same numbers
as Keras does eagerly from the same seed.

Internals used: `keras.src.backend.torch.random`, its `torch_seed_generator`, `get_device` and reference to the module
`torch`; `draw_seed`, which returns the seed as a tensor.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from keras.src.backend.torch import random as keras_random
from keras.src.random.seed_generator import draw_seed

from handloom._util.patch import Patch
from handloom.backends.torch.fake import is_traced

_library = torch.library.Library("handloom", "DEF")


class _Seed:
    """A seed that is a tensor, in place of a generator while a step is traced."""

    def __init__(self, seed: torch.Tensor) -> None:
        self.tensor = seed


def _generator(seed: torch.Tensor) -> torch.Generator:
    first, second = seed
    generator = torch.Generator(device=seed.device)
    generator.manual_seed(int(first + second) & 0xFFFFFFFF)
    return generator


def _operation(schema: str) -> Callable[[Callable[..., torch.Tensor]], Callable[..., torch.Tensor]]:
    """Registers a function of a seed as an operation that a trace records."""

    def define(sample: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        name = schema.split("(", maxsplit=1)[0]
        _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))

        def run(*args: Any, seed: torch.Tensor, **kwargs: Any) -> torch.Tensor:
            return sample(*args, generator=_generator(seed), **kwargs)

        def shape_only(*args: Any, seed: torch.Tensor, **kwargs: Any) -> torch.Tensor:
            del seed
            return sample(*args, generator=None, **kwargs)

        _library.impl(name, run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"handloom::{name}", shape_only, lib=_library)
        operation: Callable[..., torch.Tensor] = getattr(torch.ops.handloom, name).default
        return operation

    return define


@_operation("normal(int[] size, float mean, float std, *, Tensor seed, ScalarType dtype, Device device) -> Tensor")
def _normal(size: Sequence[int], mean: float, std: float, **options: Any) -> torch.Tensor:
    return torch.normal(mean, std, size=size, **options)


@_operation("rand(int[] size, *, Tensor seed, ScalarType dtype, Device device) -> Tensor")
def _rand(size: Sequence[int], **options: Any) -> torch.Tensor:
    return torch.rand(size, **options)


@_operation("randint(int low, int high, int[] size, *, Tensor seed, ScalarType dtype, Device device) -> Tensor")
def _randint(low: int, high: int, size: Sequence[int], **options: Any) -> torch.Tensor:
    return torch.randint(low=low, high=high, size=size, **options)


@_operation("bernoulli(Tensor probabilities, *, Tensor seed) -> Tensor")
def _bernoulli(probabilities: torch.Tensor, **options: Any) -> torch.Tensor:
    return torch.bernoulli(probabilities, **options)


@_operation("multinomial(Tensor probabilities, int samples, bool replacement, *, Tensor seed) -> Tensor")
def _multinomial(probabilities: torch.Tensor, samples: int, replacement: bool, **options: Any) -> torch.Tensor:
    return torch.multinomial(probabilities, samples, replacement=replacement, **options)


def _late(sampler: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """A sampling function of torch; with a `_Seed`, it calls the operation that reads the seed."""
    operation = _OPERATIONS[sampler]

    @functools.wraps(sampler)
    def sample(*args: Any, generator: Any = None, **kwargs: Any) -> torch.Tensor:
        if not isinstance(generator, _Seed):
            return sampler(*args, generator=generator, **kwargs)
        return operation(*args, seed=generator.tensor, **kwargs)

    return sample


_OPERATIONS: dict[Callable[..., Any], Callable[..., torch.Tensor]] = {
    torch.normal: lambda mean, std, size, **options: _normal(list(size), mean, std, **options),
    torch.rand: lambda size, seed, device, dtype=torch.float32: _rand(
        list(size), seed=seed, dtype=dtype, device=device
    ),
    torch.randint: lambda low, high, size, **options: _randint(low, high, list(size), **options),
    torch.bernoulli: lambda p, seed: _bernoulli(p.detach(), seed=seed),
    torch.multinomial: lambda p, n, replacement, seed: _multinomial(p.detach(), n, replacement, seed=seed),
}


class _Torch:
    """The module `torch` for `keras.random` while a step is traced."""

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(torch, name)
        return _late(attribute) if isinstance(attribute, Hashable) and attribute in _OPERATIONS else attribute


def _late_seed(original: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda seed: original(seed) if keras_random.get_device() == "meta" else _Seed(draw_seed(seed))


traceable_random_ops = Patch(
    (keras_random, "torch_seed_generator", _late_seed), (keras_random, "torch", lambda _: _Torch()), when=is_traced
)
"""Inside, `keras.random` uses the operations above."""
