"""`hl.Model`: a Keras model that trains with Handloom's loop, whatever its step does."""

import contextlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, cast

from handloom._data.class_weight import ClassWeight
from handloom._data.sample_weight import ThirdPart
from handloom._keras import Functional, Tensor, default_loss, in_keras_order, keras, set_loss_tracker
from handloom._model.compiled_optimizer import attach, build_optimizer, compiled_optimizer, finish_training, prepared
from handloom._model.data import check_targets, in_order_of_outputs, model_feed, unpacked, unpacked_like
from handloom._model.explain import Explanation, explain, shown
from handloom._model.export import export
from handloom._model.on_batch import predict_on_batch, test_on_batch, train_on_batch
from handloom._model.stateful_steps import also_with_state
from handloom._model.steps import ModelSteps, check_compiled
from handloom._model.unknown_classes import naming_unknown_classes
from handloom._model.validation_split import split
from handloom._model.variants import is_inputs_and_outputs, is_list_of_layers, register_as_its_class, variant
from handloom._model.weights import load_weights, save, save_weights
from handloom._reporting.loss_tracker import LossTracker, holding
from handloom._reporting.nested import outer_epochs_kept
from handloom._run import loop
from handloom._run.grouping import limited_steps
from handloom._run.options import RunOptions
from handloom._run.run import Run
from handloom._run.seed import seed_run
from handloom._run.validation import NEVER
from handloom._trace.gradients import Wrt, build
from handloom._trace.loss_weight import Weight
from handloom._trace.losses import noted
from handloom._util.arguments import whole_number
from handloom._util.every import AfterEpochs, Every, every
from handloom._util.short import short
from handloom.distribute._strategy import Strategy
from handloom.errors import ArgumentError
from handloom.optimizers import NamedOptimizers, averaged_weights
from handloom.optimizers._minimize import minimize


@keras.saving.register_keras_serializable("handloom")
class Model(keras.Model):
    """A `keras.Model` that trains with Handloom's loop: functional, sequential or subclassed, saved and loaded as one.

    Override `train_step(data)`, `test_step(data)` or `predict_step(data)` and write the step with Keras operations
    only; it runs compiled on every backend. Each value that a step returns is reported under its name. A scalar is
    averaged over the epoch, weighted by the number of examples (or by the sample weights, if given). A metric, or the
    result of a metric, reports its result at the end of the epoch.

    In a step of your own, the third part of a batch counts as sample weights if they were given to `fit` as
    `sample_weight` or `class_weight`, if the step has a variable `sample_weight`, or if it passes the batch, or this
    part in third place, to `super()` or `keras.utils.unpack_x_y_sample_weight`. Otherwise it means what the step takes
    it for.

    Args:
        args: Inputs and outputs for a functional model, a list of layers for a sequential model, nothing for a model
            that defines `call`.
        kwargs: As for `keras.Model`.

    Example:
        class GAN(hl.Model):
            def train_step(self, data):
                d_loss = self.minimize(lambda: ..., wrt=self.discriminator)
                g_loss = self.minimize(lambda: ..., wrt=self.generator)
                return {"d_loss": d_loss, "g_loss": g_loss}

        gan.compile(optimizer={"discriminator": "adam", "generator": "adam"})
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> "Model":
        sequential = is_list_of_layers(args, kwargs) and cls.__init__ is Model.__init__
        return cast(Model, super().__new__(variant(cls, keras.Sequential) if sequential else cls, *args, **kwargs))

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # Only the arguments that arrive here tell a functional model: the constructor of a subclass may take two too.
        if is_inputs_and_outputs(args, kwargs) and not isinstance(self, Functional):
            # Not `setattr`: Keras inspects each attribute that is set, and is not ready yet. Nor Keras's own way, which
            # changes the bases of every class between this class and keras.Model, for all their subclasses.
            object.__setattr__(self, "__class__", variant(type(self), Functional))
        elif is_list_of_layers(args, kwargs) and not isinstance(self, keras.Sequential):
            raise ArgumentError(
                f"HL032: The constructor of {type(self).__name__} passes a list of layers to hl.Model.",
                fix=f"To give a sequential model its own constructor: class {type(self).__name__}(hl.Sequential).",
            )
        super().__init__(*args, **kwargs)
        self._steps = ModelSteps(self)
        self._has_weighted_metrics = False

    def __reduce__(self) -> Any:
        """Pickles and copies as Keras does, but names `Model`, because no module holds a variant by name."""
        rebuild, contents = super().__reduce__()
        return getattr(Model, rebuild.__name__), contents

    def get_config(self) -> dict[str, Any]:
        """The structure of the model, from which `from_config` makes a model like it."""
        register_as_its_class(type(self))
        return cast(dict[str, Any], super().get_config())

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: dict[str, Any] | None = None) -> "Model":
        """Makes the model that `get_config` describes."""
        if "layers" in config and "input_layers" not in config and not issubclass(cls, keras.Sequential):
            return cast(Model, variant(cls, keras.Sequential).from_config(config, custom_objects))
        with naming_unknown_classes(config, custom_objects):
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
            optimizer: As for Keras, or a dict of optimizers by the parts that they train:
                `{"generator": ..., "*": ...}`. Each name is an attribute of the model (or a dotted path), and the
                optimizer owns its trainable variables; `"*"` owns the rest. `None` for a model that is only evaluated.
                `handloom.optimizers.GradientAccumulation` replaces the `gradient_accumulation_steps` of a Keras
                optimizer.
            loss: As for Keras, as are the following arguments.
            loss_weights: Factors of the losses of several outputs.
            metrics: Metrics that ignore sample weights.
            weighted_metrics: Metrics that use sample weights.
            run_eagerly: Whether steps run eagerly.
            steps_per_execution: Number of training steps in one dispatch, as for `hl.fit`. The model has `"auto"` as 1.
            jit_compile: As for `hl.function`.
            auto_scale_loss: Whether to scale the loss under the policy `mixed_float16`.

        Raises:
            OptimizerError: A variable is owned by two optimizers or by none.
        """
        optimizer = prepared(optimizer, self.dtype_policy, auto_scale_loss=auto_scale_loss)
        together = 1 if steps_per_execution == "auto" else steps_per_execution  # Keras has a number here.
        given = (loss, loss_weights, metrics, weighted_metrics, run_eagerly, together)
        super().compile(optimizer, *given, jit_compile=not run_eagerly and jit_compile, auto_scale_loss=False)
        set_loss_tracker(self, LossTracker(name="loss"))
        self._steps = ModelSteps(self, jit_compile, steps_per_execution)
        self._has_weighted_metrics = bool(weighted_metrics)
        attach(optimizer, self)

    def get_compile_config(self) -> dict[str, Any]:
        """The arguments of `compile`, as a saved model keeps them."""
        config = cast(dict[str, Any], super().get_compile_config())
        # Keras would keep its choice for "auto" here; where the model is loaded, another choice may be right.
        return config | self._steps.options if config else config

    def compile_from_config(self, config: dict[str, Any]) -> None:
        """Compiles a loaded model as it was compiled when it was saved."""
        if type(self).compile is not Model.compile:
            super().compile_from_config(config)  # Tells the user to compile a model that has its own compile().
            return
        with naming_unknown_classes(config):
            arguments = keras.saving.deserialize_keras_object(config)
        self.compile(**arguments)
        if self.optimizer is not None and self.built:
            build_optimizer(self)

    # -------------------------------------------------------------------- steps

    @also_with_state
    def train_step(self, data: Any) -> dict[str, Any]:
        """Trains on one batch. Override it for a step of your own.

        Args:
            data: A batch: `x`, `(x, y)` or `(x, y, sample_weight)`.

        Returns:
            The values to report, by name.
        """
        x, y, sample_weight = _unpacked(self, data)

        def loss_fn() -> tuple[Tensor, Any]:
            y_pred = self(x, training=True)  # Even if `call` does not take it, because the layers inside get it.
            return default_loss(self, x, y, y_pred, sample_weight, training=True), y_pred

        loss, y_pred = self.minimize(loss_fn, has_aux=True)
        with holding(self, loss):
            return cast(dict[str, Any], self.compute_metrics(x, y, y_pred, sample_weight=sample_weight))

    @also_with_state
    def test_step(self, data: Any) -> dict[str, Any]:
        """Evaluates on one batch, as `train_step` without training. Override it for a step of your own."""
        x, y, sample_weight = _unpacked(self, data)
        y_pred = self(x, training=False)
        # Noted here too: a subclass may have its own `compute_loss`.
        loss = noted(lambda: default_loss(self, x, y, y_pred, sample_weight, training=False))
        with holding(self, loss):
            return cast(dict[str, Any], self.compute_metrics(x, y, y_pred, sample_weight=sample_weight))

    @also_with_state
    def predict_step(self, data: Any) -> Any:
        """Returns the outputs of the model for one batch. Override it for a step of your own."""
        return self(unpacked(data)[0], training=False)

    def compute_loss(
        self, x: Any = None, y: Any = None, y_pred: Any = None, sample_weight: Any = None, training: bool = True
    ) -> Tensor:
        """Returns the compiled loss plus regularization and the losses that layers add."""
        sample_weight = in_order_of_outputs(self, y_pred, sample_weight)
        return noted(lambda: super(Model, self).compute_loss(x, y, y_pred, sample_weight, training))

    def minimize(
        self,
        loss_fn: Callable[[], Any],
        wrt: Wrt | None = None,
        optimizer: keras.Optimizer | None = None,
        *,
        weight: Weight | None = None,
        has_aux: bool = False,
    ) -> Any:
        """Makes one update that decreases a loss, as `hl.minimize` does.

        Args:
            loss_fn: Takes no arguments; returns the loss, or with `has_aux` a pair of the loss and anything else.
            wrt: The variables to train, as for `hl.minimize`. By default, the whole model.
            optimizer: By default, the compiled optimizer; of several, the owner of each variable.
            weight: As for `hl.minimize`.
            has_aux: Whether `loss_fn` returns a pair.

        Returns:
            The loss before the update; with `has_aux`, a pair.

        Raises:
            OptimizerError: There is no optimizer, or none that owns these variables.
            GradientError: As for `hl.minimize`; but for a whole model without trainable variables a warning.
        """
        if wrt is None and self._steps.train_nothing(loss_fn):
            return loss_fn()
        wrt = self if wrt is None else wrt
        if optimizer is None:
            optimizer = compiled_optimizer(self)
            build(wrt, loss_fn)
            if not optimizer.built and not isinstance(optimizer, NamedOptimizers):
                optimizer.build(self.trainable_variables)  # All of them, because a later step may train another part.
            self._steps.add_unfrozen()
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
        class_weight: ClassWeight | None = None,
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
            x: Inputs, or a source of batches, as `hl.Feed` takes it. If a generator is used up, see `hl.fit`.
            y: Targets, unless `x` gives them.
            batch_size: Number of examples in a batch, for arrays. By default, 32.
            epochs: The epoch to stop at, counted from 0 and not from `initial_epoch`.
            verbose: 0 for no output, 1 for a progress bar, 2 for a line per epoch; `"auto"` for a progress bar in a
                terminal and lines elsewhere.
            callbacks: Keras callbacks.
            validation_split: Fraction of the arrays, at their end, to validate on instead of train on.
            validation_data: `(x, y)`, `(x, y, sample_weight)`, or a source of batches.
            shuffle: Whether to draw a new order in each epoch, for arrays and `PyDataset`s.
            class_weight: Weights of examples, by class; for several outputs by name: `{"a": {0: 1.0}, "b": {3: 2.0}}`.
            sample_weight: Weights of examples.
            initial_epoch: The epoch to start at.
            steps_per_epoch: Number of steps in an epoch. By default, one pass over the data.
            validation_steps: Number of steps of a validation. By default, one pass over the data.
            validation_batch_size: By default, `batch_size`.
            validation_freq: Number of epochs between two validations, or a list of the epochs (counted from 1) after
                which to validate.
            run_dir: A directory for the log and the checkpoints of the run; this and the following as for `hl.fit`.
            resume: Whether to resume from a checkpoint in it.
            allow: Names in which a checkpoint may differ.
            save: When to save.
            keep: Number of checkpoints to keep.
            best: The reported value by which the best checkpoint is kept too.
            strategy: How the run uses its devices.
            steps_per_execution: Number of steps in one dispatch. By default, as given to `compile`.
            seed: A seed for everything random in the run.

        Returns:
            The history: `history.history[name]` is a list with one value per epoch.

        Raises:
            DataError: The data is empty, of unequal lengths, has labels outside the classes, or has weights that are
                negative or sum to zero in a batch.
            StepError: A step does not return a dict of scalars.
        """
        check_compiled(self, "fit", "train_step")
        together = self._steps.together if steps_per_execution is None else steps_per_execution
        options = RunOptions(run_dir, resume, allow, save, keep, best, strategy, together, verbose)
        seed_run(seed, self)
        data = (x, y, sample_weight)
        if validation_split and validation_data is None:
            data, validation_data = split(data, validation_split)
        third = self._steps.third_part("train_step", sample_weight, class_weight)
        feed = model_feed(self, data, third, batch_size, shuffle=shuffle, class_weight=class_weight, training=True)
        validation = NEVER
        with self._steps.running():
            if validation_data is not None:
                parts, size = unpacked_like(x, validation_data), validation_batch_size or batch_size
                tested = self._steps.third_part("test_step", parts[2])
                held_out = model_feed(self, parts, tested, size)
                step, when = self._steps.reporting("test_step", tested), _validation_times(validation_freq)
                validation = loop.by_step(step, held_out, when, validation_steps)
            run = Run(
                self._steps.reporting("train_step", third),
                feed,
                options,
                model=self,
                state={"model": self},
                epochs=epochs,
                initial_epoch=initial_epoch,
                steps_per_epoch=steps_per_epoch,
                validation=validation,
                callbacks=callbacks,
            )
            self.history = loop.train(run, finish=lambda: finish_training(self))
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

        `weights="ema"` evaluates with the averages that `handloom.optimizers.WeightAveraging` keeps.

        Returns:
            The reported values: a dict if `return_dict`; otherwise a list in the order of the metrics, or the only one.
        """
        check_compiled(self, "evaluate", "test_step")
        third = self._steps.third_part("test_step", sample_weight)
        feed = model_feed(self, (x, y, sample_weight), third, batch_size)
        steps = limited_steps(steps, feed.length)
        around = loop.standalone("evaluate", self, callbacks, verbose, steps or feed.length)
        with self._steps.running(), _weights(self, weights), around as (hooks, after_step, events):
            step = self._steps.reporting("test_step", third)
            with outer_epochs_kept(step):
                results = loop.evaluate(step, feed, hooks, after_step, steps)
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
        """Predicts, with Keras's arguments and their meaning; see `fit`. `weights` is as for `evaluate`.

        Returns:
            The outputs as NumPy arrays in their structure, with the batches concatenated along the first axis.
        """
        feed = model_feed(self, (x, None, None), ThirdPart(False), batch_size, labels=False)
        steps = limited_steps(steps, feed.length)
        around = loop.standalone("predict", self, callbacks, verbose, steps or feed.length)
        with self._steps.running(), _weights(self, weights), around as (hooks, after_step, _):
            return loop.predict(self._steps.prediction, feed, hooks, after_step, steps)

    def explain(self) -> Explanation:
        """Prints which optimizer trains which variables, how batch values are reduced to the epoch's value, and notes.

        Returns:
            The same as data.

        Raises:
            OptimizerError: A variable is owned by two optimizers or by none.
        """
        return shown(explain(self, self._steps.reductions, weighted=self._has_weighted_metrics))

    train_on_batch = train_on_batch
    test_on_batch = test_on_batch
    predict_on_batch = predict_on_batch
    save = save
    save_weights = save_weights
    load_weights = load_weights
    export = export


@keras.saving.register_keras_serializable("handloom")
class Sequential(Model, keras.Sequential):
    """A `keras.Sequential` that trains with Handloom's loop; see `hl.Model`."""


def _unpacked(model: Model, data: Any) -> Any:
    parts = unpacked(data)
    if type(model).compute_loss is Model.compute_loss:
        check_targets(model, parts[1])
    return parts


def _weights(model: Model, weights: str | None) -> contextlib.AbstractContextManager[None]:
    if weights not in (None, "ema"):
        raise ArgumentError(f'HL033: weights takes "ema", or None for the present weights; received {short(weights)}.')
    return averaged_weights(model) if weights else contextlib.nullcontext()


def _validation_times(validation_freq: int | Sequence[int]) -> Every | AfterEpochs:
    if isinstance(validation_freq, Iterable):
        return AfterEpochs(frozenset(whole_number("fit", validation_freq=epoch) for epoch in validation_freq))
    return every(epochs=whole_number("fit", validation_freq=validation_freq))
