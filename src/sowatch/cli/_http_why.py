"""Why a process has no HTTP flows, as a sentence for people."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from sowatch.model.escape import visible

if TYPE_CHECKING:
    from sowatch.explain.probing import TlsAnswer

__all__ = ["why_no_flows"]

_WHY: Final = {
    "tappable": "it can have flows: `sowatch http --pid` shows its requests.",
    "no_tls": "none: nothing that it has mapped exports the functions of OpenSSL, GnuTLS or NSS; "
    "HTTP without TLS is not seen.",
    "kernel_refuses": "none: the kernel puts no probes into its mapping of the TLS library.",
    "not_exported": "none: OpenSSL is linked into its program, which does not export it.",
    "go": "none: it is a Go program, which brings a TLS of its own.",
    "rustls": "none: rustls is linked into its program, and has no functions that could be probed.",
    "java": "none: it is a Java machine, which brings a TLS of its own.",
    "static": "none: its program is static and has no symbols, so nobody can find a TLS library in it.",
    "off": 'none: [http] of the agent is off. Set enabled = true there, or use "sowatch http".',
    "not_selected": "none: [http] of the agent selects other processes.",
    "refused": "none: its TLS library could not be tapped",
    "not_attached": "none yet: its TLS library is not attached.",
    "no_call": "none yet: its TLS library is attached, and it has not read or written by it since.",
    "no_http": "none: it has read or written by its TLS library, and that was no HTTP so far.",
    "flows": "it has flows.",
}


def why_no_flows(answer: TlsAnswer) -> str:
    """One sentence, with the libraries that it is about."""
    said = _WHY[answer.state]
    if answer.reason is not None:
        said = f"{said.rstrip('.')}: {visible(answer.reason)}"
    if answer.calls:
        said += f" ({answer.calls} calls, {answer.flows} flows)"
    return said + "".join(f" {visible(path)}" for path in answer.files[:3])
