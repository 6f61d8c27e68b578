# The binding that setup.py compiles from shim.h and shim.c; cffi gives its members no types.

from typing import Any

ffi: Any
lib: Any
