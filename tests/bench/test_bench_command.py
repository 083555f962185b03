"""`ds4jax bench`: what they refuse, and how they end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import pytest

from ds4jax import runtime
from ds4jax.bench import environment, experts, kernels
from ds4jax.bench import suite as module
from ds4jax.cli import main as cli
from ds4jax.cli.commands import bench
from ds4jax.errors import InputError


def refusal(capsys: pytest.CaptureFixture[str], main: Any, *arguments: str) -> str:
    """The one line of a command that exits with 2."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    out, err = capsys.readouterr()
    assert (ended.value.code, out, err.count("\n")) == (2, "", 1)
    return err


def test_bench_kernels_needs_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    line = refusal(capsys, cli.main, "bench", "kernels", "--json", str(tmp_path / "k.json"))
    assert line == (
        "ds4jax: error: bench: jax runs on cpu here; kernels are timed on an NVIDIA GPU (pip install 'ds4jax[cuda13]')\n"
    )
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["bench"], "WHAT"),
        (["bench", "nothing"], "kernels"),
        (["bench", "kernels", "--rows", "1,x"], "--rows: 'x' is not an integer"),
        (["bench", "kernels", "--rows", ""], "--rows: '' is not an integer"),
        (["bench", "kernels", "--rows", "0"], "--rows: 0 is out of range; a launch takes 1 to 32 rows"),
        (["bench", "kernels", "--rows", "33"], "--rows: 33 is out of range"),
        (["bench", "kernels", "--shapes", "large"], "--shapes"),
        (["bench", "kernels", "--plot", "a.pdf"], "--plot: a.pdf: the figure is a PNG"),
        (["bench", "kernels", "--json", "no/such/folder/k.json"], "--json: no/such/folder/k.json: cannot be written"),
    ],
)
def test_bad_options(capsys: pytest.CaptureFixture[str], arguments: list[str], says: str) -> None:
    assert says in refusal(capsys, cli.main, *arguments)


def test_parts_of_the_suite() -> None:
    assert tuple(module.PARTS) == bench.PARTS


def test_rows() -> None:
    assert bench.row_counts("4,1,4,12") == (1, 4, 12)
    assert bench.row_counts(bench.DEFAULT_ROWS) == kernels.ROWS


def test_bench_kernels_writes_what_it_found(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    row = {"weight_bytes": 10**6, **kernels.row("8x64", "small", "share_warp", 2, [5.0], 10_000, 4.0)}
    asked = []

    def run(self: kernels.Bench, note: Any) -> kernels.Result:
        asked.append((self.rows, self.check_bits))
        return kernels.Result([row], [], ["head: it failed"])

    monkeypatch.setattr(environment, "require_gpu", lambda: None)
    monkeypatch.setattr(environment, "copy_gbps", lambda: 4.0)
    monkeypatch.setattr(kernels.Bench, "run", run)
    monkeypatch.setattr(experts, "measure", lambda bandwidth, note: ([], ["down: it failed, too"]))
    files = ["--json", str(tmp_path / "k.json"), "--plot", str(tmp_path / "k.png")]
    assert cli.main(["bench", "kernels", "--rows", "2", *files]) == 1
    assert asked == [((2,), False)]
    told = json.loads((tmp_path / "k.json").read_text())
    assert (told["rows"], told["problems"]) == ([row], ["head: it failed", "down: it failed, too"])
    assert (tmp_path / "k.png").stat().st_size > 1000
    assert "head: it failed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["suite"], "--part"),
        (["suite", "--part", "nothing", "--out", "x"], "kernels"),
        (["suite", "--part", "kernels", "--out", "pyproject.toml"], "--out: pyproject.toml: File exists"),
    ],
)
def test_bad_suite_options(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, root: Path, arguments: list[str], says: str
) -> None:
    monkeypatch.chdir(root)
    assert says in refusal(capsys, cli.main, "bench", *arguments)


def test_suite_needs_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    line = refusal(capsys, cli.main, "bench", "suite", "--part", "kernels", "--out", str(tmp_path / "out"))
    assert line.startswith("ds4jax: error: bench: jax runs on cpu here")
    monkeypatch.setenv("JAX_PLATFORMS", "nonsense")
    with pytest.raises(InputError, match="jax does not start: .*nonsense"):
        module.gpus()


def test_tests_run_in_a_fresh_process(monkeypatch: pytest.MonkeyPatch, root: Path, tmp_path: Path) -> None:
    monkeypatch.setenv("JAX_PLATFORMS", "")
    monkeypatch.setattr(module, "TESTS", ("-m", "pytest", "-q", "-p", "no:cacheprovider"))
    source, told = tmp_path / "test_one.py", tmp_path / "told.txt"
    tests = (str(source),)
    source.write_text(
        "import os\n\ndef test_it():\n"
        "    assert os.environ['XLA_PYTHON_CLIENT_PREALLOCATE'] == 'false'\n"
        "    assert os.environ['JAX_PLATFORMS'] == 'cuda,cpu'\n"
    )
    assert module.gpu_tests(told, tests)
    assert "1 passed" in told.read_text()
    source.write_text(f"def test_it():\n    assert {str(root / 'a')!r} == 1\n")
    assert not module.gpu_tests(told, tests)
    assert "1 failed" in told.read_text()
    assert str(root) not in told.read_text()
    source.write_text("import pytest\n\ndef test_it():\n    pytest.skip('no')\n")
    assert not module.gpu_tests(told, tests)


@pytest.mark.parametrize(("tested", "measured", "code"), [(True, True, 0), (False, True, 1), (True, False, 1)])
def test_suite(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    tested: bool,
    measured: bool,
    code: int,
) -> None:
    order = []

    def gpu_tests(path: Path, tests: tuple[str, ...]) -> bool:
        order.append((path.name, tests))
        path.write_text("tests/a.py F\nwhy\n1 failed\n")
        return tested

    def part(out: Path, slug: str, note: Any) -> bool:
        order.append(slug)
        return measured

    monkeypatch.setattr(module, "gpus", lambda: ("A GPU", 2))
    monkeypatch.setattr(module, "gpu_tests", gpu_tests)
    monkeypatch.setattr(module, "PARTS", {"kernels": module.Part(part, ("tests/one.py",))})
    assert cli.main(["bench", "suite", "--part", "kernels", "--out", str(tmp_path)]) == code
    assert order == ["a-gpu", ("a-gpu-kernels-gpu-tests.txt", ("tests/one.py",))]
    out = capsys.readouterr().out
    assert out.endswith("gpu tests: 1 failed\n")
    assert ("why" in out) is not tested


@pytest.mark.parametrize(
    ("differing", "problems", "good"), [(0, [], True), (1, [], False), (0, ["head: it failed"], False), (None, [], False)]
)
def test_kernels_part(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, differing: int | None, problems: list[str], good: bool
) -> None:
    compared = [] if differing is None else [{"shape": "8x64", "m": 2, "against": "a second run", "differing": differing}]
    row = kernels.row("8x64", "small", "share_warp", 2, [5.0], 10_000, 4.0)
    monkeypatch.setattr(runtime, "configure", lambda: None)
    monkeypatch.setattr(environment, "require_gpu", lambda: None)
    monkeypatch.setattr(environment, "copy_gbps", lambda: 4.0)
    monkeypatch.setattr(kernels.Bench, "run", lambda self, note: kernels.Result([row], compared, problems))
    monkeypatch.setattr(experts, "measure", lambda bandwidth, note: ([row], []))
    assert module.kernels_part(tmp_path, "a-gpu", lambda message: None) is good
    told = json.loads((tmp_path / "a-gpu-kernels.json").read_text())
    assert (told["rows"], told["bits"], told["problems"]) == ([row, row], compared, problems)
