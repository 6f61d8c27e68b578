"""The packages of ARCHITECTURE.md import only what stands before them; importing them does nothing."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import sowatch

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = Path(sowatch.__file__).resolve().parent

#: The root package hands out what the others hold, so only the last one may use it.
ROOT_PACKAGE = "__init__"
ABOVE_THE_ROOT = {"cli", "__main__"}
#: Packages that stand side by side: neither may import the other.
SIDE_BY_SIDE = {"linux", "bpf"}
MAX_NAMES = 18


def packages() -> list[str]:
    """The packages in the order of the table of ARCHITECTURE.md, lowest first."""
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    return re.findall(r"^\| `(\w+)` \|", text, flags=re.MULTILINE)


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name below `sowatch` ("" is the package itself)."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def package_of(module: str) -> str:
    return module.split(".", maxsplit=1)[0] or ROOT_PACKAGE


def imports(path: Path, package: str) -> Iterator[str]:
    """The modules of `sowatch` that a file imports anywhere, functions included, as names below it.

    ``from sowatch.x import y`` gives ``x.y``: `known` finds out which part of it is a module.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"))
    only_types = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
        for statement in node.body
        for inner in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if node in only_types:
            continue
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = ["sowatch", *package.split(".")] if package else ["sowatch"]
                base = ".".join([*above[: len(above) - node.level + 1], *([base] if base else [])])
            names = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if name == "sowatch" or name.startswith("sowatch."):
                yield name.removeprefix("sowatch").removeprefix(".")


def known(name: str, all_modules: set[str]) -> str:
    """The longest beginning of a dotted name that is a module; "" is the package."""
    while name and name not in all_modules:
        name = name.rpartition(".")[0]
    return name


def edges() -> set[tuple[str, str]]:
    """(importing module, imported module) within the package."""
    paths = modules()
    # The extension is compiled, so there is no file to find it by.
    names = {*paths, "bpf._libbpf"}
    found = set()
    for module, path in paths.items():
        package = module if path.name == "__init__.py" else module.rpartition(".")[0]
        found |= {(module, known(name, names)) for name in imports(path, package)}
    return {(one, other) for one, other in found if one != other}


def test_every_module_belongs_to_a_package_of_the_architecture() -> None:
    others = {module for module in modules() if package_of(module) not in {*packages(), ROOT_PACKAGE, "__main__"}}

    assert others == set()


def test_every_package_of_the_architecture_exists() -> None:
    present = {package_of(module) for module in modules()}

    assert [package for package in packages() if package not in present] == []


def test_the_root_has_few_names() -> None:
    present = {path.name for path in PACKAGE.iterdir() if path.name != "__pycache__"}

    assert len(present) <= MAX_NAMES, sorted(present)


def test_a_package_imports_only_what_stands_before_it() -> None:
    order = {package: place for place, package in enumerate(packages())}
    order[ROOT_PACKAGE] = len(order)
    order["__main__"] = len(order)
    upwards = []
    for module, imported in sorted(edges()):
        mine, theirs = package_of(module), package_of(imported)
        if not {mine, theirs} <= order.keys():
            continue  # not in the table: the test above says so
        allowed = (
            mine == theirs
            or (theirs == ROOT_PACKAGE and mine in ABOVE_THE_ROOT)
            or (theirs != ROOT_PACKAGE and order[theirs] < order[mine] and {mine, theirs} != SIDE_BY_SIDE)
        )
        if not allowed:
            upwards.append(f"{module or 'sowatch'} imports {imported or 'sowatch'}")

    assert upwards == []


def test_modules_of_one_package_do_not_import_each_other_in_circles() -> None:
    wanted: dict[str, set[str]] = {}
    for module, imported in edges():
        # `__init__` of a package may import its modules while they load it.
        if package_of(module) == package_of(imported) and imported not in ("", package_of(module)):
            wanted.setdefault(module, set()).add(imported)
    free = {module for module in modules() if not wanted.get(module)}
    while True:
        freed = {module for module, needs in wanted.items() if module not in free and needs <= free | {"bpf._libbpf"}}
        if not freed:
            break
        free |= freed

    assert sorted(set(wanted) - free) == []


@pytest.mark.parametrize("module", sorted(modules().keys() - {"__main__", "bpf._build_binding", "bpf._build_programs"}))
def test_importing_a_module_starts_no_thread_and_says_nothing(module: str) -> None:
    name = f"sowatch.{module}".removesuffix(".")
    code = f"import {name}, os; assert os.listdir('/proc/self/task') == [str(os.getpid())]"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)

    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_what_the_package_imports_from_others_is_what_it_declares() -> None:
    # _cffi_backend, which the compiled binding imports, comes with cffi; _build_binding.py needs cffi itself.
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    requirements = [*project["dependencies"], *extras["agent"], *extras["http"], *extras["kubernetes"], *extras["otlp"]]
    requirements += [*extras["fleet"], *extras["sbom"], *extras["vulnerabilities"]]
    names = {re.split(r"[^\w-]", requirement)[0].replace("-", "_") for requirement in requirements}
    # All parts of OpenTelemetry are found below one name.
    declared = {"opentelemetry" if name.startswith("opentelemetry_") else name for name in names}
    modules_of = {
        "chdb_core": "chdb",
        "cyclonedx_python_lib": "cyclonedx",
        "grpcio": "grpc",
        "packageurl_python": "packageurl",
        "protobuf": "google",
    }
    declared = {modules_of.get(name, name) for name in declared}
    imported = set()
    for path in modules().values():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                imported.add((node.module or "").partition(".")[0])

    assert imported - set(sys.stdlib_module_names) - {"sowatch"} == declared


def test_importing_the_package_loads_no_terminal_library() -> None:
    code = "import sowatch, sys; print(sorted({'rich', 'pygments'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout == "[]\n"


def test_importing_telemetry_loads_no_exporters_library() -> None:
    wanted = {"prometheus_client", "opentelemetry", "grpc", "requests", "google.protobuf"}
    code = f"import sowatch.telemetry, sys; print(sorted({wanted!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout == "[]\n"


def test_a_watcher_imports_neither_explanations_nor_strategies_that_are_not_tried() -> None:
    rare = {"sowatch.explain", "sowatch.bpf.compile", "importlib.resources", "hashlib"}
    rare |= {f"sowatch.sources.{one}" for one in ("legacy", "polling", "prebuilt")}
    code = f"import sowatch.watcher.watcher, sys; print(sorted({rare!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout == "[]\n"
