"""A fleet of any size for pages and documentation: an upgrade of OpenSSL rolls through it, and not every host answers.

What is on a host follows from its number, so a test can tell what an answer has to be: see `Sample`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

from support.fleet_records import SECOND, Group, HostRecords, Record, debian

__all__ = ["LIBSSL_NEW", "LIBSSL_OLD", "Sample"]

HOUR = 3600 * SECOND
DAY = 24 * HOUR
LIB = "/usr/lib/x86_64-linux-gnu"


def build(name: str) -> str:
    """A build id."""
    return hashlib.sha1(name.encode()).hexdigest()


LIBSSL_OLD = build("libssl3 3.0.11-1~deb12u2")
LIBSSL_NEW = build("libssl3 3.0.15-1~deb12u1")
OLD_SSL = Group(f"{LIB}/libssl.so.3", LIBSSL_OLD, "libssl.so.3", debian("libssl3", "3.0.11-1~deb12u2", "openssl"))
NEW_SSL = replace(OLD_SSL, build_id=LIBSSL_NEW, package=debian("libssl3", "3.0.15-1~deb12u1", "openssl"))
LIBC = Group(f"{LIB}/libc.so.6", build("libc6"), "libc.so.6", debian("libc6", "2.36-9+deb12u9", "glibc"))
LIBZ = Group(f"{LIB}/libz.so.1.2.13", build("zlib1g"), "libz.so.1", debian("zlib1g", "1:1.2.13.dfsg-1", "zlib"))
WHEEL = Group(
    "/opt/venv/lib/python3.11/site-packages/cryptography.libs/libssl-0f3e2a1c.so.3",
    build("cryptography"),
    "libssl-0f3e2a1c.so.3",
)
NGINX = {"exe": "/usr/sbin/nginx", "unit": "nginx.service", "listen": "tcp:443,tcp:80"}
SHOP = {"exe": "/usr/bin/python3.11", "unit": "containerd.service", "listen": "tcp:8080"}


@dataclass(frozen=True)
class Sample:
    """``hosts`` hosts; what is on one follows from its number modulo 100.

    0 and 1: nothing heard of for an hour (silent); 2: a record is missing (lossy); 3: it polls (unsupported); 4 to 11:
    upgraded, but nginx still has the old libssl (stale); 12 to 19: not upgraded. All others are upgraded and have
    restarted nginx.
    """

    hosts: int
    now_ns: int

    def name(self, number: int) -> str:
        """Of a host."""
        return f"{('web', 'db', 'shop')[number % 3]}-{number:05}.example"

    def with_old_libssl(self) -> list[str]:
        """The hosts on which the old build is mapped, or was when they were heard last."""
        return [self.name(one) for one in range(self.hosts) if one % 100 < 20]

    def records(self) -> Iterator[list[Record]]:
        """Of each host, what arrives."""
        for number in range(self.hosts):
            yield self._of(number)

    def _of(self, number: int) -> list[Record]:
        turn = number % 100
        epoch = self.now_ns - 6 * DAY
        # The upgrade goes through the fleet within four days.
        upgraded = self.now_ns - 5 * DAY + (number * 7919 % 97) * 4 * DAY // 97
        # They are asked for longer than agents with the default interval would be silent.
        host = HostRecords(build(f"host {number}")[:32], self.name(number), epoch, interval_s=600)
        if turn == 3:
            host.strategy, host.guarantee = "procfs", "sampled"
        old = replace(OLD_SSL, processes=5, pids=(812, 813, 814, 815, 816), **NGINX)
        groups = [old, *self._others(number)]
        records = host.snapshot_of(groups)
        if turn >= 4 and not 12 <= turn < 20:
            host.now_ns = upgraded
            records.append(host.changed(replace(old, stale="replaced", stale_since_ns=upgraded)))
        if turn >= 20:
            host.now_ns = upgraded + (5 + number % 50) * 60 * SECOND
            records += [host.unmapped(old), host.mapped(replace(old, build_id=LIBSSL_NEW, package=NEW_SSL.package))]
        # What is anew every six hours in a real fleet is so once here.
        host.now_ns = self.now_ns - (HOUR if turn in (0, 1) else 20 * SECOND)
        stale = {"stale": "replaced", "stale_since_ns": upgraded} if 4 <= turn < 12 else {}
        now = [replace(one, **stale) if one.build_id == LIBSSL_OLD else one for one in host.groups.values()]
        records += host.snapshot_of(now)
        if turn == 2:
            del records[-2]
        return [*records, host.heartbeat()]

    def _others(self, number: int) -> Iterator[Group]:
        yield replace(LIBC, processes=60, pids=(1, 402, 411), exe="/usr/lib/systemd/systemd", unit="init.scope")
        yield replace(LIBC, processes=5, pids=(812, 813), **NGINX)
        yield replace(LIBZ, processes=5, pids=(812, 813), **NGINX)
        if number % 3 == 2:
            pod = f"cart-7d9c{number % 1000:03}"
            inside = {"container": build(pod) + build(pod)[:24], "pod_uid": f"0f3e2a1c-{number:012}", "pod": pod}
            yield replace(WHEEL, processes=2, pids=(2040, 2041), namespace="shop", **inside, **SHOP)
