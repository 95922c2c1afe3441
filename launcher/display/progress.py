"""The one display of a run, on the driver's stderr: a live block on a terminal, plain lines elsewhere.

It shows what it is told and knows nothing of workers or stores. A stream that breaks (a closed pipe,
a terminal that is gone) silences it and never reaches the run. rich stays in this file.
"""

import atexit
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, TextIO

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from launcher.display.tables import duration, is_headline, number

Clock = Callable[[], float]

_LINE_INTERVAL_S = 5.0
_REFRESHES_PER_S = 5.0
_PACE_WINDOW_S = 60.0
_PACE_LEAST_S = 0.5
"""Reports come in batches: those of one batch, all of the same moment, tell nothing of the pace."""
_MAX_WIDTH, _MIN_BAR = 120, 10


class Progress(Protocol):
    """What the driver says to a person while a run goes on. May be called from one thread."""

    def message(self, text: str) -> None:
        """Says something that stays: resumed from step 400, stopping."""

    def warn(self, text: str) -> None:
        """Says something that went wrong and does not stop the run."""

    def phase(self, text: str) -> None:
        """Says what is done now, until the next phase or update: starting Ray, validating."""

    def update(
        self,
        *,
        epoch: int,
        epochs: int,
        step: int,
        total_steps: int,
        metrics: Mapping[str, float],
        images_per_second: float | None,
        workers: int,
    ) -> None:
        """Shows where training is; cheap enough for every step.

        Args:
            epoch: The epoch that the step belongs to, from 0; shown from 1.
            epochs: Epochs in all.
            step: Optimizer steps completed.
            total_steps: Optimizer steps at the end of the run.
            metrics: New values by name; one that is absent keeps its last value, ``lr/*`` is not shown.
            images_per_second: Throughput of all workers; none: not known yet.
            workers: Workers that train now.
        """

    def close(self) -> None:
        """Leaves the terminal as it was found. May be called twice."""


def open_progress(stream: TextIO | None = None, *, clock: Clock = time.monotonic) -> Progress:
    """Opens the display: live if the stream is a terminal that can move its cursor, else plain lines.

    Args:
        stream: Where to; by default stderr, since stdout belongs to ``--json``.
        clock: Seconds that only grow.
    """
    stream = sys.stderr if stream is None else stream
    if stream.isatty() and os.environ.get("TERM", "dumb") not in ("dumb", "unknown"):
        return _LiveProgress(stream, clock)
    return _LineProgress(stream, clock)


# What is shown ---------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class _Snapshot:
    """One moment of training."""

    epoch: int
    epochs: int
    step: int
    total_steps: int
    metrics: Mapping[str, float]
    images_per_second: float | None
    workers: int
    eta_s: float | None
    is_validation: bool
    """Whether it brings validation results that were not known before."""

    def place(self) -> str:
        return f"epoch {min(self.epoch + 1, self.epochs):,}/{self.epochs:,}"

    def steps(self) -> str:
        return f"step {self.step:,}/{self.total_steps:,}"

    def measures(self) -> list[str]:
        shown = [(name.removeprefix("train/"), value) for name, value in self.metrics.items() if is_headline(name)]
        shown.sort(key=lambda item: "/" in item[0])  # train before val, however they came
        rate = self.images_per_second
        return [f"{name} {number(value, digits=3)}" for name, value in shown] + ([f"{rate:,.0f} img/s"] if rate else [])

    def eta(self) -> list[str]:
        return [] if self.eta_s is None else [f"ETA {duration(self.eta_s)}"]


class _Pace:
    """Steps per second over the last minute, so that an estimate forgets a slow start and an old outage."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._marks: deque[tuple[float, int]] = deque()

    def eta_s(self, step: int, total_steps: int) -> float | None:
        """Seconds until the last step, now that ``step`` is done; none before there is anything to go by."""
        now, marks = self._clock(), self._marks
        if marks and step < marks[-1][1]:  # workers were lost, and steps are done again
            marks.clear()
        # A hundred marks are enough: thousands of steps a second need not all be remembered.
        if len(marks) > 1 and now - marks[-2][0] < _PACE_WINDOW_S / 100:
            marks.pop()
        marks.append((now, step))
        while len(marks) > 2 and marks[1][0] <= now - _PACE_WINDOW_S:
            marks.popleft()
        (begin, first), (end, last) = marks[0], marks[-1]
        if last == first or end - begin < _PACE_LEAST_S:
            return None
        return (total_steps - step) * (end - begin) / (last - first)


class _Base:
    """Makes snapshots of updates; a kind of display shows them."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._pace = _Pace(clock)
        self._metrics: dict[str, float] = {}

    def update(
        self,
        *,
        epoch: int,
        epochs: int,
        step: int,
        total_steps: int,
        metrics: Mapping[str, float],
        images_per_second: float | None,
        workers: int,
    ) -> None:
        before, self._metrics = self._metrics, {**self._metrics, **metrics}
        self._show(
            _Snapshot(
                epoch=epoch,
                epochs=epochs,
                step=step,
                total_steps=total_steps,
                metrics=self._metrics,
                images_per_second=images_per_second,
                workers=workers,
                eta_s=self._pace.eta_s(step, total_steps),
                # Compared as text, since a NaN differs from itself.
                is_validation=any(
                    str(value) != str(before.get(name)) for name, value in metrics.items() if name.startswith("val/")
                ),
            )
        )

    def _show(self, snapshot: _Snapshot) -> None:
        raise NotImplementedError


class _SafeStream:
    """A text stream that falls silent when it breaks, and writes what its encoding lacks as escapes."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._broken = False
        self.encoding = getattr(stream, "encoding", None) or "utf-8"

    def write(self, text: str) -> int:
        self._attempt(lambda: self._stream.write(text.encode(self.encoding, "backslashreplace").decode(self.encoding)))
        return len(text)

    def flush(self) -> None:
        self._attempt(self._stream.flush)

    def isatty(self) -> bool:
        return self._stream.isatty()

    def _attempt(self, action: Callable[[], object]) -> None:
        if self._broken:
            return
        try:
            action()
        except (OSError, ValueError):  # ValueError: the stream is closed
            self._broken = True


# Plain lines -----------------------------------------------------------------


class _LineProgress(_Base):
    """Lines for a file or a pipe: the first update, then one every few seconds, each epoch's end, each validation."""

    def __init__(self, stream: TextIO, clock: Clock) -> None:
        super().__init__(clock)
        self._stream = _SafeStream(stream)
        self._wrote_at = -float("inf")
        self._withheld: _Snapshot | None = None

    def message(self, text: str) -> None:
        self._write(text)

    def warn(self, text: str) -> None:
        self._write(f"warning: {text}")

    def phase(self, text: str) -> None:
        # Before training every phase is news; later "validating" and "saving" come and go with each epoch.
        if not self._metrics or self._is_due():
            self._write(text)

    def close(self) -> None:
        self._write_withheld()

    def _show(self, snapshot: _Snapshot) -> None:
        if self._withheld and self._withheld.epoch != snapshot.epoch:
            self._write_withheld()
        self._withheld = snapshot
        if snapshot.is_validation or self._is_due():
            self._write_withheld()

    def _is_due(self) -> bool:
        return self._clock() - self._wrote_at >= _LINE_INTERVAL_S

    def _write_withheld(self) -> None:
        if self._withheld:
            snapshot, self._withheld = self._withheld, None
            self._wrote_at = self._clock()
            self._write("  ".join([snapshot.place(), snapshot.steps(), *snapshot.measures(), *snapshot.eta()]))

    def _write(self, text: str) -> None:
        self._stream.write(text + "\n")
        self._stream.flush()


# Live ------------------------------------------------------------------------


class _LiveProgress(_Base):
    """A block of two lines at the foot of a terminal, redrawn by a thread of rich's a few times a second."""

    def __init__(self, stream: TextIO, clock: Clock) -> None:
        super().__init__(clock)
        self._phase: tuple[str, float] | None = None
        self._snapshot: _Snapshot | None = None
        safe: TextIO = _SafeStream(stream)  # type: ignore[assignment]
        # The stream is known to be a terminal; rich would let environment variables say otherwise.
        self._console = Console(file=safe, force_terminal=True, force_interactive=True)
        self._live = Live(
            self,
            console=self._console,
            refresh_per_second=_REFRESHES_PER_S,
            transient=True,
            redirect_stdout=False,  # --json owns it
            redirect_stderr=stream is sys.stderr,  # what libraries print there goes above the block
        )
        atexit.register(self.close)  # an exception nobody caught must not leave the cursor hidden
        self._live.start()

    def message(self, text: str) -> None:
        self._console.print(Text(text), soft_wrap=True)

    def warn(self, text: str) -> None:
        self._console.print(Text.assemble(("warning: ", "bold yellow"), text), soft_wrap=True)

    def phase(self, text: str) -> None:
        self._phase = (text, self._clock())

    def close(self) -> None:
        self._live.stop()
        atexit.unregister(self.close)

    def _show(self, snapshot: _Snapshot) -> None:
        self._snapshot = snapshot
        self._phase = None

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Called by rich's thread; each attribute is read once, and what it holds does not change."""
        snapshot, phase = self._snapshot, self._phase
        width = min(options.max_width, _MAX_WIDTH)
        if snapshot:
            yield _bar_line(snapshot, width)
        details = snapshot.measures() + [_workers(snapshot.workers)] if snapshot else []
        if phase:
            text, since = phase
            details = [f"{text}  {duration(self._clock() - since)}", *details]
        if details:
            yield Text(_fitting(details, width), no_wrap=True, overflow="ellipsis", style="" if phase else "dim")


def _bar_line(snapshot: _Snapshot, width: int) -> Table | Text:
    left, right = snapshot.place(), "  ".join([snapshot.steps(), *snapshot.eta()])
    bar_width = width - len(left) - len(right) - 4
    if bar_width < _MIN_BAR:
        return Text(_fitting([left, snapshot.steps(), *snapshot.eta()], width), no_wrap=True, overflow="ellipsis")
    line = Table.grid(padding=(0, 2, 0, 0))
    bar = ProgressBar(max(1, snapshot.total_steps), snapshot.step, width=bar_width, complete_style="green")
    line.add_row(Text(left, "bold"), bar, Text(right))
    return line


def _fitting(parts: list[str], width: int) -> str:
    """As many of the parts, from the first, as one line holds: what matters most comes first."""
    while len(parts) > 1 and len("  ".join(parts)) > width:
        parts = parts[:-1]
    return "  ".join(parts)


def _workers(count: int) -> str:
    return f"{count} worker{'s' * (count != 1)}"
