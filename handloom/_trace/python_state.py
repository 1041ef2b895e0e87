"""The Python values that a function can read: attributes, globals, closures, what is in their lists and dicts.

A compiled function holds them as constants. They are found in the code of the function, and in that of the user's
functions and classes that it names, without running it; so some are found that it does not read.
"""

import functools
import inspect
import itertools
import sys
import types
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from handloom._keras import (
    keras,
    layers_of,
    learning_rate_in,
    optimizers_in,
    penalties_in,
    trainable_in,
    trained_by,
    trained_in,
)
from handloom._trace.python_value import COLLECTIONS, Value, contents_of, element_of, is_plain
from handloom._util.codes import Names, Place
from handloom._util.source_line import is_users
from handloom.backends import backend

_CODE = (types.MethodType, types.ModuleType, type, types.BuiltinFunctionType)
_HOLDERS = ("SimpleNamespace", "Namespace")
_CALLED_BY_OTHERS = {
    *("call", "forward", "__call__", "compute_loss", "compute_metrics"),
    *("update_state", "result", "apply", "update_step"),
}
_KINDS = (
    *(keras.optimizers.schedules.LearningRateSchedule, keras.Regularizer, keras.constraints.Constraint),
    *(keras.Loss, keras.Metric),
)
_MOST = 100  # Of the elements of a collection or dict that are held one by one.
_MOST_BYTES = 2**14  # Of an array, which is compared at each step.


class PythonState:
    """The Python values that a function can read.

    Args:
        function: The function.
        arguments: Objects that it is given.
        metrics: Whether the metrics of models are among what it reads.

    Attributes:
        values: The values, by holder and name.
        names: The names in the code.
    """

    def __init__(self, function: Callable[..., Any], arguments: Sequence[Any] = (), *, metrics: bool = True) -> None:
        self._metrics = metrics
        self.values: dict[tuple[int, Any], Value] = {}
        self.names = Names()
        self._seen: dict[int, tuple[str, Any]] = {}
        self._objects: dict[int, tuple[str, Any]] = {}
        self._dicts: list[tuple[str, dict[Any, Any]]] = []
        self._visit("self", function)
        for argument in arguments:
            self._visit(getattr(argument, "name", type(argument).__name__), argument)
        size = -1
        while size != (size := len(self._seen) + len(self.names.read)):  # Each function that is found adds names.
            for path, thing in list(self._objects.values()):
                self._attributes(path, thing)
        for path, found in self._dicts:
            self._plain_elements(path, found)

    @property
    def things(self) -> list[tuple[str, Any]]:
        """The objects and functions among them, each with a path."""
        return list(self._seen.values())

    def place(self, value: Value) -> Place | None:
        """Where the code names a value, or else what holds it."""
        parts = reversed(value.path_parts)
        return next((self.names.read[part][0] for part in parts if part in self.names.read), None)

    def _hold(self, get: Callable[..., Any], holder: Any, name: Any, path: str, variable: bool = True) -> None:
        value = Value(get, holder, name, path, None).present
        if isinstance(value, COLLECTIONS) and is_plain(value):
            value = next(kind(value) for kind in COLLECTIONS if isinstance(value, kind))
        found = Value(get, holder, name, path, value, variable)
        if not (variable and isinstance(value, _CODE)):
            self.values.setdefault(found.key, found)
        if not is_plain(value):
            self._visit(path, value)

    def _visit(self, path: str, thing: Any) -> None:
        if isinstance(thing, keras.Variable):
            self._hold(dict.get, *trainable_in(thing), f"{path}.trainable")
        elif isinstance(thing, np.ndarray):
            if thing.nbytes <= _MOST_BYTES and not thing.dtype.hasobject:
                self._hold(contents_of, thing, "", path)
        elif not (id(thing) in self._seen or is_plain(thing) or backend.is_array(thing)):
            self._seen[id(thing)] = path, thing
            self._look_into(path, thing)

    def _look_into(self, path: str, thing: Any) -> None:
        if isinstance(thing, (types.ModuleType, type)):
            if _is_of_the_user(thing):
                self._objects[id(thing)] = path, thing
        elif isinstance(thing, types.FunctionType):
            self._function(thing)
        elif isinstance(thing, (dict, *COLLECTIONS)):
            self._elements(path, thing)
        elif isinstance(thing, keras.Layer):
            self._layer(path, thing)
        elif isinstance(thing, keras.optimizers.Optimizer):
            self._optimizer(path, thing)
        elif isinstance(thing, _KINDS):
            self._of_keras(path, thing)
        elif _is_of_the_user(type(thing)) or type(thing).__name__ in _HOLDERS:
            self._objects[id(thing)] = path, thing
        else:
            for part in _parts(thing):
                self._visit(path, part)

    def _function(self, function: types.FunctionType) -> None:
        self._visit("", getattr(function, "__wrapped__", None))
        if is_users(function.__code__.co_filename):
            for name in sorted(self.names.add(function) & function.__globals__.keys()):
                self._hold(dict.get, function.__globals__, name, name)
            self._defaults(function)
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            self._hold(getattr, cell, "cell_contents", name)

    def _defaults(self, function: types.FunctionType) -> None:
        names, defaults = function.__code__.co_varnames[: function.__code__.co_argcount], function.__defaults__ or ()
        for index, name in enumerate(names[len(names) - len(defaults) :]):
            self._hold(element_of, defaults, index, name)
        for name in function.__kwdefaults__ or {}:
            self._hold(dict.get, function.__kwdefaults__, name, name)

    def _elements(self, path: str, thing: Any) -> None:
        thing = getattr(thing, "__wrapped__", thing)  # TensorFlow puts a proxy around the dicts of layers.
        if isinstance(thing, dict):
            self._dicts.append((path, thing))
        if len(thing) > _MOST:
            return
        if isinstance(thing, dict):
            for key in [key for key, element in thing.items() if not is_plain(element)]:
                self._hold(dict.get, thing, key, f"{path}[{key!r}]")
            return
        for index, element in enumerate(thing):
            # A tuple keeps its elements, but a list among them may change; the elements of a set cannot.
            if isinstance(thing, (list, deque)) or (isinstance(thing, tuple) and isinstance(element, COLLECTIONS)):
                self._hold(element_of, thing, index, f"{path}[{index}]")
            else:
                self._visit(f"{path}[{index}]", element)

    def _plain_elements(self, path: str, thing: dict[Any, Any]) -> None:
        """Those whose keys the code names; if it names none, it may go through all."""
        for key in [key for key in thing if key in self.names.read] or (thing if len(thing) <= _MOST else ()):
            if is_plain(thing[key]):
                self._hold(dict.get, thing, key, f"{path}[{key!r}]")

    def _layer(self, path: str, layer: Any) -> None:
        for inner in layers_of(layer):
            inner_path = path if inner is layer else f"{path}.{inner.name}"
            self._seen[id(inner)] = inner_path, inner
            self._hold(dict.get, *trainable_in(inner), f"{inner_path}.trainable")
            self._of_keras(inner_path, inner)
        for variable in layer.variables:
            variable_path = f"{path}[{variable.path!r}]"
            self._hold(dict.get, *trainable_in(variable), f"{variable_path}.trainable")
            for inside, name in penalties_in(variable):
                self._hold(dict.get, inside, name, f"{variable_path}.{name.strip('_')}")
        for name in ("optimizer", "loss"):
            self._visit(f"{path}.{name}", getattr(layer, name, None))
        for metric in layer.metrics if self._metrics else ():
            for each in (metric, *getattr(metric, "metrics", ())):  # One of Keras contains the compiled ones.
                self._visit(f"{path}.{each.name}", each)

    def _optimizer(self, path: str, optimizer: Any) -> None:
        self._hold(dict.get, *learning_rate_in(optimizer), f"{path}.learning_rate")
        self._of_keras(path, optimizer)
        if optimizer.use_ema or not type(optimizer).__module__.startswith("keras."):
            # It may update what it keeps for variables that have no gradient in this step.
            self._hold(dict.get, *trained_in(optimizer), f"the variables of {path}")
            for variable in trained_by(optimizer):
                self._visit(variable.path, variable)
        for inner in optimizers_in(optimizer):
            self._visit(f"{path}.{inner.name}", inner)

    def _of_keras(self, path: str, thing: Any) -> None:
        """What an object of Keras keeps in attributes, such as the rate of dropout, a function or a regularizer."""
        if _is_of_the_user(type(thing)):
            self._objects.setdefault(id(thing), (path, thing))
        if isinstance(thing, keras.Model):
            return
        numbers = (int, float) if isinstance(thing, keras.Layer) else (int, float, bool, type(None))
        of_steps, alone = _read_by_libraries(thing.__class__)
        for name in sorted(of_steps & vars(thing).keys()):
            value, is_public = vars(thing)[name], not name.startswith("_")
            is_number = type(value) is float or (name in alone and type(value) in numbers)
            if (is_number and is_public) or callable(value) or _is_of_the_user(type(value)):
                self._hold(dict.get, vars(thing), name, f"{path}.{name}", variable=False)
            elif isinstance(value, dict) and is_public:
                self._visit(f"{path}.{name}", value)

    def _attributes(self, path: str, thing: Any) -> None:
        """The attributes of an object of the user that the code names, and the methods of its class."""
        is_instance = not isinstance(thing, (type, types.ModuleType))
        inside = getattr(thing, "__dict__", {})
        own = backend.attributes(thing) if is_instance and inside else inside
        for name in sorted(self.names.read.keys() & own.keys()):
            # Not by `getattr` where it can be avoided: a loop by hand asks at each step.
            get, holder = (dict.get, inside) if is_instance and name in inside else (getattr, thing)
            self._hold(get, holder, name, f"{path}.{name}", variable=not isinstance(thing, keras.Metric))
        for kind in type(thing).__mro__ if is_instance else ():
            if _is_of_the_user(kind):
                for name in sorted(vars(kind).keys() & (self.names.read.keys() | _CALLED_BY_OTHERS)):
                    self._of_class(path, thing, name, vars(kind)[name])

    def _of_class(self, path: str, thing: Any, name: str, found: Any) -> None:
        if is_plain(found) or inspect.ismemberdescriptor(found):
            self._hold(getattr, thing, name, f"{path}.{name}")
        for part in (found, *_parts(found)):
            if isinstance(part, types.FunctionType):
                self._visit(path, part)


def _parts(thing: Any) -> list[Any]:
    """What a bound method, a partial, or another wrapper of a function consists of.

    No attribute of others is asked for: an object may have any, each a new object.
    """
    if isinstance(thing, functools.partial):
        return [thing.func, *thing.args, *thing.keywords.values(), *_wrapped(thing)]
    known = ((types.MethodType, "__self__"), (types.BuiltinFunctionType, "__self__"), (property, "fget"))
    named = [getattr(thing, name) for kind, name in known if isinstance(thing, kind)]
    return [*named, *([thing.__func__] if isinstance(thing, _METHODS) else []), *_wrapped(thing)]


_METHODS = (types.MethodType, classmethod, staticmethod)


def _wrapped(thing: Any) -> list[Any]:
    inside = inspect.getattr_static(thing, "__dict__", None)
    return [vars(thing)["__wrapped__"]] if inside is not None and "__wrapped__" in vars(thing) else []


@functools.cache
def _read_by_libraries(kind: type) -> tuple[set[str], set[str]]:
    """The names that methods of libraries read in steps, but do not assign; and those that `build` does not read."""
    methods: dict[str, list[types.FunctionType]] = defaultdict(list)
    for base in (each for each in kind.__mro__ if each not in keras.Layer.__mro__ and not _is_of_the_user(each)):
        for name, found in vars(base).items():
            methods[name] += [part for part in (found, *_parts(found)) if isinstance(part, types.FunctionType)]
    in_steps, in_build, done = Names(), Names(), {"__init__"}
    while called := (methods.keys() & (in_steps.read.keys() | _CALLED_BY_OTHERS)) - done:
        done |= called
        for method in itertools.chain.from_iterable(methods[name] for name in called):
            in_steps.add(method)
    for method in methods["build"]:
        in_build.add(method)
    of_steps = {*in_steps.read, "activity_regularizer"} - in_steps.stored
    return of_steps, of_steps - in_build.read.keys()


def _is_of_the_user(thing: Any) -> bool:
    """Whether a class or module is the user's."""
    return _is_users_module(str(thing.__module__ if isinstance(thing, type) else thing.__name__))


@functools.cache
def _is_users_module(name: str) -> bool:
    module = sys.modules.get(name)
    is_python = module is not None and name not in sys.builtin_module_names
    return is_python and is_users(getattr(module, "__file__", None) or "")
