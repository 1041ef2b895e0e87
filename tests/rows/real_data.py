"""Real data from scikit-learn and Python, in the shapes that the rows need."""

import collections
import inspect
import re
import textwrap

import numpy as np
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits, load_sample_images, load_wine


def digits():
    """1,797 scanned digits of 64 pixels between 0 and 1, and which digit each is."""
    pixels, labels = load_digits(return_X_y=True)
    return (pixels / 16).astype("float32"), labels.astype("int32")


def diabetes():
    """442 patients by 10 measurements, and the disease's progression; all of mean 0 and variance 1."""
    x, y = load_diabetes(return_X_y=True)
    standard = [(array - array.mean(axis=0)) / array.std(axis=0) for array in (x, y[:, None])]
    return tuple(array.astype("float32") for array in standard)


def tumours():
    """569 tumours by 30 measurements, each of mean 0 and variance 1, and which of them are malignant."""
    measured, benign = load_breast_cancer(return_X_y=True)
    standard = (measured - measured.mean(axis=0)) / measured.std(axis=0)
    return standard.astype("float32"), (1 - benign).astype("int32")


def wines():
    """178 wines by 12 measurements, and how much alcohol they have; all of mean 0 and variance 1."""
    measured = load_wine().data
    standard = (measured - measured.mean(axis=0)) / measured.std(axis=0)
    return standard[:, 1:].astype("float32"), standard[:, :1].astype("float32")


def photographs():
    """The pieces of 32 by 32 pixels of two photographs, in colours between 0 and 1, and of which of the two each is."""
    pieces = [image[:416, :640].reshape(13, 32, 20, 32, 3).swapaxes(1, 2) for image in load_sample_images().images]
    labels = np.repeat([0, 1], 13 * 20)
    return np.concatenate(pieces).reshape(-1, 32, 32, 3).astype("float32") / 255, labels.astype("int32")


def lines_of_code(count):
    """The first lines of Python's own `textwrap` that have three words and more, as lists of words."""
    lines = [re.findall(r"[a-z]+", line.lower()) for line in inspect.getsource(textwrap).splitlines()]
    return [words for words in lines if len(words) > 2][:count]


def counts_of_words(lines, most):
    """How often each line has each of the commonest words: mostly never."""
    words = [word for word, _ in collections.Counter(word for line in lines for word in line).most_common(most)]
    return np.array([[line.count(word) for word in words] for line in lines], "float32")
