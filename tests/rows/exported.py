"""Runs exported models in their own runtime, without Handloom and Keras. Not a test.

python exported.py {tf_saved_model|onnx} FOLDER: calls each model there twice on its NAME.in.npy.
"""

import sys
from pathlib import Path

import numpy as np


def saved_model(exported):
    import tensorflow as tf  # noqa: PLC0415

    loaded = tf.saved_model.load(exported)
    return lambda x: loaded.serve(x).numpy()


def onnx(exported):
    import onnxruntime  # noqa: PLC0415

    session = onnxruntime.InferenceSession(exported)
    [only] = session.get_inputs()
    return lambda x: session.run(None, {only.name: x})[0]


def main(kind, folder):
    sys.modules |= {"handloom": None, "keras": None}  # As if neither were installed.
    load = {"tf_saved_model": saved_model, "onnx": onnx}[kind]
    for inputs in list(Path(folder).glob("*.in.npy")):
        name = str(inputs).removesuffix(".in.npy")
        model, x = load(name), np.load(inputs)
        np.save(f"{name}.out.npy", [model(x), model(x)])


if __name__ == "__main__":
    main(*sys.argv[1:])
