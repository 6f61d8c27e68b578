"""Why is it, or is it not, in the mapping table? The decision trail of one process or one file.

`explain` reads ``/proc``, the mapping table, the kernel side's verdicts and the files; what it finds is put
together by pure functions (``assemble``) into frozen records (``records``). It changes nothing, runs no user code,
and gives up on a file system that does not answer.
"""

from __future__ import annotations

from sowatch.explain.gather import ExplainContext, check_process, explain, paths_named
from sowatch.explain.probing import AttachmentReport, ProbeReport, attachment_line
from sowatch.explain.published import Published, explain_published_file, explain_published_process
from sowatch.explain.records import (
    Blocked,
    FileLook,
    MappedIn,
    MappingReport,
    PathReport,
    ProcessReport,
    RuleAnswer,
    Seen,
    Try,
    VerdictAnswer,
    difference_line,
    explanation,
    to_dict,
)

__all__ = [
    "AttachmentReport",
    "Blocked",
    "ExplainContext",
    "FileLook",
    "MappedIn",
    "MappingReport",
    "PathReport",
    "ProbeReport",
    "ProcessReport",
    "Published",
    "RuleAnswer",
    "Seen",
    "Try",
    "VerdictAnswer",
    "attachment_line",
    "check_process",
    "difference_line",
    "explain",
    "explain_published_file",
    "explain_published_process",
    "explanation",
    "paths_named",
    "to_dict",
]
