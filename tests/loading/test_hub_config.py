"""config.json of the hub: the golden model's, V4-Flash's, and broken ones."""

from __future__ import annotations

import dataclasses
import json

import pytest
from hub_files import V4_FLASH
from numerics import GOLDEN, golden_config

from ds4jax.config import Config
from ds4jax.errors import InputError
from ds4jax.loading.hub_config import IF_PRESENT, KEYS, YARN_KEYS, read_config, with_mtp

YARN = V4_FLASH["rope_scaling"]


@pytest.fixture
def read(tmp_path):
    """Reads a config.json made of V4-Flash's values with changes; a change to None leaves the key out."""

    def write_and_read(**changes):
        raw = {key: value for key, value in (V4_FLASH | changes).items() if value is not None}
        path = tmp_path / "config.json"
        path.write_text(json.dumps(raw))
        return read_config(path)

    return write_and_read


def refused(read, key, **changes):
    """The message, which is one line that begins with the file and the key."""
    with pytest.raises(InputError) as caught:
        read(**changes)
    message = str(caught.value)
    assert "\n" not in message
    assert f"config.json: {key}: " in message
    return message


def test_v4_flash(read, tmp_path):
    config, raw = read()
    assert config == Config(n_mtp=0)
    assert with_mtp(config, tmp_path / "config.json") == Config()
    assert raw == V4_FLASH


def test_golden():
    config, _ = read_config(GOLDEN / "hub" / "config.json")
    other = golden_config(qat=True)
    # The reference's config.json has no context length.
    assert with_mtp(config, GOLDEN) == dataclasses.replace(other, max_context=1024)


@pytest.mark.parametrize("key", [*sorted(KEYS.values()), "model_type", "scoring_func"])
def test_nothing_is_assumed(read, key):
    assert "missing" in refused(read, key, **{key: None})


@pytest.mark.parametrize("key", sorted(YARN_KEYS.values()))
def test_no_yarn_value_is_assumed(read, key):
    yarn = {name: value for name, value in YARN.items() if name != key}
    assert "missing" in refused(read, f"rope_scaling.{key}", rope_scaling=yarn)
    assert "missing" in refused(read, f"rope_parameters.{key}", rope_scaling=None, rope_parameters=yarn)


def test_yarn_itself_is_not_assumed(read):
    assert "missing" in refused(read, "rope_scaling", rope_scaling=None)


def test_rope_parameters(read):
    """Both forms in which newer files describe rotation."""
    flat = {**YARN, "rope_type": "yarn", "attention_factor": 1.0}
    del flat["type"]
    assert read(rope_scaling=None, rope_parameters=flat)[0] == Config(n_mtp=0)
    nested = {"main": {"rope_type": "default", "rope_theta": 500.0}, "compress": {**flat, "rope_theta": 700.0}}
    config, _ = read(rope_scaling=None, rope_parameters=nested, rope_theta=None, compress_rope_theta=None)
    assert config == Config(n_mtp=0, rope_theta=500.0, compress_rope_theta=700.0)
    assert "missing" in refused(read, "rope_theta", rope_scaling=None, rope_parameters={"compress": flat}, rope_theta=None)


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("model_type", "deepseek_v3", '"deepseek_v3"; only deepseek_v4'),
        ("scoring_func", "sigmoid", '"sigmoid"; only sqrtsoftplus'),
        ("num_key_value_heads", 8, "is 8; only 1"),
        ("tie_word_embeddings", True, "is true; only false"),
        ("norm_topk_prob", False, "is false; only true"),
        ("hidden_size", "4096", 'is "4096"; it must be an integer'),
        ("hidden_size", 4096.0, "is 4096.0; it must be an integer"),
        ("hidden_size", True, "is true; it must be an integer"),
        ("hidden_size", 2**40, "is 1099511627776; it must be an integer"),
        ("hidden_size", -1, "is -1; it must be an integer"),
        ("hidden_size", 0, "is 0"),
        ("eos_token_id", [1, 2], "is [1, 2]; it must be an integer"),
        ("eos_token_id", 129280, "is 129280; it must be below vocab_size (129280)"),
        ("bos_token_id", 129280, "is 129280; it must be below vocab_size (129280)"),
        ("rms_norm_eps", "small", 'is "small"; it must be a number'),
        ("rms_norm_eps", float("nan"), "is NaN; it must be a number"),
        ("rope_theta", float("inf"), "is Infinity; it must be a number"),
        ("rope_theta", False, "is false; it must be a number"),
        ("compress_ratios", 4, "is 4; it must be a list"),
        ("compress_ratios", [0] * 42, "has 42 entries"),
        ("compress_ratios", [1] * 44, "holds 1"),
        ("num_hidden_layers", 46, "has 44 entries"),
        ("o_groups", 7, "does not divide"),
        ("index_head_dim", 96, "power of two"),
        ("rope_scaling", "yarn", 'is "yarn"; it must be an object'),
    ],
)
def test_refuses(read, key, value, says):
    # Too many layers show as too few ratios.
    named = "compress_ratios" if key == "num_hidden_layers" else key
    assert says in refused(read, named, **{key: value})


@pytest.mark.parametrize("ratios", [[0, 0, "4"] + [4] * 41, [0, 0, 4.5] + [4] * 41, [0, 0, None] + [4] * 41])
def test_refuses_ratios_that_are_no_integers(read, ratios):
    assert "it must be an integer" in refused(read, "compress_ratios[2]", compress_ratios=ratios)


def test_refuses_other_scaling(read):
    assert 'is "linear"; only yarn' in refused(read, "rope_scaling.type", rope_scaling={**YARN, "type": "linear"})
    assert "is null; only yarn" in refused(read, "rope_scaling.type", rope_scaling={"factor": 16})
    assert "never scaled" in refused(read, "rope_scaling.attention_factor", rope_scaling={**YARN, "attention_factor": 1.28})


def test_mtp_needs_its_ratio(read, tmp_path):
    config, _ = read(compress_ratios=[0, 0] + [4, 128] * 20 + [4])
    with pytest.raises(InputError, match=r"config\.json: compress_ratios: has 43 entries"):
        with_mtp(config, tmp_path / "config.json")


def test_more_ratios_than_layers_are_fine(read):
    config, _ = read(compress_ratios=[0, 0] + [4, 128] * 20 + [4, 0, 0, 0])
    assert config.n_layers == 43
    assert config.mtp_ratio == 0


def test_absent_keys_with_one_possible_value(read):
    config, _ = read(**dict.fromkeys(IF_PRESENT))
    assert config == Config(n_mtp=0)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"\xff\xfe\xff", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b"[1]", "must be a JSON object"),
        (b'{"model_type": "deepseek_v4", "model_type": "llama"}', "'model_type' is given twice"),
    ],
)
def test_refuses_other_files(tmp_path, content, says):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=says) as caught:
        read_config(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_missing_file(tmp_path):
    with pytest.raises(InputError, match=r"config\.json: cannot be read \(No such file or directory\)"):
        read_config(tmp_path / "config.json")
