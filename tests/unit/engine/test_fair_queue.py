"""What several ask for is given by turns."""

from __future__ import annotations

import threading
from typing import Any

from sowatch.engine.fair_queue import FairQueue


def test_one_who_asks_for_little_does_not_wait_behind_all_that_another_one_wants() -> None:
    queue = FairQueue[str]()
    for number in range(3):
        queue.put("flooder", f"much {number}")
    queue.put("honest", "little")
    queue.put("third", "a")
    queue.put("third", "b")
    given = [queue.get() for _ in range(6)]
    assert given == ["much 0", "little", "a", "much 1", "b", "much 2"]


def test_a_get_waits_for_the_next_put(wait_until: Any) -> None:
    queue, got = FairQueue[int](), list[int]()
    threads = [threading.Thread(target=lambda: got.append(queue.get())) for _ in range(2)]
    for thread in threads:
        thread.start()
    assert got == []
    queue.put("a", 1)
    queue.put("a", 2)
    wait_until(lambda: sorted(got) == [1, 2])
    for thread in threads:
        thread.join()
