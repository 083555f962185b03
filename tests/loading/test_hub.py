"""Hub checkpoints: every golden tensor exactly, every legal way to store it, and directories that are broken."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hub_files import V4_FLASH, Raw, published_storage, read_raw, write_raw
from hypothesis import given
from hypothesis import strategies as st
from numerics import GOLDEN, arrays

from ds4jax.config import Config
from ds4jax.errors import InputError
from ds4jax.loading.checkpoint import Checkpoint
from ds4jax.loading.hub import open_hub
from ds4jax.model.parameters import shapes

HUB = GOLDEN / "hub"
SHARD = "model-00001-of-00003.safetensors"
LINEAR, TABLE, NORM = "layers.0.attn.wkv.weight", "layers.1.ffn.gate.tid2eid", "layers.2.attn_norm.weight"
EXPERT = "layers.3.ffn.experts.5.w2.weight"


@pytest.fixture(scope="module")
def golden_raw() -> Raw:
    return {name: tensor for file in sorted(HUB.glob("*.safetensors")) for name, tensor in read_raw(file).items()}


@pytest.fixture
def hub(tmp_path) -> Path:
    """A copy of the golden checkpoint for tests to damage."""
    return Path(shutil.copytree(HUB, tmp_path / "hub"))


@pytest.fixture
def single(tmp_path, golden_raw):
    """Writes the golden checkpoint as one file, with tensors replaced or (None) left out."""

    def write(changes: dict[str, tuple[str, list[int], bytes] | None]) -> Path:
        shutil.copy(HUB / "config.json", tmp_path)
        tensors = {name: tensor for name, tensor in (golden_raw | changes).items() if tensor is not None}
        write_raw(tmp_path / "model.safetensors", tensors)
        return tmp_path

    return write


def expected(name: str) -> np.ndarray:
    """A golden weight by its canonical name."""
    weights = arrays("weights")
    head, experts, tail = name.partition(".ffn.experts.")
    if not experts:
        return weights[name]
    return np.stack([weights[f"{head}{experts}{expert}.{tail}"] for expert in range(8)])


def read(checkpoint: Checkpoint, name: str) -> np.ndarray:
    return np.asarray(next(tensor for tensor in checkpoint.tensors if tensor.name == name).read())


def refused(directory: Path) -> str:
    """The one-line error of opening it."""
    with pytest.raises(InputError) as caught:
        open_hub(directory)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_golden_tensor():
    checkpoint = open_hub(HUB)
    assert checkpoint.kind == "hub"
    assert checkpoint.path == HUB
    assert checkpoint.config.n_mtp == 1
    assert checkpoint.config.qat
    assert checkpoint.tokenizer is None
    assert checkpoint.ignored == ()
    assert checkpoint.metadata["architectures"] == ["DeepseekV4ForCausalLM"]
    assert {tensor.name: tensor.shape for tensor in checkpoint.tensors} == shapes(checkpoint.config)
    assert {tensor.stored for tensor in checkpoint.tensors} == {"F8_E4M3", "F4_E2M1", "BF16", "F32", "I64"}
    index = json.loads((HUB / "model.safetensors.index.json").read_text())
    assert sum(tensor.nbytes for tensor in checkpoint.tensors) == index["metadata"]["total_size"]
    for tensor in checkpoint.tensors:
        value = np.asarray(tensor.read())
        assert value.dtype == (np.int32 if "tid2eid" in tensor.name else np.float32), tensor.name
        np.testing.assert_array_equal(value, expected(tensor.name), err_msg=tensor.name, strict=True)


def test_one_file_without_index_in_other_types(single):
    """Matrices without scales, in bfloat16 and float32; an expert in FP8; vectors in bfloat16; an int32 table."""
    weights = arrays("weights")
    # 2^-6 everywhere is exact in every type.
    bits = np.full(128 * 64, np.float32(2**-6)).view(np.uint32) >> 16
    bf16_linear = (weights[LINEAR].view(np.uint32) >> 16).astype(np.uint16)
    wq_a = "layers.0.attn.wq_a.weight"
    directory = single(
        {
            LINEAR: ("BF16", list(weights[LINEAR].shape), bf16_linear.tobytes()),
            LINEAR.replace("weight", "scale"): None,
            wq_a: ("F32", list(weights[wq_a].shape), weights[wq_a].tobytes()),
            wq_a.replace("weight", "scale"): None,
            EXPERT: ("F8_E4M3", [128, 64], bytes([0x38]) * 128 * 64),
            EXPERT.replace("weight", "scale"): ("F8_E8M0", [1, 1], bytes([127 - 6])),
            EXPERT.replace("w2", "w3"): ("BF16", [64, 128], bits.astype(np.uint16).tobytes()),
            EXPERT.replace("w2.weight", "w3.scale"): None,
            NORM: ("BF16", [128], np.full(128, 0x3F80, np.uint16).tobytes()),
            TABLE: ("I32", [512, 2], weights[TABLE].tobytes()),
        }
    )
    checkpoint = open_hub(directory)
    for name in (LINEAR, wq_a, TABLE, "head.weight"):
        np.testing.assert_array_equal(read(checkpoint, name), expected(name), strict=True)
    np.testing.assert_array_equal(read(checkpoint, NORM), np.ones(128, np.float32), strict=True)
    for matrix in ("w2", "w3"):
        name = f"layers.3.ffn.experts.{matrix}.weight"
        stack = expected(name).copy()
        stack[5] = 2**-6
        np.testing.assert_array_equal(read(checkpoint, name), stack, strict=True)
    stored = {tensor.name: tensor.stored for tensor in checkpoint.tensors}
    assert stored["layers.3.ffn.experts.w2.weight"] == "F4_E2M1+F8_E4M3"
    assert stored[TABLE] == "I32"


def test_claimed_mtp_that_is_not_there(single, golden_raw):
    """The weights decide, whatever the config says."""
    without = {name: None for name in golden_raw if name.startswith("mtp.0.")}
    checkpoint = open_hub(single(without))
    assert checkpoint.metadata["num_nextn_predict_layers"] == 1
    assert checkpoint.config.n_mtp == 0
    assert not any(tensor.name.startswith("mtp.") for tensor in checkpoint.tensors)


def test_what_the_model_has_no_use_for(single):
    extra = {"layers.6.attn_norm.weight": ("BF16", [128], bytes(256)), "mtp.1.e_proj.weight": ("F64", [1], bytes(8))}
    checkpoint = open_hub(single(extra | {"mtp.0.e_proj.weight": None, "mtp.0.e_proj.scale": None}))
    assert checkpoint.config.n_mtp == 0
    assert set(extra) | {"mtp.0.h_proj.weight", "mtp.0.ffn.experts.7.w1.scale"} <= set(checkpoint.ignored)
    assert all(name in extra or name.startswith("mtp.0.") for name in checkpoint.ignored)


def test_an_incomplete_mtp_block_is_named(single):
    checkpoint = open_hub(single({"mtp.0.e_proj.weight": None}))
    assert (checkpoint.config.n_mtp, len(checkpoint.ignored)) == (0, 86)
    assert checkpoint.no_mtp == "its MTP block is incomplete: mtp.0.e_proj.weight is missing"
    first = "mtp.0.attn.attn_sink"
    assert checkpoint.note == f"86 tensors are not used, {first} the first of them; no drafts: {checkpoint.no_mtp}"


def test_an_mtp_block_under_another_prefix(single, golden_raw):
    block = {name: tensor for name, tensor in golden_raw.items() if name.startswith("mtp.0.")}
    moved = {f"model.{name}": tensor for name, tensor in block.items()}
    checkpoint = open_hub(single(dict.fromkeys(block) | moved))
    assert checkpoint.ignored == tuple(sorted(moved))
    assert f"{len(moved)} tensors are not used, " in checkpoint.note
    assert "no drafts: these weights have no MTP block under mtp.0, though model.mtp.0." in checkpoint.note


def test_a_dspark_drafter_of_one_stage(single):
    projection = {"mtp.0.main_proj.weight": ("BF16", [128, 384], bytes(128 * 768))}
    hub = single(projection | {"mtp.0.e_proj.weight": None, "mtp.0.e_proj.scale": None})
    assert "config.json: dspark_target_layer_ids: missing or not a list; the DSpark drafter of these weights" in refused(hub)


def config_with(hub: Path, **changes: object) -> Path:
    raw = json.loads((hub / "config.json").read_text())
    (hub / "config.json").write_text(json.dumps(raw | changes))
    return hub


def test_compressors_that_the_config_has_no_use_for(hub):
    message = "config.json: compress_ratios: gives this layer 0, but the weights have layers.2.attn.compressor.ape"
    assert message in refused(config_with(hub, compress_ratios=[0] * 7))


def test_a_table_of_experts_that_the_config_has_no_use_for(single):
    hub = config_with(single({"layers.1.ffn.gate.bias": ("F32", [8], bytes(32))}), num_hash_layers=1)
    assert "config.json: num_hash_layers: is 1, but the weights have layers.1.ffn.gate.tid2eid" in refused(hub)


def test_more_ratios_than_layers_and_block(hub):
    message = "config.json: compress_ratios: has 7 entries; 5 layers and the MTP block of these weights make 6"
    assert message in refused(config_with(hub, num_hidden_layers=5))


def test_a_folder_of_gguf_files(tmp_path):
    for name in ("c.gguf", "b.gguf", "a-mtp.gguf"):
        (tmp_path / name).touch()
    assert (
        refused(tmp_path) == f"{tmp_path}: a folder with GGUF files, and no config.json; give the name of a file, such as b.gguf"
    )


def test_a_dspark_drafter_is_no_mtp_block(single):
    checkpoint = open_hub(single({"mtp.1.attn_norm.weight": ("BF16", [128], bytes(256))}))
    assert (checkpoint.config.n_mtp, checkpoint.drafter) == (0, "none")
    assert checkpoint.no_mtp == "its mtp.* tensors are several blocks, and neither an MTP block nor a DSpark drafter"


def test_a_broken_dspark_drafter(single):
    hub = single({"mtp.1.confidence_head.proj.weight": ("BF16", [1, 128], bytes(256))})
    assert "dspark_target_layer_ids: missing or not a list" in refused(hub)
    checkpoint = open_hub(hub, drafter="none")
    assert (checkpoint.config.n_mtp, checkpoint.ignored, checkpoint.drafter, checkpoint.note) == (0, (), "none", "")
    with pytest.raises(InputError, match="drafter is mtp: its mtp.* tensors are a DSpark drafter, which is not an MTP block"):
        open_hub(hub, drafter="mtp")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"norm.weight": None}, "norm.weight: missing"),
        ({EXPERT: None}, f"{EXPERT}: missing"),
        ({"mtp.0.hnorm.weight": None}, "mtp.0.hnorm.weight: missing"),
        ({"layers.0.attn.wkv.scale": None}, f"layers.0.attn.wkv.scale: missing; {LINEAR} is stored as F8_E4M3"),
        ({EXPERT.replace("weight", "scale"): None}, f"{EXPERT.replace('weight', 'scale')}: missing"),
        ({NORM: ("BF16", [64], bytes(128))}, f"{NORM}: has shape [64]; config.json makes it [128]"),
        ({NORM: ("BF16", [128, 1], bytes(256))}, f"{NORM}: has shape [128, 1]"),
        ({NORM: ("F16", [128], bytes(256))}, f"{NORM}: has type F16; supported here are BF16, F32"),
        ({NORM: ("F8_E4M3", [128], bytes(128))}, f"{NORM}: has type F8_E4M3"),
        ({LINEAR: ("F8_E5M2", [96, 128], bytes(96 * 128))}, f"{LINEAR}: has type F8_E5M2"),
        ({LINEAR: ("F8_E4M3", [128, 96], bytes(96 * 128))}, f"{LINEAR}: has shape [128, 96]; config.json makes it [96, 128]"),
        ({LINEAR: ("I8", [96, 128], bytes(96 * 128))}, f"{LINEAR}: has shape [96, 128]; config.json makes it [96, 64]"),
        ({LINEAR: ("BF16", [96, 128], bytes(96 * 256))}, "layers.0.attn.wkv.scale: scales of BF16 values"),
        ({"layers.0.attn.wkv.scale": ("F8_E8M0", [1, 2], bytes(2))}, "layers.0.attn.wkv.scale: has shape [1, 2]"),
        ({"layers.0.attn.wkv.scale": ("F32", [1, 1], bytes(4))}, "layers.0.attn.wkv.scale: has type F32"),
        ({EXPERT: ("I8", [128, 64], bytes(128 * 64))}, f"{EXPERT}: has shape [128, 64]; config.json makes it [128, 32]"),
        ({EXPERT.replace("weight", "scale"): ("F8_E8M0", [128, 1], bytes(128))}, "has shape [128, 1]"),
        ({TABLE: ("F32", [512, 2], bytes(4096))}, f"{TABLE}: has type F32; supported here are I64, I32"),
        ({TABLE: ("I64", [512, 3], bytes(512 * 24))}, f"{TABLE}: has shape [512, 3]"),
    ],
)
def test_refuses_tensors(single, changes, says):
    message = refused(single(changes))
    assert "model.safetensors: " in message
    assert says in message


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"layers.0.attn.wkv.scale": ("F8_E8M0", [1, 1], b"\xff")}, f"{LINEAR}: holds values that are not finite"),
        ({"layers.0.attn.wkv.scale": ("F8_E8M0", [1, 1], b"\xfe")}, f"{LINEAR}: holds values that are not finite"),
        ({LINEAR: ("F8_E4M3", [96, 128], b"\x7f" * 96 * 128)}, f"{LINEAR}: holds values that are not finite"),
        ({NORM: ("BF16", [128], b"\x80\x7f" * 128)}, f"{NORM}: holds values that are not finite"),
        ({NORM: ("F32", [128], b"\xff" * 512)}, f"{NORM}: holds values that are not finite"),
        ({TABLE: ("I64", [512, 2], np.full(1024, 8).tobytes())}, f"{TABLE}: names expert 8 of 8"),
        ({TABLE: ("I64", [512, 2], np.full(1024, -1).tobytes())}, f"{TABLE}: names expert -1 of 8"),
        # An int64 whose low half alone would do.
        ({TABLE: ("I64", [512, 2], np.full(1024, 2**32 + 1).tobytes())}, f"{TABLE}: names expert 4294967297 of 8"),
    ],
)
def test_refuses_values(single, changes, says):
    checkpoint = open_hub(single(changes))
    name = LINEAR if LINEAR in says else next(iter(changes))
    with pytest.raises(InputError, match=r"model\.safetensors: ") as caught:
        read(checkpoint, name)
    assert says in str(caught.value)


def test_shard_that_shrinks_after_opening(hub):
    checkpoint = open_hub(hub)
    last = max((t for t in checkpoint.tensors if "experts" not in t.name), key=lambda t: t.nbytes)
    for shard in hub.glob("*.safetensors"):
        shard.write_bytes(shard.read_bytes()[:60_000])
    with pytest.raises(InputError, match=rf"{last.name}: the file ends inside it"):
        last.read()
    for shard in hub.glob("*.safetensors"):
        shard.unlink()
    with pytest.raises(InputError, match=rf"{last.name}: cannot be read \(No such file"):
        last.read()


@pytest.mark.parametrize("name", ["config.json", SHARD])
def test_missing_file(hub, name):
    (hub / name).unlink()
    assert str(hub / name) in refused(hub)


def test_no_weights(hub):
    (hub / "model.safetensors.index.json").unlink()
    assert "neither model.safetensors.index.json nor model.safetensors" in refused(hub)


def test_other_architecture(hub):
    raw = json.loads((hub / "config.json").read_text())
    (hub / "config.json").write_text(json.dumps(raw | {"model_type": "llama"}))
    assert 'config.json: model_type: is "llama"' in refused(hub)


@pytest.mark.parametrize(
    "keys", [("hidden_size",), ("n_routed_experts",), ("hidden_size", "vocab_size", "moe_intermediate_size")]
)
def test_config_of_an_absurd_size(hub, keys):
    raw = json.loads((hub / "config.json").read_text())
    (hub / "config.json").write_text(json.dumps(raw | dict.fromkeys(keys, 2**31 - 1)))
    message = refused(hub)
    assert "config.json makes it" in message or "missing; the model of config.json needs it" in message


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "not valid JSON"),
        ("{}", "weight_map: missing"),
        ('{"weight_map": []}', "weight_map: missing"),
        ('{"weight_map": {"norm.weight": 1}}', "weight_map: missing or not a table"),
        ('{"weight_map": {"norm.weight": "../hub/' + SHARD + '"}}', "a shard lies beside the index"),
        ('{"weight_map": {"norm.weight": "/etc/passwd"}}', "a shard lies beside the index"),
        ('{"weight_map": {"norm.weight": ".."}}', "names the shard '..'; a shard lies beside the index"),
        ('{"weight_map": {"norm.weight": ""}}', "names the shard ''; a shard lies beside the index"),
        ('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', "'a' is given twice"),
        ('{"weight_map": {"absent.weight": "' + SHARD + '"}}', f"'absent.weight': listed in {SHARD!r}, which does not hold it"),
        ('{"weight_map": {"embed.weight": "' + SHARD + '"}}', "missing; the model of config.json needs it"),
    ],
)
def test_refuses_index(hub, content, says):
    (hub / "model.safetensors.index.json").write_text(content)
    assert says in refused(hub)


def test_tensor_in_two_shards(hub):
    other = hub / "model-00002-of-00003.safetensors"
    write_raw(other, read_raw(other) | {"embed.weight": read_raw(hub / SHARD)["embed.weight"]})
    assert f"'embed.weight': also in {SHARD!r}" in refused(hub)


def test_tensor_in_another_shard_than_the_index_says(hub):
    index = hub / "model.safetensors.index.json"
    raw = json.loads(index.read_text())
    raw["weight_map"]["embed.weight"] = "model-00003-of-00003.safetensors"
    index.write_text(json.dumps(raw))
    assert "'embed.weight': also in 'model-00003" in refused(hub)


@pytest.mark.parametrize("length", [0, 7, 8, 5000, 977_623])
def test_truncated_shard(hub, length):
    (hub / SHARD).write_bytes((HUB / SHARD).read_bytes()[:length])
    assert f"{hub / SHARD}: not a whole safetensors file" in refused(hub)


@pytest.mark.parametrize(
    "content", [b'{"a":["F32",[2],[0,8]]}', b"[]", b"\xff", b'{"a":{"dtype":"F99","shape":[8],"data_offsets":[0,8]}}']
)
def test_strange_header(hub, content):
    (hub / SHARD).write_bytes(len(content).to_bytes(8, "little") + content + bytes(8))
    assert f"{hub / SHARD}: " in refused(hub)


def complaint(directory: Path) -> str | None:
    try:
        open_hub(directory)
    except InputError as error:
        return str(error)
    return None


@given(position=st.integers(0, 24_000), value=st.integers(0, 255))
def test_one_changed_byte_of_a_header(tmp_path_factory, position, value):
    """The checkpoint opens, or the error is one line."""
    directory = tmp_path_factory.mktemp("hub")
    for file in HUB.iterdir():
        (directory / file.name).symlink_to(file)
    content = bytearray((HUB / SHARD).read_bytes())
    content[position] = value
    (directory / SHARD).unlink()
    (directory / SHARD).write_bytes(content)
    message = complaint(directory)
    assert message is None or (str(directory) in message and "\n" not in message)


@pytest.mark.slow
def test_published_inventory(tmp_path):
    """All headers of V4-Flash over a file of zeros: as many tensors and bytes as the published index counts."""
    (tmp_path / "config.json").write_text(json.dumps(V4_FLASH))
    tensors = {part: how for name, shape in shapes(Config()).items() for part, how in published_storage(name, shape).items()}
    assert len(tensors) == 69_187
    header, end = {}, 0
    for name, (dtype, shape, size) in tensors.items():
        start, end = end, end + math.prod(shape) * size
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    assert end == 159_609_485_896
    text = json.dumps(header).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        # A sparse file takes no space on the disk.
        file.truncate(8 + len(text) + end)
    checkpoint = open_hub(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    assert checkpoint.config == Config()
    assert checkpoint.ignored == ()
    assert sum(tensor.nbytes for tensor in checkpoint.tensors) == end


def write_tokenizer(directory: Path, tokens: list[str]) -> None:
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    tokenizer.add_special_tokens(["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"])
    tokenizer.save(str(directory / "tokenizer.json"))


def test_tokenizer(hub):
    write_tokenizer(hub, ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "a", "b"])
    tokenizer = open_hub(hub).tokenizer
    assert tokenizer.encode("ab") == [2, 3]
    assert (tokenizer.bos_id, tokenizer.eos_id) == (0, 1)
    write_tokenizer(hub, [f"{i:c}" for i in range(0x100, 0x100 + 511)])
    assert "tokenizer.json: has 513 tokens; the model of config.json has 512" in refused(hub)
    (hub / "tokenizer.json").write_text("{")
    assert "tokenizer.json: " in refused(hub)
