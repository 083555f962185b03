"""`bench mesh`: runs on virtual devices, a gather that is wrong, processes that fail or hang, and what cannot be measured."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from ds4jax.bench import environment, mesh, mesh_processes, report, suite
from ds4jax.bench.exchanges import of_step
from ds4jax.bench.mesh_options import Options, Run, runs
from ds4jax.bench.mesh_worker import Task
from ds4jax.bounds import MESH_PIECES, WAYS
from ds4jax.cli import main as cli
from ds4jax.errors import InputError
from ds4jax.random_models import checkpoint as synthetic

FAULTY = str(Path(__file__).parents[1] / "faulty_mesh_worker.py")
SIZES = ["--context", "64", "--long", "600", "--prompt", "64", "--steps", "3", "--links", "2", "--slots", "2"]
TINY = ["bench", "mesh", "--synthetic", "small-q2", *SIZES]


def silent(message: str) -> None:
    """For notes that nobody reads."""


@pytest.fixture
def eight(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes have eight devices of a CPU."""
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=8")


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch) -> None:
    """There seem to be two devices; no process looks."""
    monkeypatch.setattr(
        environment, "probe", lambda: {"device": "A GPU", "jax": "1", "backend": "gpu", "count": 2, "command": ""}
    )


@pytest.mark.usefixtures("eight")
@pytest.mark.long
def test_one_and_two_devices_have_the_same_bits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "mesh.json"
    options = ["--layers", "1", "--devices", "2", "--pieces", "plain", "--json", str(file)]
    assert cli.main([*TINY, *options]) == 0, capsys.readouterr().out
    content = json.loads(file.read_text())
    assert [(row["devices"], row["name"]) for row in content["rows"]] == [(2, "plain"), (1, "plain")]
    assert [(one["devices"], one["steps"], one["equal"]) for one in content["compared"]] == [(2, 3, True)]
    held = {one["devices"]: one["held_bytes"] for one in content["models"]}
    assert held[1] == [content["models"][0]["weight_bytes"]]
    assert held[2] == [synthetic_share(1, 2)] * 2
    assert "bits: 1 comparisons, 0 with differences" in capsys.readouterr().out


@pytest.mark.long
@pytest.mark.usefixtures("eight")
def test_gathers_are_timed_at_every_size(tmp_path: Path) -> None:
    file = tmp_path / "mesh.json"
    assert cli.main([*TINY, "--devices", "4", "--pieces", "gathers", "--json", str(file)]) == 0
    config, rows = synthetic.config_of("small-q2"), json.loads(file.read_text())["gathers"]
    sizes = {4 * count * one.floats for count in (1, 2) for one in of_step(config, 4)}
    assert [row["whole_bytes"] for row in rows] == sorted(sizes)
    assert all(row["right"] and row["us_per_gather"] > 0 for row in rows)


def synthetic_share(layers: int, devices: int) -> int:
    """Bytes of each device's share."""
    from ds4jax.loading.plan import share_bytes

    return share_bytes(synthetic.checkpoint(synthetic.config_of("small-q2", layers), "small-q2"), devices)


@pytest.mark.long
@pytest.mark.usefixtures("eight")
def test_a_wrong_gather_ends_with_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(mesh_processes, "PROGRAM", (FAULTY,))
    file = tmp_path / "mesh.json"
    options = ["--layers", "1", "--devices", "2", "--pieces", "gathers,plain", "--json", str(file)]
    assert cli.main([*TINY, *options]) == 1
    content = json.loads(file.read_text())
    [one] = content["compared"]
    assert (one["equal"], one["first_differing_step"]) == (False, 0)
    assert not any(row["right"] for row in content["gathers"])
    # A piece without problems is not measured again, whatever its bits are.
    assert [one["piece"] for one in content["finished"]] == ["plain", "plain"]
    out = capsys.readouterr().out
    assert "DIFFERENT: small-q2, plain, 2 devices against 1 device: 3 of 3 steps, first 0" in out
    assert "brings values to a wrong place" in out


@pytest.mark.slow
@pytest.mark.usefixtures("eight")
@pytest.mark.parametrize(
    ("layout", "layers", "pieces", "drafts", "assumed"),
    [
        ("small-q2", "1", "plain,drafts", "2 drafts of mtp", 1.75),
        # DSpark reads three layers.
        ("small-0731-q2", "3", ",".join(MESH_PIECES), "5 drafts of dspark", 4.42),
    ],
)
def test_a_whole_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], layout: str, layers: str, pieces: str, drafts: str, assumed: float
) -> None:
    """Every piece, on one and two devices and in two processes; then nothing is left to measure."""
    file, picture = tmp_path / "mesh.json", tmp_path / "mesh.png"
    options = ["--synthetic", layout, "--layers", layers, "--pieces", pieces, "--devices", "2"]
    simulated = ["--acceptance", "0.5,0.5", "--per-step", "4.42"]
    arguments = [*TINY, *options, *simulated, "--json", str(file), "--plot", str(picture)]
    assert cli.main(arguments) == 0, capsys.readouterr().out
    content = json.loads(file.read_text())
    for devices in (2, 1):
        rows = [row for row in content["rows"] if row["devices"] == devices and row["processes"] == 1]
        assert [row["piece"] for row in rows] == [one for one in pieces.split(",") if one not in ("gathers", "processes")]
        [drafted] = (row for row in rows if row["piece"] == "drafts")
        assert (drafted["name"], drafted["assumed_tokens_per_step"], drafted["lossless"]) == (drafts, assumed, True)
        assert drafted["simulated"]
    apart = [row["name"] for row in content["rows"] if row["processes"] == 2]
    assert apart == (["plain"] if "processes" in pieces else [])
    assert len(content["compared"]) == len(rows) + len(apart)
    assert all(one["equal"] for one in content["compared"])
    assert picture.stat().st_size > 20_000
    capsys.readouterr()
    assert cli.main([*arguments, "--resume"]) == 0
    again = json.loads(file.read_text())
    assert {name: value for name, value in again.items() if name != "command"} == {
        name: value for name, value in content.items() if name != "command"
    }


def test_the_most_important_comes_first() -> None:
    made = runs(Options(layouts=("mxfp4-layout", "flash-q2")), 4)
    assert [(run.layout, run.devices, run.processes) for run in made] == [
        (None, 4, 1),
        ("mxfp4-layout", 4, 1),
        ("flash-q2", 4, 1),
        ("mxfp4-layout", 1, 1),
        ("flash-q2", 1, 1),
        ("flash-q2", 4, 2),
        ("mxfp4-layout", 2, 1),
        ("flash-q2", 2, 1),
    ]
    assert {run.pieces[0] for run in made} == {"gathers", "plain"}
    assert made[5].pieces == ("plain",)
    assert made[3].exchange == "none"


def test_every_exchange_is_measured() -> None:
    made = runs(Options(layouts=("flash-q2",), exchanges=("collective", "another"), pieces=("gathers", "plain")), 2)
    assert [(run.layout, run.devices, run.exchange) for run in made] == [
        (None, 2, "collective"),
        (None, 2, "another"),
        ("flash-q2", 2, "collective"),
        ("flash-q2", 2, "another"),
        ("flash-q2", 1, "none"),
    ]


def says(*lines: dict[str, Any], then: str = "") -> tuple[str, ...]:
    """A program that says this, and then runs some code."""
    printed = "".join(f"print({'ds4jax-mesh ' + json.dumps(line)!r}, flush=True);" for line in lines)
    return "-c", f"import sys, time; print('Gloo'); {printed}{then}"


DIGESTS = {"tokens_digest": "a", "step_digests": ["1", "2"]}
PLAIN = {"row": {"piece": "plain", "name": "plain", "ms_per_step": 2.0, "tokens_per_second": 500.0, **DIGESTS}}
FINISHED = {"finished": {"piece": "plain"}}
DONE = {"done": True}


def measured(
    monkeypatch: pytest.MonkeyPatch, program: tuple[str, ...], before: Any = None, **options: Any
) -> tuple[dict[str, Any], list[int]]:
    """A result of processes that run this program, and the rows that it had whenever it was kept."""
    monkeypatch.setattr(mesh_processes, "PROGRAM", program)
    kept: list[int] = []
    chosen = Options(layouts=("flash-q2",), pieces=("plain",), **options)
    return mesh.bench(chosen, silent, lambda content: kept.append(len(content["rows"])), before), kept


@pytest.mark.usefixtures("two")
def test_what_was_found_is_kept_at_once_and_not_measured_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    content, kept = measured(monkeypatch, says(PLAIN, FINISHED, DONE))
    assert kept == [1, 1, 1, 2, 2, 2]
    assert mesh.good(content)
    path = tmp_path / "mesh.json"
    report.write(path, content)
    before = mesh.earlier(path)
    again, kept = measured(monkeypatch, says(then="sys.exit(3)"), before, limit_seconds=100)
    assert (again, kept) == (content, [])
    assert before is not None
    # Of another version, or cut in the middle of a piece.
    other = before | {"jax": "2"}
    assert len(measured(monkeypatch, says(PLAIN, FINISHED, DONE), other)[0]["rows"]) == 2
    cut = before | {"finished": before["finished"][:1]}
    again, kept = measured(monkeypatch, says(PLAIN, FINISHED, DONE), cut)
    assert (len(again["rows"]), kept) == (2, [2, 2, 2])
    assert mesh.earlier(tmp_path / "none.json") is None
    for text in ("no", "[1]", "{}"):
        path.write_text(text)
        with pytest.raises(InputError, match=r"mesh\.json: is no result of this benchmark"):
            mesh.earlier(path)


@pytest.mark.parametrize(
    ("program", "says_why"),
    [
        (says(PLAIN, then="sys.exit('it broke\\nat last')"), "the process ended with 1: at last"),
        (says(PLAIN), "the process ended early"),
        (says(PLAIN, FINISHED, {"problem": "long: no memory"}, DONE), "long: no memory"),
    ],
)
@pytest.mark.usefixtures("two")
def test_a_failure_is_a_problem_and_the_rest_is_measured(
    monkeypatch: pytest.MonkeyPatch, program: tuple[str, ...], says_why: str
) -> None:
    content, _ = measured(monkeypatch, program)
    assert content["problems"] == [f"flash-q2, 2 devices, collective: {says_why}", f"flash-q2, 1 device: {says_why}"]
    assert len(content["rows"]) == 2
    assert not mesh.good(content)


ALONE = f"""
import sys
from ds4jax.bench import environment, mesh, mesh_processes, mesh_report
from jax._src import xla_bridge

environment.probe = lambda: {{"device": "A GPU", "jax": "1", "backend": "gpu", "count": 4, "command": ""}}
mesh_processes.PROGRAM = {says(PLAIN, FINISHED, DONE)!r}
mesh_report.show(mesh.bench(mesh.Options(), print, lambda content: None))
sys.exit(len(xla_bridge._backends))
"""


def test_the_first_process_starts_no_device() -> None:
    """It would hold the memory that the others need."""
    done = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "bits: 5 comparisons, 0 with differences" in done.stdout


@pytest.mark.usefixtures("two")
def test_a_process_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    began = time.monotonic()
    content, _ = measured(monkeypatch, says(PLAIN, then="time.sleep(600)"), limit_seconds=2)
    assert content["problems"] == ["flash-q2, 2 devices, collective: ended after 2 s", "flash-q2, 1 device: ended after 2 s"]
    content, _ = measured(monkeypatch, says(PLAIN, then="time.sleep(600)"), all_seconds=2)
    assert content["problems"][1] == "flash-q2, 1 device: the time was up"
    assert len(content["rows"]) == 1
    assert time.monotonic() - began < 60


@pytest.mark.usefixtures("two")
def test_a_layout_may_be_too_large_for_one_device_but_not_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    content, _ = measured(monkeypatch, says({"too_large": "it needs more"}))
    assert [(one["devices"], one["reason"]) for one in content["not_measured"]] == [(2, "it needs more"), (1, "it needs more")]
    assert content["problems"] == ["flash-q2, 2 devices, collective: it needs more"]


def test_a_task_survives_its_text() -> None:
    task = Task(Options(slots=(2, 4), acceptance=(0.5,)), Run("flash-q2", 2, "collective", ("plain", "long"), 2), 1, 9000)
    assert Task.of(task.text()) == task


def test_each_process_sees_its_part_of_the_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XLA_FLAGS", "--a")
    monkeypatch.delenv(mesh_processes.SHOWN, raising=False)
    assert mesh_processes._share_of_devices(1, 2, 8) == {
        "CUDA_VISIBLE_DEVICES": "4,5,6,7",
        "XLA_FLAGS": "--a --xla_force_host_platform_device_count=4",
    }
    monkeypatch.setenv(mesh_processes.SHOWN, "7,GPU-a,2")
    assert mesh_processes._share_of_devices(0, 2, 2)[mesh_processes.SHOWN] == "7"
    assert mesh_processes._share_of_devices(1, 2, 2)[mesh_processes.SHOWN] == "GPU-a"


@pytest.mark.usefixtures("two")
def test_part_of_the_suite(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Every process says the same; those of the gathers, too."""
    monkeypatch.setattr(mesh_processes, "PROGRAM", says(PLAIN, FINISHED, DONE))
    assert suite.PARTS["mesh"].several
    assert suite.mesh_part(tmp_path, "a-gpu-x2", silent)
    content = json.loads((tmp_path / "a-gpu-x2-mesh.json").read_text())
    assert content["options"]["layouts"] == ["mxfp4-layout", "flash-q2"]
    assert (tmp_path / "a-gpu-x2-mesh.png").exists()


def test_names_of_its_files_have_the_number_of_devices(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = []
    monkeypatch.setattr(suite, "gpus", lambda: ("A GPU", 4))
    monkeypatch.setattr(suite, "gpu_tests", lambda path, tests: found.append(path.name) or path.write_text("1 passed\n") > 0)
    part = suite.Part(lambda out, slug, note: found.append(slug) is None, (), several=True)
    monkeypatch.setattr(suite, "PARTS", {"mesh": part})
    assert suite.suite("mesh", tmp_path) == 0
    assert found == ["a-gpu-x4", "a-gpu-x4-mesh-gpu-tests.txt"]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--devices", "3"], "devices is 3; there are 2 gpu devices"),
        (["--devices", "1"], "argument --devices: 1 is out of range; this measures at least 2 devices"),
        (["--synthetic", "flash"], "argument --synthetic: 'flash' is not a layout; give some of flash-q2, "),
        (["--pieces", "plain,fast"], "argument --pieces: 'fast' is not a piece; give some of gathers, plain, "),
        (["--exchange", ""], "argument --exchange: '' is not an exchange; give some of collective"),
        (["--slots", "65"], "slots is 65; a step has at most 64"),
        (["--long", "9000"], "long is 9000 and steps 3; small-q2 ends at 4096"),
        (["--devices", "2", "--pieces", "processes"], "pieces is processes: it stands beside plain"),
        (["--layers", "7"], "layers is 7; small-q2 has 6"),
        (["--resume"], "--resume: give --json FILE, too"),
        (["--plot", "a.pdf"], "argument --plot: a.pdf: the figure is a PNG; end the name with .png"),
    ],
)
@pytest.mark.usefixtures("two")
def test_bad_input_is_one_line(capsys: pytest.CaptureFixture[str], arguments: list[str], line: str) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([*TINY, *arguments])
    out, err = capsys.readouterr()
    assert (ended.value.code, out, err.count("\n")) == (2, "", 1)
    assert line.removeprefix("argument ") in err


def test_one_device_is_no_mesh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "probe", lambda: {"backend": "cpu", "count": 1})
    with pytest.raises(InputError, match="devices is 1; this measures at least 2"):
        mesh.bench(Options(), silent, lambda content: None)


@pytest.mark.parametrize(("device", "expected"), [("NVIDIA H200", WAYS), ("NVIDIA A100-SXM4-80GB", WAYS[:1])])
def test_without_a_name_every_exchange_that_the_devices_can_have(
    monkeypatch: pytest.MonkeyPatch, device: str, expected: tuple[str, ...]
) -> None:
    found = {"device": device, "jax": "1", "backend": "gpu", "count": 2, "command": ""}
    monkeypatch.setattr(environment, "probe", lambda: found)
    monkeypatch.setattr(mesh, "_follow", lambda *_: None)
    options = Options(layouts=("flash-q2",), exchanges=(), pieces=("plain",))
    content = mesh.bench(options, silent, lambda content: None)
    assert content["options"]["exchanges"] == list(expected)
