"""Writes small ELF shared objects field by field, honest or spoiled, in every class and byte order."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

__all__ = [
    "BASE",
    "CODE",
    "FUNC",
    "GLOBAL",
    "IFUNC",
    "LOCAL",
    "NOTYPE",
    "OBJECT",
    "TLS",
    "UNIQUE",
    "WEAK",
    "Made",
    "Sym",
    "gnu_hash",
    "old_hash",
]

GLOBAL, WEAK, LOCAL, UNIQUE = 1, 2, 0, 10
NOTYPE, OBJECT, FUNC, TLS, IFUNC = 0, 1, 2, 6, 10
CODE = 0x800  # file offset of the code, in the only segment; its address is BASE + CODE
BASE = 0x40_0000


class Sym(NamedTuple):
    name: bytes
    value: int = BASE + CODE
    bind: int = GLOBAL
    kind: int = FUNC
    visibility: int = 0
    section: int = 1

    @property
    def can_be_bound_to(self) -> bool:
        return bool(self.section) and self.bind != LOCAL


def gnu_hash(name: bytes) -> int:
    value = 5381
    for byte in name:
        value = (value * 33 + byte) % 2**32
    return value


def old_hash(name: bytes) -> int:
    """As the gABI has it."""
    value = 0
    for byte in name:
        value = (value << 4) + byte
        high = value & 0xF0000000
        value = (value ^ high >> 24) & ~high
    return value


class Made:
    """An ELF shared object put together field by field; every field can be spoiled before `data`."""

    def __init__(
        self, *, bits: int = 64, order: str = "<", hashes: Sequence[str] = ("gnu",), machine: int = 62
    ) -> None:
        self.bits, self.order, self.hashes, self.machine = bits, order, hashes, machine
        self.build_id: bytes | None = bytes(range(20))
        self.soname: bytes | None = b"libmade.so.1"
        self.symbols: list[Sym] = [Sym(b"made_read"), Sym(b"made_write", BASE + CODE + 16)]
        self.note_align = 4
        self.notes_before = b""
        self.first_tags: list[tuple[int, int]] = []  # written before the others
        self.tags: dict[int, int] = {}  # override what would be written
        self.segments: dict[int, dict[str, int]] = {}  # kind -> fields to override
        self.segments_before: list[dict[str, int]] = []
        self.segments_behind: list[dict[str, int]] = []
        self.phentsize: int | None = None
        self.phnum: int | None = None
        self.gnu: dict[str, Any] = {}
        self.buckets = 3
        self.old_buckets = 1
        #: Section headers for the notes and the dynamic section (kind -> fields to override); none if None.
        self.sections: dict[int, dict[str, int]] | None = None
        self.build_id_in_section: bytes | None = None  # by a section of its own, which no program header covers

    def words(self, *values: int) -> bytes:
        return struct.pack(f"{self.order}{len(values)}I", *values)

    def addresses(self, *values: int) -> bytes:
        return struct.pack(f"{self.order}{len(values)}{'Q' if self.bits == 64 else 'I'}", *values)

    def note(self, name: bytes, kind: int, desc: bytes) -> bytes:
        def pad(data: bytes) -> bytes:
            return data + bytes(-len(data) % self.note_align)

        return pad(pad(self.words(len(name), len(desc), kind) + name) + desc)

    def sorted_symbols(self) -> list[Sym]:
        """As the linker does: what cannot be bound to first, the others by bucket."""
        first = [one for one in self.symbols if not one.can_be_bound_to]
        last = [one for one in self.symbols if one.can_be_bound_to]
        return first + sorted(last, key=lambda one: gnu_hash(one.name) % self.buckets)

    def symbol_record(self, name: int, one: Sym) -> bytes:
        info = one.bind << 4 | one.kind
        if self.bits == 64:
            return struct.pack(self.order + "IBBHQQ", name, info, one.visibility, one.section, one.value, 16)
        return struct.pack(self.order + "IIIBBH", name, one.value, 16, info, one.visibility, one.section)

    def gnu_table(self, ordered: list[Sym]) -> bytes:
        first = 1 + sum(not one.can_be_bound_to for one in ordered)
        hashed = [gnu_hash(one.name) for one in ordered[first - 1 :]]
        buckets = [0] * self.buckets
        chain = []
        for at, value in enumerate(hashed):
            bucket = value % self.buckets
            buckets[bucket] = buckets[bucket] or first + at
            is_last = at + 1 == len(hashed) or hashed[at + 1] % self.buckets != bucket
            chain.append(value & ~1 | is_last)
        head = (self.gnu.get("buckets", self.buckets), self.gnu.get("first", first), self.gnu.get("bloom", 1), 6)
        buckets = self.gnu.get("values", buckets)
        return (
            self.words(*head) + self.addresses(2**self.bits - 1) + self.words(*buckets, *self.gnu.get("chain", chain))
        )

    def old_table(self, ordered: list[Sym]) -> bytes:
        count = len(ordered) + 1
        # 64-bit words on s390x.
        buckets, chain = [0] * self.old_buckets, [0] * count
        for at, one in reversed(list(enumerate(ordered, 1))):
            bucket = old_hash(one.name) % self.old_buckets
            chain[at], buckets[bucket] = buckets[bucket], at
        chain = self.gnu.get("old_chain", chain)
        values = (self.old_buckets, self.gnu.get("count", count), *buckets, *chain)
        return self.addresses(*values) if self.machine == 22 else self.words(*values)

    def data(self) -> bytes:
        strings = bytearray(b"\0")
        soname_at = len(strings)
        strings += (self.soname or b"") + b"\0"
        ordered = self.sorted_symbols()
        table = bytearray(self.symbol_record(0, Sym(b"", 0, 0, 0, 0, 0)))
        for one in ordered:
            table += self.symbol_record(len(strings), one)
            strings += one.name + b"\0"
        notes = self.notes_before
        if self.build_id is not None:
            notes += self.note(b"GNU\0", 3, self.build_id)

        body = bytearray()
        start = CODE + 64

        def put(piece: bytes) -> int:
            body.extend(bytes(-len(body) % 16))
            at = start + len(body)
            body.extend(piece)
            return at

        at = {"notes": put(notes), "symbols": put(bytes(table)), "strings": put(bytes(strings))}
        tags = {5: BASE + at["strings"], 10: len(strings), 6: BASE + at["symbols"], 11: 24 if self.bits == 64 else 16}
        if self.soname is not None:
            tags[14] = soname_at
        if "gnu" in self.hashes:
            tags[0x6FFFFEF5] = BASE + put(self.gnu_table(ordered))
        if "old" in self.hashes:
            tags[4] = BASE + put(self.old_table(ordered))
        tags |= self.tags
        dynamic = self.addresses(*(word for tag in [*self.first_tags, *tags.items()] for word in tag), 0, 0)
        at["dynamic"] = put(dynamic)
        rows = [(0, 0, 0, 0), (7, at["notes"], len(notes), self.note_align), (6, at["dynamic"], len(dynamic), 8)]
        if self.build_id_in_section is not None:
            note = self.note(b"GNU\0", 3, self.build_id_in_section)
            rows.append((7, put(note), len(note), self.note_align))
        shoff = 0
        if self.sections is not None:
            names = ("kind", "offset", "size", "align")
            listed = [dict(zip(names, row, strict=True)) | self.sections.get(row[0], {}) for row in rows]
            shoff = put(b"".join(self.section(**one) for one in listed))
        size = start + len(body)
        places = [(1, 5, 0, size, 4096), (2, 4, at["dynamic"], len(dynamic), 8)]
        places += [(4, 4, at["notes"], len(notes), self.note_align)]
        segments = [
            {"kind": kind, "flags": flags, "offset": offset, "vaddr": BASE + offset, "filesz": filesz, "align": align}
            for kind, flags, offset, filesz, align in places
        ]
        segments = [{**one, **self.segments.get(one["kind"], {})} for one in segments]
        segments = [*self.segments_before, *segments, *self.segments_behind]
        head = self.header(len(segments), shoff, len(rows) if shoff else 0) + b"".join(
            self.segment(**one) for one in segments
        )
        return head.ljust(start, b"\xcc") + bytes(body)

    def header(self, count: int, shoff: int, sections: int) -> bytes:
        ident = b"\x7fELF" + bytes([self.bits // 32, 1 if self.order == "<" else 2, 1]) + bytes(9)
        kinds, size, segment = ("HHIQQQIHHHHHH", 64, 56) if self.bits == 64 else ("HHIIIIIHHHHHH", 52, 32)
        segment = segment if self.phentsize is None else self.phentsize
        count = count if self.phnum is None else self.phnum
        section = (64 if self.bits == 64 else 40) if shoff else 0
        fields = (3, self.machine, 1, 0, size, shoff, 0, size, segment, count, section, sections, 0)
        return ident + struct.pack(self.order + kinds, *fields)

    def segment(self, *, kind: int, flags: int, offset: int, vaddr: int, filesz: int, align: int) -> bytes:
        if self.bits == 64:
            return struct.pack(self.order + "IIQQQQQQ", kind, flags, offset, vaddr, 0, filesz, filesz, align)
        return struct.pack(self.order + "IIIIIIII", kind, offset, vaddr, 0, filesz, filesz, flags, align)

    def section(self, *, kind: int, offset: int, size: int, align: int) -> bytes:
        layout = "IIQQQQIIQQ" if self.bits == 64 else "IIIIIIIIII"
        return struct.pack(self.order + layout, 0, kind, 0, BASE + offset, offset, size, 0, 0, align, 0)
