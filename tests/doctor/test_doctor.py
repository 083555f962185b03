"""Each thing that can be wrong gives its line, with what to do; and a machine where all is well."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import jax
import pytest

import ds4jax
from ds4jax import nvidia
from ds4jax.bounds import WORKING_BYTES
from ds4jax.cli import main as cli
from ds4jax.device import DeviceMemory
from ds4jax.doctor import child, devices, resources, self_check, versions
from ds4jax.doctor.probe import Probe, probe
from ds4jax.doctor.row import Row
from ds4jax.nvidia import Card

CPU = Probe("cpu", "jnp, quantised arithmetic (Q8_0, at most 32 rows)", "cpu")
CARD = Card("580.82.07", 140_000_000_000, 150_000_000_000)


@pytest.fixture(autouse=True)
def no_platform(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)


def installed(**changed: str | None) -> Callable[[str], str]:
    """Versions of packages: this environment's without plugins of JAX, and some changed. "_" stands for "-"; None is missing."""

    def of(name: str) -> str:
        version = changed.get(name.replace("-", "_"), None if name.endswith("-plugin") else metadata.version(name))
        if version is None:
            raise metadata.PackageNotFoundError(name)
        return version

    return of


def todos(rows: list[Row]) -> dict[str, str]:
    return {row.name: row.todo for row in rows if row.todo}


def test_versions_of_this_environment() -> None:
    rows = list(versions.rows())
    assert todos(rows) == {}
    assert rows[0].value.startswith(f"{ds4jax.__version__}, Python 3.")
    assert (
        rows[1].value == f"jax {jax.__version__}, jaxlib {metadata.version('jaxlib')}, flax {metadata.version('flax')}: supported"
    )


def test_versions_that_are_not_supported() -> None:
    found = todos(list(versions.rows(installed(jax="0.11.1", flax=None, rich="1.0"))))
    assert found["packages"].startswith("jax 0.11.1 is not supported: pip install 'jax")
    assert "; flax is not installed: pip install 'flax>=" in found["packages"]
    assert found["rich"].startswith("rich 1.0 is not supported: pip install 'rich>=")


def test_python_that_is_not_supported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions.platform, "python_version", lambda: "3.10.4")
    assert todos(list(versions.rows())) == {"ds4jax": "Python 3.10.4 is not supported: use Python >=3.11"}


def test_a_machine_without_a_gpu() -> None:
    rows = list(devices.rows(CPU, (), installed()))
    assert [(row.name, row.value, row.todo) for row in rows] == [
        ("device", "cpu", None),
        ("driver", "no NVIDIA driver", None),
        ("kernels", CPU.kernels, None),
    ]


@pytest.mark.parametrize(("driver", "extra"), [("580.82.07", "cuda13"), ("550.54", "cuda12")])
def test_a_driver_without_a_plugin(driver: str, extra: str) -> None:
    found = todos(list(devices.rows(CPU, (Card(driver, 1, 1),), installed())))
    assert found == {"device": f"jax runs on the CPU, and has no plugin for the NVIDIA GPU: pip install 'ds4jax[{extra}]'"}


def test_a_plugin_that_does_not_work() -> None:
    found = todos(list(devices.rows(CPU, (CARD,), installed(jax_cuda13_plugin="0.10.2"))))
    assert list(found) == ["device"]
    assert found["device"].endswith("although it has a plugin for the NVIDIA GPU: pip install --force-reinstall 'ds4jax[cuda13]'")


def test_a_driver_too_old_for_the_plugin() -> None:
    gpu = Probe("NVIDIA H200", "pallas share-warp", "gpu")
    found = todos(list(devices.rows(gpu, (Card("550.54", 1, 1),), installed(jax_cuda13_plugin="0.10.2"))))
    assert found == {"driver": "driver 550.54 is too old for cuda13: install driver 580 or newer or pip install 'ds4jax[cuda12]'"}
    assert todos(list(devices.rows(gpu, (CARD,), installed(jax_cuda13_plugin="0.10.2")))) == {}


def test_the_user_may_choose_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert todos(list(devices.rows(CPU, (CARD,), installed()))) == {}


def test_jax_that_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAX_PLATFORMS", "nowhere")
    found = todos(list(devices.rows(probe(60), (), installed())))
    assert found["device"].startswith("jax does not start: ")
    assert found["device"].endswith(": unset JAX_PLATFORMS, which is nowhere")


def test_a_cache_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("DS4JAX_CACHE", str(tmp_path / "file" / "jax"))
    row = resources.cache()
    assert row.value == f"{tmp_path}/file/jax, cannot be written"
    assert row.todo
    assert row.todo.endswith(": set DS4JAX_CACHE to a folder that can be written")


def test_the_size_of_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "program").write_bytes(bytes(2_500_000))
    monkeypatch.setenv("DS4JAX_CACHE", str(tmp_path))
    assert resources.cache() == Row(
        "cache",
        f"{tmp_path}, writable, 1 files of 2.5 MB",
        None,
        {"folder": str(tmp_path), "writable": True, "files": 1, "size": 2_500_000},
    )
    monkeypatch.delenv("DS4JAX_CACHE")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "gs://bucket/programs")
    assert resources.cache().value == "gs://bucket/programs, of jax; not looked at"


def test_little_memory() -> None:
    total = 10 * WORKING_BYTES
    enough, little = (DeviceMemory(total, total - free, None) for free in (WORKING_BYTES, WORKING_BYTES - 1))
    assert resources.host(enough).todo is None
    found = resources.host(little)
    assert (found.value, found.figures) == ("2.0 GB of 20.0 GB free", {"free": WORKING_BYTES - 1, "total": total})
    assert found.todo == "only 2.0 GB of memory are free, 2.0 GB are needed: end other programs, or raise the container's limit"
    rows = resources.device((CARD, Card("580", 1_000_000_000, 150_000_000_000), Card("580", None, None)))
    assert [row.name for row in rows] == ["GPU 0", "GPU 1", "GPU 2"]
    assert list(todos(rows)) == ["GPU 1"]
    assert "CUDA_VISIBLE_DEVICES" in str(rows[1].todo)


@pytest.mark.parametrize(
    ("printed", "cards"),
    [
        ("580.82.07, 100, 143771", (Card("580.82.07", 100 << 20, 143771 << 20),)),
        ("580.1, 1, 2\n580.1, [N/A], [N/A]", (Card("580.1", 1 << 20, 2 << 20), Card("580.1", None, None))),
        ("", ()),
    ],
)
def test_what_the_driver_prints(printed: str, cards: tuple[Card, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\necho '{printed}'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert nvidia.cards() == cards
    program.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed'\nexit 9\n")
    assert nvidia.cards() == ()


def comparisons(*differences: str | None) -> str:
    """A program that reports a loaded model and comparisons with these differences."""
    rows = [{"draft": draft, "tokens": 48, "difference": one} for draft, one in enumerate(differences)]
    return f"from ds4jax.doctor.child import say; say(); [say(**row) for row in {rows}]"


def test_a_self_check_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_check, "PROGRAM", comparisons(None, "new token 3 is 7, not 9"))
    row = self_check.self_check()
    assert (row.value, row.figures["equal"]) == ("not equal", False)
    assert row.todo == "with 1 drafts new token 3 is 7, not 9: ds4jax check shows which modes differ; use --draft 0"


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("raise RuntimeError('out of memory')", "RuntimeError: out of memory"),
        ("import os; os.abort()", "exit code -6"),
        (comparisons(None) + "; import time; time.sleep(600)", "stopped after 1 s"),
    ],
)
def test_a_self_check_that_ends_early(program: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_check, "PROGRAM", program)
    monkeypatch.setattr(self_check, "COMPARING", 1.0)
    began = time.monotonic()
    assert self_check.self_check().todo == f"{reason}: ds4jax generate '{self_check.PROMPT}' shows what happens"
    assert time.monotonic() - began < 60


def test_the_parent_sees_each_part_as_it_is_done() -> None:
    program = "from ds4jax.doctor.child import say; print('a library'); say(part=1); say(part=2); input()"
    parts = child.objects(program, 60)
    assert [next(parts), next(parts)] == [{"part": 1}, {"part": 2}]
    with pytest.raises(child.ChildError, match="EOFError"):
        next(parts)


@pytest.mark.long
def test_a_self_check_here() -> None:
    """48 tokens of the tiny model, in a process of its own that finds its programs in the cache of the tests."""
    seen: list[tuple[int, int]] = []
    row = self_check.self_check(lambda done, total: seen.append((done, total)))
    assert row.todo is None
    assert row.value.startswith("48 tokens of the tiny model with 2 drafts a step and without: equal bits, ")
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


@pytest.mark.parametrize("difference", [None, "new token 3 is 7, not 9"])
def test_the_command(difference: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(self_check, "PROGRAM", comparisons(None, difference))
    monkeypatch.setattr(nvidia, "cards", lambda: ())
    monkeypatch.setattr("ds4jax.device.host_memory", lambda: None)
    monkeypatch.setattr("ds4jax.doctor.probe.probe", lambda seconds: CPU)
    assert cli.main(["doctor"]) == (1 if difference else 0)
    out, err = capsys.readouterr()
    lines = out.splitlines()
    names = ["ds4jax", "packages", "device", "driver", "kernels", "cache", "host", "self-check"]
    assert err == ""
    assert [line.split()[0] for line in lines[:8]] == names
    todo = f"with 1 drafts {difference}: ds4jax check shows which modes differ; use --draft 0"
    assert lines[8:] == ([f"self-check: {todo}", "1 to mend"] if difference else ["all is well"])
    assert cli.main(["doctor", "--json"]) == (1 if difference else 0)
    told = json.loads(capsys.readouterr().out)
    assert told["well"] is (difference is None)
    assert [row["name"] for row in told["rows"]] == names
    assert [row["name"] for row in told["rows"] if row["todo"]] == (["self-check"] if difference else [])
