"""The logs that callbacks get after each batch."""

import functools
import weakref
from collections.abc import Callable
from typing import Any

from handloom._reporting.logs import Logs, Value


class BatchLogs(dict[str, Value]):
    """The values reported up to a batch, as the dict that Keras gives; it reads them when it is first used.

    The device is not waited for until then. A callback may keep it, also unread.

    Args:
        epoch: The logs of the epoch, which now end with this batch.

    Attributes:
        epoch: The same.
    """

    def __init__(self, epoch: Logs) -> None:
        super().__init__(dict.fromkeys(epoch.names, 0.0))  # json.dumps asks for the size without calling a method.
        self.epoch = epoch
        self._read: Callable[[], dict[str, Value]] | None = epoch.reported

    def keep(self) -> None:
        """Copies the values on the device unless they are read: the next step changes them."""
        if self._read is not None:
            self._read = self.epoch.reported_later()

    def fill(self) -> None:
        """Reads the values, once."""
        if self._read is not None:
            values, self._read = self._read(), None
            dict.clear(self)
            dict.update(self, values)

    def __reduce__(self) -> Any:
        return dict, (dict(self),)


def _filled(method: Callable[..., Any]) -> Callable[..., Any]:
    """The method of a dict, called once the values are read."""

    @functools.wraps(method)
    def call(self: BatchLogs, *args: Any, **kwargs: Any) -> Any:
        self.fill()
        return method(self, *args, **kwargs)

    return call


_OPERATORS = "contains delitem eq getitem ior iter len ne or repr reversed ror setitem"
_METHODS = "clear copy get items keys pop popitem setdefault update values"
for _name in [*(f"__{name}__" for name in _OPERATORS.split()), *_METHODS.split()]:
    setattr(BatchLogs, _name, _filled(getattr(dict, _name)))


def call_with_logs(hook: Callable[..., None], batch: int, epoch: Logs) -> None:
    """Calls a hook with the logs of a batch. They are copied only if a callback keeps them unread."""
    logs = BatchLogs(epoch)
    hook(batch, logs)
    reference = weakref.ref(logs)
    del logs
    if (kept := reference()) is not None:
        kept.keep()
