"""Several optimizers of one model, each owning part of its variables."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

from handloom._keras import Layer, Tensor, Variable, keras, trained_by
from handloom.errors import OptimizerError
from handloom.optimizers._loss_scale import apply_unscaled

REST = "*"

Chooser: TypeAlias = Callable[[int, Variable], bool]
"""Whether an optimizer owns the variable at this place among a model's weights."""


@keras.saving.register_keras_serializable("handloom")
class NamedOptimizers(keras.optimizers.Optimizer):
    """Optimizers by the name of what they train; `model.optimizer` after `compile(optimizer={...})`.

    Each name is an attribute of the model, a dotted path to a layer, a variable, or a list of these; the optimizer
    owns its trainable variables. `"*"` owns the rest. In a pair `(predicate, optimizer)` the predicate says by a
    variable's path what the optimizer owns, and the name is free. Every trainable variable has exactly one owner.

    Args:
        optimizers: The optimizers by name, or pairs `(predicate, optimizer)`.
        name: Name of the whole.

    Example:
        `model.optimizer["generator"].learning_rate = 1e-4`
    """

    def __init__(self, optimizers: Mapping[str, keras.Optimizer], name: str = "named_optimizers") -> None:
        super().__init__(learning_rate=0.0, name=name)
        pairs = {key: value if isinstance(value, tuple) else (None, value) for key, value in optimizers.items()}
        self._chosen = {key: _by_path(predicate) for key, (predicate, _) in pairs.items() if predicate is not None}
        self._by_name = {key: _optimizer(key, optimizer) for key, (_, optimizer) in pairs.items()}
        if not self._by_name:
            raise OptimizerError(
                'HL316: No optimizer was given. For example: optimizer={"generator": "adam", "*": "sgd"}.'
            )
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
        """The optimizers, where Keras's own callbacks look for several."""
        return list(self._by_name.values())

    def with_each(self, change: Callable[[keras.Optimizer], keras.Optimizer]) -> NamedOptimizers:
        """The same names, for what a function makes of each optimizer."""
        changed = NamedOptimizers({name: change(own) for name, own in self._by_name.items()}, name=self.name)
        changed._chosen.update(self._chosen)
        return changed

    def attach(self, model: Layer) -> None:
        """Takes the names as attributes of this model from now on."""
        self._model = weakref.ref(model)  # Keras follows attributes when it saves; the model holds this optimizer.

    def _attached(self) -> Layer:
        model = self._model()
        if model is None:
            raise OptimizerError("HL317: Several optimizers by name belong to a model: pass them to its compile().")
        return model

    def owners(self) -> dict[str, list[Variable]]:
        """Who owns what: for each name, the trainable variables the model has there now.

        Raises:
            OptimizerError: If a name is no attribute of the model, or a variable has two owners or none.
        """
        model = self._attached()
        owners = {name: self._variables_of(model, name) for name in self._by_name if name != REST}
        names: dict[int, str] = {}
        for name, variables in owners.items():
            for variable in variables:
                if id(variable) in names:
                    raise OptimizerError(
                        f"HL318: The variable {variable.path!r} is owned twice, by the optimizers {names[id(variable)]!r} and "
                        f"{name!r}. Name parts of the model that have no variable in common.",
                    )
                names[id(variable)] = name
        rest = [variable for variable in model.trainable_variables if id(variable) not in names]
        if REST in self._by_name:
            owners[REST] = rest
        elif rest:
            raise OptimizerError(
                f"HL319: No optimizer owns {', '.join(repr(variable.path) for variable in rest)}; the optimizers are "
                f'{", ".join(map(repr, self._by_name))}. Add one for the rest, optimizer={{..., "*": "adam"}}, or '
                "freeze the layer: layer.trainable = False.",
            )
        return {name: owners[name] for name in self._by_name}

    def _variables_of(self, model: Layer, name: str) -> list[Variable]:
        if name not in self._chosen:
            return _variables_at(model, name)
        trained = set(map(id, model.trainable_variables))
        return [variable for _, variable in self._choice(model, name) if id(variable) in trained]

    def _choice(self, model: Layer, name: str) -> list[tuple[int, Variable]]:
        """What a predicate chooses among the weights of a model, trained or not, and at which places they are."""
        is_chosen = self._chosen[name]
        return [(place, variable) for place, variable in enumerate(model.weights) if is_chosen(place, variable)]

    def split(self, variables: Sequence[Variable]) -> list[tuple[keras.Optimizer, list[Variable]]]:
        """The variables in groups, each with its owner, which is built for all that it owns."""
        wanted = set(map(id, variables))
        groups = []
        for name, owned in self.owners().items():
            optimizer = self._by_name[name]
            group = [variable for variable in owned if id(variable) in wanted]
            if group:
                _build(optimizer, owned)
                self.built = True
                groups.append((optimizer, group))
        found = {id(variable) for _, group in groups for variable in group}
        strange = [variable.path for variable in variables if id(variable) not in found]
        if strange:
            raise OptimizerError(
                f"HL320: No optimizer of the model owns {', '.join(map(repr, strange))}: not among the model's trainable "
                "variables. Pass an optimizer of its own: minimize(..., optimizer=...).",
            )
        return groups

    def build(self, variables: Sequence[Variable]) -> None:
        """Builds every optimizer for what it owns."""
        del variables  # What the model has at the names, which says whose each one is.
        for name, owned in self.owners().items():
            if owned:
                _build(self._by_name[name], owned)
        self.built = True

    def apply(self, grads: Sequence[Tensor | None], trainable_variables: Sequence[Variable] | None = None) -> None:
        """Hands each optimizer the gradients of its variables."""
        if trainable_variables is None:
            raise OptimizerError(
                "HL321: Several optimizers cannot tell whose gradients these are; pass the variables too."
            )
        gradients = {id(variable): grad for variable, grad in zip(trainable_variables, grads, strict=True)}
        for optimizer, group in self.split(trainable_variables):
            apply_unscaled(optimizer, [gradients[id(variable)] for variable in group], group)

    @property
    def variables(self) -> list[Variable]:
        return [variable for optimizer in self._by_name.values() for variable in optimizer.variables]

    @property
    def learning_rate(self) -> Any:
        names = ", ".join(f'optimizer["{name}"].learning_rate' for name in self._by_name)
        raise AttributeError(f"Several optimizers have no one learning rate; use {names}.")

    def finalize_variable_values(self, var_list: Sequence[Variable]) -> None:
        del var_list  # Averages are of what each optimizer was built for; before its first update they are zeros.
        for optimizer in self._by_name.values():
            if optimizer.built and int(keras.ops.convert_to_numpy(optimizer.iterations)):
                optimizer.finalize_variable_values(trained_by(optimizer))

    def get_config(self) -> dict[str, Any]:
        serialize = keras.saving.serialize_keras_object
        optimizers = {name: serialize(value) for name, value in self._by_name.items()}
        # A predicate is code, which no file holds. What it chose is kept, by place: paths may be others after loading.
        places = {name: [place for place, _ in self._choice(self._attached(), name)] for name in self._chosen}
        return {"name": self.name, "optimizers": optimizers, "places": places}

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: dict[str, Any] | None = None) -> NamedOptimizers:
        deserialize = keras.saving.deserialize_keras_object
        optimizers = {name: deserialize(value, custom_objects) for name, value in config["optimizers"].items()}
        loaded = cls(optimizers, name=config["name"])
        loaded._chosen.update({name: _by_place(places) for name, places in config["places"].items()})
        return loaded


def as_optimizer(optimizer: Any) -> keras.Optimizer:
    """What `compile` takes as an optimizer: one, its name, or several in a dict."""
    if isinstance(optimizer, Mapping) and "class_name" not in optimizer:
        return NamedOptimizers(optimizer)
    return keras.optimizers.get(optimizer)


def _optimizer(name: str, optimizer: Any) -> keras.Optimizer:
    try:
        return keras.optimizers.get(optimizer)
    except ValueError as error:
        raise OptimizerError(f"HL322: optimizer={{{name!r}: {optimizer!r}}}: {error}") from error


def _by_path(predicate: Callable[[str], bool]) -> Chooser:
    return lambda _, variable: predicate(variable.path)


def _by_place(places: Sequence[int]) -> Chooser:
    return lambda place, _: place in places


def _build(optimizer: keras.Optimizer, variables: Sequence[Variable]) -> None:
    if not optimizer.built:
        optimizer.build(list(variables))


def _variables_at(model: Layer, path: str) -> list[Variable]:
    """The trainable variables of what stands at a dotted path of attributes."""
    place = model
    for part in path.split("."):
        if not hasattr(place, part):
            raise OptimizerError(
                f"HL323: There is an optimizer for {path!r}, but {type(model).__name__} has no such attribute ({part!r} is "
                f"missing on {type(place).__name__}). Names of optimizers are attributes of the model, dotted paths "
                f'like "encoder.head", or "*" for the rest.',
            )
        place = getattr(place, part)
    variables: dict[int, Variable] = {}
    for leaf in keras.tree.flatten(place):
        if isinstance(leaf, keras.Layer):
            variables.update((id(variable), variable) for variable in leaf.trainable_variables)
        elif isinstance(leaf, keras.Variable):
            variables[id(leaf)] = leaf
        else:
            raise OptimizerError(
                f"HL324: There is an optimizer for {path!r}, but what {type(model).__name__} has there is no layer or "
                f"variable: {leaf!r} (of type {type(leaf).__name__}).",
            )
    return list(variables.values())
