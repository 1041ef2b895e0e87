"""Findings: each has its line; warnings can be silenced, collected, or turned into errors."""

import pickle
import warnings

import keras
import numpy as np
import pytest
from keras import ops

import handloom as hl
from handloom._util.findings import given, warn
from handloom.errors import DataError, FallbackWarning, Finding, HandloomError, HandloomWarning
from tests.threads import in_a_thread


def line_of(finding):
    with open(finding.filename, encoding="utf-8") as file:
        return file.readlines()[finding.lineno - 1].strip()


def test_warn_carries_its_finding_and_shows_its_line_and_code():
    with pytest.warns(HandloomWarning) as warned:
        warn("HL204: Something was seen.", "It is wrong.", "Do this.")
    [warning] = warned
    assert str(warning.message) == "Something was seen. It is wrong. Do this. [HL204]"
    assert warning.message.finding == Finding(
        "HL204", __file__, warning.lineno, "Something was seen.", "It is wrong.", "Do this."
    )
    assert warning.filename == __file__
    assert line_of(warning.message.finding) == 'warn("HL204: Something was seen.", "It is wrong.", "Do this.")'
    with pytest.warns(FallbackWarning):
        warn("HL204: Seen.", category=FallbackWarning)


def test_error_carries_its_finding_and_can_be_pickled():
    def fails():
        return DataError("HL204: Something was seen.", fix="Do this.")

    error = fails()
    assert str(error) == "Something was seen. Do this. [HL204]"
    assert line_of(error.finding) == 'return DataError("HL204: Something was seen.", fix="Do this.")'
    copied = pickle.loads(pickle.dumps(error))
    assert (type(copied), str(copied), copied.finding) == (DataError, str(error), error.finding)


def test_error_has_the_line_of_the_user_behind_libraries():
    with pytest.raises(HandloomError) as caught:
        keras.tree.map_structure(lambda leaf: hl.every(steps=leaf), [0])
    assert line_of(caught.value.finding).startswith("keras.tree.map_structure(")


def test_warn_of_a_step_has_the_line_of_fit_or_of_the_step():
    with pytest.warns(HandloomWarning) as warned:
        hl.fit(lambda x, sample_weight: {}, (np.ones(3), np.ones(3)), verbose=0)
    assert line_of(warned[0].message.finding).startswith("hl.fit(")
    layer, optimizer = keras.layers.Dense(1, dtype="mixed_float16"), keras.optimizers.SGD()

    def step(x):
        return hl.minimize(lambda: ops.mean(layer(x)), layer, optimizer)

    with pytest.warns(HandloomWarning, match="float16") as warned, hl.run_eagerly(True):
        hl.function(step)(np.ones((2, 2), "float32"))
    assert line_of(warned[0].message.finding).startswith("return hl.minimize(")


def shown():
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        warn("HL252: Seen.")
        warn("HL204: Seen.")
    return [warning.message.finding.code for warning in warned]


def test_silence_holds_for_a_block_of_one_thread():
    with hl.checks.silence("HL204"):
        with hl.checks.silence("HL252"):
            assert shown() == []
        assert shown() == ["HL252"]
        assert in_a_thread(shown) == ["HL252", "HL204"]
    assert shown() == ["HL252", "HL204"]


def test_silence_holds_in_the_process_if_it_is_not_a_block():
    undone = hl.checks.silence("HL204")
    try:
        assert shown() == in_a_thread(shown) == ["HL252"]
    finally:
        with undone:  # After the block, all is as before the call.
            pass
    assert shown() == ["HL252", "HL204"]


def test_error_of_an_option_of_fit_has_the_line_of_fit():
    with pytest.raises(ValueError, match="HL004") as error:
        hl.fit(len, [1.0], steps_per_execution=0)
    assert "hl.fit(len" in line_of(error.value.finding)


@pytest.mark.parametrize("code", ["HL1", "hl204", "HL2044", "HL401", 204, None, "UserWarning"])
def test_silence_takes_a_code(code):
    with pytest.raises(ValueError, match="takes the code of a warning, such as 'HL204'"):
        hl.checks.silence(code)


def test_strict_makes_warnings_errors():
    with hl.checks.strict():
        with pytest.raises(HandloomError, match=r"Seen\. \[HL204\]") as caught:
            warn("HL204: Seen.")
        assert caught.value.finding.code == "HL204"
        with hl.checks.silence("HL204"):
            warn("HL204: Seen.")
    assert shown() == ["HL252", "HL204"]


def test_collect_takes_warnings_and_the_error_that_ends_the_block():
    with hl.checks.collect() as findings:
        warn("HL204: One.")
        with hl.checks.collect() as inner:
            warn("HL204: Two.")
        in_a_thread(shown)
    assert [finding.saw for finding in findings] == ["One."]
    assert [finding.saw for finding in inner] == ["Two."]
    with pytest.raises(DataError), hl.checks.collect() as findings:
        raise DataError("HL204: Three.")
    assert [finding.saw for finding in findings] == ["Three."]


def test_given_receives_findings_that_are_collected_or_shown_but_not_silenced_ones():
    heard = []
    with given.added(heard.append):
        shown()
        with hl.checks.collect(), hl.checks.silence("HL252"):
            shown()
    assert [finding.code for finding in heard] == ["HL252", "HL204", "HL204"]
