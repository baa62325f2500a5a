"""Loaded tokenizers give SentencePiece's ids, and those that would not are refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyagent_fast.errors import ModelError
from tinyagent_fast.prompts.loading import (
    HARD_STRINGS,
    check_tokenizer,
    load_tokenizer,
    resolve_tokenizer_folder,
    switched_off,
    tokenizer_from_sentencepiece,
)
from tinyagent_fast.prompts.tokens import PromptTokenizer

ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
NEAR_TEXT = st.text('ab 1.\n"(),$[]\u2581\u00e9_<>/s', max_size=40)
CASE_SEPARATOR = "\n__ggml_vocab_test__\n"

Encode = Callable[[str], list[int]]


def sentencepiece_of(path: Path) -> Encode:
    from sentencepiece import SentencePieceProcessor

    processor = SentencePieceProcessor(model_file=str(path))
    return lambda text: list(processor.encode(text))


def with_first_prefix_only(tokenizer: Any) -> Any:
    """Change a tokenizer as the Llama class of transformers 5 does when it loads one."""
    from tokenizers import pre_tokenizers

    core = tokenizer.backend_tokenizer
    core.normalizer = None
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return tokenizer


@pytest.fixture(scope="module")
def llama(real_data: Path) -> Any:
    return tokenizer_from_sentencepiece(real_data / "llama_tokenizer.model")


@pytest.fixture(scope="module")
def llama_reference(real_data: Path) -> Encode:
    return sentencepiece_of(real_data / "llama_tokenizer.model")


@pytest.mark.parametrize("text", HARD_STRINGS)
def test_llama_ids_are_sentencepieces_on_hard_strings(
    text: str, llama: Any, llama_reference: Encode
) -> None:
    assert PromptTokenizer(llama).encode_text(text) == llama_reference(text)


def test_llama_ids_are_sentencepieces_on_500_published_plans_and_queries(
    real_data: Path, llama: Any, llama_reference: Encode
) -> None:
    entries = json.loads((real_data / "training_data.json").read_text(encoding="utf-8"))
    chosen = list(entries.values())[:500]
    texts = [text for e in chosen for text in (e["input"], e["output"][0]["raw_output"])]
    assert len(texts) == 1000
    ours = PromptTokenizer(llama).encode_texts(texts)
    assert [t for t, ids in zip(texts, ours, strict=True) if ids != llama_reference(t)] == []


def test_llama_ids_are_llama_cpps_on_all_its_own_cases(real_data: Path, llama: Any) -> None:
    name = "ggml-vocab-llama-spm.gguf"
    cases = (real_data / f"{name}.inp").read_bytes().decode().split(CASE_SEPARATOR)
    lines = (real_data / f"{name}.out").read_text(encoding="utf-8").split("\n")
    assert len(cases) == len(lines) == 47
    tokenizer = PromptTokenizer(llama)
    for case, line in zip(cases, lines, strict=True):
        assert tokenizer.encode_text(case) == [int(word) for word in line.split()], case


def test_a_saved_llama_tokenizer_loads_with_the_same_ids(
    tmp_path: Path, llama: Any, llama_reference: Encode
) -> None:
    llama.save_pretrained(str(tmp_path))
    loaded = PromptTokenizer(load_tokenizer(tmp_path))
    assert [loaded.encode_text(text) for text in HARD_STRINGS] == [
        llama_reference(text) for text in HARD_STRINGS
    ]
    assert (loaded.bos_id, loaded.eos_id, loaded.pad_id) == (1, 2, 0)
    assert len(loaded.hf) == 32000


@pytest.fixture(scope="module")
def small_pair(spm_folder: Path) -> tuple[Encode, Encode]:
    path = spm_folder / "tokenizer.model"
    ours = PromptTokenizer(tokenizer_from_sentencepiece(path))
    return ours.encode_text, sentencepiece_of(path)


@settings(max_examples=400, deadline=None)
@given(text=ANY_TEXT | NEAR_TEXT)
def test_ids_are_sentencepieces_on_any_text(small_pair: tuple[Encode, Encode], text: str) -> None:
    ours, reference = small_pair
    assert ours(text) == reference(text)


def test_special_tokens_come_from_the_model_file_and_none_is_added(spm_folder: Path) -> None:
    tokenizer = load_tokenizer(spm_folder)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token) == (
        "<s>",
        "</s>",
        "<unk>",
    )
    assert tokenizer.pad_token == "<unk>"
    assert len(tokenizer) == tokenizer.vocab_size == 700


def test_the_tokenizer_itself_puts_one_bos_in_front(spm_folder: Path) -> None:
    tokenizer = load_tokenizer(spm_folder)
    ids = tokenizer("Hello").input_ids
    assert ids[0] == tokenizer.bos_token_id
    assert ids.count(tokenizer.bos_token_id) == 1


def test_saving_and_loading_keeps_the_ids(spm_folder: Path, tmp_path: Path) -> None:
    before = load_tokenizer(spm_folder)
    before.save_pretrained(str(tmp_path))
    assert not (tmp_path / "tokenizer.model").exists()
    after = load_tokenizer(tmp_path)
    pair = [PromptTokenizer(t) for t in (before, after)]
    for text in HARD_STRINGS:
        assert pair[0].encode_text(text) == pair[1].encode_text(text)


def test_a_byte_level_tokenizer_is_taken_as_it_is(tiny_base: Path) -> None:
    tokenizer = load_tokenizer(tiny_base)
    ids = tokenizer("  two  spaces ", add_special_tokens=False).input_ids
    assert tokenizer.decode(ids) == "  two  spaces "


@pytest.mark.parametrize("witness", ["tokenizer.model", "tokenizer.json"])
def test_a_tokenizer_changed_as_transformers_5_changes_it_is_refused(
    witness: str, spm_folder: Path, tmp_path: Path
) -> None:
    folder = spm_folder
    if witness == "tokenizer.json":
        load_tokenizer(spm_folder).save_pretrained(str(tmp_path))
        folder = tmp_path
    changed = with_first_prefix_only(load_tokenizer(folder))
    with pytest.raises(ModelError, match=rf"other ids than {witness}.*llama\.cpp"):
        check_tokenizer(changed, folder)


def test_the_check_accepts_the_unchanged_tokenizer(spm_folder: Path) -> None:
    check_tokenizer(load_tokenizer(spm_folder), spm_folder)


def test_the_check_covers_the_stop_string(spm_folder: Path) -> None:
    from tokenizers import AddedToken

    changed = load_tokenizer(spm_folder)
    changed.backend_tokenizer.add_tokens([AddedToken("<END_OF_PLAN>", normalized=False)])
    with pytest.raises(ModelError, match="<END_OF_PLAN>"):
        check_tokenizer(changed, spm_folder)


def test_a_damaged_tokenizer_json_beside_a_tokenizer_model_is_refused(
    spm_folder: Path, tmp_path: Path
) -> None:
    with_first_prefix_only(load_tokenizer(spm_folder)).save_pretrained(str(tmp_path))
    shutil.copy(spm_folder / "tokenizer.model", tmp_path)
    with pytest.raises(ModelError, match="remove the damaged"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"normalization_rule_name": "nmt_nfkc"}, "normalises text"),
        ({"model_type": "unigram", "vocab_size": 272}, "no BPE model"),
        ({"remove_extra_whitespaces": True}, r"other ids than tokenizer\.model"),
        ({"add_dummy_prefix": False}, r"other ids than tokenizer\.model"),
        ({"user_defined_symbols": ["$1"]}, r"other ids than tokenizer\.model"),
    ],
)
def test_a_model_whose_ids_cannot_be_reproduced_is_refused(
    changed: dict[str, Any], message: str, tmp_path: Path
) -> None:
    import sentencepiece

    settings_of_llama: dict[str, Any] = {
        "model_type": "bpe",
        "vocab_size": 300,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["create a note", "open the note $1"] * 20),
        model_prefix=str(tmp_path / "tokenizer"),
        minloglevel=2,
        **{**settings_of_llama, **changed},
    )
    with pytest.raises(ModelError, match=message):
        load_tokenizer(tmp_path)


@pytest.fixture
def renamed(spm_folder: Path, tmp_path: Path) -> Path:
    """Return a folder with a tokenizer.model alone, whose settings add tokens and rename EOS."""
    shutil.copy(spm_folder / "tokenizer.model", tmp_path)
    write(tmp_path / "config.json", {"model_type": "llama"})
    write(tmp_path / "added_tokens.json", {"<|im_end|>": 700, "<|im_start|>": 701})
    settings_file = {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "eos_token": "<|im_end|>",
        "unk_token": "<unk>",
        "chat_template": "{% for m in messages %}<|im_start|>{{ m.content }}{% endfor %}",
    }
    write(tmp_path / "tokenizer_config.json", settings_file)
    return tmp_path


def write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


def test_settings_beside_a_tokenizer_model_count_as_transformers_reads_them(
    renamed: Path, spm_folder: Path
) -> None:
    from transformers import AutoTokenizer

    ours, own = load_tokenizer(renamed), AutoTokenizer.from_pretrained(str(renamed))
    assert (ours.eos_token, ours.eos_token_id, len(ours)) == ("<|im_end|>", 700, 702)
    for name in ("bos_token_id", "eos_token_id", "unk_token_id", "chat_template"):
        assert getattr(ours, name) == getattr(own, name)
    assert ours.get_added_vocab().items() >= own.get_added_vocab().items()
    plain = load_tokenizer(spm_folder)
    for text in HARD_STRINGS:
        assert ours.encode(text) == plain.encode(text)
    assert ours.convert_ids_to_tokens(ours.encode("a<|im_start|>b"))[2] == "<|im_start|>"


def test_such_a_tokenizer_stays_the_same_when_it_is_saved(renamed: Path, tmp_path: Path) -> None:
    before = load_tokenizer(renamed)
    before.save_pretrained(str(tmp_path / "saved"))
    after = load_tokenizer(tmp_path / "saved")
    assert (after.eos_token_id, after.bos_token_id) == (700, 1)
    for text in (*HARD_STRINGS, "<|im_start|>user\nhi<|im_end|>\n", "</s><|im_end|>"):
        assert before.encode(text) == after.encode(text)
    assert before.chat_template == after.chat_template


@pytest.mark.parametrize(
    "changed",
    [
        {"<|im_end|>": 700, "<|im_start|>": 702},
        {"<|im_end|>": 3, "<|im_start|>": 701},
        {"<|im_end|>": "x"},
        {"<|im_end|>": None},
        ["<|im_end|>"],
        7,
    ],
)
def test_added_tokens_that_cannot_have_their_ids_are_refused(changed: Any, renamed: Path) -> None:
    write(renamed / "added_tokens.json", changed)
    with pytest.raises(ModelError):
        load_tokenizer(renamed)


def test_eos_by_another_name_than_transformers_reads_is_refused(renamed: Path) -> None:
    tokenizer = load_tokenizer(renamed)
    tokenizer.eos_token = "</s>"
    with pytest.raises(ModelError, match="eos_token"):
        check_tokenizer(tokenizer, renamed)


def test_a_model_without_bos_gives_rows_without_one(tmp_path: Path) -> None:
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["create a note", "open the note $1"] * 20),
        model_prefix=str(tmp_path / "tokenizer"),
        minloglevel=2,
        model_type="bpe",
        vocab_size=300,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        bos_id=-1,
        eos_id=1,
        unk_id=0,
        eos_piece="<end>",
    )
    ours = PromptTokenizer(load_tokenizer(tmp_path))
    reference = sentencepiece_of(tmp_path / "tokenizer.model")
    assert (ours.bos_id, ours.eos_id) == (None, 1)
    assert ours.encode_prompts(["create <end>"])[0] == reference("create <end>")


@pytest.mark.parametrize("on", [("truncation",), ("padding",), ("truncation", "padding")])
def test_truncation_and_padding_of_a_base_are_off_here_and_in_what_is_saved(
    on: tuple[str, ...], tiny_base: Path, tmp_path: Path
) -> None:
    from tokenizers import Tokenizer

    folder = tmp_path / "base"
    shutil.copytree(tiny_base, folder)
    core = Tokenizer.from_file(str(folder / "tokenizer.json"))
    if "truncation" in on:
        core.enable_truncation(16)
    if "padding" in on:
        core.enable_padding(length=64, pad_token="</s>", pad_id=2)
    core.save(str(folder / "tokenizer.json"))
    assert switched_off(folder) == on
    tokenizer, plain = load_tokenizer(folder), load_tokenizer(tiny_base)
    text = "create a note " * 30
    assert tokenizer.encode(text) == plain.encode(text)
    assert tokenizer.encode("a") == plain.encode("a")
    tokenizer.save_pretrained(str(tmp_path / "saved"))
    saved = json.loads((tmp_path / "saved/tokenizer.json").read_text(encoding="utf-8"))
    assert saved["truncation"] is None and saved["padding"] is None
    config = json.loads((tmp_path / "saved/tokenizer_config.json").read_text(encoding="utf-8"))
    assert not {"max_length", "pad_to_multiple_of", "truncation_strategy"} & config.keys()
    assert tokenizer.pad_token == plain.pad_token


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 4400216536\n"
DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "pointer": lambda _: POINTER,
    "empty": lambda _: b"",
    "cut": lambda data: data[: len(data) // 2],
    "page": lambda _: b"<!DOCTYPE html><html>not found</html>",
    "bytes": lambda data: b"\xff\xfe\x00" + data[3:],
    "list": lambda _: b"[]",
    "null": lambda _: b"null",
    "other keys": lambda _: b'{"model": {"type": "BPE"}}',
    "unknown model": lambda data: data.replace(b'"BPE"', b'"Newer"'),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "tokenizer.model"])
def test_damaged_tokenizer_files_are_the_users_error(
    name: str, damage: str, tiny_base: Path, renamed: Path, tmp_path: Path
) -> None:
    folder = renamed
    if name != "tokenizer.model":
        folder = tmp_path / "base"
        shutil.copytree(tiny_base, folder)
    path = folder / name
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    harmless = damage == "unknown model" and name != "tokenizer.json"
    if harmless or (name == "tokenizer_config.json" and damage == "other keys"):
        damage = "harmless"
    try:
        load_tokenizer(resolve_tokenizer_folder(str(folder)))
    except ModelError as error:
        assert error.fix
        assert ("Git LFS" in error.why) == (damage == "pointer")
    else:
        assert damage == "harmless"


def test_a_file_that_is_no_sentencepiece_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"\xff\xff not a model")
    with pytest.raises(ModelError, match="no SentencePiece model"):
        load_tokenizer(tmp_path)


def test_a_folder_without_tokenizer_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"neither tokenizer\.json nor tokenizer\.model"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_without_eos_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    shutil.copy(tiny_base / "tokenizer.json", tmp_path)
    settings_file = json.loads((tiny_base / "tokenizer_config.json").read_text(encoding="utf-8"))
    del settings_file["eos_token"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings_file), encoding="utf-8")
    with pytest.raises(ModelError, match="no EOS token"):
        load_tokenizer(tmp_path)


def test_a_missing_pad_token_is_taken_from_the_vocabulary(tiny_base: Path, tmp_path: Path) -> None:
    shutil.copy(tiny_base / "tokenizer.json", tmp_path)
    settings_file = json.loads((tiny_base / "tokenizer_config.json").read_text(encoding="utf-8"))
    for name in ("pad_token", "unk_token"):
        settings_file.pop(name, None)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings_file), encoding="utf-8")
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.pad_token == tokenizer.eos_token
    assert len(tokenizer) == len(load_tokenizer(tiny_base))


def test_a_local_folder_is_its_own_tokenizer_folder(tiny_base: Path) -> None:
    assert resolve_tokenizer_folder(str(tiny_base)) == tiny_base


@pytest.mark.parametrize(
    ("offline", "said"),
    [(False, r"did not give it: gone[\s\S]*network"), (True, "unset HF_HUB_OFF")],
)
def test_a_name_that_neither_disk_nor_hub_has_is_an_error_with_a_fix(
    offline: bool, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def refuse(*_: Any, **__: Any) -> str:
        raise LocalEntryNotFoundError("gone")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
    with pytest.raises(ModelError, match=rf"no local folder[\s\S]*{said}"):
        resolve_tokenizer_folder("nobody/nothing")


def test_only_tokenizer_files_are_asked_of_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    asked: dict[str, Any] = {}

    def download(name: str, **arguments: Any) -> str:
        asked.update(arguments, name=name)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve_tokenizer_folder("some/base", "v1") == tmp_path
    assert (asked["name"], asked["revision"]) == ("some/base", "v1")
    assert not any("safetensors" in p or p.endswith("*") for p in asked["allow_patterns"])
    assert {"tokenizer.json", "tokenizer.model"} <= set(asked["allow_patterns"])
