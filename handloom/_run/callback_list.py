"""Keras's callback protocol. Which callbacks handle which hooks is determined once, before the first step."""

from collections.abc import Callable, Iterable
from typing import Any

from handloom._keras import keras
from handloom._util.every import Every
from handloom._util.short import short
from handloom.errors import ArgumentError

_HOOKS = [name for name in vars(keras.callbacks.Callback) if name.startswith("on_")]


class Callbacks:
    """Callbacks whose hooks are called only where they do something.

    Every hook of `keras.callbacks.Callback` is a method here. At the ends of batches they get `BatchLogs`, which are
    read when they are looked at; a callback that does not look does not wait for the device.

    Args:
        callbacks: `keras.callbacks.Callback` objects.
        model: The model that callbacks see as `self.model`.
        params: The dict that callbacks see as `self.params`.

    Raises:
        ArgumentError: One of them is not a Keras callback.
    """

    def __init__(self, callbacks: Iterable[keras.callbacks.Callback], model: Any, params: dict[str, Any]) -> None:
        self._callbacks, self.model = list(callbacks), model
        for callback in self._callbacks:
            if not isinstance(callback, keras.callbacks.Callback):
                raise ArgumentError(
                    f"HL024: callbacks takes keras.callbacks.Callback objects; received {short(callback)} (of type "
                    f"{type(callback).__name__}).",
                    fix="Pass an object, such as keras.callbacks.EarlyStopping(); for a function, "
                    "keras.callbacks.LambdaCallback(on_epoch_end=...).",
                )
            callback.set_params(params)
            callback.set_model(model)
        for hook in _HOOKS:
            handlers = [getattr(callback, hook) for callback in self._callbacks if _handles(callback, hook)]
            setattr(self, hook, _all_of(handlers))

    def close(self) -> None:
        """Closes the callbacks that can be closed: Keras has no hook for the end of a run by an exception."""
        for callback in self._callbacks:
            if callable(getattr(callback, "close", None)):
                callback.close()

    def handled(self, hook: str) -> Callable[..., None] | None:
        """The hook if a callback handles it, else `None`: a loop looks it up once, and calls it only then."""
        return getattr(self, hook) if any(_handles(callback, hook) for callback in self._callbacks) else None

    @property
    def each_step(self) -> bool:
        """Whether a callback needs every step.

        Callbacks with `takes_executions` need one call for several steps that run in one dispatch: the begin of the
        first batch and the end of the last.
        """
        hooks = ("on_train_batch_begin", "on_train_batch_end")
        others = [callback for callback in self._callbacks if not getattr(callback, "takes_executions", False)]
        return any(_handles(callback, hook) for callback in others for hook in hooks)

    @property
    def triggers(self) -> list[Every]:
        """The schedules of callbacks that have one."""
        return [every for each in self._callbacks if isinstance(every := getattr(each, "every", None), Every)]

    def __getattr__(self, hook: str) -> Callable[..., None]:
        raise AttributeError(f"Keras callbacks have no hook {hook!r}.")


def as_list(callbacks: Any) -> list[Any]:
    """The callbacks in any form that Keras takes: one, several, `None`, or a `CallbackList`."""
    if callbacks is None:
        return []
    callbacks = getattr(callbacks, "callbacks", callbacks)
    return list(callbacks) if hasattr(callbacks, "__iter__") else [callbacks]


def by_name(callbacks: Iterable[keras.callbacks.Callback]) -> dict[str, keras.callbacks.Callback]:
    """Callbacks by the names of their classes; several of one class are numbered."""
    found: dict[str, keras.callbacks.Callback] = {}
    for callback in callbacks:
        name, count = type(callback).__name__, 1
        while name in found:
            name, count = f"{type(callback).__name__}{count + 1}", count + 1
        found[name] = callback
    return found


def _all_of(handlers: list[Callable[..., None]]) -> Callable[..., None]:
    if len(handlers) == 1:
        return handlers[0]

    def call(*args: Any) -> None:
        for handler in handlers:
            handler(*args)

    return call


def _handles(callback: keras.callbacks.Callback, hook: str) -> bool:
    """Whether a callback overrides a hook, or its older name, by which Keras calls it too."""
    return any(_overrides(callback, name) for name in (hook, hook.replace("train_batch", "batch")))


def _overrides(callback: keras.callbacks.Callback, name: str) -> bool:
    method = getattr(callback, name)
    return getattr(method, "__func__", method) is not getattr(keras.callbacks.Callback, name)
