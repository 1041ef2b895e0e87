"""Keras's callback protocol, the only one: who listens to what is settled once, before the first step."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from handloom._keras import keras
from handloom._util.every import Every
from handloom.errors import ArgumentError

_HOOKS = [
    "on_epoch_begin",
    "on_epoch_end",
    *(f"on_{phase}_{when}" for phase in ("train", "test", "predict") for when in ("begin", "end")),
    *(f"on_{phase}_batch_{when}" for phase in ("train", "test", "predict") for when in ("begin", "end")),
]


class Callbacks:
    """Callbacks whose hooks are called only where they do something.

    Every hook of `keras.callbacks.Callback` is a method here. Batch logs are a mapping that computes itself when it is
    looked at; a callback that does not look costs no wait for the device.

    Args:
        callbacks: `keras.callbacks.Callback` objects, or a `CallbackList`.
        model: What they know as `self.model`.
        params: What they know as `self.params`.

    Raises:
        TypeError: If one is no Keras callback.
    """

    def __init__(self, callbacks: Iterable[keras.callbacks.Callback], model: Any, params: dict[str, Any]) -> None:
        self._callbacks = list(getattr(callbacks, "callbacks", callbacks))
        for callback in self._callbacks:
            if not isinstance(callback, keras.callbacks.Callback):
                raise ArgumentError(
                    f"HL024: callbacks takes keras.callbacks.Callback objects; received {callback!r} (of type "
                    f"{type(callback).__name__}). For a function use keras.callbacks.LambdaCallback(on_epoch_end=...).",
                )
            callback.set_params(params)
            callback.set_model(model)
        self._listeners = {
            hook: [getattr(callback, hook) for callback in self._callbacks if _listens(callback, hook)]
            for hook in _HOOKS
        }

    def __enter__(self) -> Callbacks:
        return self

    def __exit__(self, *_: object) -> None:
        # Keras has no hook for an end by exception; a bar or file of ours must close all the same.
        for callback in self._callbacks:
            close = getattr(callback, "close", None)
            if callable(close):
                close()

    @property
    def each_step(self) -> bool:
        """Whether a callback needs every step.

        Those with `takes_executions` are content with one call for several steps that are dispatched together, from
        the first batch to the last.
        """
        hooks = ("on_train_batch_begin", "on_train_batch_end")
        others = [callback for callback in self._callbacks if not getattr(callback, "takes_executions", False)]
        return any(_listens(callback, hook) for callback in others for hook in hooks)

    @property
    def triggers(self) -> list[Every]:
        """When those act that do so now and then."""
        found = [getattr(callback, "every", None) for callback in self._callbacks]
        return [every for every in found if isinstance(every, Every)]

    def handlers(self, hook: str) -> Callable[..., None] | None:
        """What calls all that handle a hook; `None` if no callback does, so that a loop need not call at all."""
        return getattr(self, hook) if self._listeners[hook] else None

    def __getattr__(self, hook: str) -> Callable[..., None]:
        listeners = self.__dict__["_listeners"].get(hook)
        if listeners is None:
            raise AttributeError(f"Keras callbacks have no hook {hook!r}.")
        call = self.__dict__[hook] = _all_of(listeners)
        return call


def _all_of(listeners: list[Callable[..., None]]) -> Callable[..., None]:
    if len(listeners) == 1:
        return listeners[0]

    def call(*args: Any) -> None:
        for listener in listeners:
            listener(*args)

    return call


def _listens(callback: keras.callbacks.Callback, hook: str) -> bool:
    """Whether a callback overrides a hook, or the older name by which Keras also calls it."""
    names = (hook, hook.replace("train_batch", "batch"))
    return any(_overrides(callback, name) for name in names)


def _overrides(callback: keras.callbacks.Callback, name: str) -> bool:
    method = getattr(callback, name)
    return getattr(method, "__func__", method) is not getattr(keras.callbacks.Callback, name)
