"""The next batch is read while the device works on the last one."""

import keras
import numpy as np
import pytest
from keras import ops

import handloom as hl

# On a CPU the other backends compute before a call returns; on an accelerator all three return at once.
pytestmark = pytest.mark.backend("jax")

BATCHES = 4


def test_fit_reads_the_next_batch_before_the_last_step_ends():
    state, ahead = keras.Variable(np.eye(500, dtype="float32")), []

    def batches():
        for index in range(BATCHES):
            if index:
                ahead.append(not state.value.is_ready())
            yield np.full((500, 500), 1e-3, "float32")

    def long(x):
        state.assign(ops.fori_loop(0, 60, lambda _, value: ops.tanh(ops.matmul(value, x)), state.value))
        return {"first": state.value[0, 0]}

    feed = hl.Feed(batches)
    hl.fit(long, feed, verbose=0)  # Compiles the step.
    ahead.clear()
    hl.fit(long, feed, verbose=0)
    assert ahead == [True] * (BATCHES - 1)
    assert feed.state()["epoch"] == 2


def test_feed_state_is_the_position_of_the_batches_given_while_the_device_works():
    state, positions = keras.Variable(np.eye(500, dtype="float32")), []
    step = hl.function(
        lambda x: state.assign(ops.fori_loop(0, 60, lambda _, value: ops.tanh(ops.matmul(value, x)), state.value))
    )
    feed = hl.Feed(np.full((BATCHES * 500, 500), 1e-3, "float32"), batch_size=500)
    for batch in feed:
        step(batch)
        positions.append((feed.state()["batch"], state.value.is_ready()))
    assert [batch for batch, _ in positions] == [1, 2, 3, 4]
    assert not all(ready for _, ready in positions)
