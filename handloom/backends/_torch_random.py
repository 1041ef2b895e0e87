"""`keras.random` on torch, made traceable: the seed is read when the step runs, not when it is traced.

Keras turns the state of a `SeedGenerator` into a Python number and that into a `torch.Generator`. A trace would
freeze the number, and with it the dropout mask. While a step is traced, `torch_seed_generator` therefore gives
back only the seed tensor, and each sampling function that is then called with it becomes one of the operations
below. They do what Keras does op by op, so that both give the same numbers from the same seed.

Internals used: `keras.src.backend.torch.random.torch_seed_generator`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from keras.src.backend.torch import random as keras_random
from keras.src.random.seed_generator import draw_seed
from torch.overrides import TorchFunctionMode

from handloom.backends.base import Untraceable

_library = torch.library.Library("handloom", "DEF")


class _Seed:
    """Stands for a generator while a step is traced: a seed that is still a tensor."""

    def __init__(self, seed: torch.Tensor) -> None:
        self.tensor = seed


def _generator(seed: torch.Tensor) -> torch.Generator:
    first, second = seed
    generator = torch.Generator(device=seed.device)
    generator.manual_seed(int(first + second) & 0xFFFFFFFF)
    return generator


def _operation(schema: str) -> Callable[[Callable[..., torch.Tensor]], Callable[..., torch.Tensor]]:
    """Makes a function of a seed an operation that a trace records; the shape comes from running it on no data."""

    def define(sample: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        name = schema.split("(")[0]
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


_SAMPLERS: dict[Callable[..., Any], Callable[..., torch.Tensor]] = {
    torch.normal: lambda mean, std, size, **o: _normal(list(size), mean, std, **_placed(o)),
    torch.rand: lambda size, **o: _rand(list(size), **_placed(o)),
    torch.randint: lambda low, high, size, **o: _randint(low, high, list(size), **_placed(o)),
    torch.bernoulli: lambda probabilities, seed: _bernoulli(probabilities.detach(), seed=seed),
    torch.multinomial: lambda p, n, replacement=False, *, seed: _multinomial(p.detach(), n, replacement, seed=seed),
}


def _placed(options: dict[str, Any]) -> dict[str, Any]:
    """The options of a sampler with dtype and device said in full, as an operation's schema wants them."""
    options["dtype"] = options.get("dtype") or torch.get_default_dtype()
    options["device"] = torch.device(options.get("device") or "cpu")
    return options


class _Sampling(TorchFunctionMode):
    """Turns a sampling function that is given a `_Seed` into the operation that reads it."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        del types
        kwargs = dict(kwargs or {})
        if not isinstance(kwargs.get("generator"), _Seed):
            return func(*args, **kwargs)
        if func not in _SAMPLERS:
            raise Untraceable(f"torch.{func.__name__} draws from a seeded generator")
        return _SAMPLERS[func](*args, seed=kwargs.pop("generator").tensor, **kwargs)


@contextlib.contextmanager
def traceable_random_ops() -> Iterator[None]:
    """Within, `keras.random` draws by the operations above."""
    original = keras_random.torch_seed_generator

    def late(seed: Any) -> Any:
        return original(seed) if keras_random.get_device() == "meta" else _Seed(draw_seed(seed))

    keras_random.torch_seed_generator = late
    try:
        with _Sampling():
            yield
    finally:
        keras_random.torch_seed_generator = original
