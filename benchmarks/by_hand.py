"""Loops written by hand on each backend, and on torch without Keras; none of them is slow."""

from __future__ import annotations

from collections.abc import Callable

import keras
from keras import layers


def model(kind: str, cls: type = keras.Model) -> keras.Model:
    """*tiny*: 32-64-1 dense. *conv*: two 3x3 convolutions on 8x8 and a dense layer."""
    if kind == "tiny":
        inputs = keras.Input((32,))
        x = layers.Dense(64, activation="relu")(inputs)
    else:
        inputs = keras.Input((8, 8, 1))
        x = layers.Conv2D(16, 3, activation="relu")(inputs)
        x = layers.Conv2D(16, 3, activation="relu")(x)
        x = layers.Flatten()(x)
    return cls(inputs, layers.Dense(1)(x))


def jax_loop(kind: str, x, y, batch: int) -> Callable[[int], None]:
    import jax
    import jax.numpy as jnp

    net, optimizer, loss_fn = model(kind), keras.optimizers.Adam(), keras.losses.MeanSquaredError()
    optimizer.build(net.trainable_variables)

    def loss_of(trainable, rest, x, y):
        y_pred, rest = net.stateless_call(trainable, rest, x, training=True)
        return loss_fn(y, y_pred), rest

    differentiate = jax.value_and_grad(loss_of, has_aux=True)

    def step(state, x, y):
        trainable, rest, of_optimizer, total = state
        (loss, rest), gradients = differentiate(trainable, rest, x, y)
        trainable, of_optimizer = optimizer.stateless_apply(of_optimizer, gradients, trainable)
        return trainable, rest, of_optimizer, total + loss

    step = jax.jit(step, donate_argnums=0)
    state = [
        [jnp.copy(variable.value) for variable in variables]
        for variables in (net.trainable_variables, net.non_trainable_variables, optimizer.variables)
    ]

    def train(epochs: int) -> None:
        nonlocal state
        for _ in range(epochs):
            carried = (*state, jnp.zeros(()))
            for first in range(0, len(x), batch):
                carried = step(carried, x[first : first + batch], y[first : first + batch])
            *state, total = carried
            float(total)

    return train


def tensorflow_loop(kind: str, x, y, batch: int) -> Callable[[int], None]:
    import tensorflow as tf

    net, optimizer, loss_fn = model(kind), keras.optimizers.Adam(), keras.losses.MeanSquaredError()
    optimizer.build(net.trainable_variables)

    @tf.function
    def step(x, y):
        with tf.GradientTape() as tape:
            loss = loss_fn(y, net(x, training=True))
        gradients = tape.gradient(loss, net.trainable_variables)
        optimizer.apply(gradients, net.trainable_variables)
        return loss

    def train(epochs: int) -> None:
        for _ in range(epochs):
            total = 0.0
            for first in range(0, len(x), batch):
                total = total + step(x[first : first + batch], y[first : first + batch])
            float(total)

    return train


def torch_loop(kind: str, x, y, batch: int) -> Callable[[int], None]:
    import torch

    net, optimizer, loss_fn = model(kind), keras.optimizers.Adam(), keras.losses.MeanSquaredError()
    optimizer.build(net.trainable_variables)

    def step(x, y):
        loss = loss_fn(y, net(x, training=True))
        net.zero_grad()
        loss.backward()
        with torch.no_grad():
            optimizer.apply([variable.value.grad for variable in net.trainable_variables], net.trainable_variables)
        return loss.detach()

    return _over_torch_batches(step, x, y, batch)


def native_torch(kind: str, x, y, batch: int) -> Callable[[int], None]:
    import torch
    from torch import nn

    if kind == "tiny":
        net = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 1))
    else:
        x = x.transpose(0, 3, 1, 2).copy()
        convolutions = [nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU()]
        net = nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(256, 1))
    optimizer = torch.optim.Adam(net.parameters())

    def step(x, y):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(net(x), y)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return _over_torch_batches(step, x, y, batch)


def _over_torch_batches(step: Callable, x, y, batch: int) -> Callable[[int], None]:
    import torch

    x, y = torch.from_numpy(x), torch.from_numpy(y)

    def train(epochs: int) -> None:
        for _ in range(epochs):
            total = 0.0
            for first in range(0, len(x), batch):
                total = total + step(x[first : first + batch], y[first : first + batch])
            float(total)

    return train


LOOPS = {"jax": jax_loop, "tensorflow": tensorflow_loop, "torch": torch_loop}
