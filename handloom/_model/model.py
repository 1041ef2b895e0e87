"""`hl.Model`: a Keras model whose `fit` is the loop of Handloom, whatever its step does."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from handloom._keras import (
    Functional,
    Tensor,
    default_loss,
    in_keras_order,
    keras,
    set_loss_tracker,
)
from handloom._model.data import model_feed, split, unpacked
from handloom._model.explain import Explanation, explain, shown
from handloom._model.export import export
from handloom._model.on_batch import predict_on_batch, test_on_batch, train_on_batch
from handloom._model.optimizer import attach, compiled_optimizer, finish_training, prepared
from handloom._model.optimizer import build as build_optimizer
from handloom._model.steps import start_steps
from handloom._model.unknown_classes import deserialized, naming_unknown_parts
from handloom._model.variants import is_inputs_and_outputs, is_list_of_layers, register_as_its_class, variant
from handloom._reporting.loss_tracker import LossTracker, holding
from handloom._run import loop
from handloom._run.options import RunOptions
from handloom._run.seed import seed_run
from handloom._trace.gradients import Wrt, build
from handloom._trace.loss_weight import Weight
from handloom._trace.losses import Denominators, note_loss
from handloom._trace.observe import observing
from handloom._util.every import AfterEpochs, Every, every
from handloom.distribute._strategy import Strategy
from handloom.errors import ArgumentError
from handloom.optimizers import NamedOptimizers, averaged_weights
from handloom.optimizers._minimize import minimize

ops = keras.ops


@keras.saving.register_keras_serializable("handloom")
class Model(keras.Model):
    """A `keras.Model` that trains by Handloom's loop: functional, sequential or subclassed, saved and loaded as one.

    Override `train_step(data)`, `test_step(data)` or `predict_step(data)` and write what a step does, in Keras's words
    alone; it runs compiled on every backend. What a step returns is what is reported, under that name: a scalar is
    averaged over the epoch, weighted by the number of examples (or by the sample weights where given); a metric, or a
    metric's result, is asked at the end of the epoch.

    Args:
        args: Inputs and outputs for a functional model, a list of layers for a sequential one, nothing for a model
            with a `call` of its own.
        kwargs: As for `keras.Model`.

    Example:
        class GAN(hl.Model):
            def train_step(self, data):
                d_loss = self.minimize(lambda: ..., wrt=self.discriminator)
                g_loss = self.minimize(lambda: ..., wrt=self.generator)
                return {"d_loss": d_loss, "g_loss": g_loss}

        gan.compile(optimizer={"discriminator": "adam", "generator": "adam"})
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> Model:
        sequential = is_list_of_layers(args) and cls.__init__ is Model.__init__
        return cast(Model, super().__new__(variant(cls, keras.Sequential) if sequential else cls, *args, **kwargs))

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # Only what arrives here tells a functional model: a subclass's own constructor may take two arguments too.
        if is_inputs_and_outputs(args, kwargs) and not isinstance(self, Functional):
            # Not `setattr`: Keras looks at everything that is set, and is not ready yet. And not Keras's own way,
            # which changes the bases of every class between this one and keras.Model, for all their subclasses.
            object.__setattr__(self, "__class__", variant(type(self), Functional))
        elif is_list_of_layers(args) and not isinstance(self, keras.Sequential):
            raise ArgumentError(
                f"HL032: {type(self).__name__} passes a list of layers on to hl.Model. To define a constructor of your own "
                "for a sequential model, subclass hl.Sequential.",
            )
        super().__init__(*args, **kwargs)
        start_steps(self, "auto", Model)

    def __reduce__(self) -> Any:
        """Pickled and copied as Keras does, but by a class that a module knows by name: a variant is not."""
        rebuild, contents = super().__reduce__()
        return getattr(Model, rebuild.__name__), contents

    def get_config(self) -> dict[str, Any]:
        """What the model is made of."""
        register_as_its_class(type(self))
        return cast(dict[str, Any], super().get_config())

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: dict[str, Any] | None = None) -> Model:
        """Makes the model that `get_config` describes."""
        if "layers" in config and "input_layers" not in config and not issubclass(cls, keras.Sequential):
            return cast(Model, variant(cls, keras.Sequential).from_config(config, custom_objects))
        with naming_unknown_parts(config, custom_objects):
            return cast(Model, super().from_config(config, custom_objects))

    # ------------------------------------------------------------------ compile

    def compile(
        self,
        optimizer: Any = "rmsprop",
        loss: Any = None,
        loss_weights: Any = None,
        metrics: Any = None,
        weighted_metrics: Any = None,
        run_eagerly: bool = False,
        steps_per_execution: int | str = "auto",
        jit_compile: bool | str = "auto",
        auto_scale_loss: bool = True,
    ) -> None:
        """Configures the model for training, as `keras.Model.compile` does.

        Args:
            optimizer: As for Keras, or a dict of optimizers by what they train: `{"generator": ..., "*": ...}`. Each
                name is an attribute of the model (dotted paths allowed) whose trainable variables that optimizer
                owns; `"*"` owns the rest. `None` for a model that is only evaluated. `gradient_accumulation_steps` of
                a Keras optimizer is done by `handloom.optimizers.GradientAccumulation`.
            loss: As for Keras, like all that follow.
            loss_weights: Factors of the losses of several outputs.
            metrics: Metrics that ignore sample weights.
            weighted_metrics: Metrics that heed them.
            run_eagerly: Whether to run steps op by op.
            steps_per_execution: How many training steps to dispatch together, as for `hl.fit`.
            jit_compile: As for `hl.function`.
            auto_scale_loss: Whether to scale the loss under the policy `mixed_float16`.

        Raises:
            OptimizerError: If a variable is owned by two optimizers or by none.
        """
        super().compile(
            optimizer=prepared(optimizer, self.dtype_policy, auto_scale_loss=auto_scale_loss),
            loss=loss,
            loss_weights=loss_weights,
            metrics=metrics,
            weighted_metrics=weighted_metrics,
            run_eagerly=run_eagerly,
            steps_per_execution=steps_per_execution,
            jit_compile=False if run_eagerly else jit_compile,
            auto_scale_loss=False,
        )
        set_loss_tracker(self, LossTracker(name="loss"))
        start_steps(self, jit_compile, Model)
        attach(self.optimizer, self)

    def get_compile_config(self) -> dict[str, Any]:
        """What `compile` was called with, as a saved model keeps it."""
        config = cast(dict[str, Any], super().get_compile_config())
        # Keras would keep what "auto" came to here; where the model is loaded, it may come to something else.
        return config | {"jit_compile": self._steps.jit_compile} if config else config

    def compile_from_config(self, config: dict[str, Any]) -> None:
        """Compiles a loaded model as it was compiled when it was saved."""
        if type(self).compile is not Model.compile:
            super().compile_from_config(config)  # Says what a model with a compile of its own has to do.
            return
        self.compile(**deserialized(config))
        if self.optimizer is not None and self.built:
            build_optimizer(self.optimizer, self)

    # -------------------------------------------------------------------- steps

    def train_step(self, data: Any) -> dict[str, Any]:
        """Trains on one batch; to be overridden.

        Args:
            data: A batch: `x`, `(x, y)` or `(x, y, sample_weight)`.

        Returns:
            What is to be reported, by name.
        """
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)

        def loss_fn() -> tuple[Tensor, Any]:
            # Also where `call` does not ask for it: layers inside are told all the same.
            y_pred = self(x, training=True)
            return default_loss(self, x, y, y_pred, sample_weight, training=True), y_pred

        loss, y_pred = self.minimize(loss_fn, has_aux=True)
        with holding(self, loss):
            return cast(dict[str, Any], self.compute_metrics(x, y, y_pred, sample_weight=sample_weight))

    def test_step(self, data: Any) -> dict[str, Any]:
        """Evaluates on one batch; to be overridden. As `train_step`, without training."""
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        y_pred = self(x, training=False)
        loss = default_loss(self, x, y, y_pred, sample_weight, training=False)
        with holding(self, loss):
            return cast(dict[str, Any], self.compute_metrics(x, y, y_pred, sample_weight=sample_weight))

    def predict_step(self, data: Any) -> Any:
        """The model's outputs for one batch; to be overridden."""
        x, _, _ = keras.utils.unpack_x_y_sample_weight(data)
        return self(x, training=False)

    def compute_loss(
        self,
        x: Any = None,
        y: Any = None,
        y_pred: Any = None,
        sample_weight: Any = None,
        training: bool = True,
    ) -> Tensor:
        """The compiled loss, with regularization and what layers added."""
        denominators = Denominators()
        with observing(denominators):
            loss = super().compute_loss(x, y, y_pred, sample_weight, training)
        note_loss(loss, denominators.distinct())
        return loss

    def minimize(
        self,
        loss_fn: Callable[[], Any],
        wrt: Wrt | None = None,
        optimizer: keras.Optimizer | None = None,
        *,
        weight: Weight | None = None,
        has_aux: bool = False,
    ) -> Any:
        """Takes one step of an optimizer down a loss, as `hl.minimize` does.

        Args:
            loss_fn: Takes nothing; returns the loss, or with `has_aux` a pair of it and anything else.
            wrt: What to train, as for `hl.minimize`; by default the whole model.
            optimizer: By default the compiled one; of several, each variable's owner.
            weight: As for `hl.minimize`.
            has_aux: Whether `loss_fn` returns a pair.

        Returns:
            The loss before the update; with `has_aux`, a pair.

        Raises:
            OptimizerError: If there is no optimizer, or none that owns these variables.
            GradientError: As `hl.minimize`.
        """
        wrt = self if wrt is None else wrt
        if optimizer is None:
            optimizer = compiled_optimizer(self)
            build(wrt, loss_fn)
            if not optimizer.built and not isinstance(optimizer, NamedOptimizers):
                optimizer.build(self.trainable_variables)  # All of them: a later step may train another part.
        return minimize(loss_fn, wrt, optimizer, weight=weight, has_aux=has_aux)

    # --------------------------------------------------------------------- runs

    def fit(
        self,
        x: Any = None,
        y: Any = None,
        batch_size: int | None = None,
        epochs: int = 1,
        verbose: str | int = "auto",
        callbacks: Any = None,
        validation_split: float = 0.0,
        validation_data: Any = None,
        shuffle: bool = True,
        class_weight: Mapping[int, float] | None = None,
        sample_weight: Any = None,
        initial_epoch: int = 0,
        steps_per_epoch: int | None = None,
        validation_steps: int | None = None,
        validation_batch_size: int | None = None,
        validation_freq: int | Sequence[int] = 1,
        run_dir: str | Path | None = None,
        resume: str = "auto",
        allow: Sequence[str] = (),
        save: Every | None = every(epochs=1),
        keep: int | None = 3,
        best: str | None = None,
        strategy: Strategy | None = None,
        steps_per_execution: int | str | None = None,
        seed: int | None = None,
    ) -> keras.callbacks.History:
        """Trains the model, with Keras's arguments and their meaning.

        Args:
            x: Inputs, or a source of batches, as `hl.Feed` takes it.
            y: Targets, unless `x` gives them.
            batch_size: Examples in a batch, for arrays. 32 by default.
            epochs: The epoch to stop at, counted from `initial_epoch`'s zero.
            verbose: 0 for silence, 1 for a progress bar, 2 for a line an epoch; `"auto"` for a bar in a terminal.
            callbacks: Keras callbacks.
            validation_split: Fraction of the arrays, from their end, to validate on instead of train.
            validation_data: `(x, y)`, `(x, y, sample_weight)`, or a source of batches.
            shuffle: Whether to draw a new order each epoch, for arrays and `PyDataset`s.
            class_weight: Weights of examples by their class.
            sample_weight: Weights of examples.
            initial_epoch: The epoch to begin at.
            steps_per_epoch: Steps in an epoch; by default one pass over the data.
            validation_steps: Steps of a validation; by default one pass.
            validation_batch_size: By default `batch_size`.
            validation_freq: Validate every so many epochs, or after the epochs listed (counted from 1).
            run_dir: A directory for the log and the checkpoints of the run; it, and the rest, as for `hl.fit`.
            resume: Whether to go on from a checkpoint there.
            allow: What a checkpoint may lack, or have besides.
            save: When to save.
            keep: How many of the last checkpoints to keep.
            best: By which value to keep the best besides, saved when it is reported.
            strategy: How the run uses its devices.
            steps_per_execution: How many steps to dispatch together; by default what `compile` was given.
            seed: One number for all that is random in the run.

        Returns:
            The history: `history.history[name]` is a list with one value an epoch.

        Raises:
            DataError: If the data is empty, of unequal lengths, has labels outside the classes, or weights that are
                negative or sum to zero in a batch.
            StepError: If a step returns no dict of scalars.
        """
        self._steps.check_compiled("fit", "train_step")
        together = self.steps_per_execution if steps_per_execution is None else steps_per_execution
        options = RunOptions(run_dir, resume, allow, save, keep, best, strategy, together, verbose)
        seed_run(seed, self)
        if validation_split and validation_data is None:
            (x, y, sample_weight), validation_data = split((x, y, sample_weight), validation_split)
        feed = model_feed(
            self, (x, y, sample_weight), batch_size, shuffle=shuffle, class_weight=class_weight, training=True
        )
        held_out = validation = None
        if validation_data is not None:
            held_out = model_feed(self, unpacked(validation_data), validation_batch_size or batch_size)
        with self._steps.running():
            if held_out is not None:
                step = self._steps.reporting("test_step")
                validation = loop.by_step(step, held_out, self, validation_steps)
            self.history = loop.train(
                self._steps.reporting("train_step"),
                feed,
                options,
                model=self,
                state={"model": self},
                epochs=epochs,
                initial_epoch=initial_epoch,
                steps_per_epoch=steps_per_epoch,
                validation=validation,
                validate_every=_validation_times(validation_freq),
                callbacks=callbacks,
                finish=functools.partial(finish_training, self),
            )
        return self.history

    def evaluate(
        self,
        x: Any = None,
        y: Any = None,
        batch_size: int | None = None,
        verbose: str | int = "auto",
        sample_weight: Any = None,
        steps: int | None = None,
        callbacks: Any = None,
        return_dict: bool = False,
        weights: str | None = None,
    ) -> Any:
        """Evaluates the model, with Keras's arguments and their meaning; see `fit`.

        With `weights="ema"` it does so with the averages that `handloom.optimizers.WeightAveraging` keeps.

        Returns:
            The reported values: a dict if `return_dict`, else a list in the order of the metrics, or the only value.
        """
        self._steps.check_compiled("evaluate", "test_step")
        feed = model_feed(self, (x, y, sample_weight), batch_size)
        with (
            self._steps.running(),
            _weights(self, weights),
            loop.standalone("evaluate", self, callbacks, verbose, steps or feed.length) as (hooks, after_step, events),
        ):
            step = self._steps.reporting("test_step")
            results = loop.evaluate(step, feed, hooks=hooks, model=self, steps=steps, after_step=after_step)
            events.append("validation", values=results)
        return results if return_dict else in_keras_order(self, results)

    def predict(
        self,
        x: Any,
        batch_size: int | None = None,
        verbose: str | int = "auto",
        steps: int | None = None,
        callbacks: Any = None,
        weights: str | None = None,
    ) -> Any:
        """The model's outputs, with Keras's arguments and their meaning; see `fit`. `weights` is as for `evaluate`.

        Returns:
            NumPy arrays in the structure of the outputs, the batches joined along their first axis.
        """
        feed = model_feed(self, (x, None, None), batch_size, labels=False)
        with (
            self._steps.running(),
            _weights(self, weights),
            loop.standalone("predict", self, callbacks, verbose, steps or feed.length) as (hooks, after_step, _),
        ):
            step = self._steps.prediction
            return loop.predict(step, feed, hooks=hooks, model=self, steps=steps, after_step=after_step)

    def explain(self) -> Explanation:
        """Prints who trains what, how reported values come of those of batches, and what may surprise.

        Returns:
            The same as data.

        Raises:
            OptimizerError: If a variable is owned by two optimizers or by none.
        """
        return shown(explain(self, self._steps.reductions))

    train_on_batch = train_on_batch
    test_on_batch = test_on_batch
    predict_on_batch = predict_on_batch
    export = export


@keras.saving.register_keras_serializable("handloom")
class Sequential(Model, keras.Sequential):
    """A `keras.Sequential` that trains by Handloom's loop; see `hl.Model`."""


def _weights(model: Model, weights: str | None) -> contextlib.AbstractContextManager[None]:
    if weights not in (None, "ema"):
        raise ArgumentError(f'HL033: weights takes None, for the weights as they are, or "ema"; received {weights!r}.')
    return averaged_weights(model) if weights else contextlib.nullcontext()


def _validation_times(validation_freq: int | Sequence[int]) -> Every | AfterEpochs:
    if isinstance(validation_freq, Iterable):
        return AfterEpochs(frozenset(validation_freq))
    return every(epochs=int(validation_freq))
