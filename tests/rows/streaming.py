"""Streams more data than may stay in memory, from each kind of source, and prints how memory grows. Not a test.

python -m tests.rows.streaming FOLDER: prints a line for each source: its name, the MiB that the feed itself takes, the
MiB by which memory grows after the first batches, and the mean of the data.
"""

import pathlib
import sys

import keras
import numpy as np
from keras import ops

import handloom as hl

ROWS, COLUMNS, BATCH = 4096, 16384, 16  # 256 MiB in batches of one, of which about a dozen may be in flight.


def batch(index):
    return np.full((BATCH, COLUMNS), index * BATCH, "float32")


class Batches(keras.utils.PyDataset):
    def __len__(self):
        return ROWS // BATCH

    def __getitem__(self, index):
        return batch(index)


def pipeline():
    import tensorflow as tf  # noqa: PLC0415

    data = tf.data.Dataset.range(0, ROWS, BATCH)
    return data.map(lambda first: tf.fill((BATCH, COLUMNS), tf.cast(first, "float32"))).prefetch(2)


def mapped(path):
    array = np.memmap(path, "float32", "w+", shape=(ROWS, COLUMNS))
    for index in range(ROWS // BATCH):
        array[index * BATCH : (index + 1) * BATCH] = index * BATCH
    array.flush()
    return array


def used():
    """The memory of this process in MiB, without the pages of files, which the system takes back when it needs them."""
    [line] = [line for line in pathlib.Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon")]
    return int(line.split()[1]) / 1024


def main(folder):
    array = mapped(pathlib.Path(folder) / "x")
    sources = {
        "mapped": lambda: hl.Feed(array, batch_size=BATCH),
        "mapped, shuffled": lambda: hl.Feed(array, batch_size=BATCH, shuffle=True),
        "generator": lambda: hl.Feed(lambda: map(batch, range(ROWS // BATCH))),
        "PyDataset": lambda: hl.Feed(Batches(workers=2, max_queue_size=4)),
        "tf.data": lambda: hl.Feed(pipeline()),
    }
    for name, source in sources.items():
        before, by_batch = used(), []
        watch = keras.callbacks.LambdaCallback(
            on_train_batch_end=lambda batch, logs, seen=by_batch: seen.append(used())
        )
        feed = source()
        feed.state()
        made = used() - before
        history = hl.fit(lambda x: {"mean": ops.mean(x)}, feed, verbose=0, callbacks=[watch]).history
        # The first batches load libraries.
        print(name, round(made), round(max(by_batch) - by_batch[7]), round(history["mean"][0], 3), sep="|")


if __name__ == "__main__":
    main(*sys.argv[1:])
