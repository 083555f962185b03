"""Versions of Python and of the packages that ds4jax needs, and whether it supports them."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator
from importlib import metadata

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import ds4jax
from ds4jax.doctor.row import Row

# Packages whose versions are shown; the others are only checked.
SHOWN = ("jax", "jaxlib", "flax")


def rows(of: Callable[[str], str] = metadata.version) -> Iterator[Row]:
    """A row for ds4jax with Python, one for the packages in `SHOWN`, and one for each other package of a wrong version.

    The supported versions are those that pyproject.toml named when ds4jax was installed.

    Args:
        of: version of a package by its name; raises `PackageNotFoundError`.
    """
    try:
        python, needed = _asked()
    except metadata.PackageNotFoundError:
        yield Row("ds4jax", f"{ds4jax.__version__}, not installed", "ds4jax is not installed: pip install . in its folder")
        return
    found = platform.python_version()
    wrong = f"Python {found} is not supported: use Python {python}" if not python.contains(found) else None
    yield Row("ds4jax", f"{ds4jax.__version__}, Python {found}", wrong, {"version": ds4jax.__version__, "python": found})
    states = {one.name: _state(one, of) for one in needed}
    shown = {name: states.pop(name) for name in SHOWN}
    bad = [todo for _, todo in shown.values() if todo]
    versions = {name: version for name, (version, _) in shown.items()}
    text = ", ".join(f"{name} {version or 'not installed'}" for name, version in versions.items())
    yield Row("packages", f"{text}: {'not ' if bad else ''}supported", "; ".join(bad) or None, versions)
    yield from (Row(name, version or "not installed", todo) for name, (version, todo) in states.items() if todo)


def _asked() -> tuple[SpecifierSet, list[Requirement]]:
    """Supported versions of Python and of each needed package, by the installed metadata."""
    python = SpecifierSet(metadata.metadata("ds4jax")["Requires-Python"])
    needed = [Requirement(line) for line in metadata.requires("ds4jax") or ()]
    return python, [one for one in needed if one.marker is None]


def _state(needed: Requirement, of: Callable[[str], str]) -> tuple[str | None, str | None]:
    """Version of a package, or None; and what to do, or None."""
    try:
        version = of(needed.name)
    except metadata.PackageNotFoundError:
        return None, f"{needed.name} is not installed: pip install '{needed}'"
    if needed.specifier.contains(version, prereleases=True):
        return version, None
    return version, f"{needed.name} {version} is not supported: pip install '{needed}'"
