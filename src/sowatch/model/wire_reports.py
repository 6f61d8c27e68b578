"""Schema 1: what answers a question with one object: ``audit`` and the agent's ``GET /inventory``.

As `sowatch.model.wire` has lines, and `sowatch.model.wire_explain` explanations.
"""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

from sowatch.model.wire import DEPRECATED, Natural, Pid, Schema, Seconds
from sowatch.model.wire_explain import Difference

__all__ = ["Audit"]


class Audit(Struct, frozen=True, gc=False, kw_only=True):
    """The object of `audit` and of the agent's `/audit`: the mapping table compared with ``/proc``."""

    schema: Schema
    event: Literal["audit"]
    processes: Annotated[Natural, Meta(description="Use process_count.", extra_json_schema=DEPRECATED)]
    mappings: Annotated[Natural, Meta(description="Use mapping_count.", extra_json_schema=DEPRECATED)]
    unreadable: Annotated[Natural, Meta(description="Processes that are there and cannot be read.")]
    unread: Annotated[list[Pid], Meta(description="Those of them that the kernel does not answer for.")]
    seconds: Seconds
    lost: Annotated[Natural, Meta(description="Records that the kernel side lost.")] | UnsetType = UNSET
    repairs: Natural | UnsetType = UNSET
    differences: list[Difference]
    process_count: Natural | UnsetType = UNSET
    mapping_count: Natural | UnsetType = UNSET
