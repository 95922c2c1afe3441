"""The progress display of a run on the driver's stderr: a live block on a terminal, plain lines elsewhere.

It knows nothing of workers or stores. A broken stream, such as a closed pipe, silences the display and never reaches
the run. rich is imported in this file only.
"""

import atexit
import math
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, TextIO

import rich.progress
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, TextColumn
from rich.text import Text

from launcher.display.tables import duration, is_headline, number

Clock = Callable[[], float]

_LINE_INTERVAL_S = 5.0
_REFRESHES_PER_S = 5.0
_PACE_WINDOW_S = 300.0
"""The ETA is estimated from the steps of this window, so that a slow start or an old outage does not count."""
_PACE_INTERVAL_S = 0.5
"""Updates arrive in batches; those within this interval count as one for the ETA."""


def open_progress(stream: TextIO | None = None, *, clock: Clock = time.monotonic) -> "Progress":
    """Open the display: live if the stream is a terminal that can move its cursor, else plain lines.

    Args:
        stream: The output; by default stderr, since stdout belongs to ``--json``.
        clock: Monotonic seconds.
    """
    return Progress(sys.stderr if stream is None else stream, clock)


class Progress:
    """Shows messages and progress while a run goes on.

    Thread: all methods are called from one thread; rich renders in a thread of its own.
    """

    def __init__(self, stream: TextIO, clock: Clock) -> None:
        self._clock = clock
        self._console = _SafeConsole(stream)
        self._metrics: dict[str, float] = {}
        self._details: list[str] = []
        self._phase: tuple[str, float] | None = None
        self._epoch: int | None = None
        self._withheld = ""
        self._counted_at = self._wrote_at = -math.inf
        self._steps = rich.progress.Progress(
            TextColumn("{task.description}", style="bold"),
            BarColumn(complete_style="green"),
            TextColumn("{task.fields[steps]}"),
            get_time=clock,
            speed_estimate_period=_PACE_WINDOW_S,
        )
        self._live = Live(
            self,
            console=self._console,
            refresh_per_second=_REFRESHES_PER_S,
            transient=True,
            redirect_stdout=False,  # stdout belongs to --json
            redirect_stderr=stream is sys.stderr,  # print the output of libraries above the live block
        )
        self._is_live = self._console.is_terminal and self._console.is_interactive
        if self._is_live:
            atexit.register(self.close)  # an uncaught exception must not leave the cursor hidden
            self._live.start()

    def message(self, text: str) -> None:
        """Print a line that stays, such as "resumed from step 400"."""
        self._console.print(text, soft_wrap=True)

    def warn(self, text: str) -> None:
        """Print a warning that stays."""
        self._console.print(Text.assemble(("warning: ", "bold yellow"), text), soft_wrap=True)

    def phase(self, text: str) -> None:
        """Show the current activity, such as "starting Ray", until the next phase or update."""
        self._phase = (text, self._clock())
        # Off a terminal, print every phase before training; later, "validating" and "saving" would repeat every epoch.
        if not self._is_live and (not self._metrics or self._is_due()):
            self.message(text)

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
        """Show the progress of training; cheap enough for every step.

        Args:
            epoch: The epoch that the step belongs to, from 0; shown from 1.
            epochs: Epochs of the whole run.
            step: Optimizer steps completed.
            total_steps: Optimizer steps at the end of the run.
            metrics: New values by name; an absent metric keeps its last value; ``lr/*`` is not shown.
            images_per_second: Throughput of all workers together; None: not known yet.
            workers: The number of workers that train now.
        """
        # Compare as text, since NaN != NaN.
        is_validation = any(
            str(value) != str(self._metrics.get(name)) for name, value in metrics.items() if name.startswith("val/")
        )
        self._metrics |= metrics
        place, steps = f"epoch {min(epoch + 1, epochs):,}/{epochs:,}", f"step {step:,}/{total_steps:,}"
        left_s = self._seconds_left(step, total_steps)
        eta = [] if left_s is None else [f"ETA {duration(left_s)}"]
        rate = [f"{images_per_second:,.0f} img/s"] if images_per_second else []
        measures = [*_measures(self._metrics), *rate]
        self._steps.update(self._steps.task_ids[0], description=place, steps="  ".join([steps, *eta]))
        self._details, self._phase = [*measures, f"{workers} worker{'s' * (workers != 1)}"], None
        if epoch != self._epoch:
            self._write_withheld()
        self._epoch, self._withheld = epoch, "  ".join([place, steps, *measures, *eta])
        if is_validation or self._is_due():
            self._write_withheld()

    def count(self, what: str, done: int, total: int, unit: str) -> None:
        """Show how much of some work is done, its rate and the time left; cheap enough for each of its parts.

        Args:
            what: The work, such as "verifying".
            done: How much of it is done.
            total: How much there is.
            unit: What is counted, such as "images".
        """
        left_s = self._seconds_left(done, total)
        speed = self._steps.tasks[0].speed
        counted = f"{done:,}/{total:,} {unit}"
        pace = [f"{speed:,.0f} {unit}/s"] if speed else []
        if left_s is not None and done < total:
            pace.append(f"ETA {duration(left_s)}")
        self._steps.update(self._steps.task_ids[0], description=what, steps="  ".join([counted, *pace]))
        self._details, self._phase = [], None
        self._withheld = "  ".join([what, counted, *pace])
        if self._is_due():
            self._write_withheld()

    def close(self) -> None:
        """Restore the terminal. May be called twice."""
        self._write_withheld()
        self._live.stop()
        atexit.unregister(self.close)

    def _seconds_left(self, step: int, total_steps: int) -> float | None:
        """Return the estimated seconds until the last step, with ``step`` completed; None: no estimate yet."""
        if not self._steps.tasks:
            self._steps.add_task("", steps="")
        [task] = self._steps.tasks
        if step < task.completed:  # workers were lost, and steps are repeated
            self._steps.reset(task.id, completed=step)
        elif self._clock() - self._counted_at >= _PACE_INTERVAL_S:
            self._counted_at = self._clock()
            self._steps.update(task.id, completed=step, total=total_steps)
        return task.time_remaining

    def _is_due(self) -> bool:
        return self._clock() - self._wrote_at >= _LINE_INTERVAL_S

    def _write_withheld(self) -> None:
        """Off a terminal, print the newest update that was not printed yet.

        ``update`` and ``close`` call it for the first update, every few seconds, at the end of each epoch and after
        each validation.
        """
        if self._withheld and not self._is_live:
            self.message(self._withheld)
            self._withheld, self._wrote_at = "", self._clock()

    def __rich__(self) -> Group:
        """Return what rich draws.

        Thread: rich's. Each attribute is read once, and the objects in them are never modified.
        """
        details, phase = self._details, self._phase
        if phase:
            text, since = phase
            details = [f"{text}  {duration(self._clock() - since)}", *details]
        return Group(self._steps, Text("  ".join(details), style="" if phase else "dim"))


def _measures(metrics: Mapping[str, float]) -> list[str]:
    shown = [(name.removeprefix("train/"), value) for name, value in metrics.items() if is_headline(name)]
    shown.sort(key=lambda item: "/" in item[0])  # train, whose prefix was removed, before val
    return [f"{name} {number(value, digits=3)}" for name, value in shown]


class _SafeConsole(Console):
    """A console that falls silent when its stream breaks; rich's own raises, or ends the process."""

    def __init__(self, stream: TextIO) -> None:
        # Only the stream decides whether it is a terminal; rich would look at environment variables first.
        super().__init__(file=stream, force_terminal=stream.isatty(), markup=False, emoji=False, highlight=False)

    def __exit__(self, *raised: Any) -> None:
        """Write what was printed."""
        try:
            super().__exit__(*raised)
        except (OSError, ValueError):  # ValueError: the stream is closed
            self.quiet = True

    def on_broken_pipe(self) -> None:
        self.quiet = True
