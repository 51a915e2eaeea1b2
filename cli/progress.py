"""Progress of a command: one changing line on a terminal, lines in a log, nothing with ``--quiet``."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Event, Thread

from diffdeploy.cli import console

__all__ = ["Activity", "activity", "duration"]

# Seconds between lines in a log, since CI ends jobs that print nothing for minutes.
HEARTBEAT_S = 10.0
# Below this time, finished steps say little about the remaining time.
_TELLING_S = 2.0


class Activity:
    """The stages of a command's work, and the steps of a stage; its methods are the library's callbacks.

    Args:
        stage: the first stage, in a few words.
        show: callback that receives the current line whenever it changes.
        say: callback that receives a line for each finished stage.

    Attributes:
        began: start of the stage, from `time.monotonic`.
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
            seconds_left: seconds until all of the work is done, if that is known.
        """
        self._step = f" {text}" if text else ""
        self._left = "" if seconds_left is None else f", about {duration(seconds_left)} left"
        # The time comes first, since a narrow terminal cuts off the name of the step.
        between = ":" if self._left and self._step else ""
        self._show(self._stage + self._left + between + self._step)

    def progress(self, done: int, total: int, name: str) -> None:
        """Begin the next step of a stage whose steps all take about the same time.

        Args:
            done: number of steps done.
            total: number of all steps; if ``done`` equals it, the work that follows is not counted in steps.
            name: name of the step.
        """
        if done == 0:
            # The time before the first step is not typical of the steps.
            self._steps_began = time.monotonic()
        taken = time.monotonic() - self._steps_began
        left = taken / done * (total - done) if 0 < done < total and taken > _TELLING_S else None
        self.step(f"{min(done + 1, total)}/{total} {name}", left)

    def end(self) -> None:
        """End the stage, if there is one, and report how long it took."""
        said = f"{self._stage}: {time.monotonic() - self.began:.1f} s" if self._stage else ""
        # Reset first, since an interrupt may arrive while the line is printed.
        self.abandon()
        if said:
            self._say(said)

    def abandon(self) -> None:
        """End the interrupted stage without printing a line."""
        self._stage, self._step, self._left = "", "", ""

    def heartbeat(self) -> str:
        """Line for a log after the stage has printed nothing for a while."""
        stage = self._stage or "working"
        return f"still {stage}{self._step} after {duration(time.monotonic() - self.began)}{self._left}"


def duration(seconds: float) -> str:
    """Format a duration; never 0 s, since it is shown while work remains."""
    minutes, rest = divmod(max(1, round(seconds)), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


@contextmanager
def activity(text: str, *, stages: bool = True) -> Iterator[Activity]:
    """Show progress on standard error while the ``with`` block runs.

    A terminal shows a spinner and one changing line. A log gets a line with the duration of each finished
    stage, and one every ten seconds that names the current step. A stage that fails prints only the error.

    Args:
        text: the first stage.
        stages: true to log every finished stage; otherwise, only the lines every ten seconds are logged.
    """
    if console.is_quiet():
        yield Activity(text, _ignore, _ignore)
    elif (stderr := console.standard_error()).is_terminal:
        # Leaves room for the spinner, and fits on one line, since a second one would make the display jump.
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
            # Another stage may have begun meanwhile and printed a line.
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
