"""Names of C++ functions by their symbols (Itanium C++ ABI, section 5.1): which function, not which arguments.

The symbols are those of hostile files, so this reads only as much of a name as it needs, in one pass from left to right
and without recursion: no demangler of a C++ library, which expands what it reads.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Final

__all__ = ["qualified_name"]

_LENGTH: Final = re.compile(r"\d+")
#: <substitution> of the standard library (5.1.8).
_STANDARD: Final = {
    "St": "std",
    "Sa": "std::allocator",
    "Sb": "std::basic_string",
    "Ss": "std::basic_string",
    "Si": "std::basic_istream",
    "So": "std::basic_ostream",
    "Sd": "std::basic_iostream",
}
#: <operator-name> (5.1.5.3).
_OPERATOR_TABLE: Final = """
    nw=new na=new[] dl=delete da=delete[] aw=co_await ps=+ ng=- ad=& de=* co=~ pl=+ mi=- ml=* dv=/ rm=% an=& or=| eo=^
    aS== pL=+= mI=-= mL=*= dV=/= rM=%= aN=&= oR=|= eO=^= ls=<< rs=>> lS=<<= rS=>>= eq=== ne=!= lt=< gt=> le=<= ge=>=
    ss=<=> nt=! aa=&& oo=|| pp=++ mm=-- cm=, pm=->* pt=-> cl=() ix=[]
"""
_OPERATORS: Final = dict(pair.split("=", 1) for pair in _OPERATOR_TABLE.split())
#: What opens a part of template arguments that its own E closes: N (a name), X (an expression), J (a pack), L (a
#: literal), F (a function), I (more arguments).
_OPENS: Final = "NXJLFI"


@lru_cache(maxsize=20_000)
def qualified_name(symbol: str) -> str | None:
    """The C++ function that a mangled name stands for, with its namespaces, without arguments; None: it is none.

    Template arguments are left out, too, so all instances of a function template have one name. A conversion operator,
    and what is local to a function or takes part of its name from an earlier part, have none here.

    >>> [qualified_name(one) for one in ("_ZN2ns1fEi", "_Z4mainv", "_ZNKSt6vectorIiSaIiEE4sizeEv", "_ZN1AC2Ev")]
    ['ns::f', 'main', 'std::vector::size', 'A::A']
    >>> qualified_name("_ZN2nseqERKNS_1SES2_"), qualified_name("_ZN1AD0Ev"), qualified_name("printf")
    ('ns::operator==', 'A::~A', None)
    """
    if not symbol.startswith("_Z"):
        return None
    at, is_nested = 2, symbol.startswith("N", 2)
    if is_nested:
        at = 3
        while symbol[at : at + 1] in ("r", "V", "K", "R", "O") and at < len(symbol):
            at += 1
    parts: list[str] = []
    while at < len(symbol):
        if is_nested and symbol[at] == "E":
            break
        following = _part(symbol, at, parts)
        if following is None:
            return None
        at = following
        # Without nesting there is one name; std:: before it is not yet it.
        if not is_nested and parts != ["std"]:
            break
    if not parts or (is_nested and not symbol.startswith("E", at)):
        return None
    return "::".join(parts)


def _part(symbol: str, at: int, parts: list[str]) -> int | None:
    """Adds what begins at a place to the parts of a name; gives where the next one begins, None if it is unknown."""
    if symbol[at] == "L":  # internal linkage
        at += 1
    if match := _LENGTH.match(symbol, at):
        end = match.end() + int(match[0][:5])
        if end > len(symbol):
            return None
        name = symbol[match.end() : end]
        parts.append("(anonymous namespace)" if name.startswith("_GLOBAL__N") else name)
        return end
    two = symbol[at : at + 2]
    if two in _STANDARD:
        if parts:
            return None
        parts.extend(_STANDARD[two].split("::"))
    elif two[:1] == "I" and parts:
        return _behind_arguments(symbol, at)
    elif two[:1] == "B" and (match := _LENGTH.match(symbol, at + 1)):  # an ABI tag
        return match.end() + int(match[0][:5])
    elif re.fullmatch(r"[CD]\d", two) and parts:
        parts.append("~" * (two[0] == "D") + parts[-1])
    elif two in _OPERATORS:
        operator = _OPERATORS[two]
        parts.append("operator" + " " * operator[0].isalpha() + operator)
    else:
        return None
    return at + 2


def _behind_arguments(symbol: str, at: int) -> int | None:
    """Where template arguments end that begin with the I at a place; None: they do not."""
    depth = 0
    while at < len(symbol):
        if match := _LENGTH.match(symbol, at):
            # A name. The number of a literal has its type before it, and only its E behind it.
            end = match.end() + int(match[0][:5])
            is_literal = symbol.startswith("E", match.end())
            at = match.end() if is_literal else end
            continue
        if symbol[at] == "S":  # a substitution: St, Sa, ..., S_, S0_, ...
            end = symbol.find("_", at)
            at = end + 1 if symbol[at : at + 2] not in _STANDARD and end > 0 else at + 2
            continue
        if symbol[at] == "T":  # a parameter: T_, T0_
            end = symbol.find("_", at)
            if end < 0:
                return None
            at = end + 1
            continue
        depth += (symbol[at] in _OPENS) - (symbol[at] == "E")
        at += 1
        if depth == 0:
            return at
    return None
