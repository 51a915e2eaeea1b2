"""Messages of errors are one line, whatever names out of files they hold."""

import pickle

import pytest

from diffdeploy.errors import DiffDeployError, InputError


@pytest.mark.parametrize(
    ("given", "shown"),
    [("a\nb", "a b"), ("a\x1b[2Jb", "a\\x1b[2Jb"), ("a\r\nb\u2028c", "a b c"), ("größer", "größer"), ("", "")],
    ids=ascii,
)
def test_a_message_is_one_line_without_what_terminals_obey(given: str, shown: str) -> None:
    assert str(InputError(given)) == shown


def test_an_error_of_a_worker_comes_back_as_it_was() -> None:
    error = pickle.loads(pickle.dumps(InputError("one\ntwo")))
    assert isinstance(error, DiffDeployError)
    assert str(error) == "one two"
