"""Training in NumPy, in double precision: the numbers that the rows are compared with."""

import keras
import numpy as np


def softmax(logits):
    exp = np.exp(logits - logits.max(axis=1, keepdims=True))
    return exp / exp.sum(axis=1, keepdims=True)


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def train(update, data, weights, epochs=1, batch_size=None):
    """Trains in the order of the data.

    Args:
        update: Takes the weights and a batch, array by array; returns the next weights and, for each example, the
            reported values, such as its loss.
        data: Arrays in any structure.
        weights: The weights to start from.
        epochs: The number of epochs.
        batch_size: All examples by default; the last batch is smaller.

    Returns:
        The reported values, of shape (epochs, examples, ...), and the last weights.
    """
    arrays = [array.astype("float64") for array in keras.tree.flatten(data)]
    size, reported = batch_size or len(arrays[0]), []
    for _ in range(epochs):
        of_epoch = []
        for first in range(0, len(arrays[0]), size):
            weights, of_batch = update(weights, *(array[first : first + size] for array in arrays))
            of_epoch.append(of_batch)
        reported.append(np.concatenate(of_epoch))
    return np.array(reported), weights


def descended(weights, gradients, rate):
    """One update by gradient descent."""
    return [weight - rate * gradient for weight, gradient in zip(weights, gradients, strict=True)]


def linear_gradients(weights, x, y, weight=None):
    """The gradients of the mean squared error of a kernel and a bias, and the error of each example."""
    kernel, bias = weights
    off = x @ kernel + bias - y
    slope = 2 * off / len(off) * (1 if weight is None else weight[:, None])
    return [x.T @ slope, slope.sum(axis=0)], off[:, 0]


def linear_regression(data, epochs=1, batch_size=32, rate=0.1):
    """Linear regression from zero by gradient descent on x, y and, optionally, the weights of the examples.

    Returns the errors, of shape (epochs, examples), and the last kernel and bias.
    """

    def update(weights, *batch):
        gradients, off = linear_gradients(weights, *batch)
        return descended(weights, gradients, rate), off

    return train(update, data, [np.zeros((data[0].shape[1], 1)), np.zeros(1)], epochs, batch_size)


def softmax_regression(data, epochs=1, batch_size=32, rate=0.5):
    """Softmax regression from zero, without a bias, by gradient descent on x and labels of ten classes.

    Returns the losses, and whether each example was classified right, both of shape (epochs, examples).
    """

    def update(kernel, x, labels):
        labels = labels.astype(int)
        chances = softmax(x @ kernel)
        of_examples = -np.log(chances[range(len(x)), labels]), chances.argmax(axis=1) == labels
        return kernel - rate * x.T @ (chances - np.eye(10)[labels]) / len(x), np.stack(of_examples, axis=1)

    reported, _ = train(update, data, np.zeros((data[0].shape[1], 10)), epochs, batch_size)
    return np.moveaxis(reported, -1, 0)


def two_layer_gradients(x, hidden, kernel, slope):
    """The gradients of a tanh layer and a linear one, both with a bias, from the slope of the loss in the outputs."""
    inner = slope @ kernel.T * (1 - hidden**2)
    return [x.T @ inner, inner.sum(axis=0), hidden.T @ slope, slope.sum(axis=0)]


def two_layer_regression(weights, x, y):
    """The gradients of the mean squared error of these layers, and the squared error of each example."""
    w1, b1, w2, b2 = weights
    hidden = np.tanh(x @ w1 + b1)
    off = hidden @ w2 + b2 - y
    return two_layer_gradients(x, hidden, w2, 2 * off / len(x)), off[:, 0] ** 2


class Adam:
    """Adam (Kingma and Ba, 2015) with the defaults of Keras."""

    def __init__(self, rate=0.01):
        self.rate, self.steps, self.moments = rate, 0, None

    def updated(self, weights, gradients):
        self.steps += 1
        self.moments = self.moments or [(0.0, 0.0)] * len(weights)
        pairs = zip(self.moments, gradients, strict=True)
        self.moments = [(0.9 * mean + 0.1 * g, 0.999 * square + 0.001 * g**2) for (mean, square), g in pairs]
        scale = np.sqrt(1 - 0.999**self.steps) / (1 - 0.9**self.steps)
        return descended(weights, [mean * scale / (np.sqrt(s) + 1e-7) for mean, s in self.moments], self.rate)
