"""What goes on while a command works: one changing line on a terminal, lines in a log, nothing with ``--quiet``."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Event, Thread

from diffdeploy.cli import console

__all__ = ["Activity", "activity", "duration"]

# In a log, where CI ends jobs that say nothing for minutes.
HEARTBEAT_S = 10.0
# Steps of less time than this say little about the time of the rest.
_TELLING_S = 2.0


class Activity:
    """The stages of a command's work, and the steps of a stage; its methods are what the library calls back.

    Args:
        stage: the first stage, in a few words.
        show: takes the line that says what goes on now, whenever it changes.
        say: takes a line for each stage that ended.

    Attributes:
        began: when the stage began, by `time.monotonic`.
    """

    def __init__(self, stage: str, show: Callable[[str], None], say: Callable[[str], None]) -> None:
        self._show, self._say = show, say
        self._stage, self._step, self._left = stage, "", ""
        self.began = self._steps_began = time.monotonic()

    def phase(self, text: str) -> None:
        """Begin a stage, which ends the one before."""
        if text == self._stage:
            return
        self.end()
        self._stage = text
        self.began = self._steps_began = time.monotonic()
        self._show(text)

    def step(self, text: str, seconds_left: float | None = None) -> None:
        """Begin a step of the stage.

        Args:
            text: the step in a few words.
            seconds_left: seconds until all of the work is done, where that is known.
        """
        self._step = f" {text}" if text else ""
        self._left = "" if seconds_left is None else f", about {duration(seconds_left)} left"
        # The time first: a narrow terminal cuts the name of the step.
        between = ":" if self._left and self._step else ""
        self._show(self._stage + self._left + between + self._step)

    def progress(self, done: int, total: int, name: str) -> None:
        """Begin a step of the stage of which there are several that take about equally long.

        Args:
            done: number of steps done.
            total: number of all steps; where ``done`` has reached it, something uncounted follows.
            name: name of the step.
        """
        if done == 0:
            # What comes before the first one takes another time.
            self._steps_began = time.monotonic()
        taken = time.monotonic() - self._steps_began
        left = taken / done * (total - done) if 0 < done < total and taken > _TELLING_S else None
        self.step(f"{min(done + 1, total)}/{total} {name}", left)

    def end(self) -> None:
        """End the stage, if there is one, and say how long it took."""
        said = f"{self._stage}: {time.monotonic() - self.began:.1f} s" if self._stage else ""
        # First, since an interrupt may come while it is said.
        self.abandon()
        if said:
            self._say(said)

    def abandon(self) -> None:
        """Leave the stage, which was interrupted, without a word."""
        self._stage, self._step, self._left = "", "", ""

    def heartbeat(self) -> str:
        """A line for a log in which the stage has been silent for a while."""
        stage = self._stage or "working"
        return f"still {stage}{self._step} after {duration(time.monotonic() - self.began)}{self._left}"


def duration(seconds: float) -> str:
    """Seconds in words; never 0 s, since this is said while something is left to do."""
    minutes, rest = divmod(max(1, round(seconds)), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


@contextmanager
def activity(text: str, *, stages: bool = True) -> Iterator[Activity]:
    """Show on standard error what goes on while the block runs.

    A terminal has a spinner with one line that changes. A log gets a line for each stage that ended, with its seconds,
    and one every ten seconds that says what takes so long. A stage that an error ends has no line but the error's.

    Args:
        text: the first stage.
        stages: whether a log gets lines of stages; otherwise only of what takes long.
    """
    if console.is_quiet():
        yield Activity(text, _ignore, _ignore)
    elif (stderr := console.standard_error()).is_terminal:
        # With a spinner before it, and without a second line, which would jump.
        room = stderr.width - 3

        def line(said: str) -> str:
            return console.cell(said if len(said) <= room else said[: room - 1] + "…")

        with stderr.status(line(text)) as status:
            yield Activity(text, lambda said: status.update(line(said)), _ignore)
    else:
        doing = Activity(text, _ignore, console.note if stages else _ignore)
        with _heartbeats(doing):
            yield doing
        doing.end()


def _ignore(_: str) -> None:
    pass


@contextmanager
def _heartbeats(doing: Activity) -> Iterator[None]:
    ended = Event()

    def beat() -> None:
        last = 0.0
        while not ended.wait(max(0.0, max(last, doing.began) + HEARTBEAT_S - time.monotonic())):
            # Another stage may have begun meanwhile, which said so.
            if time.monotonic() >= max(last, doing.began) + HEARTBEAT_S:
                console.note(doing.heartbeat())
                last = time.monotonic()

    thread = Thread(target=beat, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
