"""A plain step, as `hl.fit` takes it: how a batch becomes its arguments, and which argument is the sample weights."""

import inspect
from collections.abc import Callable
from typing import Any

from handloom._data.feed import Feed
from handloom._data.sample_weight import check_weights, weighed_at, weights_in
from handloom._reporting.step import ReportingStep, signature_of
from handloom.errors import StepError


def plain_step(step: Callable[..., Any], data: Any, *, training: bool = False) -> tuple[ReportingStep, Feed]:
    """A plain step, to be called with batches; and its data, as a feed that checks its sample weights."""
    if not callable(step):
        raise StepError(
            f"HL251: The step is an object of type {type(step).__name__}, which cannot be called.",
            fix="Pass a function of a batch that returns a dict of scalars, and then the data: hl.fit(step, data).",
        )
    position, feed = _position_of_weights(step), data.view() if isinstance(data, Feed) else Feed(data)
    if position is not None:
        feed.check(lambda batch: check_weights(weights_in(None, batch[position : position + 1]), training=training))
    return ReportingStep(step, unpacks=_unpacks(step), weighed=lambda *batch: weighed_at(batch, position)), feed


def _unpacks(step: Callable[..., Any]) -> bool:
    """Whether the parts of a batch are the arguments of a step."""
    parameters = _parameters(step)
    required = [parameter for parameter in parameters if parameter.default is parameter.empty]
    return len(required) > 1 or any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters)


def _position_of_weights(step: Callable[..., Any]) -> int | None:
    names = [parameter.name for parameter in _parameters(step)]
    return names.index("sample_weight") if "sample_weight" in names and _unpacks(step) else None


def _parameters(step: Callable[..., Any]) -> list[inspect.Parameter]:
    """The parameters that can be passed by position."""
    signature = signature_of(step)
    parameters = signature.parameters.values() if signature else ()
    return [parameter for parameter in parameters if parameter.kind.name not in ("KEYWORD_ONLY", "VAR_KEYWORD")]
