"""`Subscribers`: the readers of events, each with a queue of its own.

The engine's thread offers events; any thread may subscribe and unsubscribe.
"""

from __future__ import annotations

import threading
from collections.abc import Collection

from sowatch.engine.published_map import Loads, PublishedMap
from sowatch.engine.subscription import SubscriberQueue
from sowatch.model.events import Event
from sowatch.model.literals import EVENT_KINDS

__all__ = ["Subscribers"]


class Subscribers:
    """All subscriptions to one published map.

    Attributes:
        events: how many were emitted.
        lost_in_queues: how many of those no reader's queue could take, summed over the readers.
    """

    def __init__(self, published: PublishedMap) -> None:
        self._published = published
        self._lock = threading.Lock()
        self._subscriptions: tuple[SubscriberQueue, ...] = ()
        self.events = 0
        self.lost_in_queues = 0

    def subscribe(
        self,
        *,
        events: Collection[str] = EVENT_KINDS,
        control: bool,
        limit: int,
        limit_bytes: int,
        rule: str | None = None,
        without_rules: Collection[str] = (),
    ) -> SubscriberQueue:
        """A new reader, from the next event on."""
        subscription = SubscriberQueue(
            self,
            events=events,
            control=control,
            limit=limit,
            limit_bytes=limit_bytes,
            rule=rule,
            without_rules=without_rules,
        )
        self.add(subscription)
        return subscription

    def add(self, subscription: SubscriberQueue) -> None:
        """Offers to this reader from the next event on."""
        with self._lock:
            self._subscriptions = (*self._subscriptions, subscription)

    def unsubscribe(self, subscription: SubscriberQueue) -> None:
        """No further offers to this reader."""
        with self._lock:
            self._subscriptions = tuple(one for one in self._subscriptions if one is not subscription)

    def held_copy(self) -> Loads:
        """The published map as it is now."""
        return self._published.copy()

    def emit(self, event: Event) -> None:
        """Offers one event to every reader."""
        self.events += 1
        for subscription in self._subscriptions:
            subscription.offer(event)

    def hand_over(self) -> None:
        """Gives every reader what was offered; what follows waits for the next time."""
        for subscription in self._subscriptions:
            subscription.hand_over()

    def catch_up(self) -> None:
        """Lets readers that fell behind recover."""
        for subscription in self._subscriptions:
            subscription.catch_up()
        self.hand_over()

    def end(self) -> None:
        """Ends every subscription."""
        for subscription in self._subscriptions:
            subscription.end()
