"""The table ``[fleet]`` of the agent's configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Literal

from msgspec import Struct, field

from sowatch.agent.setting_checks import in_range, missing_module
from sowatch.model.errors import ConfigError

__all__ = ["FLEET_RULE", "FleetSettings"]

#: The name of the rule that [fleet] adds after all others.
FLEET_RULE: Final = "fleet"


class FleetSettings(Struct, frozen=True, kw_only=True):
    """The table ``[fleet]``: what is mapped here, to the receiver of a fleet. Off by default; see docs/fleet.md.

    Attributes:
        enabled: send it.
        endpoint: of the receiver or a collector, as http://HOST:PORT. Default: OTEL_EXPORTER_OTLP_ENDPOINT.
        protocol: http or grpc.
        headers: sent with each request.
        token_file: a file whose content is sent as a bearer token; read anew for each request.
        interval_s: seconds between two heartbeats; a host that has sent none for three of them is silent.
        snapshot_interval_s: seconds after which everything is sent anew.
    """

    enabled: bool = False
    endpoint: str | None = None
    protocol: Literal["http", "grpc"] = "http"
    headers: Mapping[str, str] = field(default_factory=dict)
    token_file: str | None = None
    interval_s: float = 30.0
    snapshot_interval_s: float = 21_600.0

    def __post_init__(self) -> None:
        in_range("interval_s", self.interval_s, 1, 3_600)
        in_range("snapshot_interval_s", self.snapshot_interval_s, 60, 604_800)
        for name, value in self.headers.items():
            if (
                not name
                or not f"{name}{value}".isascii()
                or not f"{name}{value}".isprintable()
                or set(name) & set(" :")
            ):
                raise ConfigError("headers", f"{name!r} cannot be sent with its value. Give ASCII texts.")
        if self.token_file is not None and any(name.lower() == "authorization" for name in self.headers):
            raise ConfigError("token_file", "headers has an authorization, too. Take one of both away.")
        if self.enabled and missing_module("opentelemetry"):
            raise ConfigError(
                "enabled", "the OpenTelemetry SDK is not installed. Install it: pip install 'sowatch[otlp]'."
            )
