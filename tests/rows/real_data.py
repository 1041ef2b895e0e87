"""Real data that scikit-learn carries, in the shape that the rows want it."""

from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits


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
