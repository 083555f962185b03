"""What a conversion holds: mainline's files from a checkpoint directory, and GGUF files from GGUF files."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf_files import SMALL, random_tensors, vocabulary, write_small
from hub_files import read_raw
from numerics import GOLDEN, arrays, assert_bits_equal

from ds4jax.errors import InputError
from ds4jax.loading import hub, open_checkpoint
from ds4jax.loading.convert import convert
from ds4jax.loading.gguf_model import check_model
from ds4jax.loading.gguf_split import open_set
from ds4jax.loading.gguf_write import write_gguf
from ds4jax.loading.hub import open_hub, read_hub
from ds4jax.loading.hub_write import tokenizer_json
from ds4jax.random_models.hub import SMALL_HUB, write_hub
from ds4jax.text.tokenizer import BYTE_OF
from pallas_kernels.formats import Q8_0

HUB = GOLDEN / "hub"
DSPARK = Path(__file__).resolve().parents[3] / "shared" / "golden_dspark"
# The order of llama.cpp's converter, after `general.*`.
KEYS = """
block_count context_length embedding_length attention.head_count attention.head_count_kv rope.scaling.type rope.scaling.factor
rope.scaling.original_context_length rope.scaling.yarn_beta_fast rope.scaling.yarn_beta_slow rope.freq_base
attention.layer_norm_rms_epsilon expert_count expert_used_count expert_gating_func attention.key_length attention.value_length
rope.dimension_count attention.q_lora_rank attention.sliding_window expert_feed_forward_length expert_shared_count
expert_weights_scale expert_weights_norm swiglu_clamp_exp swiglu_clamp_shexp attention.indexer.head_count
attention.indexer.key_length attention.indexer.top_k attention.output_group_count attention.output_lora_rank
attention.compress_ratios attention.compress_rope_freq_base hyper_connection.count hyper_connection.sinkhorn_iterations
hyper_connection.epsilon hash_layer_count embedding_length_out
""".split()


@pytest.fixture(autouse=True)
def shapes_found_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tracing the model takes a second, and every conversion here is one of the same model."""
    monkeypatch.setattr(hub, "shapes", functools.cache(hub.shapes))


@pytest.fixture(scope="module")
def random_hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint directory with ratios 0, 4 and 128, an MTP block and a tokenizer."""
    folder = tmp_path_factory.mktemp("random") / "model"
    write_hub(folder)
    return folder


@pytest.fixture(scope="module")
def exact(random_hub: Path) -> Path:
    """Its conversion without loss."""
    out = random_hub.parent / "exact" / "model.gguf"
    out.parent.mkdir()
    convert(random_hub, out, dense="bf16")
    return out


def fields(path: Path) -> dict[str, Any]:
    return {key: field.contents() for key, field in gguf.GGUFReader(path).fields.items() if not key.startswith("GGUF.")}


def tensors(path: Path) -> dict[str, gguf.ReaderTensor]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


def values(tensor: gguf.ReaderTensor) -> np.ndarray:
    """The values of a tensor by the `gguf` package, as float32."""
    found = tensor.data if tensor.tensor_type.name == "I32" else gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    return found.reshape([int(size) for size in tensor.shape[::-1]])


def loaded(path: Path) -> dict[str, np.ndarray]:
    """Every parameter as float32, expert tables int32, in plain numpy."""
    if path.is_dir():
        sources = read_hub(path).sources
        return {
            one.name: np.concatenate(list(one.pieces())).view("<i4" if one.form == "I32" else "<f4").reshape(one.shape)
            for one in sources
        }
    found = {}
    for one in check_model(open_set(path)).found:
        raw, kind = one.header.raw(one.info), gguf.GGMLQuantizationType[one.info.type]
        value = raw.view("<i4") if one.info.type == "I32" else gguf.quants.dequantize(raw, kind)
        found[one.slot.name] = value.reshape(one.info.shape)[..., one.columns or slice(None)]
    return found


def assert_same_model(found: Path, expected: Path) -> None:
    one, other = loaded(found), loaded(expected)
    assert one.keys() == other.keys()
    for name, value in one.items():
        np.testing.assert_array_equal(value, other[name], err_msg=name)
    assert open_checkpoint(found).config == open_checkpoint(expected).config


def test_without_loss_it_holds_what_the_directory_holds(random_hub: Path, exact: Path) -> None:
    assert_same_model(exact, random_hub)
    opened = open_checkpoint(exact)
    assert (opened.drafter_path, opened.ignored, opened.note) == (exact.with_name("mtp-model.gguf"), (), "")
    tokenizer, expected = opened.tokenizer, open_hub(random_hub).tokenizer
    assert tokenizer is not None
    assert expected is not None
    assert [tokenizer.token_bytes(i) for i in range(384)] == [expected.token_bytes(i) for i in range(384)]


def test_keys_in_the_converters_order(exact: Path) -> None:
    main, mtp = fields(exact), fields(exact.with_name("mtp-model.gguf"))
    assert [key.removeprefix("deepseek4.") for key in main if key.startswith("deepseek4.")] == KEYS
    assert [key.removeprefix("deepseek4.") for key in mtp if key.startswith("deepseek4.")] == [*KEYS, "nextn_predict_layers"]
    assert list(main)[:3] == ["general.architecture", "general.type", "general.name"]
    assert (main["general.name"], main["deepseek4.expert_gating_func"], main["deepseek4.rope.scaling.type"]) == (
        "model",
        4,
        "yarn",
    )
    assert (main["deepseek4.block_count"], mtp["deepseek4.block_count"], mtp["deepseek4.nextn_predict_layers"]) == (4, 5, 1)
    assert main["deepseek4.attention.compress_ratios"] == [0, 4, 128, 4, 0]
    assert (main["deepseek4.swiglu_clamp_exp"], mtp["deepseek4.swiglu_clamp_shexp"]) == ([10.0] * 4, [10.0] * 5)
    assert main["deepseek4.embedding_length_out"] == 4 * 256
    assert (main["tokenizer.ggml.padding_token_id"], main["tokenizer.ggml.add_bos_token"]) == (2, False)
    same = {key for key in main if not key.endswith(("block_count", "clamp_exp", "clamp_shexp"))}
    assert {key: mtp[key] for key in same} == {key: main[key] for key in same}


def test_types_of_the_converter(random_hub: Path, tmp_path: Path) -> None:
    convert(random_hub, tmp_path / "model.gguf")
    types = {name: tensor.tensor_type.name for name, tensor in tensors(tmp_path / "model.gguf").items()}
    bf16 = ("token_embd", "output.", "ffn_gate_inp", "compressor_kv", "compressor_gate", "indexer.proj")
    for name, stored in types.items():
        if "_exps." in name:
            expected = "MXFP4"
        elif "tid2eid" in name:
            expected = "I32"
        elif any(part in name for part in bf16) and "norm" not in name:
            expected = "BF16"
        else:
            norms = ("norm", "hc_", "_ape", "sinks", "exp_probs_b")
            expected = "F32" if any(part in name for part in norms) else "Q8_0"
        assert stored == expected, name
    assert types["blk.1.indexer.attn_q_b.weight"] == "Q8_0"


def test_fp8_becomes_q8_0_by_ggmls_rule(random_hub: Path, tmp_path: Path) -> None:
    out = tmp_path / "model.gguf"
    convert(random_hub, out)
    exact, found = loaded(random_hub), loaded(out)
    for tensor in open_checkpoint(out).tensors:
        expected = exact[tensor.name]
        if tensor.stored == "Q8_0":
            expected = gguf.quants.dequantize(Q8_0.encode(expected), gguf.GGMLQuantizationType.Q8_0)
        np.testing.assert_array_equal(found[tensor.name], expected, err_msg=tensor.name)


def test_experts_equal_the_golden_weights(tmp_path: Path) -> None:
    """Bit for bit, by the `gguf` library alone, those of the MTP block in its own file too."""
    out, weights = tmp_path / "golden.gguf", arrays("weights")
    convert(HUB, out)
    found = tensors(out) | {name: one for name, one in tensors(tmp_path / "mtp-golden.gguf").items() if name.startswith("blk.")}
    stacks = [name for name in found if "_exps." in name]
    assert len(stacks) == 3 * 7
    for name in stacks:
        assert found[name].tensor_type == gguf.GGMLQuantizationType.MXFP4
        layer = name.split("_exps")[0].replace("blk.6.", "mtp.0.").replace("blk.", "layers.").replace("ffn_", "ffn.experts.")
        layer, matrix = layer.rsplit(".", 1)
        kind = {"gate": "w1", "up": "w3", "down": "w2"}[matrix]
        golden = np.stack([weights[f"{layer}.{expert}.{kind}.weight"] for expert in range(8)])
        assert_bits_equal(values(found[name]), golden + np.float32(0))


def test_the_mtp_files_own_tensors(random_hub: Path, exact: Path) -> None:
    given, block = loaded(random_hub), tensors(exact.with_name("mtp-model.gguf"))
    joined = np.concatenate([given["mtp.0.e_proj.weight"], given["mtp.0.h_proj.weight"]], axis=-1)
    expected = {
        "blk.4.nextn.eh_proj.weight": joined,
        "blk.4.nextn.shared_head_norm.weight": given["mtp.0.norm.weight"],
        "output_hc_fn.weight": given["mtp.0.hc_head_fn"],
        "token_embd.weight": given["embed.weight"],
        "output.weight": given["head.weight"],
        "output_norm.weight": given["norm.weight"],
    }
    for name, value in expected.items():
        np.testing.assert_array_equal(values(block[name]), value, err_msg=name)
    assert "output_hc_fn.weight" in tensors(exact)


@pytest.mark.skipif(not DSPARK.exists(), reason="golden_dspark lies beside the checkout only where it was shared")
def test_dspark_equals_the_golden_file(tmp_path: Path) -> None:
    """Another program's file of the same drafter has the same names, shapes, types and values, FP8 matrices within rounding."""
    out = tmp_path / "model.gguf"
    layout = convert(DSPARK / "hub", out)
    assert layout.note == ""
    found, golden = tensors(tmp_path / "dspark-model.gguf"), tensors(DSPARK / "dflash.gguf")
    assert found.keys() == golden.keys()
    for name, tensor in found.items():
        assert (tensor.tensor_type, list(tensor.shape)) == (golden[name].tensor_type, list(golden[name].shape)), name
        value, expected = values(tensor), values(golden[name])
        bound = np.abs(expected).max() * (1 / 127 if tensor.tensor_type.name == "Q8_0" else 0)
        assert np.abs(value - expected).max() <= bound, name
    keys, expected = fields(tmp_path / "dspark-model.gguf"), fields(DSPARK / "dflash.gguf")
    ours = {key: value for key, value in keys.items() if key.startswith("dflash.") and key != "dflash.vocab_size"}
    assert ours == {key: value for key, value in expected.items() if key.startswith("dflash.")}
    assert keys["tokenizer.ggml.mask_token_id"] == 509


def test_dspark_of_a_random_directory(tmp_path: Path) -> None:
    write_hub(tmp_path / "hub", drafter="dspark")
    convert(tmp_path / "hub", tmp_path / "model.gguf")
    keys = fields(tmp_path / "dspark-model.gguf")
    assert (keys["general.architecture"], keys["dflash.block_count"], keys["dflash.target_layers"]) == ("dflash", 3, [2, 3, 4])
    assert fields(tmp_path / "model.gguf")["deepseek4.attention.compress_ratios"] == [0, 4, 128, 4, 0, 0, 0]
    config = json.loads((tmp_path / "hub" / "config.json").read_text())
    for key, value in (("dspark_block_size", None), ("dspark_target_layer_ids", [9])):
        (tmp_path / "hub" / "config.json").write_text(json.dumps(config | {key: value}))
        with pytest.raises(InputError, match=rf"config\.json: {key}: "):
            convert(tmp_path / "hub", tmp_path / "other.gguf")
    assert not list(tmp_path.glob("*other*"))


def test_flavours_back_and_forth(exact: Path, tmp_path: Path) -> None:
    one, back = tmp_path / "one" / "antirez.gguf", tmp_path / "back" / "model.gguf"
    one.parent.mkdir()
    back.parent.mkdir()
    convert(exact, one, flavour="antirez")
    assert list(one.parent.iterdir()) == [one]
    assert_same_model(one, exact)
    keys = fields(one)
    assert (keys["deepseek4.vocab_size"], keys["deepseek4.block_count"]) == (384, 4)
    assert keys["ds4jax.converted_flavour"] == "antirez from mainline"
    assert "mtp.0.e_proj.weight" in tensors(one)
    convert(one, back, flavour="mainline")
    assert_same_model(back, exact)
    for name in ("model.gguf", "mtp-model.gguf"):
        written, first = fields(back.with_name(name)), fields(exact.with_name(name))
        assert written.pop("ds4jax.converted_flavour") == "mainline from antirez"
        assert {key: value for key, value in written.items() if key != "ds4jax.qat"} == first


def split(path: Path, folder: Path) -> Path:
    """The file in three shards, the first without tensors; returns the second."""
    reader = gguf.GGUFReader(path)
    parts: list[list[gguf.ReaderTensor]] = [[], reader.tensors[:70], reader.tensors[70:]]
    for number, part in enumerate(parts):
        writer = gguf.GGUFWriter(folder / f"cut-{number + 1:05}-of-00003.gguf", "deepseek4")
        for key, field in reader.fields.items() if not number else ():
            if not key.startswith("GGUF.") and key != "general.architecture":
                writer.add_key_value(key, field.contents(), field.types[0], field.types[1] if len(field.types) > 1 else None)
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", 3)
        writer.add_int32("split.tensors.count", len(reader.tensors))
        for tensor in part:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return folder / "cut-00002-of-00003.gguf"


def test_shards_become_one_file(exact: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    convert(split(exact, tmp_path), out)
    found, expected = tensors(out), tensors(exact)
    assert list(found) == list(expected)
    for name, tensor in found.items():
        np.testing.assert_array_equal(tensor.data, expected[name].data)
    keys = fields(out)
    assert keys.pop("ds4jax.merged_shards") == 3
    assert keys == fields(exact)


def test_a_file_is_not_written_over_its_own_shard(exact: Path, tmp_path: Path) -> None:
    second = split(exact, tmp_path)
    before = second.read_bytes()
    with pytest.raises(InputError, match=f"{second}: is {second.name} of the checkpoint that is being converted"):
        convert(second, second, force=True)
    assert second.read_bytes() == before


def test_a_file_is_not_written_over_its_own_mtp_file(exact: Path, tmp_path: Path) -> None:
    """Not even where the block stays in it and only the model is copied."""
    main, mtp = (Path(shutil.copy(exact.with_name(name), tmp_path)) for name in ("model.gguf", "mtp-model.gguf"))
    before = mtp.read_bytes()
    for flavour in (None, "antirez"):
        with pytest.raises(InputError, match=r"is mtp-model\.gguf of the checkpoint that is being converted"):
            convert(main, mtp, flavour=flavour, force=True)
    assert mtp.read_bytes() == before
    assert sorted(tmp_path.iterdir()) == [main, mtp]


@pytest.mark.parametrize(("kind", "rounding"), [("q8_0", 1 / 254 + 2.0**-11), ("f16", 2.0**-11), ("bf16", 2.0**-8), ("f32", 0)])
def test_requantise(kind: str, rounding: float, tmp_path: Path) -> None:
    path, out = tmp_path / "small.gguf", tmp_path / "out.gguf"
    write_small(path, quantize=True, embedding="F32")
    convert(path, out, requantise=kind)
    old, new, given, found = tensors(path), tensors(out), loaded(path), loaded(out)
    form = kind.upper()
    changed = {name for name, tensor in new.items() if tensor.tensor_type != old[name].tensor_type}
    kept = ("_exps.", "hc_", "_ape.", "ffn_gate_inp", "norm", "tid2eid", "sinks", "exp_probs_b")
    wide = {name for name, tensor in old.items() if not any(part in name for part in kept)}
    assert changed == {name for name in wide if old[name].tensor_type.name != form}
    assert {new[name].tensor_type.name for name in wide} == {form}
    for name, value in found.items():
        assert np.abs(value - given[name]).max() <= rounding * np.abs(given[name]).max(), name
    said = fields(out)["ds4jax.requantised"]
    assert said.startswith(f"{form}: ")
    assert sum(int(part.split()[0]) for part in said.partition(": ")[2].split(", ")) == len(changed)


def test_requantise_refuses_what_the_type_cannot_hold(tmp_path: Path) -> None:
    path = tmp_path / "small.gguf"
    large = random_tensors(SMALL)
    large["layers.1.attn.wkv.weight"] *= np.float32(1e8)
    write_gguf(path, SMALL, large, **vocabulary())
    for kind in ("f16", "q8_0"):
        with pytest.raises(
            InputError, match=rf"{path}: blk\.1\.attn_kv\.weight: holds values that are not finite in {kind.upper()}"
        ):
            convert(path, tmp_path / "out.gguf", requantise=kind, force=True)
    convert(path, tmp_path / "out.gguf", requantise="bf16", force=True)


def test_refuses_what_would_be_lost_or_means_nothing(random_hub: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    convert(random_hub, out)
    with pytest.raises(
        InputError,
        match=r"attn_q_b\.weight: type Q8_0 is not one of antirez's .*; give --requantise f32, which keeps every value",
    ):
        convert(out, tmp_path / "antirez.gguf", flavour="antirez")
    with pytest.raises(InputError, match="dense: it is for a checkpoint directory"):
        convert(out, tmp_path / "other.gguf", dense="bf16")
    with pytest.raises(InputError, match="requantise: it is for a GGUF file"):
        convert(random_hub, tmp_path / "other.gguf", requantise="bf16")
    assert {path.name for path in tmp_path.iterdir()} == {"out.gguf", "mtp-out.gguf"}
    convert(out, tmp_path / "antirez.gguf", flavour="antirez", requantise="f32")
    assert_same_model(tmp_path / "antirez.gguf", out)


def test_the_mtp_file_of_the_source_is_named(exact: Path, tmp_path: Path) -> None:
    assert convert(exact, tmp_path / "copy.gguf").note == "the MTP block stays in mtp-model.gguf"
    shutil.copy(exact, tmp_path / "alone.gguf")
    assert convert(tmp_path / "alone.gguf", tmp_path / "again.gguf").note == ""


def test_a_random_directory_is_the_same_each_time(random_hub: Path, tmp_path: Path) -> None:
    write_hub(tmp_path / "again")
    write_hub(tmp_path / "other", seed=1)
    written, again, other = (
        (folder / "model.safetensors").read_bytes() for folder in (random_hub, tmp_path / "again", tmp_path / "other")
    )
    assert written == again != other
    assert open_hub(random_hub).config == SMALL_HUB


def test_halves_of_the_joined_projection(tmp_path: Path) -> None:
    """They become one type by request; of two types they cannot lie in one tensor."""
    path = tmp_path / "small.gguf"
    given = random_tensors(SMALL)
    given["mtp.0.e_proj.weight"] = Q8_0.quantize(given["mtp.0.e_proj.weight"])
    write_gguf(path, SMALL, given, **vocabulary())
    says = r"mtp-out\.gguf: blk\.3\.nextn\.eh_proj\.weight: would be made of F32 and Q8_0; give them one type"
    with pytest.raises(InputError, match=says):
        convert(path, tmp_path / "out.gguf", flavour="mainline")
    convert(path, tmp_path / "out.gguf", flavour="mainline", requantise="bf16")
    joined = tensors(tmp_path / "mtp-out.gguf")["blk.3.nextn.eh_proj.weight"]
    expected = np.concatenate([loaded(path)[f"mtp.0.{half}_proj.weight"] for half in "eh"], axis=-1)
    assert joined.tensor_type.name == "BF16"
    assert np.abs(values(joined) - expected).max() <= 2.0**-8 * np.abs(expected).max()


def test_back_to_a_checkpoint_directory(random_hub: Path, exact: Path, tmp_path: Path) -> None:
    """Experts have the bytes that they came from, all other values are the same."""
    convert(exact, tmp_path / "hub", flavour="hub")
    assert sorted(path.name for path in (tmp_path / "hub").iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]
    first, back = read_raw(random_hub / "model.safetensors"), read_raw(tmp_path / "hub" / "model.safetensors")
    experts = [name for name in first if ".experts." in name and "shared" not in name]
    assert len(experts) == 5 * 3 * 8 * 2
    for name in experts:
        assert back[name] == first[name], name
    assert_same_model(tmp_path / "hub", random_hub)
    again = tmp_path / "again.gguf"
    convert(tmp_path / "hub", again, dense="bf16")
    one, other = (open_checkpoint(path).tokenizer for path in (again, exact))
    assert one is not None
    assert other is not None
    assert [one.encode(text, parse_special=True) for text in ("abc de<｜end▁of▁sentence｜>", "語")] == [
        other.encode(text, parse_special=True) for text in ("abc de<｜end▁of▁sentence｜>", "語")
    ]


def test_placeholders_stay_out_of_the_tokenizer(tmp_path: Path) -> None:
    tokens = ["<a>", "<b>", *BYTE_OF, "th", "[PAD259]", "<think>"]
    types = [3, 3, *[1] * 257, 5, 4]
    raw = json.loads(tokenizer_json(tokens, ["t h"], types))
    assert raw["model"]["vocab"] == {token: i for i, token in enumerate(tokens) if token != "[PAD259]"}
    assert {one["content"]: one["special"] for one in raw["added_tokens"]} == {"<a>": True, "<b>": True, "<think>": False}


def test_a_checkpoint_directory_refuses(exact: Path, random_hub: Path, tmp_path: Path) -> None:
    write_small(tmp_path / "small.gguf", quantize=True)
    cases = [
        (tmp_path / "small.gguf", {}, r"ds4jax\.qat: is false"),
        (exact, {"requantise": "f32"}, "requantise: a checkpoint directory keeps all values"),
        (random_hub, {}, "flavour: is a checkpoint directory already"),
    ]
    for source, options, says in cases:
        with pytest.raises(InputError, match=says):
            convert(source, tmp_path / "hub", flavour="hub", **options)
    with pytest.raises(InputError, match="is a file; give the name of a folder"):
        convert(exact, tmp_path / "small.gguf", flavour="hub")
    write_small(tmp_path / "other.gguf", dataclasses.replace(SMALL, qat=True), quantize=True)
    with pytest.raises(InputError, match=r"blk\.0\.ffn_gate_exps\.weight: type Q8_0; only MXFP4 experts can become FP4"):
        convert(tmp_path / "other.gguf", tmp_path / "hub", flavour="hub")
    assert not (tmp_path / "hub").exists()


def test_a_checkpoint_directory_loses_the_index_of_an_earlier_one(exact: Path, tmp_path: Path) -> None:
    """The index would be read in place of the new file."""
    (tmp_path / "model.safetensors.index.json").write_text("old")
    with pytest.raises(InputError, match=r"index\.json: would be read with model\.safetensors; .* --force to remove it"):
        convert(exact, tmp_path, flavour="hub")
    assert len(list(tmp_path.iterdir())) == 1
    assert "model.safetensors.index.json" in convert(exact, tmp_path, flavour="hub", force=True).note
    assert_same_model(tmp_path, exact)
