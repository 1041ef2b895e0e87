"""What callbacks freeze and unfreeze amid a run is a part of its state."""

from collections.abc import Mapping
from typing import Any

from handloom._keras import keras, trained_by
from handloom.checkpoint.names import keras_objects, named
from handloom.optimizers._add_variables import rebuild


class Frozen:
    """Which layers were frozen or unfrozen since a run began, and which variables its optimizers have slots for.

    Args:
        state: The objects that the run trains.
    """

    def __init__(self, state: Any) -> None:
        self._state = {"state": state}
        self._begun = self._trainable()

    def state(self) -> dict[str, Any]:
        """Pairs (trainable when the run began, now) by layer; and the variables of optimizers, if there are such."""
        now = self._trainable()
        changed = {name: [was, now[name]] for name, was in self._begun.items() if now.get(name, was) != was}
        frozen_since = any(not each.trainable for part in self._optimizers().values() for each in trained_by(part))
        return {"changed": changed, "trained": self._trained() if changed or frozen_since else {}}

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Freezes and unfreezes layers as before, apart from those that the user has set otherwise; adds the slots."""
        objects, (variables, _) = keras_objects(self._state), named(self._state)
        for name, (begun, now) in saved["changed"].items():
            if name in objects and objects[name].trainable == begun:
                objects[name].trainable = now
                self._begun[name] = begun
        for name, names in saved["trained"].items():
            missing = {*names} - {*self._trained().get(name, ())}
            if missing and name in objects and all(each in variables for each in names):
                rebuild(objects[name], [variables[each] for each in names])

    def _trainable(self) -> dict[str, bool]:
        objects = keras_objects(self._state).items()
        return {name: thing.trainable for name, thing in objects if isinstance(thing, keras.Layer)}

    def _trained(self) -> dict[str, list[str]]:
        names = {id(variable): name for name, variable in named(self._state)[0].items()}
        return {
            name: [names.get(id(variable), "") for variable in trained_by(part)]
            for name, part in self._optimizers().items()
        }

    def _optimizers(self) -> dict[str, keras.Optimizer]:
        objects = keras_objects(self._state).items()
        found = {name: thing for name, thing in objects if isinstance(thing, keras.optimizers.Optimizer)}
        return {name: optimizer for name, optimizer in found.items() if optimizer.built and trained_by(optimizer)}
