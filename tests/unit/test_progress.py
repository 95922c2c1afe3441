"""The progress display: what reaches a terminal (a real pty, read by a small terminal of ours) and what a file."""

import contextlib
import io
import math
import os
import pty
import re
import select
import sys
import termios
import threading
from collections.abc import Iterator
from typing import Any, TextIO

import pytest

import launcher.display.progress
from launcher.display.progress import Progress, open_progress


class Clock:
    """A clock that moves when told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def update(display: Progress, step: int, **changes: Any) -> None:
    """A step of a run of 10 epochs of 22 steps."""
    values: dict[str, Any] = {
        "epoch": (step - 1) // 22,
        "epochs": 10,
        "step": step,
        "total_steps": 220,
        "metrics": {"train/loss": 0.412, "train/accuracy": 0.903, "lr/0": 0.05},
        "images_per_second": 1240.3,
        "workers": 2,
    }
    display.update(**(values | changes))


class TestLines:
    """Not a terminal: plain lines."""

    @pytest.fixture
    def clock(self) -> Clock:
        return Clock()

    @pytest.fixture
    def stream(self) -> io.StringIO:
        return io.StringIO()

    @pytest.fixture
    def display(self, stream: io.StringIO, clock: Clock) -> Progress:
        return open_progress(stream, clock=clock)

    def test_a_line_holds_all(self, display: Progress, stream: io.StringIO, clock: Clock) -> None:
        update(display, 1)
        clock.now = 6.5
        update(display, 66, metrics={"val/loss": 0.31, "val/accuracy": 0.94})
        assert stream.getvalue().splitlines() == [
            "epoch 1/10  step 1/220  loss 0.412  accuracy 0.903  1,240 img/s",
            "epoch 3/10  step 66/220  loss 0.412  accuracy 0.903  val/loss 0.310  val/accuracy 0.940  1,240 img/s"
            "  ETA 0:00:16",
        ]

    def test_lines_are_throttled(self, display: Progress, stream: io.StringIO, clock: Clock) -> None:
        for step in range(1, 22):
            clock.now = step * 0.6
            update(display, step)
        assert re.findall(r"step (\d+)/", stream.getvalue()) == ["1", "10", "19"]

    def test_an_epoch_ends_with_a_line(self, display: Progress, stream: io.StringIO) -> None:
        for step in range(1, 68):
            update(display, step)
        display.close()
        display.close()
        assert re.findall(r"step (\d+)/", stream.getvalue()) == ["1", "22", "44", "66", "67"]

    def test_validation_is_shown_once(self, display: Progress, stream: io.StringIO) -> None:
        update(display, 1)
        for step in (10, 11, 12):
            update(display, step, metrics={"train/loss": 1.0, "val/loss": math.nan})
        update(display, 13, metrics={"val/loss": 0.5})
        assert re.findall(r"step (\d+)/", stream.getvalue()) == ["1", "10", "13"]

    def test_phases_are_lines_until_training(self, display: Progress, stream: io.StringIO, clock: Clock) -> None:
        display.phase("starting Ray")
        display.phase("waiting for workers")
        update(display, 1)
        display.phase("saving")
        clock.now = 6.0
        display.phase("validating")
        assert [line for line in stream.getvalue().splitlines() if "step" not in line] == [
            "starting Ray",
            "waiting for workers",
            "validating",
        ]

    def test_messages_are_never_withheld(self, display: Progress, stream: io.StringIO) -> None:
        update(display, 1)
        display.message("resumed from step 400")
        display.warn("worker 1 is lost")
        assert stream.getvalue().splitlines()[1:] == ["resumed from step 400", "warning: worker 1 is lost"]

    def test_work_is_counted(self, display: Progress, stream: io.StringIO, clock: Clock) -> None:
        display.phase("building data.train")
        for done in range(600, 1600, 100):  # the first 600 were done before
            display.count("verifying", done, 1500, "images")
            clock.now += 1
        display.close()
        assert stream.getvalue().splitlines() == [
            "building data.train",
            "verifying  600/1,500 images",
            "verifying  1,100/1,500 images  100 images/s  ETA 0:00:04",
            "verifying  1,500/1,500 images  100 images/s",
        ]

    def test_eta_forgets_what_is_long_past(self, display: Progress, stream: io.StringIO, clock: Clock) -> None:
        for step in range(1, 11):  # 50 s a step at first
            clock.now += 50
            update(display, step, total_steps=520)
        for step in range(11, 322):  # then 1 s a step
            clock.now += 1
            update(display, step, total_steps=520)
        assert "step 10/520" in stream.getvalue()
        assert "ETA 7:05:00" in stream.getvalue().splitlines()[9]
        clock.now += 1
        update(display, 322, total_steps=520, metrics={"val/loss": 1.0})
        assert "ETA 0:03:18" in stream.getvalue().splitlines()[-1]

    def test_eta_starts_anew_when_steps_are_done_again(
        self, display: Progress, stream: io.StringIO, clock: Clock
    ) -> None:
        for step in (10, 20, 15):
            clock.now += 10
            update(display, step)
        clock.now += 0.01
        update(display, 22, metrics={"val/loss": 1.0})  # reports come in batches
        first, second, *replayed = stream.getvalue().splitlines()
        assert "ETA" not in first
        assert "ETA 0:03:20" in second
        assert len(replayed) == 2
        assert not any("ETA" in line for line in replayed)

    def test_nothing_is_cut_off_or_drawn_for_a_narrow_file(
        self, stream: io.StringIO, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name, value in {"COLUMNS": "40", "FORCE_COLOR": "1", "TTY_COMPATIBLE": "1", "TTY_INTERACTIVE": "1"}.items():
            monkeypatch.setenv(name, value)
        url = f"s3://bucket/{'folder/' * 10}run [bold]"
        with contextlib.closing(open_progress(stream)) as display:
            display.phase(f"reading {url}")
            update(display, 1, metrics={"val/accuracy": 0.94})
            display.warn(f"{url} is away")
        assert stream.getvalue().splitlines() == [
            f"reading {url}",
            "epoch 1/10  step 1/220  val/accuracy 0.940  1,240 img/s",
            f"warning: {url} is away",
        ]

    @pytest.mark.parametrize("failure", [BrokenPipeError(), OSError(5, "the terminal is gone"), ValueError("closed")])
    def test_a_broken_stream_does_not_reach_the_run(self, failure: Exception) -> None:
        class Broken(io.StringIO):
            writes = 0

            def write(self, text: str) -> int:  # noqa: ARG002
                self.writes += 1
                raise failure

        broken = Broken()
        display = open_progress(broken)
        for step in range(1, 100):
            update(display, step)
        display.warn("worker 1 is lost")
        display.close()
        assert broken.writes == 1

    def test_what_an_encoding_lacks_is_escaped(self) -> None:
        raw = io.BytesIO()
        stderr = io.TextIOWrapper(raw, encoding="ascii", errors=sys.__stderr__.errors, write_through=True)
        display = open_progress(stderr)
        display.message("läuft ✓")
        assert raw.getvalue() == b"l\\xe4uft \\u2713\n"

    def test_a_dumb_terminal_gets_lines(self, monkeypatch: pytest.MonkeyPatch) -> None:
        class Terminal(io.StringIO):
            def isatty(self) -> bool:
                return True

        monkeypatch.setenv("TERM", "dumb")
        terminal = Terminal()
        with contextlib.closing(open_progress(terminal)) as display:
            update(display, 1)
        assert "\x1b" not in terminal.getvalue()
        assert "step 1/220" in terminal.getvalue()

    def test_stderr_is_looked_up_when_opened(self, capsys: pytest.CaptureFixture[str]) -> None:
        open_progress().message("hello")
        assert capsys.readouterr() == ("", "hello\n")


class Terminal:
    """A pty whose other end is read all the time, since a writer waits once some KiB lie unread."""

    def __init__(self) -> None:
        self._reading_end, writing_end = pty.openpty()
        self.stream: TextIO = open(writing_end, "w", encoding="utf-8")  # noqa: SIM115
        self._received = bytearray()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        with contextlib.suppress(OSError):  # Linux reports the closed end as EIO
            while chunk := os.read(self._reading_end, 65536):
                self._received += chunk

    def hang_up(self) -> str:
        """Closes it; returns everything that was written."""
        self.stream.close()
        self._reader.join()
        os.close(self._reading_end)
        return self._received.decode()


def screen_after(output: str) -> list[str]:
    """What a person sees: plays text, line ends, cursor up and erase; fails on what it does not know."""
    lines, row, column = [""], 0, 0
    for token in re.findall(r"\x1b\[\??[\d;]*[A-Za-z]|[^\x1b]", output):
        if token == "\r":
            column = 0
        elif token == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif token == "\x1b[2K":
            lines[row] = ""
        elif up := re.fullmatch(r"\x1b\[(\d+)A", token):
            row -= int(up[1])
        elif token.startswith("\x1b"):
            assert token[-1] == "m" or token in ("\x1b[?25l", "\x1b[?25h"), repr(token)
        else:
            lines[row] = lines[row][:column].ljust(column) + token + lines[row][column + 1 :]
            column += 1
    return [line.rstrip() for line in lines[: row + 1]]


class TestLive:
    """A terminal: a block that is redrawn, and gone at the end."""

    @pytest.fixture
    def terminal(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[Terminal]:
        monkeypatch.setenv("TERM", "xterm-256color")
        monkeypatch.setenv("COLUMNS", "100")
        # Only the drawing that closing makes, so that no test depends on when a thread wakes.
        monkeypatch.setattr(launcher.display.progress, "_REFRESHES_PER_S", 0.001)
        terminal = Terminal()
        yield terminal
        if not terminal.stream.closed:
            terminal.hang_up()

    def test_block_and_clean_end(self, terminal: Terminal) -> None:
        display = open_progress(terminal.stream, clock=Clock())
        display.phase("starting Ray")
        display.message("plan: 220 steps")
        update(display, 66)
        display.warn("worker 1 is lost: [killed] by SIGKILL")
        display.close()
        display.close()
        output = terminal.hang_up()

        assert "starting Ray  0:00:00" in output
        assert "━" in output
        drawn = re.sub(r"\x1b\[[\d;]*m", "", output)
        assert re.search(r"epoch 3/10 [━╸╺]+ +step 66/220", drawn)
        assert "loss 0.412  accuracy 0.903  1,240 img/s  2 workers" in drawn
        assert screen_after(output) == ["plan: 220 steps", "warning: worker 1 is lost: [killed] by SIGKILL", ""]
        assert output.rindex("\x1b[?25h") > output.rindex("\x1b[?25l")  # the cursor is back

    def test_block_is_whole_while_it_lives(self, terminal: Terminal) -> None:
        clock = Clock()
        display = open_progress(terminal.stream, clock=clock)
        update(display, 60)
        clock.now = 12.0
        update(display, 66, metrics={"val/loss": 0.31})
        display.phase("validating")
        clock.now = 15.0
        display.message("checkpoint at step 66")  # printing redraws the block below
        terminal.stream.flush()
        # What stands before closing is what the last drawing but one shows.
        display.close()
        output = terminal.hang_up()
        before_close = output[: output.rindex("\x1b[?25h")].removesuffix("\r\n")
        message, bar, details = [line for line in screen_after(before_close) if line]
        assert message == "checkpoint at step 66"
        assert re.fullmatch(r"epoch 3/10 [━╸╺]+ +step 66/220  ETA 0:05:08", bar)
        assert len(bar) <= 100
        assert details == "validating  0:00:03  loss 0.412  accuracy 0.903  val/loss 0.310  1,240 img/s  2 workers"

    @pytest.mark.parametrize("columns", [1, 12, 20, 30, 40, 60, 300])
    def test_any_width(self, terminal: Terminal, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("COLUMNS", str(columns))
        with contextlib.closing(open_progress(terminal.stream)) as display:
            update(display, 66, metrics={"train/loss": 0.4, "val/loss": 0.3})
            display.phase("validating")
        output = terminal.hang_up()
        block = screen_after(output[: output.rindex("\x1b[?25h")])
        assert all(len(line) <= columns for line in block)
        assert "".join("".join(block).split()).endswith("validating0:00:00loss0.400val/loss0.3001,240img/s2workers")
        assert screen_after(output) == [""]
        assert "…" not in output or columns < 40

    def test_clean_after_an_exception(self, terminal: Terminal) -> None:
        def fail() -> None:
            with contextlib.closing(open_progress(terminal.stream)) as display:
                update(display, 1)
                raise RuntimeError("a worker is lost")

        with pytest.raises(RuntimeError):
            fail()
        assert screen_after(terminal.hang_up()) == [""]

    def test_clean_when_nobody_closes(self, terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
        at_exit: list[Any] = []
        monkeypatch.setattr(launcher.display.progress.atexit, "register", at_exit.append)
        update(open_progress(terminal.stream), 1)
        [close] = at_exit
        close()
        output = terminal.hang_up()
        assert screen_after(output) == [""]
        assert output.rindex("\x1b[?25h") > output.rindex("\x1b[?25l")

    def test_stdout_is_left_alone_and_stderr_goes_above(
        self, terminal: Terminal, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        stdout = io.StringIO()
        monkeypatch.setattr(sys, "stdout", stdout)
        monkeypatch.setattr(sys, "stderr", terminal.stream)
        with contextlib.closing(open_progress()) as display:
            update(display, 1)
            display.message("training")  # draws the block, which the warning must not run into
            print("{}")
            print("a library warns", file=sys.stderr)
        assert stdout.getvalue() == "{}\n"
        assert sys.stderr is terminal.stream
        assert screen_after(terminal.hang_up()) == ["training", "a library warns", ""]

    def test_a_thread_redraws(self, terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(launcher.display.progress, "_REFRESHES_PER_S", 1000.0)
        drawn = threading.Event()

        def clock() -> float:
            if threading.current_thread() is not threading.main_thread():
                drawn.set()
            return 0.0

        with contextlib.closing(open_progress(terminal.stream, clock=clock)) as display:
            display.phase("starting Ray")
            assert drawn.wait(timeout=10)

    def test_a_terminal_that_stands_still_holds_up_no_step(
        self, terminal: Terminal, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(launcher.display.progress, "_REFRESHES_PER_S", 1000.0)
        drawn = threading.Event()

        def clock() -> float:
            if threading.current_thread() is not threading.main_thread():
                drawn.set()
            return 0.0

        with contextlib.closing(open_progress(terminal.stream, clock=clock)) as display:
            termios.tcflow(terminal.stream, termios.TCOOFF)  # as Ctrl-S does
            display.phase("starting Ray")
            try:
                assert drawn.wait(timeout=10)
                for step in (1, 2, 1):
                    update(display, step)
                    display.phase("validating")
                assert select.select([], [terminal.stream], [], 0)[1] == []
            finally:
                termios.tcflow(terminal.stream, termios.TCOON)  # or closing would wait, too
        assert screen_after(terminal.hang_up()) == [""]

    def test_a_terminal_that_goes_away_does_not_reach_the_run(self, terminal: Terminal) -> None:
        display = open_progress(terminal.stream)
        terminal.hang_up()
        update(display, 1)
        display.warn("worker 1 is lost")
        display.close()
