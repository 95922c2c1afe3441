"""The one display of a run, on the driver's stderr: a live block on a terminal, plain lines elsewhere.

It shows what it is told and knows nothing of workers or stores. A stream that breaks (a closed pipe,
a terminal that is gone) silences it and never reaches the run. rich stays in this file.
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
"""The time left is estimated from the steps of this window, so that it forgets a slow start and an old outage."""
_PACE_INTERVAL_S = 0.5
"""Reports come in batches: the steps of one, all of the same moment, count as one for the estimate."""


def open_progress(stream: TextIO | None = None, *, clock: Clock = time.monotonic) -> "Progress":
    """Opens the display: live if the stream is a terminal that can move its cursor, else plain lines.

    Args:
        stream: Where to; by default stderr, since stdout belongs to ``--json``.
        clock: Seconds that only grow.
    """
    return Progress(sys.stderr if stream is None else stream, clock)


class Progress:
    """What the driver says to a person while a run goes on. May be called from one thread."""

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
            redirect_stdout=False,  # --json owns it
            redirect_stderr=stream is sys.stderr,  # what libraries print there goes above the block
        )
        self._is_live = self._console.is_terminal and self._console.is_interactive
        if self._is_live:
            atexit.register(self.close)  # an exception nobody caught must not leave the cursor hidden
            self._live.start()

    def message(self, text: str) -> None:
        """Says something that stays: resumed from step 400, stopping."""
        self._console.print(text, soft_wrap=True)

    def warn(self, text: str) -> None:
        """Says something that went wrong and does not stop the run."""
        self._console.print(Text.assemble(("warning: ", "bold yellow"), text), soft_wrap=True)

    def phase(self, text: str) -> None:
        """Says what is done now, until the next phase or update: starting Ray, validating."""
        self._phase = (text, self._clock())
        # Before training every phase is news; later "validating" and "saving" come and go with each epoch.
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
        # Compared as text, since a NaN differs from itself.
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

    def close(self) -> None:
        """Leaves the terminal as it was found. May be called twice."""
        self._write_withheld()
        self._live.stop()
        atexit.unregister(self.close)

    def _seconds_left(self, step: int, total_steps: int) -> float | None:
        """Until the last step, now that ``step`` is done; none before there is anything to go by."""
        if not self._steps.tasks:
            self._steps.add_task("", steps="")
        [task] = self._steps.tasks
        if step < task.completed:  # workers were lost, and steps are done again
            self._steps.reset(task.id, completed=step)
        elif self._clock() - self._counted_at >= _PACE_INTERVAL_S:
            self._counted_at = self._clock()
            self._steps.update(task.id, completed=step, total=total_steps)
        return task.time_remaining

    def _is_due(self) -> bool:
        return self._clock() - self._wrote_at >= _LINE_INTERVAL_S

    def _write_withheld(self) -> None:
        """Off a terminal: the first update, then one every few seconds, each epoch's end and each validation."""
        if self._withheld and not self._is_live:
            self.message(self._withheld)
            self._withheld, self._wrote_at = "", self._clock()

    def __rich__(self) -> Group:
        """Called by rich's thread; each attribute is read once, and what it holds does not change."""
        details, phase = self._details, self._phase
        if phase:
            text, since = phase
            details = [f"{text}  {duration(self._clock() - since)}", *details]
        return Group(self._steps, Text("  ".join(details), style="" if phase else "dim"))


def _measures(metrics: Mapping[str, float]) -> list[str]:
    shown = [(name.removeprefix("train/"), value) for name, value in metrics.items() if is_headline(name)]
    shown.sort(key=lambda item: "/" in item[0])  # train before val, however they came
    return [f"{name} {number(value, digits=3)}" for name, value in shown]


class _SafeConsole(Console):
    """Falls silent when its stream breaks: rich's would end the process, or raise."""

    def __init__(self, stream: TextIO) -> None:
        # The stream tells whether it is a terminal; rich alone would ask environment variables first.
        super().__init__(file=stream, force_terminal=stream.isatty(), markup=False, emoji=False, highlight=False)

    def __exit__(self, *raised: Any) -> None:
        """Writes what was printed."""
        try:
            super().__exit__(*raised)
        except (OSError, ValueError):  # ValueError: the stream is closed
            self.quiet = True

    def on_broken_pipe(self) -> None:
        self.quiet = True
