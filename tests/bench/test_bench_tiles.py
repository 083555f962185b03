"""Which tile a launch gets, and the table that `python -m pallas_kernels.tuning.tune` writes."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import jax
import pytest

from pallas_kernels.core import tiles
from pallas_kernels.linear.q8_matmul import Tile
from pallas_kernels.tuning import tune
from pallas_kernels.tuning.shapes import FLASH, Product, tile_key
from pallas_kernels.tuning.tune import Launch

H100 = "NVIDIA H100 80GB HBM3"


def test_measured_tiles_come_from_the_table() -> None:
    shapes = tiles.read(tiles.TABLE)[H100]
    assert {product.key for product in FLASH} <= set(shapes)
    for product in FLASH:
        entries = shapes[product.key]
        assert set(entries) >= {str(m) for m in tune.TUNED_ROWS}
        for m, measured in {**{m: m for m in tune.TUNED_ROWS}, 5: 8, 6: 8, 7: 8}.items():
            found = tiles.tile_for(product.sizes, product.k, product.groups, m, H100)
            assert [found.rows, found.unroll, found.chained] == entries[str(measured)]
            assert found in tune.candidates(product, measured)


def test_the_table_comes_before_the_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = {"2": [4, 2, 0], "4": [2, 8, 1]}
    monkeypatch.setattr(tiles, "_shipped", lambda: {"a device": {tile_key((512, 256), 4096, 1): entries}})
    for m, tile in {1: Tile(4, 2), 2: Tile(4, 2), 3: Tile(2, 8, True), 4: Tile(2, 8, True), 8: Tile(2, 8, True)}.items():
        assert tiles.tile_for((512, 256), 4096, 1, m, "a device") == tile
    assert tiles.tile_for((512, 256), 4096, 2, 2, "a device") == Tile(1, 4)
    assert tiles.tile_for((512, 256), 4096, 1, 2, "another") == Tile(1, 4)


@pytest.mark.parametrize(
    ("sizes", "k", "groups", "tile"),
    [
        ((4096,), 2048, 1, Tile(2, 2)),
        ((4095,), 2048, 1, Tile(1, 2)),
        ((4095,), 8192, 1, Tile(1, 4)),
        ((4096,), 4096, 1, Tile(2, 2)),
        ((8192,), 4096, 1, Tile(4, 1)),
        ((5000, 3192), 4096, 1, Tile(4, 1)),
        ((1024,), 4096, 8, Tile(4, 1)),
        ((1024,), 4096, 7, Tile(2, 2)),
        ((64,), 64, 1, Tile(1, 1)),
        ((64,), 2080, 1, Tile(1, 3)),
    ],
)
def test_rule_for_unknown_devices(sizes: tuple[int, ...], k: int, groups: int, tile: Tile) -> None:
    assert tiles.tile_for(sizes, k, groups, 4, "no such device") == tile


def test_writing_keeps_what_is_there(tmp_path: Path) -> None:
    path = tmp_path / "tiles.json"
    tiles.write(path, "a device", {"8x64": {1: Tile(1, 1)}, "16x64": {1: Tile(2, 1), 8: Tile(1, 1)}})
    tiles.write(path, "another", {"8x64": {4: Tile(4, 4)}})
    tiles.write(path, "a device", {"16x64": {8: Tile(4, 2), 2: Tile(1, 2, True)}})
    assert json.loads(path.read_text()) == {
        "a device": {"8x64": {"1": [1, 1, 0]}, "16x64": {"1": [2, 1, 0], "2": [1, 2, 1], "8": [4, 2, 0]}},
        "another": {"8x64": {"4": [4, 4, 0]}},
    }
    assert [entry.name for entry in tmp_path.iterdir()] == ["tiles.json"]


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "{",
        '{"a": 1}',
        '{"a": {"8x64": [1, 1]}}',
        '{"a": {"8x64": {}}}',
        '{"a": {"8x64": {"1": [1]}}}',
        '{"a": {"8x64": {"1": [1, 1]}}}',
        '{"a": {"8x64": {"1": [0, 1, 0]}}}',
        '{"a": {"8x64": {"1": [1, 1, 2]}}}',
        '{"a": {"8x64": {"m": [1, 1, 0]}}}',
    ],
)
def test_a_file_that_is_no_table_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "tiles.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="tiles.json: not a table"):
        tiles.read(path)


def test_each_number_of_rows_has_the_fastest_tile() -> None:
    product, a, b, c = FLASH[0], Tile(1, 2), Tile(2, 1), Tile(4, 1)
    us = {(a, 1): 10.0, (a, 4): 150.0, (b, 1): 11.0, (b, 4): 100.0, (c, 1): 20.0, (c, 4): 100.0}
    medians = {Launch(product, m, tile): time for (tile, m), time in us.items()}
    assert tune.best(medians) == {1: a, 4: b}
    del medians[Launch(product, 1, a)]
    assert tune.best(medians) == {1: b, 4: b}


def test_select_takes_short_names() -> None:
    assert tune.select("head,q_a-kv,head") == (FLASH[-1], FLASH[0])
    assert tune.select(",".join(map(tune.short_name, FLASH))) == FLASH
    with pytest.raises(argparse.ArgumentTypeError, match=r"unknown shape 'q_c'; known: q_a-kv, q_b"):
        tune.select("head,q_c")


def test_numbers_of_rows_are_checked() -> None:
    assert tune.row_counts("32,16,16") == (16, 32)
    for numbers in ("0", "65", "8,", "two"):
        with pytest.raises(argparse.ArgumentTypeError, match=f"{numbers!r} must be numbers from 1 to 64"):
            tune.row_counts(numbers)


def test_more_rows_than_a_program_takes_have_the_registers_of_a_batch() -> None:
    wide = Product("", (4096,), 8192)
    assert tune.candidates(wide, 32) == tune.candidates(wide, 8) != tune.candidates(wide, 4)


def test_candidates_fit_the_shape_and_the_registers() -> None:
    forms = (False, True)
    assert tune.candidates(Product("", (32768,), 1024), 4) == [Tile(rows, 1, form) for rows in (1, 2, 4, 8) for form in forms]
    small = [Tile(rows, unroll, form) for rows in (1, 2) for unroll in (1, 2) for form in forms]
    assert tune.candidates(Product("", (2,), 2048), 1) == small
    wide = Product("", (4096,), 8192)
    assert Tile(8, 2) in tune.candidates(wide, 4)
    assert Tile(8, 2) not in tune.candidates(wide, 8)
    assert Tile(1, 8) in tune.candidates(wide, 8)


def test_tune_needs_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    assert tune.main(["--device-table", str(tmp_path / "tiles.json")]) == 2
    out, err = capsys.readouterr()
    assert (out, err) == ("", "tune: jax runs on cpu here; tiles are measured on a GPU\n")
    assert not any(tmp_path.iterdir())
