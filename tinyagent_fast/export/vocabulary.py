"""Tokenizer files of a model folder to the vocabulary of a GGUF, such that the ids stay the same.

Whatever llama.cpp could not reproduce is refused here with its reason: a model that is served with
other ids than it was trained on does not fail, it only gets worse. The vocabularies of the gguf
package check nothing of this, and give a tokenizer.json one score for all tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from gguf import TokenType
from tokenizers.pre_tokenizers import ByteLevel

from tinyagent_fast.errors import ModelError
from tinyagent_fast.export.checkpoints import read_json

_SPACE = "\u2581"
_BYTE_TOKENS = frozenset(f"<0x{value:02X}>" for value in range(256))
_ADDED_SCORE = -1000.0
_METASPACE = (
    "text that begins with a space, or follows a special token, gets other ids in llama.cpp "
    "(tokenizer.json has a Metaspace pre-tokenizer)"
)

_LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN_2 = _LLAMA_3.replace(r"\p{N}{1,3}", r"\p{N}")
_GPT_2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

# By pattern and ignore_merges (a word that is a token is not merged): llama.cpp has no switch for
# the latter, it follows from the name. dbrx has Llama 3's pattern and merges every word.
_PRE_TOKENIZERS: Mapping[tuple[str, bool], str] = {
    (_LLAMA_3, True): "llama-bpe",
    (_LLAMA_3, False): "dbrx",
    (_QWEN_2, False): "qwen2",
    (_GPT_2, False): "gpt-2",
}


@dataclass(frozen=True, kw_only=True)
class GgufVocabulary:
    """The tokenizer keys of a GGUF; a list has one entry for each row of the embeddings."""

    model: Literal["llama", "gpt2"]
    pre: str
    tokens: list[str]
    scores: list[float] | None
    token_types: list[int]
    merges: list[str] | None
    bos_id: int | None
    eos_id: int
    unk_id: int | None
    pad_id: int | None
    add_bos: bool
    add_eos: bool
    add_space_prefix: bool
    notes: tuple[str, ...] = ()
    """What is worth knowing of it, such as rows without a token."""


@dataclass
class _Pieces:
    """Tokens by id while they are put together, before the gaps are filled."""

    tokens: dict[int, str] = field(default_factory=dict)
    scores: dict[int, float] = field(default_factory=dict)
    types: dict[int, int] = field(default_factory=dict)

    def put(self, index: int, token: str, score: float, kind: int) -> None:
        """Enter a token, or replace what its id had."""
        self.tokens[index], self.scores[index], self.types[index] = token, score, kind


def read_vocabulary(folder: Path, embedding_rows: int) -> GgufVocabulary:
    """Read a model folder's tokenizer as the vocabulary that gives the same ids in llama.cpp.

    Args:
        folder: Holds tokenizer.json. A tokenizer.model beside it is not looked at: training did
            not use it.
        embedding_rows: Rows of the token embeddings; ids without a token are named `[PADn]`.

    Returns:
        The vocabulary. BOS is added exactly if the tokenizer has one, as training does.

    Raises:
        ModelError: No tokenizer, one whose ids llama.cpp would not reproduce, or more tokens than
            embeddings.
    """
    file = read_json(folder / "tokenizer.json")
    model = file.get("model", {})
    if model.get("type", "BPE") != "BPE" or "merges" not in model:
        raise _other_ids(folder, f"its model is {model.get('type')}, and only BPE is known here")
    if model.get("byte_fallback"):
        return _from_llama_json(folder, file, embedding_rows)
    return _from_byte_level_json(folder, file, embedding_rows)


def _other_ids(folder: Path, why: str) -> ModelError:
    return ModelError(
        f"tokenizer in {folder}",
        f"{why}, so llama.cpp would give other ids than training did",
        "use a base model with a Llama tokenizer or a byte-level BPE as Llama 3's",
    )


def _from_llama_json(folder: Path, file: Mapping[str, Any], embedding_rows: int) -> GgufVocabulary:
    """Take a tokenizer.json that is a converted SentencePiece BPE model with byte fallback."""
    pieces = _Pieces()
    prefix = _space_prefix(file)
    if prefix is None:
        raise _other_ids(folder, "its normaliser or pre-tokenizer changes text in an unknown way")
    notes = (_METASPACE,) if prefix and file.get("pre_tokenizer") else ()
    added = _added_tokens(folder, file)
    vocab: dict[str, int] = file["model"]["vocab"]
    if absent := _BYTE_TOKENS - vocab.keys():
        raise _other_ids(folder, f"{len(absent)} of the 256 byte tokens are missing")
    _rebuild_scores(folder, vocab, _merge_pairs(file), {t["content"] for t in added}, pieces)
    if hidden := [t["content"] for t in added if t.get("normalized") and not t["special"]]:
        raise _other_ids(folder, f"its added token {hidden[0]!r} is sought in normalised text")
    _put_added(folder, added, pieces)
    names = _special_names(folder)
    if (unk := vocab.get(names["unk"] or "")) is not None:
        pieces.types[unk] = TokenType.UNKNOWN
    return _finish(
        folder, pieces, names, embedding_rows, model="llama", add_space_prefix=prefix, notes=notes
    )


def _rebuild_scores(
    folder: Path,
    vocab: Mapping[str, int],
    merges: Sequence[tuple[str, str]],
    added: set[str],
    pieces: _Pieces,
) -> None:
    """Give each token the rank of its first merge as score, after proof that this is the same.

    llama.cpp joins any two pieces that make a token, the best score first. That equals merging by
    a list if the list has every such pair, and all pairs of one token stand together in it.
    """
    rank: dict[str, int] = {}
    last = ""
    for index, (left, right) in enumerate(merges):
        token = left + right
        if token in rank and token != last:
            raise _other_ids(folder, f"its merges of {token!r} do not stand together")
        rank.setdefault(token, index)
        last = token
    listed = set(merges)
    for token, index in vocab.items():
        kind = TokenType.BYTE if token in _BYTE_TOKENS else TokenType.NORMAL
        pieces.put(index, token, -float(rank.get(token, len(merges))), kind)
        if kind == TokenType.BYTE or token in added:
            continue
        for cut in range(1, len(token)):
            pair = (token[:cut], token[cut:])
            if pair[0] in vocab and pair[1] in vocab and pair not in listed:
                raise _other_ids(folder, f"{pair[0]!r} and {pair[1]!r} are not among its merges")


def _from_byte_level_json(
    folder: Path, file: Mapping[str, Any], embedding_rows: int
) -> GgufVocabulary:
    """Take a tokenizer.json that is a byte-level BPE, as GPT-2's, Llama 3's or our own."""
    model = file["model"]
    pre = _pre_tokenizer_name(folder, file)
    normal = [step["type"] for step in _steps(file.get("normalizer"))]
    if normal not in ([], ["NFC"]):
        raise _other_ids(folder, f"its text is normalised ({', '.join(normal)})")
    notes = ("text that is not in NFC gets other ids in llama.cpp",) if normal else ()
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise _other_ids(folder, "its tokens are marked at the beginning or end of words")
    if absent := [char for char in ByteLevel.alphabet() if char not in model["vocab"]]:
        raise _other_ids(folder, f"{len(absent)} of the 256 bytes have no token")
    pieces = _Pieces()
    for token, index in model["vocab"].items():
        pieces.put(index, token, 0.0, TokenType.NORMAL)
    _put_added(folder, _added_tokens(folder, file), pieces)
    return _finish(
        folder,
        pieces,
        _special_names(folder),
        embedding_rows,
        model="gpt2",
        pre=pre,
        merges=[" ".join(pair) for pair in _merge_pairs(file)],
        notes=notes,
    )


def _pre_tokenizer_name(folder: Path, file: Mapping[str, Any]) -> str:
    """Find the name under which llama.cpp cuts text into words as this tokenizer does."""
    *cuts, last = _steps(file.get("pre_tokenizer")) or [{"type": None}]
    if last["type"] != "ByteLevel" or last.get("add_prefix_space"):
        raise _other_ids(folder, "it is no byte-level BPE, or it puts a space before text")
    patterns = [_split_pattern(step) for step in cuts]
    if last.get("use_regex", True):
        patterns.append(_GPT_2)
    ignore_merges = bool(file["model"].get("ignore_merges"))
    name = _PRE_TOKENIZERS.get((patterns[0] or "", ignore_merges)) if len(patterns) == 1 else None
    if name is None:
        raise _other_ids(
            folder,
            f"it cuts words by a pattern with no known name in llama.cpp ({patterns}, "
            f"ignore_merges {ignore_merges})",
        )
    return name


def _put_added(folder: Path, added: Iterable[Mapping[str, Any]], pieces: _Pieces) -> None:
    """Enter added tokens, which llama.cpp looks for in a text before it merges.

    It finds CONTROL ones only where it is told to read special tokens.
    """
    for token in added:
        special = bool(token.get("special"))
        bounded = [k for k in ("lstrip", "rstrip", "single_word") if token.get(k)]
        if bounded and not special:
            raise _other_ids(folder, f"its added token {token['content']!r} has {bounded[0]}")
        kind = TokenType.CONTROL if special else TokenType.USER_DEFINED
        pieces.put(token["id"], token["content"], _ADDED_SCORE, kind)


def _finish(
    folder: Path,
    pieces: _Pieces,
    names: Mapping[str, str | None],
    embedding_rows: int,
    *,
    model: Literal["llama", "gpt2"],
    pre: str = "default",
    merges: list[str] | None = None,
    add_space_prefix: bool = False,
    notes: tuple[str, ...] = (),
) -> GgufVocabulary:
    """Fill the gaps, find the special ids and hold the number of tokens against the embeddings."""
    count = max(pieces.tokens) + 1
    if count > embedding_rows:
        raise ModelError(
            f"tokenizer in {folder}",
            f"it has {count:,} tokens, and the model has embeddings for {embedding_rows:,}",
            "use the tokenizer that the model was trained with",
        )
    gaps = [index for index in range(embedding_rows) if index not in pieces.tokens]
    for index in gaps:
        pieces.put(index, f"[PAD{index}]", _ADDED_SCORE, TokenType.UNUSED)
    if gaps:
        notes += (f"{len(gaps)} embedding rows have no token and are named [PADn]",)
    ids = {token: index for index, token in pieces.tokens.items()}
    found = {name: ids.get(text) if text else None for name, text in names.items()}
    eos_id = found["eos"]
    if eos_id is None or (names["bos"] and found["bos"] is None):
        raise ModelError(
            f"tokenizer in {folder}",
            f"its vocabulary has no EOS or BOS token ({names['eos']!r}, {names['bos']!r})",
            "set eos_token and bos_token in tokenizer_config.json to tokens that it has",
        )
    order = range(embedding_rows)
    return GgufVocabulary(
        model=model,
        pre=pre,
        tokens=[pieces.tokens[index] for index in order],
        scores=[pieces.scores[index] for index in order] if model == "llama" else None,
        token_types=[pieces.types[index] for index in order],
        merges=merges,
        bos_id=found["bos"],
        eos_id=eos_id,
        unk_id=found["unk"],
        pad_id=found["pad"],
        add_bos=found["bos"] is not None,
        add_eos=False,
        add_space_prefix=add_space_prefix,
        notes=notes,
    )


# What several versions of transformers and tokenizers spell in several ways.


def _steps(part: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    """List the steps of a normaliser or pre-tokenizer, whether it is a sequence or not."""
    if part is None:
        return []
    if part["type"] == "Sequence":
        return list(part.get("normalizers") or part.get("pretokenizers") or [])
    return [part]


def _space_prefix(file: Mapping[str, Any]) -> bool | None:
    """Read whether a Llama tokenizer puts a space before text; None if it does other things too."""
    changes, cuts = _steps(file.get("normalizer")), _steps(file.get("pre_tokenizer"))
    kinds = [step["type"] for step in changes + cuts]
    if kinds == ["Metaspace"] and cuts and cuts[0].get("split") is False:
        return bool(cuts[0].get("prepend_scheme", "always") != "never")
    to_space = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    if cuts or to_space not in changes:
        return None
    others = [step for step in changes if step != to_space]
    if others not in ([], [{"type": "Prepend", "prepend": _SPACE}]):
        return None
    return bool(others)


def _split_pattern(step: Mapping[str, Any]) -> str | None:
    """Read the pattern of a step that cuts text into words and keeps all of it; else None."""
    keeps = (step.get("behavior"), step.get("invert")) in (("Isolated", False), ("Removed", True))
    if step["type"] != "Split" or not keeps:
        return None
    pattern: str | None = step["pattern"].get("Regex")
    return pattern


def _merge_pairs(file: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Read merges by rank: pairs, or texts with a space between in files before 2024."""
    merges = (m.split(" ", 1) if isinstance(m, str) else m for m in file["model"]["merges"])
    return [(left, right) for left, right in merges]


def _added_tokens(folder: Path, file: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """List added tokens with their `id`: of tokenizer.json, and of tokenizer_config.json alone."""
    added: dict[int, Mapping[str, Any]] = {t["id"]: t for t in file.get("added_tokens", [])}
    config = folder / "tokenizer_config.json"
    if config.exists():
        for index, token in read_json(config).get("added_tokens_decoder", {}).items():
            added.setdefault(int(index), token)
    return [{**token, "id": index} for index, token in sorted(added.items())]


def _special_names(folder: Path) -> dict[str, str | None]:
    """Read the texts of the special tokens as transformers does; None where there is none."""
    names: dict[str, str | None] = dict.fromkeys(("bos", "eos", "unk", "pad"))
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        settings = read_json(folder / file) if (folder / file).exists() else {}
        for name, before in names.items():
            token = settings.get(f"{name}_token")
            text = token.get("content") if isinstance(token, dict) else token
            names[name] = text or before
    return names
