"""Several optimizers of one model, each with its own part of the variables."""

import functools
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Self, TypeAlias

from handloom._keras import Gradients, Layer, Tensors, Variable, keras, trained_by
from handloom._util.short import short
from handloom.errors import OptimizerError
from handloom.optimizers._loss_scale import apply_unscaled
from handloom.optimizers._tree import taker_inside

ops = keras.ops
REST = "*"

Choice: TypeAlias = Callable[[str], bool] | Sequence[int]
"""Chooses among the weights of a model: a predicate by their paths, positions by their order."""


@keras.saving.register_keras_serializable("handloom")
class NamedOptimizers(keras.optimizers.Optimizer):
    """Optimizers by the name of the part that they train; `model.optimizer` after `compile(optimizer={...})`.

    A name is an attribute of the model, or a dotted path of attributes, and leads to a layer, a variable, or a list of
    these; the optimizer owns its trainable variables. `"*"` owns the rest. For a pair `(predicate, optimizer)` the name
    is free: the optimizer owns the variables whose path the predicate accepts. Every trainable variable must have
    exactly one owner.

    Args:
        optimizers: Optimizers, or pairs `(predicate, optimizer)`, by name.
        name: The name of the whole.

    Raises:
        OptimizerError: There are no optimizers, or Keras does not know one of them.

    Example:
        `model.optimizer["generator"].learning_rate = 1e-4`
    """

    def __init__(self, optimizers: Mapping[str, Any], name: str = "named_optimizers") -> None:
        super().__init__(learning_rate=0.0, name=name)
        if not optimizers:
            raise OptimizerError("HL316: There are no optimizers.", fix='Pass some: {"encoder": "adam", "*": "sgd"}.')
        pairs = {key: value if isinstance(value, tuple) else (None, value) for key, value in optimizers.items()}
        for key, pair in pairs.items():
            if not isinstance(key, str) or len(pair) != 2 or pair[1] is None:
                raise OptimizerError(
                    f"HL325: optimizer={{{key!r}: {short(optimizers[key])}}} is not a name and an optimizer.",
                    fix="Pass a name with an optimizer, or with a pair (predicate, optimizer).",
                )
        self._choices = {key: predicate for key, (predicate, _) in pairs.items() if predicate is not None}
        self._by_name = {key: _optimizer(key, optimizer) for key, (_, optimizer) in pairs.items()}
        self._model: Callable[[], Layer | None] = lambda: None

    def __getitem__(self, name: str) -> keras.Optimizer:
        if name not in self._by_name:
            raise KeyError(f"There is no optimizer named {name!r}; there are {', '.join(map(repr, self._by_name))}.")
        return self._by_name[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_name)

    def __len__(self) -> int:
        return len(self._by_name)

    def items(self) -> Iterator[tuple[str, keras.Optimizer]]:
        """Pairs (name, optimizer), in the order given."""
        yield from self._by_name.items()

    def values(self) -> Iterator[keras.Optimizer]:
        """The optimizers, in the order given."""
        yield from self._by_name.values()

    @property
    def optimizers(self) -> list[keras.Optimizer]:
        """The optimizers as a list, under the name that Keras's callbacks use."""
        return list(self._by_name.values())

    def with_each(self, change: Callable[[keras.Optimizer], keras.Optimizer]) -> Self:
        """The same names, with the results of a function of each optimizer."""
        return NamedOptimizers({name: (self._choices.get(name), change(own)) for name, own in self.items()}, self.name)

    def attach(self, model: Layer) -> None:
        """Sets the model whose attributes the names refer to."""
        self._model = weakref.ref(model)  # Weak: Keras saves attributes too, and the model holds this optimizer.

    def _attached(self) -> Layer:
        model = self._model()
        if model is None:
            raise OptimizerError("HL317: Optimizers by name belong to a model.", fix="Pass them to its compile().")
        return model

    def owners(self) -> dict[str, list[Variable]]:
        """Returns for each name the trainable variables that the model has there now.

        Raises:
            OptimizerError: A name is not an attribute of the model, or a variable has two owners or none.
        """
        model = self._attached()
        owners = {name: self._variables_of(model, name) for name in self._by_name if name != REST}
        names: dict[int, str] = {}
        for name, variables in owners.items():
            for variable in variables:
                first = names.setdefault(id(variable), name)
                if first != name:
                    raise OptimizerError(
                        f"HL318: {variable.path!r} is owned twice, by the optimizers {first!r} and {name!r}.",
                        fix="Name parts of the model that have no variable in common.",
                    )
        rest = [variable for variable in model.trainable_variables if id(variable) not in names]
        if REST in self._by_name:
            owners[REST] = rest
        elif rest:
            raise OptimizerError(
                f"HL319: No optimizer owns {_listed(variable.path for variable in rest)}; "
                f"there are optimizers for {_listed(self._by_name)}.",
                fix='Add one for the rest, optimizer={..., "*": "adam"}, or freeze the layer: layer.trainable = False.',
            )
        return {name: owners[name] for name in self._by_name}

    def _variables_of(self, model: Layer, name: str) -> list[Variable]:
        if name not in self._choices:
            return _variables_at(model, name)
        weights, trained = model.weights, set(map(id, model.trainable_variables))
        chosen = (weights[place] for place in _places(self._choices[name], weights))
        return [variable for variable in chosen if id(variable) in trained]

    def split(self, variables: Sequence[Variable]) -> list[tuple[keras.Optimizer, list[Variable]]]:
        """Groups variables by their owners, and builds these, each for everything that it owns.

        Raises:
            OptimizerError: A variable does not belong to the model.
        """
        wanted, groups = {id(variable): variable.path for variable in variables}, []
        for name, owned in self.owners().items():
            optimizer, group = self._by_name[name], [own for own in owned if wanted.pop(id(own), None)]
            if group and not optimizer.built:
                optimizer.build(owned)
            if group:
                groups.append((optimizer, group))
        if wanted:
            raise OptimizerError(
                f"HL320: No optimizer owns {_listed(wanted.values())}: not among the trainable variables of the model.",
                fix="Pass another optimizer for them: minimize(..., optimizer=...).",
            )
        self.built = True
        return groups

    def build(self, variables: Sequence[Variable]) -> None:
        """Builds the owners of these variables, each for everything that it owns."""
        self.split(variables)

    def apply(self, grads: Gradients, trainable_variables: Sequence[Variable] | None = None) -> None:
        """Passes each optimizer the gradients of its variables.

        Raises:
            OptimizerError: The variables are missing, or one of them has no owner.
        """
        if trainable_variables is None:
            raise OptimizerError("HL321: The variables are missing.", fix="Pass both: apply(gradients, variables).")
        gradients = {id(variable): grad for variable, grad in zip(trainable_variables, grads, strict=True)}
        for optimizer, group in self.split(trainable_variables):
            apply_unscaled(optimizer, [gradients[id(variable)] for variable in group], group)

    def stateless_apply(self, optimizer_variables: Tensors, grads: Gradients, trainable_variables: Tensors) -> Any:
        """Returns the new values of the model's trainable variables, and of the optimizers' own, from the present."""
        trained = self._attached().trainable_variables
        known = [*trained, *self.variables]
        values = [*trainable_variables, *optimizer_variables]
        with keras.StatelessScope(list(zip(known, values, strict=True))) as scope:
            self.apply(grads, trained)
        news = list(map(scope.get_current_value, known))
        return news[: len(trained)], news[len(trained) :]

    @property
    def variables(self) -> list[Variable]:
        return [variable for optimizer in self._by_name.values() for variable in optimizer.variables]

    @property
    def learning_rate(self) -> Any:
        names = ", ".join(f'optimizer["{name}"].learning_rate' for name in self._by_name)
        raise AttributeError(f"Optimizers by name have no common learning rate; use {names}.")

    @property
    def iterations(self) -> Any:
        """The number of updates of the optimizer that has made most."""
        return functools.reduce(ops.maximum, [optimizer.iterations for optimizer in self._by_name.values()])

    def finalize_variable_values(self, var_list: Sequence[Variable]) -> None:
        for optimizer in self._by_name.values():
            if optimizer.built and int(ops.convert_to_numpy(optimizer.iterations)):
                optimizer.finalize_variable_values(trained_by(optimizer))

    def get_config(self) -> dict[str, Any]:
        optimizers = keras.saving.serialize_keras_object(dict(self._by_name))
        # A predicate is code, which is not saved. Its choice is, by position: after loading, paths may differ.
        places = {name: _places(choice, self._attached().weights) for name, choice in self._choices.items()}
        return {"name": self.name, "optimizers": optimizers, "places": places}

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: dict[str, Any] | None = None) -> Self:
        loaded, places = keras.saving.deserialize_keras_object(config["optimizers"], custom_objects), config["places"]
        return cls({name: (places.get(name), optimizer) for name, optimizer in loaded.items()}, config["name"])


def as_optimizer(optimizer: Any) -> keras.Optimizer:
    """Converts an optimizer, its name or config, or a dict of several to an optimizer."""
    if isinstance(optimizer, Mapping) and "class_name" not in optimizer:
        return NamedOptimizers(optimizer)
    return keras.optimizers.get(optimizer)


def _optimizer(name: str, given: Any) -> keras.Optimizer:
    try:
        optimizer = keras.optimizers.get(given)
    except ValueError as error:
        raise OptimizerError(f"HL322: optimizer={{{name!r}: {short(given)}}}: {error}") from error
    if taker := taker_inside(optimizer):
        kind = type(taker).__name__
        raise OptimizerError(
            f"HL350: The optimizer named {name!r} contains {kind}, which takes the gradients of a whole loss.",
            fix=f"Put it around all optimizers by name: {kind}({{{name!r}: ..., ...}}).",
        )
    return optimizer


def _places(choice: Choice, weights: Sequence[Variable]) -> list[int]:
    if not callable(choice):
        return list(choice)
    return [place for place, variable in enumerate(weights) if choice(variable.path)]


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))


def _variables_at(model: Layer, path: str) -> list[Variable]:
    """The trainable variables at a dotted path of attributes."""
    found = model
    for part in path.split("."):
        if not hasattr(found, part):
            raise OptimizerError(
                f"HL323: There is an optimizer for {path!r}, but {type(found).__name__} has no attribute {part!r}.",
                fix='Name an attribute of the model, a dotted path like "encoder.head", or "*" for the rest. For a '
                f"layer by its name: {{{path!r}: (lambda path: {path!r} in path, optimizer)}}.",
            )
        found = getattr(found, part)
    variables: dict[int, Variable] = {}
    for leaf in keras.tree.flatten(found):
        if not isinstance(leaf, (keras.Layer, keras.Variable)):
            raise OptimizerError(
                f"HL324: There is an optimizer for {path!r}, but {type(model).__name__} has {short(leaf)} there (of "
                f"type {type(leaf).__name__}).",
                fix="Name a layer, a variable, or a list of these.",
            )
        variables.update((id(variable), variable) for variable in getattr(leaf, "trainable_variables", [leaf]))
    return list(variables.values())
