"""The golden DSpark drafter for tests: in a checkpoint directory, in ds4's file and in llama.cpp's, and the model's file."""

from __future__ import annotations

import dataclasses
import json
import shutil
import tarfile
from pathlib import Path

from hub_files import read_raw, write_raw
from numerics import GOLDEN

from ds4jax.loading.convert import convert

SHARED = Path(__file__).resolve().parents[2] / "shared" / "golden_dspark"


@dataclasses.dataclass(frozen=True)
class Drafters:
    """Files of one model.

    Attributes:
        hub: a checkpoint directory with the drafter inside.
        main: the model alone as a GGUF file, in a folder of its own.
        antirez, dflash: the drafter alone.
    """

    hub: Path
    main: Path
    antirez: Path
    dflash: Path


def unpack(folder: Path) -> Drafters:
    """Unpack the golden files. The directory's model is that of set a; the model's file is its conversion without loss."""
    with tarfile.open(GOLDEN / "dspark" / "drafters.tar.xz") as archive:
        # Python 3.11.0 to 3.11.3 have no filter, and 3.12 warns of extracting without one.
        archive.extraction_filter = getattr(tarfile, "data_filter", None)
        archive.extractall(folder)
    hub, main = folder / "hub", folder / "main" / "model.gguf"
    hub.mkdir()
    main.parent.mkdir()
    for name in ("config.json", *(path.name for path in folder.glob("*.safetensors"))):
        shutil.move(folder / name, hub / name)
    trunk = {}
    for shard in sorted((GOLDEN / "hub").glob("*.safetensors")):
        trunk |= {name: tensor for name, tensor in read_raw(shard).items() if not name.startswith("mtp.")}
    write_raw(hub / "model-00001-of-00005.safetensors", trunk)
    places = {name: path.name for path in hub.glob("*.safetensors") for name in read_raw(path)}
    (hub / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    convert(hub, main, flavour="antirez", dense="bf16")
    main.with_name("dspark-model.gguf").unlink()
    return Drafters(hub, main, folder / "antirez.gguf", folder / "dflash.gguf")
