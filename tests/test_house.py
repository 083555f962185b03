"""What the conventions ask of the code and no linter checks."""

from __future__ import annotations

import ast
import graphlib
import platform
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import jax
import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

import ds4jax

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = sorted(path for package in ("ds4jax", "pallas_kernels") for path in (ROOT / package).rglob("*.py"))
MOST_LINES = 400
MOST_LINES_OF_A_FUNCTION = 60


def name(path: Path) -> str:
    """A path as test ids show it."""
    return str(path.relative_to(ROOT))


def module(path: Path) -> str:
    """A file's name as `import` has it."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@pytest.mark.parametrize("path", PACKAGES, ids=name)
def test_size_and_docstrings(path: Path) -> None:
    source = path.read_text()
    tree = ast.parse(source)
    found = [] if source.count("\n") <= MOST_LINES else [f"{source.count(chr(10))} lines"]
    if source.strip() and not ast.get_docstring(tree):
        found.append("no docstring")
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.end_lineno and node.end_lineno - node.lineno >= MOST_LINES_OF_A_FUNCTION:
            found.append(f"{node.name}: {node.end_lineno - node.lineno + 1} lines")
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_") and not ast.get_docstring(node):
            found.append(f"{node.name}: no docstring")
    assert found == []


def imported(path: Path) -> set[str]:
    """Our modules that a file imports anywhere: at its top, inside functions, and for types alone.

    Only the package's face may name at its top, for types, what it imports on demand.
    """
    modules = set(map(module, PACKAGES))
    tree = ast.parse(path.read_text())
    nodes = tree.body if path == ROOT / "ds4jax" / "__init__.py" else ast.walk(tree)
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = {f"{node.module}.{alias.name}" for alias in node.names} & modules
            found |= inner if len(inner) == len(node.names) else inner | {node.module}
    return found & modules


def test_no_imports_go_in_a_circle() -> None:
    graph = {module(path): imported(path) for path in PACKAGES}
    assert graph["ds4jax.bench.prefill"] >= {"ds4jax.bench.whole_model", "ds4jax.decode.module"}
    assert "ds4jax.evaluation.check" in graph["ds4jax.language_model"], "an import inside a function counts"
    assert "ds4jax.text.tokenizer" in graph["ds4jax.text.prompt"], "an import for types counts"
    assert graph["ds4jax"] == {"ds4jax.config", "ds4jax.errors"}
    graphlib.TopologicalSorter(graph).prepare()


def printed(program: str) -> list[str]:
    """Lines that a fresh interpreter prints."""
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout.splitlines()


def test_kernels_stand_alone() -> None:
    names = ", ".join(module(path) for path in (ROOT / "pallas_kernels").rglob("[!_]*.py"))
    modules = printed(f"import sys, {names}; print(*sys.modules)")[0].split()
    assert {"pallas_kernels.ops", "pallas_kernels.experts.meaning"} <= set(modules)
    assert [module for module in modules if module.split(".")[0] in ("ds4jax", "flax", "gguf")] == []


def test_importing_ds4jax_starts_nothing() -> None:
    modules, backends = printed(
        "import ds4jax, sys; print(*sys.modules); ds4jax.load; from jax._src import xla_bridge; print(len(xla_bridge._backends))"
    )
    assert not {"jax", "flax", "numpy"} & set(modules.split())
    assert backends == "0"


def test_public_names_are_there() -> None:
    assert [public for public in ds4jax.__all__ if not hasattr(ds4jax, public)] == []


def test_tests_are_strict_and_share_a_cache() -> None:
    with pytest.raises(jax.dtypes.TypePromotionError):
        _ = jax.numpy.int32(1) + jax.numpy.float32(1)
    assert jax.config.jax_compilation_cache_dir
    assert jax.config.jax_persistent_cache_min_compile_time_secs == 0


def test_the_readme_says_which_versions_of_python_and_jax() -> None:
    """As the package asks for them, and jaxlib's are jax's."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = {one.name: one.specifier for one in map(Requirement, project["dependencies"])}
    assert asked["jax"] == asked["jaxlib"]
    assert jax.__version__ in asked["jax"]
    assert Version(platform.python_version()) in SpecifierSet(project["requires-python"])
    row = next(line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("| Python, jax |"))
    for one in (*SpecifierSet(project["requires-python"]), *asked["jax"]):
        assert re.search(rf"\b{re.escape(one.version)}\b", row), one
