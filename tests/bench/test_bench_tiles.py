"""Which tile a launch gets, and the table that `python -m pallas_kernels.tune` writes."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import jax
import pytest

from pallas_kernels import tiles, tune
from pallas_kernels.q8_matmul import Tile
from pallas_kernels.shapes import FLASH, tile_key
from pallas_kernels.tune import Launch

H100 = "NVIDIA H100 80GB HBM3"


def test_measured_tiles_come_from_the_table() -> None:
    assert tiles.tile_for((4096,), 2048, 1, H100) == Tile(2, 1)
    assert tiles.tile_for((4096,), 8192, 1, H100) == Tile(1, 1)
    assert tiles.tile_for((1024,), 4096, 8, H100) == Tile(1, 1)
    assert tiles.tile_for((129280,), 4096, 1, H100) == Tile(2, 1)
    assert {product.key for product in FLASH} <= set(tiles.read(tiles.TABLE)[H100])


def test_the_table_comes_before_the_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "_shipped", lambda: {"a device": {tile_key((512, 256), 4096, 1): [4, 2]}})
    assert tiles.tile_for((512, 256), 4096, 1, "a device") == Tile(4, 2)
    assert tiles.tile_for((512, 256), 4096, 2, "a device") == Tile(1, 1)
    assert tiles.tile_for((512, 256), 4096, 1, "another") == Tile(1, 1)


@pytest.mark.parametrize(
    ("sizes", "k", "groups", "rows"),
    [
        ((4096,), 2048, 1, 2),
        ((4096,), 2080, 1, 1),
        ((65536,), 4096, 1, 2),
        ((65504,), 4096, 1, 1),
        ((40000, 30000), 4096, 1, 2),
        ((8192,), 4096, 8, 2),
        ((8192,), 4096, 7, 1),
        ((8192,), 32, 1, 2),
    ],
)
def test_rule_for_unknown_devices(sizes: tuple[int, ...], k: int, groups: int, rows: int) -> None:
    assert tiles.tile_for(sizes, k, groups, "no such device") == Tile(rows, 1)


def test_writing_keeps_what_is_there(tmp_path: Path) -> None:
    path = tmp_path / "tiles.json"
    tiles.write(path, "a device", {"8x64": Tile(1, 1), "16x64": Tile(2, 1)})
    tiles.write(path, "another", {"8x64": Tile(4, 4)})
    tiles.write(path, "a device", {"16x64": Tile(4, 2)})
    assert json.loads(path.read_text()) == {"a device": {"8x64": [1, 1], "16x64": [4, 2]}, "another": {"8x64": [4, 4]}}
    assert [entry.name for entry in tmp_path.iterdir()] == ["tiles.json"]


@pytest.mark.parametrize("text", ["[]", "{", '{"a": 1}', '{"a": {"8x64": [1]}}', '{"a": {"8x64": "ab"}}'])
def test_a_file_that_is_no_table_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "tiles.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="tiles.json: not a table"):
        tiles.read(path)


def test_best_weighs_each_number_of_rows_the_same() -> None:
    product, a, b, c = FLASH[0], Tile(1, 1), Tile(2, 1), Tile(4, 1)
    us = {(a, 1): 10.0, (a, 4): 150.0, (b, 1): 11.0, (b, 4): 100.0, (c, 1): 20.0, (c, 4): 100.0}
    medians = {Launch(product, m, tile): time for (tile, m), time in us.items()}
    assert tune.best(medians) == b
    del medians[Launch(product, 1, b)]
    assert tune.best(medians) == a


def test_select_takes_short_names() -> None:
    assert tune.select("head,q_a-kv,head") == (FLASH[-1], FLASH[0])
    assert tune.select(",".join(map(tune.short_name, FLASH))) == FLASH
    with pytest.raises(argparse.ArgumentTypeError, match=r"unknown shape 'q_c'; known: q_a-kv, q_b"):
        tune.select("head,q_c")


def test_every_candidate_has_a_row_for_each_warp() -> None:
    assert [(tile.rows, tile.warps) for tile in tune.CANDIDATES] == [(1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (4, 4)]


def test_tune_needs_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    assert tune.main(["--device-table", str(tmp_path / "tiles.json")]) == 2
    out, err = capsys.readouterr()
    assert (out, err) == ("", "tune: jax runs on cpu here; tiles are measured on a GPU\n")
    assert not any(tmp_path.iterdir())
