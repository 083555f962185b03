"""The wheel, built from the sdist as `python -m build` does it, installed alone and used outside the checkout."""

from __future__ import annotations

import os
import site
import subprocess
import sys
import venv
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

import ds4jax

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("ds4jax", "pallas_kernels")
PROMPT, NEW_TOKENS = "In the beginning", 16

Run = Callable[..., str]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT], check=True, capture_output=True)
    assert len(list(folder.glob("ds4jax-*.tar.gz"))) == 1
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Runs a program of a fresh environment that has the wheel, in an empty folder, and returns its stdout."""
    folder = tmp_path_factory.mktemp("fresh")
    venv.create(folder / "env", symlinks=True)
    python = folder / "env" / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps"]
    subprocess.run([*pip, wheel], check=True, capture_output=True)
    # The dependencies are those of this environment. A path in a .pth file is not a site folder, so a ds4jax that is installed
    # there from a checkout stays invisible.
    (place,) = (folder / "env").glob("lib/python*/site-packages")
    (place / "dependencies.pth").write_text("\n".join(site.getsitepackages()))
    (folder / "empty").mkdir()
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(program: str, *arguments: str) -> str:
        command = [folder / "env" / "bin" / program, *arguments]
        return subprocess.run(
            command, check=True, stdout=subprocess.PIPE, text=True, cwd=folder / "empty", env=environment
        ).stdout

    return run


@pytest.mark.slow
def test_the_wheel_holds_both_packages(wheel: Path) -> None:
    """Every file of them that is tracked: the tiny model, its text and heads, tables, the chat page, and the marks for types."""
    tracked = subprocess.run(["git", "ls-files", *PACKAGES], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if name.split("/")[0] in PACKAGES}
    assert names == set(tracked.splitlines())
    assert {f"{package}/py.typed" for package in PACKAGES} <= names


@pytest.mark.slow
def test_the_wheel_generates(installed: Run) -> None:
    where = installed("python", "-c", "import ds4jax, pallas_kernels; print(ds4jax.__file__, pallas_kernels.__file__)")
    assert str(ROOT) not in where
    text = installed("ds4jax", "generate", PROMPT, "--max-new-tokens", str(NEW_TOKENS), "--max-draft", "2")
    assert text.rstrip() == ds4jax.load().generate(PROMPT, max_new_tokens=NEW_TOKENS).text.rstrip()


@pytest.mark.slow
def test_the_wheel_knows_its_versions(installed: Run) -> None:
    assert installed("ds4jax", "--version").splitlines()[0] == f"ds4jax   {ds4jax.__version__}"
    rows = installed("python", "-c", "from ds4jax.doctor import versions; print(*versions.rows(), sep='\\n')").splitlines()
    assert len(rows) == 2
    assert all("todo=None" in row for row in rows)
