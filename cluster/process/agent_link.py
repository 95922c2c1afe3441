"""The training process's end of the wire to its agent: small messages out, orders in, nobody waits.

Messages leave in batches, a few times a second, so that a run of short steps does not spend them on messages; they
arrive complete and in order. Among them are beats, for the agent alone.
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
    """Sends messages to the driver and hears its orders; its beats tell of ``activity``.

    The process ends at once when its agent is gone: nobody would hear of what it does.
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
        """Queues a report for the driver; returns at once.

        Thread: any.
        """
        self._outbox.put(report)

    def wait_for_meeting_place(self, timeout_s: float) -> Meet:
        """Where rank 0 waits for the others.

        Raises:
            TimeoutError: Rank 0 did not announce one in time.
        """
        try:
            return self._meeting_place.get(timeout=timeout_s)
        except queue.Empty:
            raise TimeoutError(f"worker 0 announced no meeting place within {timeout_s:.0f} s") from None

    def close(self) -> None:
        """Sends what is queued and returns when it is on its way."""
        self._closing.set()
        self._sender.join()

    def _send_batches(self) -> None:
        beat_at, was_first_step = -math.inf, True
        while True:
            is_last = self._closing.wait(_BATCH_INTERVAL_S)
            batch: list[Beat | Report] = []
            now, beat = time.monotonic(), self.activity.beat()
            # The end of the first step is told at once: from then on the agent watches every step for a hang.
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
