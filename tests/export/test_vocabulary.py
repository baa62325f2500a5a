"""A GGUF's vocabulary gives the ids of training; one that would not is refused with its reason."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from gguf import TokenType

from tinyagent_fast.errors import ModelError
from tinyagent_fast.export import vocabulary
from tinyagent_fast.export.conversion import convert_to_gguf
from tinyagent_fast.export.vocabulary import GgufVocabulary, read_vocabulary
from tinyagent_fast.prompts.loading import HARD_STRINGS, load_tokenizer
from tinyagent_fast.prompts.tokens import PromptTokenizer

Edit = Callable[[dict[str, Any]], object]

POOLS = (
    "abc ABC .,;:!?\"'()[]{}<>/\\$_-1234567890",
    " \t\n\r\u00a0\u2003\u3000\u0085\u200b\x0b\x0c",
    "éüßñøπΩжя中文日本語한국어عبرية़ि",
    "👩\u200d💻🚀🇩🇪\u0301\ufe0f",
    "'s't're've'm'll'd'S'LL",
    "\u2581Ġ Ċ\u2581",
    "0123456789 ",
)
PHRASES = (
    *("<s>", "</s>", "<unk>", "<|im_end|>", "[PAD7]", "<0x0A>", "<END_OF_PLAN>"),
    *("### Response:\n", '1. get_email_address("Sid")\n', "$1", "join()", "  ", "\n\n", "\r\n"),
)


def strings(count: int) -> list[str]:
    """Make texts of all kinds: mixed, of one kind, of any character, of what looks special."""
    rng = random.Random(5)
    texts = list(HARD_STRINGS)
    while len(texts) < count:
        length = rng.randrange(1, 40)
        pool = rng.choice(POOLS)
        kind = rng.randrange(4)
        if kind == 0:
            text = "".join(rng.choice(rng.choice(POOLS)) for _ in range(length))
        elif kind == 1:
            text = "".join(rng.choice(pool) for _ in range(length))
        elif kind == 2:
            below = rng.choice((0x250, 0x3000, 0x110000))
            text = "".join(chr(rng.randrange(1, below)) for _ in range(length))
        else:
            parts = (rng.choice((*PHRASES, " ", "x", rng.choice(pool))) for _ in range(8))
            text = "".join(parts)
        texts.append("".join(char for char in text if not 0xD800 <= ord(char) < 0xE000))
    return texts


def different(folder: Path, gguf: Path, texts: Iterable[str]) -> list[str]:
    """Return the texts whose ids, BOS included, llama.cpp gives otherwise than training does."""
    pytest.importorskip("xllamacpp")
    from tinyagent_fast.inference.llama_cpp import LlamaCppSettings, LlamaServer

    tokenizer = PromptTokenizer(load_tokenizer(folder))
    settings = LlamaCppSettings(model=gguf, slots=1, context_tokens_per_slot=64, threads=1)
    with LlamaServer(settings) as server:
        return [
            t for t in texts if server.tokenize(t, bos=True) != tokenizer.encode_prompts([t])[0]
        ]


def pieces_of(folder: Path) -> list[str]:
    tokenizer = PromptTokenizer(load_tokenizer(folder))
    return [tokenizer.decode([index]) for index in range(len(tokenizer.hf))]


def to_gguf(folder: Path, target: Path) -> Path:
    return convert_to_gguf(folder, target, quant="f16", name="v").path


def texts_of(read: GgufVocabulary) -> list[str]:
    return [read.tokens[index].text for index in range(len(read.tokens))]


def kinds_of(read: GgufVocabulary) -> list[int]:
    return [read.tokens[index].kind for index in range(len(read.tokens))]


def edited(source: Path, target: Path, edit: Edit) -> Path:
    """Copy tokenizer files and change tokenizer.json."""
    target.mkdir(exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / name, target)
    content = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
    edit(content)
    (target / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    return target


# Ids in llama.cpp.


def test_llama_cpp_gives_the_ids_of_a_byte_level_tokenizer(
    tiny_merged: Path, tiny_gguf: dict[str, Path]
) -> None:
    texts = strings(2000) + pieces_of(tiny_merged)
    assert different(tiny_merged, tiny_gguf["f16"], texts) == []


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside a tokenizer.model"])
def test_llama_cpp_gives_the_ids_of_a_sentencepiece_tokenizer(
    beside: bool,
    spm_folder: Path,
    spm_json: Path,
    make_llama: Callable[..., Path],
    tmp_path: Path,
) -> None:
    folder = make_llama(tmp_path / "model", vocab_size=720)
    shutil.copytree(spm_json, folder, dirs_exist_ok=True)
    if beside:
        shutil.copy(spm_folder / "tokenizer.model", folder)
    texts = strings(300 if beside else 2000) + pieces_of(folder)
    assert different(folder, to_gguf(folder, tmp_path / "m.gguf"), texts) == []


def test_llama_cpp_gives_the_ids_of_the_llama_vocabulary_on_published_prompts(
    real_data: Path, make_llama: Callable[..., Path], tmp_path: Path
) -> None:
    folder = make_llama(tmp_path / "model", vocab_size=32000, hidden_size=8, head_dim=2)
    shutil.copy(real_data / "llama_tokenizer.model", folder / "tokenizer.model")
    load_tokenizer(folder).save_pretrained(str(folder))
    entries = json.loads((real_data / "training_data.json").read_text(encoding="utf-8"))
    points = [entry["output"][0] for entry in list(entries.values())[:150]]
    texts = strings(2000) + [point["raw_input"] + point["raw_output"] for point in points]
    assert different(folder, to_gguf(folder, tmp_path / "m.gguf"), texts) == []


def test_the_comparison_finds_a_vocabulary_that_is_cut_by_another_pattern(
    tiny_merged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = {"gpt-2": ((vocabulary.LLAMA_3_WORDS,), False)}
    monkeypatch.setattr(vocabulary, "PRE_TOKENIZERS", names)
    assert different(tiny_merged, to_gguf(tiny_merged, tmp_path / "m.gguf"), strings(200))


def test_the_comparison_finds_scores_that_are_lost(
    spm_json: Path,
    make_llama: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = shutil.copytree(spm_json, make_llama(tmp_path / "model"), dirs_exist_ok=True)
    token = vocabulary.Token
    monkeypatch.setattr(vocabulary, "Token", lambda text, _, kind: token(text, -1000.0, kind))
    assert different(folder, to_gguf(folder, tmp_path / "m.gguf"), strings(200))


# What is read.


def test_a_byte_level_vocabulary_has_the_ids_and_special_tokens_of_training(
    tiny_merged: Path,
) -> None:
    tokenizer = load_tokenizer(tiny_merged)
    read = read_vocabulary(tiny_merged, len(tokenizer))
    assert texts_of(read) == tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    assert (read.model, read.pre) == ("gpt2", "dbrx")
    assert read.special_ids == {"bos": 1, "eos": 2, "unk": 0, "pad": 0}
    assert [i for i, kind in enumerate(kinds_of(read)) if kind == TokenType.CONTROL] == [0, 1, 2]
    assert {kind for kind in kinds_of(read)[3:]} == {TokenType.NORMAL}
    assert read.merges and read.merges[0].count(" ") == 1
    assert read.notes == ()


def test_scores_rebuilt_from_merges_order_tokens_as_the_true_ones(
    spm_folder: Path, spm_json: Path
) -> None:
    from sentencepiece import sentencepiece_model_pb2 as protobuf

    proto = protobuf.ModelProto()
    proto.ParseFromString((spm_folder / "tokenizer.model").read_bytes())
    rebuilt = read_vocabulary(spm_json, 700)
    assert texts_of(rebuilt) == [piece.piece for piece in proto.pieces]
    assert kinds_of(rebuilt) == [piece.type for piece in proto.pieces]
    made = [
        index
        for index, token in rebuilt.tokens.items()
        if token.kind == TokenType.NORMAL and len(token.text) > 1
    ]
    assert len(made) > 100
    assert sorted(made, key=lambda index: proto.pieces[index].score) == sorted(
        made, key=lambda index: rebuilt.tokens[index].score
    )


def test_a_sentencepiece_vocabulary_knows_bytes_and_unknown(spm_json: Path) -> None:
    read = read_vocabulary(spm_json, 700)
    assert (read.model, read.pre, read.add_space_prefix, read.merges) == (
        *("llama", "default", True),
        None,
    )
    assert kinds_of(read)[:3] == [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL]
    assert kinds_of(read).count(TokenType.BYTE) == 256
    assert read.special_ids == {"bos": 1, "eos": 2, "unk": 0, "pad": 0}


def test_rows_without_a_token_are_named_and_counted(spm_json: Path) -> None:
    read = read_vocabulary(spm_json, 704)
    assert texts_of(read)[700:] == ["[PAD700]", "[PAD701]", "[PAD702]", "[PAD703]"]
    assert kinds_of(read)[700:] == [TokenType.UNUSED] * 4
    assert read.notes == ("4 embedding rows have no token and are named [PADn]",)


def test_more_tokens_than_embeddings_are_refused(tiny_merged: Path) -> None:
    with pytest.raises(ModelError, match="768 tokens, and the model has embeddings for 767"):
        read_vocabulary(tiny_merged, 767)


@pytest.mark.parametrize("base", ["tiny_merged", "spm_json"])
def test_added_tokens_keep_their_ids_and_are_found_only_if_not_special(
    base: str, request: pytest.FixtureRequest, make_llama: Callable[..., Path], tmp_path: Path
) -> None:
    from tokenizers import AddedToken

    source = load_tokenizer(request.getfixturevalue(base))
    first = len(source)
    source.add_tokens([AddedToken("<END_OF_PLAN>", normalized=False)])
    source.add_tokens([AddedToken("<|user|>", normalized=False, special=True)], special_tokens=True)
    folder = make_llama(tmp_path / "model", vocab_size=first + 2)
    source.save_pretrained(str(folder))
    read = read_vocabulary(folder, first + 2)
    assert texts_of(read)[first:] == ["<END_OF_PLAN>", "<|user|>"]
    assert kinds_of(read)[first:] == [TokenType.USER_DEFINED, TokenType.CONTROL]
    texts = ["1. join()<END_OF_PLAN>", "a <END_OF_PLAN> b<END_OF_PLAN>", "<|user|>\nhi"]
    assert different(folder, to_gguf(folder, tmp_path / "m.gguf"), texts) == []


def test_a_tokenizer_without_bos_adds_none(tiny_merged: Path, tmp_path: Path) -> None:
    folder = edited(tiny_merged, tmp_path / "t", lambda _: None)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["bos_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    read = read_vocabulary(folder, 768)
    assert read.special_ids["bos"] is None
    assert PromptTokenizer(load_tokenizer(folder)).bos_id is None


def with_the_other_merges(file: dict[str, Any]) -> None:
    """Turn the older spelling of merges, a text each, into the newer one of pairs, or back."""
    merges = file["model"]["merges"]
    file["model"]["merges"] = [m.split(" ") if isinstance(m, str) else " ".join(m) for m in merges]


@pytest.mark.parametrize("base", ["tiny_merged", "spm_json"])
def test_merges_are_read_in_both_spellings(
    base: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    source: Path = request.getfixturevalue(base)
    other = edited(source, tmp_path / "other", with_the_other_merges)
    assert read_vocabulary(other, 768) == read_vocabulary(source, 768)


@pytest.mark.parametrize(
    ("ignore_merges", "pattern", "name"),
    [
        (True, vocabulary.LLAMA_3_WORDS, "llama-bpe"),
        (False, vocabulary.LLAMA_3_WORDS, "dbrx"),
        (False, vocabulary._QWEN_2, "qwen2"),
        (False, vocabulary._GPT_2, "gpt-2"),
    ],
)
def test_patterns_that_llama_cpp_knows_are_recognised(
    ignore_merges: bool, pattern: str, name: str, tiny_merged: Path, tmp_path: Path
) -> None:
    def edit(file: dict[str, Any]) -> None:
        file["model"]["ignore_merges"] = ignore_merges
        file["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = pattern

    assert read_vocabulary(edited(tiny_merged, tmp_path / "t", edit), 768).pre == name


def test_digits_cut_before_gpt_2s_pattern_are_recognised(tiny_merged: Path, tmp_path: Path) -> None:
    def edit(file: dict[str, Any], *, individual: bool = True) -> None:
        file["pre_tokenizer"]["pretokenizers"] = [
            {"type": "Digits", "individual_digits": individual},
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
        ]

    assert read_vocabulary(edited(tiny_merged, tmp_path / "t", edit), 768).pre == "smollm"
    with pytest.raises(ModelError, match="pattern with no known name"):
        in_groups = edited(tiny_merged, tmp_path / "u", lambda f: edit(f, individual=False))
        read_vocabulary(in_groups, 768)


def test_bytes_that_text_does_not_have_may_lack_a_token_and_it_is_said(
    tiny_merged: Path, tmp_path: Path
) -> None:
    def edit(file: dict[str, Any]) -> None:
        for char in "\u0104\u00c0\u00ff":  # they stand for bytes 04, C0 and FF
            del file["model"]["vocab"][char]

    read = read_vocabulary(edited(tiny_merged, tmp_path / "t", edit), 768)
    assert any("3 bytes, all of control characters or unassigned" in note for note in read.notes)


def test_gpt_2s_own_byte_level_step_is_recognised(tiny_merged: Path, tmp_path: Path) -> None:
    def edit(file: dict[str, Any]) -> None:
        file["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}

    assert read_vocabulary(edited(tiny_merged, tmp_path / "t", edit), 768).pre == "gpt-2"


# What is refused.


def first_split(file: dict[str, Any]) -> dict[str, Any]:
    split: dict[str, Any] = file["pre_tokenizer"]["pretokenizers"][0]
    return split


def added(**changes: Any) -> Edit:
    token = {"id": 800, "content": "<X>", "special": False, "normalized": False, **changes}
    return lambda file: file["added_tokens"].append(token)


BYTE_LEVEL_FAULTS: dict[str, tuple[Edit, str]] = {
    "pattern": (
        lambda f: first_split(f)["pattern"].update(Regex=r"\w+"),
        "pattern with no known name",
    ),
    "ignore_merges": (
        lambda f: (
            first_split(f)["pattern"].update(Regex=vocabulary._GPT_2),
            f["model"].update(ignore_merges=True),
        ),
        "ignore_merges True",
    ),
    "behaviour": (
        lambda f: first_split(f).update(behavior="Removed"),
        "pattern with no known name",
    ),
    "two patterns": (
        lambda f: f["pre_tokenizer"]["pretokenizers"].insert(0, first_split(f)),
        "pattern with no known name",
    ),
    "prefix space": (
        lambda f: f["pre_tokenizer"]["pretokenizers"][1].update(add_prefix_space=True),
        "puts a space before text",
    ),
    "no pre-tokenizer": (lambda f: f.update(pre_tokenizer=None), "no byte-level BPE"),
    "normaliser": (lambda f: f.update(normalizer={"type": "Lowercase"}), r"normalised \(Lowercase"),
    "suffix": (lambda f: f["model"].update(end_of_word_suffix="</w>"), "beginning or end of words"),
    "bytes": (lambda f: f["model"]["vocab"].pop("Ċ"), "1 of the 256 bytes"),
    "unigram": (lambda f: f["model"].update(type="Unigram"), "only BPE"),
    "bounded token": (added(lstrip=True), "'<X>' has lstrip"),
}

LLAMA_FAULTS: dict[str, tuple[Edit, str]] = {
    "normaliser": (lambda f: f.update(normalizer={"type": "NFKC"}), "in an unknown way"),
    "other prefix": (
        lambda f: f["normalizer"]["normalizers"][0].update(prepend="x"),
        "in an unknown way",
    ),
    "metaspace that splits": (
        lambda f: f.update(
            normalizer=None,
            pre_tokenizer={"type": "Metaspace", "replacement": "\u2581", "split": True},
        ),
        "in an unknown way",
    ),
    "bytes": (lambda f: f["model"]["vocab"].pop("<0x41>"), "1 of the 256 byte tokens"),
    "merge missing": (lambda f: f["model"]["merges"].pop(40), "not among its merges"),
    "merges apart": (
        lambda f: f["model"]["merges"].append(f["model"]["merges"][0]),
        "do not stand together",
    ),
    "normalised token": (added(normalized=True), "'<X>' is sought in normalised text"),
}


@pytest.mark.parametrize("fault", BYTE_LEVEL_FAULTS)
def test_a_byte_level_tokenizer_that_llama_cpp_would_not_reproduce_is_refused(
    fault: str, tiny_merged: Path, tmp_path: Path
) -> None:
    edit, message = BYTE_LEVEL_FAULTS[fault]
    with pytest.raises(ModelError, match=message):
        read_vocabulary(edited(tiny_merged, tmp_path / "t", edit), 1000)


@pytest.mark.parametrize("fault", LLAMA_FAULTS)
def test_a_llama_tokenizer_that_llama_cpp_would_not_reproduce_is_refused(
    fault: str, spm_json: Path, tmp_path: Path
) -> None:
    edit, message = LLAMA_FAULTS[fault]
    with pytest.raises(ModelError, match=message):
        read_vocabulary(edited(spm_json, tmp_path / "t", edit), 1000)


def test_a_metaspace_that_starts_otherwise_is_taken_with_a_note(
    spm_json: Path, tmp_path: Path
) -> None:
    def edit(scheme: str) -> Edit:
        step = {"type": "Metaspace", "replacement": "\u2581", "split": False}
        return lambda f: f.update(normalizer=None, pre_tokenizer={**step, "prepend_scheme": scheme})

    first = read_vocabulary(edited(spm_json, tmp_path / "a", edit("first")), 700)
    assert first.add_space_prefix
    assert "begins with a space" in first.notes[0]
    never = read_vocabulary(edited(spm_json, tmp_path / "b", edit("never")), 700)
    assert not never.add_space_prefix
    assert never.notes == ()


def test_text_that_is_normalised_to_nfc_is_noted(tiny_merged: Path, tmp_path: Path) -> None:
    folder = edited(tiny_merged, tmp_path / "t", lambda f: f.update(normalizer={"type": "NFC"}))
    assert read_vocabulary(folder, 768).notes == (
        "text that is not in NFC gets other ids in llama.cpp",
    )


def test_a_folder_without_tokenizer_or_eos_is_refused(tiny_merged: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"it has no tokenizer\.json"):
        read_vocabulary(tmp_path, 700)
    shutil.copy(tiny_merged / "tokenizer.json", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ModelError, match="no EOS or BOS token"):
        read_vocabulary(tmp_path, 768)
