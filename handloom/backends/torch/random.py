"""Traceable `keras.random` on torch: a step reads its seeds when it runs, not when it is traced.

Keras converts the state of a `SeedGenerator` to a Python number, and that to a `torch.Generator`. In a trace the number
would be a constant, and so would the dropout mask. While a step is traced, `torch_seed_generator` therefore returns the
seed as a tensor, and the sampling functions that receive it become the operations below. They give the same numbers
as Keras does eagerly from the same seed.

Internals used: `keras.src.backend.torch.random`, its `torch_seed_generator`, `get_device` and reference to the module
`torch`; `draw_seed`, which returns the seed as a tensor.
"""

import functools
from collections.abc import Callable, Hashable
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


def _operation(sampler: Callable[..., torch.Tensor], schema: str) -> Callable[..., torch.Tensor]:
    """A sampling function of torch as an operation on a seed, which a trace records."""
    name = sampler.__name__
    _library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))

    def run(*args: Any, seed: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return sampler(*args, generator=_generator(seed), **kwargs)

    def shape_only(*args: Any, seed: torch.Tensor, **kwargs: Any) -> torch.Tensor:  # noqa: ARG001
        return sampler(*args, **{**kwargs, "device": "meta"} if "device" in kwargs else kwargs)

    _library.impl(name, run, "CompositeExplicitAutograd")
    _library.impl(name, shape_only, "Meta")  # `register_fake` would read the source of every module: 0.2 s.
    operation: Callable[..., torch.Tensor] = getattr(torch.ops.handloom, name).default
    return operation


_CREATED = "*, Tensor seed, Device device, ScalarType? dtype=None) -> Tensor"

_OPERATIONS: dict[Callable[..., torch.Tensor], Callable[..., torch.Tensor]] = {
    sampler: _operation(sampler, schema)
    for sampler, schema in (
        (torch.normal, f"(float mean, float std, int[] size, {_CREATED}"),
        (torch.rand, f"(int[] size, {_CREATED}"),
        (torch.randint, f"(int low, int high, int[] size, {_CREATED}"),
        (torch.bernoulli, "(Tensor input, *, Tensor seed) -> Tensor"),
        (torch.multinomial, "(Tensor input, int num_samples, bool replacement, *, Tensor seed) -> Tensor"),
    )
}


def _late(sampler: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """A sampling function of torch; with a `_Seed`, it calls the operation that reads the seed."""

    @functools.wraps(sampler)
    def sample(*args: Any, generator: Any = None, **kwargs: Any) -> torch.Tensor:
        if not isinstance(generator, _Seed):
            return sampler(*args, generator=generator, **kwargs)
        with torch.no_grad():  # The operation has no derivative.
            return _OPERATIONS[sampler](*args, seed=generator.tensor, **kwargs)

    return sample


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
