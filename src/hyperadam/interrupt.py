"""Long work that is stopped in good order."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def interruption() -> Iterator[threading.Event]:
    """Turn the first Ctrl-C (or SIGTERM) into a request; the second one acts as usual.

    Yields:
        An event that is set when the work should stop after what it is at.
    """
    event = threading.Event()
    # Python lets only the main thread handle signals.
    main = threading.current_thread() is threading.main_thread()
    previous = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM) if main}

    def request(number: int, _: FrameType | None) -> None:
        event.set()
        signal.signal(number, previous[signal.Signals(number)])

    for number in previous:
        signal.signal(number, request)
    try:
        yield event
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
