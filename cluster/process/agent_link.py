"""The training process's connection to its agent: reports and heartbeats out, orders in, without blocking a step.

Reports leave in batches a few times a second, so that a run of short steps does not spend its time on messages. They
arrive complete and in order. Heartbeats travel in the same batches and stay with the agent.
"""

import math
import os
import queue
import threading
import time
from multiprocessing.connection import Connection

from cluster.process.activity import Activity
from cluster.process.messages import Beat, Report
from cluster.process.orders import Meet, Order, Stop

_BATCH_INTERVAL_S = 0.2
_BEAT_INTERVAL_S = 1.0


class AgentLink:
    """Sends reports to the driver, receives its orders, and sends heartbeats made from ``activity``.

    The process ends at once when its agent is gone: nobody would receive its reports.
    """

    def __init__(self, connection: Connection, activity: Activity) -> None:
        self.stop_wanted = threading.Event()
        self.activity = activity
        self._connection = connection
        self._outbox: queue.SimpleQueue[Report] = queue.SimpleQueue()
        self._meeting_place: queue.SimpleQueue[Meet] = queue.SimpleQueue()
        self._closing = threading.Event()
        self._sender = threading.Thread(target=self._send_batches, name="link-send", daemon=True)
        self._sender.start()
        threading.Thread(target=self._receive, name="link-receive", daemon=True).start()

    def send(self, report: Report) -> None:
        """Queue a report for the driver and return at once.

        Thread: any.
        """
        self._outbox.put(report)

    def wait_for_meeting_place(self, timeout_s: float) -> Meet:
        """Wait for the address at which rank 0 opened the store of the process group, and return it.

        Raises:
            TimeoutError: Rank 0 announced none in time.
        """
        try:
            return self._meeting_place.get(timeout=timeout_s)
        except queue.Empty:
            raise TimeoutError(f"worker 0 announced no meeting place within {timeout_s:.0f} s") from None

    def close(self) -> None:
        """Send what is queued, and return once the pipe has taken it."""
        self._closing.set()
        self._sender.join()

    def _send_batches(self) -> None:
        beat_at, was_first_step = -math.inf, True
        while True:
            is_last = self._closing.wait(_BATCH_INTERVAL_S)
            batch: list[Beat | Report] = []
            now, beat = time.monotonic(), self.activity.beat()
            # A heartbeat leaves at once after the first step: from then on the shorter time limit for hangs applies.
            if now - beat_at >= _BEAT_INTERVAL_S or beat.is_first_step != was_first_step:
                beat_at, was_first_step = now, beat.is_first_step
                batch.append(beat)
            while not self._outbox.empty():
                batch.append(self._outbox.get())
            if batch:
                try:
                    self._connection.send(batch)
                except OSError:
                    os._exit(1)
            if is_last:
                return

    def _receive(self) -> None:
        while True:
            try:
                order: Order = self._connection.recv()
            except (EOFError, OSError):
                os._exit(1)
            match order:
                case Stop():
                    self.stop_wanted.set()
                case Meet():
                    self._meeting_place.put(order)
