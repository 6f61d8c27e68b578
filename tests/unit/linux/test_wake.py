"""Wake: ends the wait of a polling thread, and reaches no other descriptor once it is closed."""

from __future__ import annotations

import os
import select
import threading

from sowatch.linux.wake import Wake


def is_readable(fd: int) -> bool:
    return bool(select.select([fd], [], [], 0)[0])


def test_a_call_is_heard_until_it_is_cleared() -> None:
    wake = Wake()
    wake()
    wake()
    assert is_readable(wake.fd)
    wake.clear()
    assert not is_readable(wake.fd)
    wake.clear()
    wake.close()


def test_a_call_after_the_end_does_not_reach_what_has_the_number_by_then() -> None:
    wake = Wake()
    number = wake.fd
    wake.close()
    other = os.eventfd(0, os.EFD_NONBLOCK)
    try:
        os.dup2(other, number)
        wake()
        assert not is_readable(number)
        wake.close()
        os.fstat(number)  # still there
    finally:
        os.close(other)
        if other != number:
            os.close(number)


def test_a_waiting_thread_is_woken(deadline) -> None:
    wake = Wake()
    woken = threading.Event()

    def wait() -> None:
        select.select([wake.fd], [], [])
        woken.set()

    thread = threading.Thread(target=wait)
    thread.start()
    wake()
    assert woken.wait(deadline(10))
    thread.join()
    wake.close()
