"""Settings of the whole process are restored, also when several threads change them at once."""

import threading
import warnings
from types import SimpleNamespace

import pytest

from diffdeploy.exclusive import replaced, without_warnings


def test_overlapping_changes_leave_the_first_value_behind() -> None:
    """Without the lock the second thread would save the first one's value, and restore it after the first had gone."""
    owner = SimpleNamespace(value="original")
    inside, release = threading.Event(), threading.Event()
    seen: list[str] = []

    def first() -> None:
        with replaced(owner, "value", "first"):
            inside.set()
            release.wait(5)
            seen.append(owner.value)

    def second() -> None:
        inside.wait(5)
        with replaced(owner, "value", "second"):
            seen.append(owner.value)

    threads = [threading.Thread(target=work) for work in (first, second)]
    for thread in threads:
        thread.start()
    inside.wait(5)
    threads[1].join(0.05)  # time to get in, if nothing held it back
    release.set()
    for thread in threads:
        thread.join(5)
    assert seen == ["first", "second"]
    assert owner.value == "original"


def test_a_setting_is_restored_after_an_error() -> None:
    owner = SimpleNamespace(value="original")

    def fail() -> None:
        with replaced(owner, "value", "changed"):
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        fail()
    assert owner.value == "original"


def test_warnings_are_hidden_in_the_block_only() -> None:
    with without_warnings():
        warnings.warn("hidden", UserWarning, stacklevel=1)
    with pytest.warns(UserWarning, match="shown"):
        warnings.warn("shown", UserWarning, stacklevel=1)
