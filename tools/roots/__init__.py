"""`scripts/test-wheel`: the suite against an installed wheel, in roots without compiler and libbpf.

table     the roots and interpreters, and which tests run there: plain data
root      a root: made by mmdebstrap, entered in a mount namespace of its own
suite     the wheel and what tests need, installed; pytest, and what it gave
page      docs/pythons.md
__main__  the command

Reasons: docs/decisions/0063-the-suite-against-the-wheel.md.
"""
