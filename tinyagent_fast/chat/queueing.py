"""A queue before the model, which writes one plan at a time."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

_MAX_WAITING = 16


class QueueFull(Exception):
    """More requests wait than anybody would wait for."""


class Queue:
    """Lets one request at a time to the model, in the order of their arrival."""

    def __init__(self) -> None:
        """Start empty."""
        self._tickets: deque[object] = deque()
        self._changed = threading.Condition()

    @contextmanager
    def place(self) -> Iterator[object]:
        """Hold a place for as long as the block runs.

        Yields:
            The ticket to ask `ahead` with.

        Raises:
            QueueFull: Too many wait already.
        """
        ticket = object()
        with self._changed:
            if len(self._tickets) > _MAX_WAITING:
                raise QueueFull
            self._tickets.append(ticket)
        try:
            yield ticket
        finally:
            with self._changed:
                self._tickets.remove(ticket)
                self._changed.notify_all()

    def ahead(self, ticket: object, *, wait_s: float = 0.0) -> int:
        """Count the requests before a place.

        Args:
            ticket: The place.
            wait_s: How long to wait for its turn before counting.

        Returns:
            0 if it is its turn.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._tickets[0] is ticket, timeout=wait_s)
            return self._tickets.index(ticket)
