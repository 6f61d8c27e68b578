"""No assertion of the suite holds whatever the code does, as far as its text shows that."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]

#: What these give is true whatever it holds.
LAZY = {"enumerate", "filter", "iter", "map", "object", "reversed", "zip"}
#: Errors that any fault raises.
BROAD = {"BaseException", "Exception"}


def is_always_true(node: ast.expr) -> bool:
    match node:
        case ast.Constant(value=value):
            return bool(value)
        case ast.Tuple(elts=parts) | ast.List(elts=parts) | ast.Set(elts=parts):
            return any(not isinstance(one, ast.Starred) for one in parts)
        case ast.Dict(keys=keys):
            return any(one is not None for one in keys)
        case ast.GeneratorExp() | ast.Lambda():
            return True
        case ast.JoinedStr(values=values):
            return any(isinstance(one, ast.Constant) for one in values)
        case ast.Call(func=ast.Name(id=name)):
            return name in LAZY
        case ast.BoolOp(op=ast.Or(), values=values):
            return any(map(is_always_true, values))
        case ast.BoolOp(values=values):
            return all(map(is_always_true, values))
        case ast.UnaryOp(op=ast.Not(), operand=ast.Constant(value=value)):
            return not value
        case ast.Compare(left=left, ops=[ast.GtE()], comparators=[ast.Constant(value=0)]):
            return isinstance(left, ast.Call) and ast.unparse(left.func) == "len"
        case ast.Compare(left=left, ops=[ast.Eq() | ast.Is() | ast.LtE() | ast.GtE()], comparators=[right]):
            has_call = any(isinstance(one, ast.Call) for one in ast.walk(left))
            return not has_call and ast.dump(left) == ast.dump(right)
    return False


def is_always_empty(node: ast.expr) -> bool:
    match node:
        case ast.Subscript(slice=ast.Slice(lower=None, upper=ast.Constant(value=0))):
            return True
        case ast.Tuple(elts=[]) | ast.List(elts=[]) | ast.Dict(keys=[]):
            return True
    return False


def of_assertion(test: ast.expr) -> Iterator[str]:
    if is_always_true(test):
        yield "it always holds"
    for part in ast.walk(test):
        if isinstance(part, ast.BoolOp) and isinstance(part.op, ast.Or) and is_always_true(part):
            yield "one side of `or` is always true"
        if isinstance(part, ast.Subscript) and is_always_empty(part):
            yield "nothing is left of it"


def assertions_in(body: list[ast.stmt]) -> Iterator[ast.Assert]:
    return (one for part in body for one in ast.walk(part) if isinstance(one, ast.Assert))


def swallows(handler: ast.ExceptHandler) -> bool:
    is_broad = handler.type is None or ast.unparse(handler.type) in {*BROAD, "AssertionError"}
    return is_broad and not any(isinstance(one, ast.Raise) for part in handler.body for one in ast.walk(part))


def idle(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Lines whose assertion, loop or expected error says nothing, and why."""
    for node in ast.walk(tree):
        match node:
            case ast.Assert(test=test):
                yield from ((node.lineno, why) for why in of_assertion(test))
            case ast.For(iter=source) | ast.comprehension(iter=source) if is_always_empty(source):
                yield source.lineno, "a loop over nothing"
            case ast.Call(func=ast.Attribute(attr="raises"), args=[ast.Name(id=name)], keywords=[]) if name in BROAD:
                yield node.lineno, "any fault is taken for the expected error"
            case ast.Try(body=body, handlers=handlers) if any(map(swallows, handlers)):
                yield from ((one.lineno, "its failure is caught") for one in assertions_in(body))
            case ast.With(items=items, body=[_, *rest]):
                if any("raises(" in ast.unparse(one.context_expr) for one in items):
                    yield from ((one.lineno, "the error comes before it") for one in assertions_in(rest))


@pytest.mark.parametrize("path", sorted(TESTS.rglob("*.py")), ids=lambda path: str(path.relative_to(TESTS)))
def test_every_assertion_can_fail(path: Path) -> None:
    assert list(idle(ast.parse(path.read_text(encoding="utf-8")))) == []


@pytest.mark.parametrize(
    "text",
    [
        "assert True",
        "assert (found, 1)",
        "assert [one == 1 for one in found] or [None]",
        "assert found[:0] or [None]",
        "assert (one for one in found)",
        "assert map(bool, found)",
        "assert found == found",
        "assert len(found) >= 0",
        "assert f'found {found}'",
        "assert (1 == 2 or True) and found",
        "for one in (): assert one",
        "for one in found[:0]: assert one",
        "pytest.raises(Exception)",
        "try:\n    assert found\nexcept Exception:\n    pass",
        "with pytest.raises(ValueError):\n    int('x')\n    assert found",
    ],
)
def test_an_assertion_that_cannot_fail_is_found(text: str) -> None:
    assert len(list(idle(ast.parse(text)))) >= 1


@pytest.mark.parametrize(
    "text",
    [
        "assert found",
        "assert found == [1]",
        "assert make() is make()",
        "assert found or other",
        "for one in found: assert one",
        "with pytest.raises(ValueError) as caught:\n    int('x')\nassert caught",
        "try:\n    assert found\nfinally:\n    pass",
    ],
)
def test_an_assertion_that_can_fail_is_left_alone(text: str) -> None:
    assert list(idle(ast.parse(text))) == []
