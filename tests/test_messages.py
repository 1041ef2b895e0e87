"""All messages: their page and their codes are those of the source, and they are written as people read them."""

import ast
import json
import re
import runpy
from collections import Counter

import pytest

from handloom import errors
from tests.on_backends import ROOT

pytestmark = pytest.mark.once

PAGE = runpy.run_path(str(ROOT / "docs" / "messages.py"))
MESSAGES = PAGE["messages"]()

# Words and turns that no manual of the field uses.
FOREIGN = re.compile(
    r"\b(anew|begun|midst|nobody|somebody|thawed|op by op|passed over|to the bit|going on|goes on|go on|as it was|"
    r"his|whose is|in the place of|such a one|of its own accord)\b|"
    r"(^|\. )(What|Whatever|Whether|How) [a-z ]+ (is|are) ",
)

each = pytest.mark.parametrize("message", MESSAGES, ids=lambda message: message.code)


def test_messages_page_and_codes_are_those_of_the_source():
    hint = "run `make messages`"
    assert PAGE["PAGE"].read_text(encoding="utf-8") == PAGE["page"](MESSAGES), hint
    assert PAGE["CODES"].read_text(encoding="utf-8") == PAGE["codes"](MESSAGES), hint


def test_message_codes_are_unique():
    assert [code for code, count in Counter(message.code for message in MESSAGES).items() if count > 1] == []


def test_messages_are_found_wherever_an_error_or_warning_of_handloom_is_given():
    names = {*errors.__all__, "warn"} - {"Finding"}
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "handloom").rglob("*.py")]
    calls = [node for source in sources for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    given = [ast.unparse(call) for call in calls if isinstance(call.func, ast.Name) and call.func.id in names]
    strict = [call for call in given if "HandloomError(saw, why, fix" in call]  # A warning that is raised as an error.
    assert len(given) == len(MESSAGES) + len(strict) > 100


@each
def test_message_is_plain_english_in_whole_sentences(message):
    assert not FOREIGN.search(message.text)
    for part in filter(None, (message.saw, message.why, message.fix)):
        assert part.rstrip()[-1] in ".}`)", part
        assert part[0].isupper() or part[0] in "{'`" or re.match(r"[a-z_]+([.(=]|\b)", part), part


@each
def test_message_has_a_class_of_its_own_kind(message):
    kind = getattr(errors, message.kind)
    assert issubclass(kind, errors.HandloomWarning if message.is_warning else errors.HandloomError)


def test_messages_json_has_every_code_once():
    kinds = json.loads(PAGE["CODES"].read_text(encoding="utf-8"))
    assert sorted(kinds["warnings"] + kinds["errors"]) == [message.code for message in MESSAGES]
