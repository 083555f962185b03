"""Programs of a GPU on disk: what their names hold, and that a loaded one has the bits of a compiled one."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import pytest
from kept_programs import KEY, filled, kept_in, lowered

from ds4jax import nvidia
from ds4jax.engine import kept, program_key


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder of programs."""
    with kept_in(tmp_path, monkeypatch) as made:
        yield made


@dataclasses.dataclass
class Topology:
    """XLA's description of a GPU."""

    number: int = 1

    def fingerprint(self) -> int:
        return self.number


@pytest.fixture
def new_machine() -> Iterator[None]:
    """The facts of the machine are looked up again, and forgotten afterwards."""
    program_key._machine.cache_clear()
    yield
    program_key._machine.cache_clear()


@pytest.mark.usefixtures("new_machine")
def test_the_facts_of_a_gpu_are_in_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its description, multiprocessors, driver and libraries; not which one it is of several equal ones."""
    client = types.SimpleNamespace(platform_version="cuda 12090")
    device = types.SimpleNamespace(platform="gpu", device_kind="NVIDIA H200", core_count=132, client=client)
    topology, driver = Topology(), tmp_path / "version"
    monkeypatch.setattr(program_key.xla_client, "get_topology_for_devices", lambda devices: topology)
    monkeypatch.setattr(jax, "devices", lambda: [device])
    monkeypatch.setattr(nvidia, "installed", functools.partial(nvidia.installed, driver))
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def named() -> str | None:
        program_key._machine.cache_clear()
        return kept.name_of(KEY)

    names = [named()]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert named() == names[0]
    for change in (
        lambda: setattr(client, "platform_version", "cuda 13000"),
        lambda: setattr(device, "core_count", 66),
        lambda: setattr(device, "device_kind", "NVIDIA H100 80GB HBM3"),
        lambda: setattr(topology, "number", 2),
        lambda: driver.write_text("580.159.04"),
        lambda: (tmp_path / "nvidia_cublas_cu12-12.9.dist-info").mkdir(),
        lambda: (tmp_path / "jax_cuda12_plugin-0.11.2.dist-info").mkdir(),
        lambda: monkeypatch.setenv("LD_LIBRARY_PATH", "/opt/cuda/lib64"),
        lambda: monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0"),
    ):
        change()
        names.append(named())
        assert None not in names
        assert len(set(names)) == len(names)


@pytest.mark.usefixtures("new_machine")
def test_a_gpu_that_xla_does_not_describe_has_no_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(devices: Any) -> Any:
        raise jax.errors.JaxRuntimeError("UNIMPLEMENTED")

    client = types.SimpleNamespace(platform_version="cuda 12090")
    monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(platform="gpu", device_kind="NVIDIA H200", client=client)])
    monkeypatch.setattr(program_key.xla_client, "get_topology_for_devices", refused)
    assert kept.name_of(KEY) is None


def test_mosaic_is_imported_before_a_program_of_a_gpu_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its import says where CUDA's assembler is, which a trace would have done."""
    name, _ = filled()
    imported: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(kept, "_find_tools", kept._find_tools.__wrapped__)
        patch.setattr(kept.importlib, "import_module", imported.append)
        assert kept.load(name) is not None
        assert imported == []
        patch.setattr(jax, "default_backend", lambda: "gpu")
        patch.setattr(kept, "deserialize_and_load", lambda *_, **__: list(imported))
        assert kept.load(name) == ["jax.experimental.mosaic.gpu"]


def test_a_program_of_a_gpu_is_in_the_cache_of_jax_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that one that cannot be loaded by its name is not compiled in every process. A CPU's is not."""
    asked: list[tuple[Any, float]] = []
    compiled = jax.stages.Lowered.compile

    def recorded(self: jax.stages.Lowered, options: Any = None) -> jax.stages.Compiled:
        asked.append((options, jax.config.jax_persistent_cache_min_compile_time_secs))
        return compiled(self, options)

    monkeypatch.setattr(jax.stages.Lowered, "compile", recorded)
    kept.compiled(kept.name_of(("on a CPU",)), lowered(0.25))
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    kept.compiled(kept.name_of(("on a GPU",)), lowered(0.75))
    (apart, most), (_, usual) = asked
    assert apart is not None
    assert (most, usual) == (float("inf"), 0)
    assert asked[1][0] is None


# A slice of V4-Flash with layers of every kind. What JAX does while the weights are made does not count.
PROCESS = """
import collections, json, sys
import jax
from ds4jax import runtime

runtime.process_of_a_command = True
runtime.configure()
from ds4jax.language_model import from_checkpoint
from ds4jax.random_models import checkpoint

layout, layers, max_draft = json.loads(sys.argv[1])
model = from_checkpoint(checkpoint.checkpoint(checkpoint.config_of(layout, layers), layout), max_draft=max_draft)
jax.block_until_ready(model.weights)
events = collections.Counter()
jax.monitoring.register_event_duration_secs_listener(lambda event, *_, **__: events.update([event.rsplit("/")[-1]]))
result = model.generate(range(5, 305), max_new_tokens=24, ignore_eos=True)
print(json.dumps([result.ids, result.fingerprint, events]))
"""


def told(folder: Path, *options: Any) -> tuple[list[int], str, dict[str, int]]:
    """Tokens, fingerprint and events of JAX of one process, which must say nothing else."""
    environment = os.environ | {"DS4JAX_CACHE": str(folder)}
    command = [sys.executable, "-c", PROCESS, json.dumps(options)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "ds4jax: note" not in done.stderr
    ids, fingerprint, events = json.loads(done.stdout.splitlines()[-1])
    return ids, fingerprint, events


@pytest.mark.parametrize(
    ("layout", "layers", "max_draft"),
    [
        pytest.param("small-q2", 3, 0, marks=pytest.mark.long),
        pytest.param("flash-q2", 4, 2, marks=pytest.mark.gpu),
    ],
)
def test_a_second_process_traces_nothing_and_has_the_same_bits(layout: str, layers: int, max_draft: int, tmp_path: Path) -> None:
    """Only the shapes of the state are traced, by which the chunk of a prompt is chosen."""
    ids, fingerprint, events = told(tmp_path, layout, layers, max_draft)
    assert events["backend_compile_duration"] >= 3
    again, same, loaded = told(tmp_path, layout, layers, max_draft)
    assert (again, same) == (ids, fingerprint)
    assert not {"backend_compile_duration", "jaxpr_to_mlir_module_duration"} & loaded.keys(), loaded
    assert loaded.get("jaxpr_trace_duration", 0) <= 1
