# SPDX-License-Identifier: Apache-2.0
"""The config loader: scalars, merging, overrides, round trips, and every file under configs/."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from sqzjax import config, config_yaml
from sqzjax.errors import ConfigError
from sqzjax.models.config import ModelConfig
from tests.config_schema import Adam, Config, File, Lion, Model, Rope

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def _load(data, *overrides) -> Config:
    return config.load(Config, {"model": {"width": 64}, **data}, overrides)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1E5", 1e5),
        ("1.5e+3", 1500.0),
        (".5", 0.5),
        ("3.", 3.0),
        ("-2", -2),
        ("010", 10),
        ("1_000_000", 1_000_000),
        ("0x1F", 31),
        ("0o17", 15),
        (".inf", math.inf),
        ("-.inf", -math.inf),
        ("no", "no"),
        ("Off", "Off"),
        ("yes", "yes"),
        ("true", True),
        ("FALSE", False),
        ("~", None),
        ("", None),
        ("2024-01-01", "2024-01-01"),
        ("1:30", "1:30"),
        ("1.2.3", "1.2.3"),
        ("'3'", "3"),
        ("=", "="),
    ],
)
def test_scalars_are_read_as_in_yaml_1_2(text, value):
    read = config_yaml.read_text(text, "test")
    assert read == value
    assert type(read) is type(value)


def test_types_are_converted_to_those_of_the_schema():
    loaded = _load({"clip": 1, "seeds": [1, 2], "out": "a/b", "extra": {"deep": [{"x": 1}]}})
    assert type(loaded.clip) is float
    assert loaded.seeds == (1, 2)
    assert loaded.out == Path("a/b")
    assert loaded.extra == {"deep": [{"x": 1}]}
    assert _load({"clip": None}).clip is None
    assert hash(loaded.model) == hash(Model(width=64))


def test_overrides_are_typed_and_reach_into_lists_and_unions():
    loaded = _load(
        {"files": [{"path": "a"}, {"path": "b"}], "seeds": [1, 2]},
        "optimizer.kind=lion",
        "optimizer.learning_rate=1E-2",
        "files.1.weight=3",
        "seeds.0=7",
        "model.rope.theta=5e5",
        "name='no'",
        "extra={a: [1, no]}",
        "extra.b=x=y",
        "clip=null",
    )
    assert loaded.optimizer == Lion(learning_rate=1e-2)
    assert loaded.files[1] == File(path="b", weight=3.0)
    assert loaded.seeds == (7, 2)
    assert loaded.model.rope == Rope(theta=5e5)
    assert loaded.name == "no"
    assert loaded.extra == {"a": [1, "no"], "b": "x=y"}
    assert loaded.clip is None


def test_a_changed_kind_replaces_a_union_but_not_a_mode():
    low = {"optimizer": {"kind": "adam", "betas": [0.5, 0.6], "learning_rate": 1.0}}
    assert _load(low, "optimizer.kind=lion").optimizer == Lion()
    assert _load(low, "optimizer={kind: lion, momentum: 0.5}").optimizer == Lion(momentum=0.5)
    assert _load(low, "optimizer.kind=adam").optimizer.betas == (0.5, 0.6)
    rope = _load({"model": {"width": 8, "rope": {"theta": 1e6}}}, "model.rope.kind=linear")
    assert rope.model.rope == Rope(kind="linear", theta=1e6)


def test_a_section_given_in_part_keeps_the_rest_of_its_default():
    assert Config(model=Model(width=64)).optimizer.learning_rate == 3e-4
    assert _load({}, "optimizer.betas=[0.8, 0.9]").optimizer == Adam(
        learning_rate=3e-4, betas=(0.8, 0.9)
    )
    assert _load({"optimizer": {"kind": "lion"}}).optimizer == Lion()


def test_base_files_merge_in_order_and_at_any_level(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "model.yaml").write_text("width: 32\nrope: {theta: 7}\n")
    (tmp_path / "low.yaml").write_text(
        "steps: 1\nbatch: 2\nname: low\noptimizer: {kind: adam, betas: [0, 0.5]}\nseeds: [1, 2]\n"
    )
    (tmp_path / "high.yaml").write_text("base: low.yaml\nbatch: 3\n")
    (tmp_path / "sub/other.yaml").write_text("name: other\nextra: {a: 1, b: {c: 2}}\n")
    (tmp_path / "sub/top.yaml").write_text(
        "base: [../high.yaml, other.yaml]\n"
        "model: {base: ../model.yaml, heads: 2}\n"
        "optimizer: {kind: lion}\nseeds: [3]\nextra: {b: {d: 3}}\n"
    )
    loaded = config.load(Config, tmp_path / "sub/top.yaml", ["steps=9"])
    assert loaded == Config(
        model=Model(width=32, heads=2, rope=Rope(theta=7.0)),
        optimizer=Lion(),
        steps=9,
        batch=3,
        name="other",
        seeds=(3,),
        extra={"a": 1, "b": {"c": 2, "d": 3}},
    )


def test_loading_changes_neither_source_nor_defaults():
    data = {"model": {"width": 64}, "extra": {"a": [1]}}
    before = json.dumps(data)
    first = config.load(Config, data, ["extra.a.0=2", "scales.x=1"])
    assert json.dumps(data) == before
    assert first.extra == {"a": [2]}
    assert config.load(Config, data).scales == {}


_TEXT = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=20)
_TRICKY = st.sampled_from(
    [
        "no",
        "1e-4",
        "0x1",
        "1_0",
        "null",
        "~",
        "",
        "=",
        "<<",
        "- a",
        "#",
        "a: b",
        "\t",
        "\n",
        "é",
        "*",
    ]
)
_WORDS = _TEXT | _TRICKY
_FLOATS = st.floats(allow_nan=False)
_TREES = st.recursive(
    st.none() | st.booleans() | st.integers() | _FLOATS | _WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_WORDS, inner, max_size=3),
    max_leaves=8,
)
_OPTIMIZERS = st.builds(
    Adam, learning_rate=st.floats(1e-30, 1e30), betas=st.tuples(_FLOATS, _FLOATS)
) | st.builds(Lion, momentum=_FLOATS)
_CONFIGS = st.builds(
    Config,
    model=st.builds(
        Model, width=st.integers(1, 100).map(lambda n: 4 * n), rope=st.builds(Rope, theta=_FLOATS)
    ),
    optimizer=_OPTIMIZERS,
    files=st.lists(st.builds(File, path=_WORDS), max_size=3).map(tuple),
    name=_WORDS,
    steps=st.integers(1, 10**30),
    clip=st.none() | _FLOATS,
    seeds=st.lists(st.integers(), max_size=3).map(tuple),
    out=st.sampled_from([Path("a/b"), Path("no"), Path("1e-4")]),
    extra=st.dictionaries(_WORDS, _TREES, max_size=3),
    scales=st.dictionaries(_WORDS, _FLOATS, max_size=3),
    by_name=st.dictionaries(_WORDS, st.builds(File, url=_WORDS), max_size=2),
)


@settings(max_examples=60, deadline=None)
@given(_CONFIGS)
def test_a_dumped_config_loads_back_equal(original):
    data = config_yaml.read_text(config.dump(original), "dump")
    assert config.parse(Config, data) == original
    assert config.parse(Config, json.loads(json.dumps(config.to_dict(original)))) == original
    assert config.fingerprint(config.parse(Config, data)) == config.fingerprint(original)


@settings(max_examples=50, deadline=None)
@given(st.dictionaries(_WORDS, _WORDS | st.integers(), max_size=4))
def test_other_yaml_readers_agree_about_text(mapping):
    assert yaml.safe_load(config_yaml.write(mapping)) == mapping


@settings(max_examples=80, deadline=None)
@given(st.dictionaries(st.sampled_from([*Config.__dataclass_fields__, "x"]), _TREES, max_size=5))
def test_any_mapping_is_loaded_or_refused_with_paths(data):
    try:
        config.load(Config, data)
    except ConfigError as error:
        assert error.problems
        assert all(": " in problem or "override" in problem for problem in error.problems)


def test_fingerprints_differ_where_configs_do_and_only_there():
    one = _load({"clip": 1})
    assert config.fingerprint(one) == config.fingerprint(_load({"clip": 1.0}))
    assert config.fingerprint(one) == config.fingerprint(Config(model=Model(width=64), clip=1))
    assert config.fingerprint(one) != config.fingerprint(_load({"clip": 1.5}))
    assert len(config.fingerprint(one)) == 64


def test_describe_names_every_key_with_rule_and_default():
    text = config.describe(Config)
    for line in (
        "steps: an integer (default 100)",
        "model: Model (required)",
        "optimizer: Adam or Lion (default Adam)",
        "    width: an integer (required)",
        "clip: a number or null (default 1.0)",
        "    # Lion: The second kind of optimizer.",
        "    url: text or null (default null)",
    ):
        assert line in text.splitlines()


def test_a_config_error_raised_by_a_schema_keeps_all_its_problems():
    @dataclass(frozen=True, kw_only=True)
    class Two:
        key: int = 0

        def __post_init__(self):
            raise ConfigError(["first: rule", "second: rule"])

    with pytest.raises(ConfigError) as caught:
        config.load(Two, {})
    assert caught.value.problems == ("top level: first: rule", "top level: second: rule")


def _schema_of(path: Path):
    """Which schema a file under configs/ is for; fragments for `base:` are checked as parts."""
    kind = path.relative_to(CONFIGS).parts[0]
    if kind == "models":
        return ModelConfig
    if kind == "eval":
        from eval.__main__ import PROGRAM
    elif kind == "train":
        from train.__main__ import PROGRAM
    else:
        pytest.skip(f"no schema for configs/{kind}")
    from sqzjax.cli import schema_for

    return schema_for(PROGRAM, path)


@pytest.mark.parametrize(
    "path",
    sorted(CONFIGS.rglob("*.y*ml")),
    ids=lambda path: path.relative_to(CONFIGS).as_posix(),
)
def test_every_config_file_loads_and_survives_dump_and_load(path, tmp_path):
    schema = _schema_of(path)
    loaded = config.load(schema, path)
    again = tmp_path / "again.yaml"
    again.write_text(config.dump(loaded))
    assert config.load(schema, again) == loaded
    assert config.load(schema, config.to_dict(loaded)) == loaded
    assert config.dump(config.load(schema, again)) == config.dump(loaded)
