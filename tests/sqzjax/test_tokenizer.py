# SPDX-License-Identifier: Apache-2.0
"""Tokenizers: round trips, special tokens, streaming, damaged files, a real model's tokenizer."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import jaxtyping
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sqzjax.io import tokenizer as tokenizers
from sqzjax.io.tokenizer import ByteTokenizer, IncrementalDecoder, JsonTokenizer, load
from tests import arrays

BYTES = ByteTokenizer()


@pytest.fixture(scope="session")
def stories(shared_data: Path) -> Path:
    return shared_data / "stories260K"


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    """A folder with a tokenizer of the bytes that the tests may damage."""
    BYTES.save(tmp_path)
    write(tmp_path / "tokenizer_config.json", {"eos_token": "<|eos|>"})
    return tmp_path


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Switch off the type checks of the test run, which users do not have."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


def write(path: Path, value: object) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


@given(st.text())
def test_bytes_round_trip(text: str):
    ids = BYTES.encode(text, add_bos=True, add_eos=True)
    assert ids[0] == 256 and ids[-1] == 257
    assert bytes(ids[1:-1]) == text.encode("utf-8")
    assert BYTES.decode(ids) == text
    assert BYTES.encode_batch([text, text]) == [ids[1:-1]] * 2


def test_bytes_special_tokens():
    assert BYTES.vocab_size == 260
    assert (BYTES.bos_id, BYTES.eos_id, BYTES.pad_id, BYTES.mask_id) == (256, 257, 258, 259)
    assert BYTES.encode("<|eos|>", parse_special=True) == list(b"<|eos|>")
    assert BYTES.decode([256, 72, 105, 257, 258, 259]) == "Hi"
    assert BYTES.decode([256, 72, 259], skip_special=False) == "<|bos|>H<|mask|>"
    assert BYTES.decode([]) == ""


def test_bytes_file_means_the_same_to_the_tokenizers_library(tmp_path: Path):
    BYTES.save(tmp_path)
    assert isinstance(load(tmp_path), ByteTokenizer)
    other = JsonTokenizer((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    every = "".join(map(chr, range(1, 700))) + "\x00 日本語 😀  \n\t x"
    assert other.encode(every) == BYTES.encode(every)
    assert other.decode(other.encode(every)) == every
    assert other.encode("<|mask|>", parse_special=True) == [BYTES.mask_id]
    assert other.vocab_size == BYTES.vocab_size


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([72, 260], "260 at position 1"),
        ([-1], "-1 at position 0"),
        ([2**31], "2147483648"),
        ([1.5], "integers"),
        ([True], "integers"),
        ([[1], [2]], "flat"),
        (["a"], "integers"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_decode_rejects_what_is_no_id(ids: list, message: str):
    with pytest.raises(ValueError, match=message):
        BYTES.decode(ids)


@pytest.mark.parametrize("text", ["a\ud800b", None, b"bytes", 3])
@pytest.mark.usefixtures("unchecked")
def test_encode_rejects_what_is_no_text(text: object, toy: Path):
    for tokenizer in (BYTES, load(toy)):
        with pytest.raises(ValueError, match=r"lone surrogate U\+D800|encodes text"):
            tokenizer.encode(text)  # pyright: ignore[reportArgumentType]
        with pytest.raises(ValueError, match=r"lone surrogate|encodes text"):
            tokenizer.encode_batch(["fine", text])  # pyright: ignore[reportArgumentType]


@given(st.lists(st.integers(0, 259)), st.integers(1, 4))
def test_incremental_bytes_equal_whole(ids: list[int], step: int):
    decoder = IncrementalDecoder(BYTES)
    pieces = [decoder.push(*ids[i : i + step]) for i in range(0, len(ids), step)]
    assert "".join([*pieces, decoder.finish()]) == BYTES.decode(ids)


def test_incremental_holds_back_incomplete_characters():
    decoder = IncrementalDecoder(BYTES)
    assert [decoder.push(i) for i in "a€b".encode()] == ["a", "", "", "€", "b"]
    assert decoder.push(0xE2) == ""
    assert decoder.finish() == "\ufffd"


def test_stories_tokenizer_matches_the_reference(stories: Path):
    tokenizer = load(stories)
    expected = arrays.load(stories / "expected.npz")
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (512, 1, 2)
    assert tokenizer.adds_bos
    prompt = tokenizer.encode("Once upon a time", add_bos=None)
    assert prompt == expected["prompt_ids"][0].tolist()
    assert tokenizer.encode("Once upon a time") == prompt[1:]
    assert tokenizer.decode(expected["greedy_tokens"][0]).startswith("Once upon a time")
    sample = (stories.parent / "tinystories_sample.txt").read_text(encoding="utf-8")
    texts = [story.strip() for story in sample.split("<|endoftext|>") if story.strip()]
    counts = expected["story_nll"][:, 1].astype(int).tolist()
    assert [len(tokenizer.encode(text)) for text in texts] == counts
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]
    assert [tokenizer.decode(tokenizer.encode(text)) for text in texts] == texts


@settings(max_examples=50, deadline=None)
@given(text=st.text(max_size=40))
def test_incremental_json_equals_whole(stories: Path, text: str):
    tokenizer = load(stories)
    ids = tokenizer.encode(text)
    decoder = IncrementalDecoder(tokenizer)
    pieces = [decoder.push(token) for token in ids]
    assert "".join([*pieces, decoder.finish()]) == tokenizer.decode(ids)


def test_incremental_keeps_the_space_after_a_prompt(stories: Path):
    tokenizer = load(stories)
    prompt, more = tokenizer.encode("Once upon"), tokenizer.encode("a time")
    decoder = IncrementalDecoder(tokenizer, prompt=prompt)
    pieces = [decoder.push(token) for token in more]
    assert "".join([*pieces, decoder.finish()]) == " a time"
    assert tokenizer.decode(more) == "a time"


def test_special_text_in_documents_stays_text(stories: Path):
    tokenizer = load(stories)
    ids = tokenizer.encode("</s> and <s>")
    assert not {1, 2} & set(ids)
    assert tokenizer.decode(ids) == "</s> and <s>"
    assert not {1, 2} & {token for row in tokenizer.encode_batch(["</s>", "<s>"]) for token in row}
    assert tokenizer.encode("</s>", parse_special=True)[-1] == 2


def test_save_keeps_the_fingerprint(stories: Path, tmp_path: Path):
    tokenizer = load(stories)
    tokenizer.save(tmp_path)
    again = load(tmp_path)
    assert again.fingerprint == tokenizer.fingerprint
    assert (again.bos_id, again.eos_id, again.adds_bos) == (1, 2, True)
    settings_file = tmp_path / "tokenizer_config.json"
    changed = json.loads(settings_file.read_text(encoding="utf-8"))
    write(settings_file, {**changed, "add_bos_token": False})
    assert load(tmp_path).fingerprint != tokenizer.fingerprint


def test_special_ids_from_other_files(toy: Path):
    write(toy / "tokenizer_config.json", {"eos_token": {"content": "<|eos|>", "lstrip": False}})
    write(toy / "special_tokens_map.json", {"bos_token": "<|bos|>"})
    write(toy / "config.json", {"eos_token_id": 3, "pad_token_id": [258], "mask_token_id": 10**6})
    tokenizer = load(toy / "tokenizer.json")
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (256, 257, 258)
    assert tokenizer.mask_id is None
    with pytest.raises(ValueError, match="no bos token"):
        write(toy / "special_tokens_map.json", {})
        load(toy).encode("x", add_bos=True)


def test_truncation_and_padding_of_the_file_are_ignored(toy: Path):
    definition = json.loads((toy / "tokenizer.json").read_text(encoding="utf-8"))
    definition["truncation"] = {
        "direction": "Right",
        "max_length": 4,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    write(toy / "tokenizer.json", definition)
    assert len(load(toy).encode("longer than four")) == 16


def test_post_processor_tells_whether_bos_is_added(toy: Path):
    definition = json.loads((toy / "tokenizer.json").read_text(encoding="utf-8"))
    definition["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<|bos|>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|bos|>": {"id": "<|bos|>", "ids": [256], "tokens": ["<|bos|>"]}},
    }
    write(toy / "tokenizer.json", definition)
    write(toy / "tokenizer_config.json", {"bos_token": "<|bos|>"})
    tokenizer = load(toy)
    assert tokenizer.adds_bos
    assert tokenizer.encode("a", add_bos=None) == [256, 97]
    assert tokenizer.encode("a") == [97]
    for setting, added in ((None, True), (False, False)):
        write(toy / "tokenizer_config.json", {"bos_token": "<|bos|>", "add_bos_token": setting})
        assert load(toy).adds_bos is added


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", b'{"model": ', "damaged tokenizer.json"),
        ("tokenizer.json", b"", "damaged tokenizer.json"),
        ("tokenizer.json", b'{"version": "1.0"}', "damaged tokenizer.json"),
        ("tokenizer.json", b"\xff\xfe\x00", "not UTF-8"),
        ("tokenizer_config.json", b"{", "not valid JSON"),
        ("tokenizer_config.json", b"[]", "JSON object"),
        ("tokenizer_config.json", b"[" * 200_000, "not valid JSON"),
        ("tokenizer_config.json", b'{"eos_token": "</s>"}', "not in the vocabulary"),
        ("special_tokens_map.json", b"nonsense", "not valid JSON"),
        ("config.json", b"\x80", "not UTF-8"),
    ],
)
def test_damaged_files(toy: Path, name: str, content: bytes, message: str):
    (toy / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load(toy)


@pytest.mark.parametrize("source", ["", "absent", "by-tes"])
def test_missing_tokenizer(source: str, tmp_path: Path):
    with pytest.raises(ValueError, match="no tokenizer at"):
        load(tmp_path / source)


def test_chat_template_of_the_settings(toy: Path, tmp_path: Path):
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
    write(toy / "tokenizer_config.json", {"eos_token": "<|eos|>", "chat_template": template})
    tokenizer = load(toy)
    text = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}])
    assert text == "user: Hi<|eos|>"
    assert tokenizer.encode(text, parse_special=True)[-1] == tokenizer.eos_id
    tokenizer.save(tmp_path / "copy")
    again = load(tmp_path / "copy").apply_chat_template([{"role": "user", "content": "Hi"}])
    assert again == text
    (toy / "chat_template.jinja").write_text("file", encoding="utf-8")
    assert load(toy).apply_chat_template([{"role": "user", "content": "Hi"}]) == "file"
    shutil.rmtree(tmp_path / "copy")


def test_a_token_that_the_settings_deny_is_not_taken_from_the_model(toy: Path, tmp_path: Path):
    """As Qwen's folders have it: `bos_token` null, `bos_token_id` in config.json."""
    template = "{{ bos_token }}|{% if bos_token %}B{% endif %}|{{ pad_token }}|{{ unk_token }}"
    settings_ = {"bos_token": None, "unk_token": {"content": "<|eos|>"}, "chat_template": template}
    write(toy / "tokenizer_config.json", settings_)
    write(toy / "config.json", {"bos_token_id": 256, "pad_token_id": 258})
    tokenizer = load(toy)
    assert (tokenizer.bos_id, tokenizer.pad_id) == (None, 258)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}]) == "|||<|eos|>"
    tokenizer.save(tmp_path / "copy")
    saved = json.loads((tmp_path / "copy" / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert saved["bos_token"] is None


def test_which_of_two_files_of_special_tokens_counts(toy: Path):
    write(toy / "special_tokens_map.json", {"eos_token": "<|pad|>"})
    write(toy / "tokenizer_config.json", {"eos_token": "<|eos|>"})
    assert load(toy).eos_id == 258
    write(toy / "tokenizer_config.json", {"eos_token": "<|eos|>", "added_tokens_decoder": {}})
    assert load(toy).eos_id == 257


def test_templates_see_no_tools_as_none(toy: Path):
    template = "{% if tools is none and documents is none %}plain{% endif %}"
    write(toy / "tokenizer_config.json", {"eos_token": "<|eos|>", "chat_template": template})
    assert load(toy).apply_chat_template([{"role": "user", "content": "Hi"}]) == "plain"


def test_no_chat_template(toy: Path):
    for tokenizer in (BYTES, load(toy)):
        with pytest.raises(ValueError, match="no chat template"):
            tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}])


def test_jax_is_not_imported():
    code = "import sys, sqzjax.io.tokenizer as t; t.load('bytes'); sys.exit('jax' in sys.modules)"
    root = Path(tokenizers.__file__).parents[2]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)
