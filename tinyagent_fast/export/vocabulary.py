"""Tokenizer files of a model folder to the vocabulary of a GGUF, such that the ids stay the same.

Whatever llama.cpp could not reproduce is refused here with its reason: a model that is served with
other ids than it was trained on does not fail, it only gets worse. The vocabularies of the gguf
package check nothing of this, and give a tokenizer.json one score for all tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from gguf import TokenType

from tinyagent_fast.errors import ModelError
from tinyagent_fast.prompts.loading import read_model_json

_SPACE = "\u2581"
_BYTE_TOKENS = frozenset(f"<0x{value:02X}>" for value in range(256))
_ADDED_SCORE = -1000.0
_METASPACE = (
    "text that begins with a space, or follows a special token, gets other ids in llama.cpp "
    "(tokenizer.json has a Metaspace pre-tokenizer)"
)

LLAMA_3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN_2 = LLAMA_3_WORDS.replace(r"\p{N}{1,3}", r"\p{N}")
_GPT_2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

_DIGIT = r"\p{N}"

PRE_TOKENIZERS: Mapping[str, tuple[tuple[str, ...], bool]] = {
    "llama-bpe": ((LLAMA_3_WORDS,), True),
    "dbrx": ((LLAMA_3_WORDS,), False),
    "qwen2": ((_QWEN_2,), False),
    "gpt-2": ((_GPT_2,), False),
    "smollm": ((_DIGIT, _GPT_2), False),
}
"""How llama.cpp cuts text under a name: the patterns, one after another, and ignore_merges (whether
a word that is a token is not merged), for which it has no switch of its own."""

# Control characters, and bytes that begin no character of UTF-8 or none that is assigned.
_DISPENSABLE_BYTES = bytes(
    value
    for value in range(256)
    if (value < 0x20 and value not in b"\t\n\r")
    or value in (0x7F, 0xC0, 0xC1, 0xF1, 0xF2)
    or value >= 0xF5
)


class Token(NamedTuple):
    """One entry of a vocabulary."""

    text: str
    score: float
    kind: TokenType


@dataclass(frozen=True, kw_only=True)
class GgufVocabulary:
    """The tokenizer keys of a GGUF."""

    model: Literal["llama", "gpt2"]
    pre: str = "default"
    tokens: Mapping[int, Token]
    """By id; one for each row of the embeddings."""
    merges: list[str] | None = None
    special_ids: Mapping[str, int | None] = field(default_factory=dict)
    """Of `bos`, `eos`, `unk` and `pad`. BOS is added exactly if there is one, as training does."""
    add_space_prefix: bool = False
    notes: tuple[str, ...] = ()
    """What is worth knowing of it, such as rows without a token."""


def read_vocabulary(folder: Path, embedding_rows: int) -> GgufVocabulary:
    """Read a model folder's tokenizer as the vocabulary that gives the same ids in llama.cpp.

    Args:
        folder: Holds tokenizer.json and tokenizer_config.json as this version of transformers
            saves them. A tokenizer.model beside them is not looked at: training did not use it.
        embedding_rows: Rows of the token embeddings; ids without a token are named `[PADn]`.

    Raises:
        ModelError: No tokenizer, one whose ids llama.cpp would not reproduce, or more tokens than
            embeddings.
    """
    file = read_model_json(folder / "tokenizer.json")
    model = file.get("model", {})
    if model.get("type", "BPE") != "BPE" or "merges" not in model:
        raise _other_ids(folder, f"its model is {model.get('type')}, and only BPE is known here")
    settings = read_model_json(folder / "tokenizer_config.json")
    added = file.get("added_tokens", [])
    names = {name: settings.get(f"{name}_token") for name in ("bos", "eos", "unk", "pad")}
    if model.get("byte_fallback"):
        vocabulary = _llama_vocabulary(folder, file, added)
    else:
        vocabulary = _byte_level_vocabulary(folder, file)
    tokens, notes = {**vocabulary.tokens, **_listed(folder, added)}, vocabulary.notes
    count = max(tokens) + 1
    if count > embedding_rows:
        raise ModelError(
            f"tokenizer in {folder}",
            f"it has {count:,} tokens, and the model has embeddings for {embedding_rows:,}",
            "use the tokenizer that the model was trained with",
        )
    if gaps := [index for index in range(embedding_rows) if index not in tokens]:
        tokens |= {at: Token(f"[PAD{at}]", _ADDED_SCORE, TokenType.UNUSED) for at in gaps}
        notes += (f"{len(gaps)} embedding rows have no token and are named [PADn]",)
    ids = {token.text: index for index, token in tokens.items()}
    found = {name: ids.get(text) if text else None for name, text in names.items()}
    if found["eos"] is None or (names["bos"] and found["bos"] is None):
        raise ModelError(
            f"tokenizer in {folder}",
            f"its vocabulary has no EOS or BOS token ({names['eos']!r}, {names['bos']!r})",
            "set eos_token and bos_token in tokenizer_config.json to tokens that it has",
        )
    if vocabulary.model == "llama" and (unk := model["vocab"].get(names["unk"])) is not None:
        tokens[unk] = tokens[unk]._replace(kind=TokenType.UNKNOWN)
    return replace(vocabulary, tokens=tokens, special_ids=found, notes=notes)


def _other_ids(folder: Path, why: str) -> ModelError:
    return ModelError(
        f"tokenizer in {folder}",
        f"{why}, so llama.cpp would give other ids than training did",
        "use a base model with a Llama tokenizer or a byte-level BPE as Llama 3's",
    )


def _llama_vocabulary(
    folder: Path, file: Mapping[str, Any], added: Sequence[Mapping[str, Any]]
) -> GgufVocabulary:
    """Take a tokenizer.json that is a converted SentencePiece BPE model with byte fallback.

    Each token's score is the rank of its first merge, after proof that this is the same: llama.cpp
    joins any two pieces that make a token, the best score first. That equals merging by a list if
    the list has every such pair, and all pairs of one token stand together in it.
    """
    prefix = _space_prefix(file)
    if prefix is None:
        raise _other_ids(folder, "its normaliser or pre-tokenizer changes text in an unknown way")
    vocab: dict[str, int] = file["model"]["vocab"]
    if absent := _BYTE_TOKENS - vocab.keys():
        raise _other_ids(folder, f"{len(absent)} of the 256 byte tokens are missing")
    if hidden := [t["content"] for t in added if t.get("normalized") and not t["special"]]:
        raise _other_ids(folder, f"its added token {hidden[0]!r} is sought in normalised text")
    merges = _merge_pairs(file)
    rank: dict[str, int] = {}
    last = ""
    for index, (left, right) in enumerate(merges):
        token = left + right
        if token in rank and token != last:
            raise _other_ids(folder, f"its merges of {token!r} do not stand together")
        rank.setdefault(token, index)
        last = token
    listed, unmerged = set(merges), _BYTE_TOKENS | {t["content"] for t in added}
    for token in vocab.keys() - unmerged:
        for cut in range(1, len(token)):
            pair = (token[:cut], token[cut:])
            if pair[0] in vocab and pair[1] in vocab and pair not in listed:
                raise _other_ids(folder, f"{pair[0]!r} and {pair[1]!r} are not among its merges")
    tokens = {}
    for token, index in vocab.items():
        kind = TokenType.BYTE if token in _BYTE_TOKENS else TokenType.NORMAL
        tokens[index] = Token(token, -float(rank.get(token, len(merges))), kind)
    metaspace = any(step["type"] == "Metaspace" for step in _steps(file.get("pre_tokenizer")))
    notes = (_METASPACE,) if prefix and metaspace else ()
    return GgufVocabulary(model="llama", tokens=tokens, add_space_prefix=prefix, notes=notes)


def _byte_level_vocabulary(folder: Path, file: Mapping[str, Any]) -> GgufVocabulary:
    """Take a tokenizer.json that is a byte-level BPE, as GPT-2's, Llama 3's or our own."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    model = file["model"]
    pre = _pre_tokenizer_name(folder, file)
    normal = [step["type"] for step in _steps(file.get("normalizer"))]
    if normal not in ([], ["NFC"]):
        raise _other_ids(folder, f"its text is normalised ({', '.join(normal)})")
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise _other_ids(folder, "its tokens are marked at the beginning or end of words")
    shown = bytes_to_unicode()
    absent = [value for value, char in shown.items() if char not in model["vocab"]]
    if lost := [value for value in absent if value not in _DISPENSABLE_BYTES]:
        raise _other_ids(folder, f"{len(lost)} of the 256 bytes have no token")
    notes = ["text that is not in NFC gets other ids in llama.cpp"] if normal else []
    if absent:
        notes.append(f"{len(absent)} bytes, all of control characters or unassigned, have no token")
    return GgufVocabulary(
        model="gpt2",
        pre=pre,
        tokens={at: Token(text, 0.0, TokenType.NORMAL) for text, at in model["vocab"].items()},
        merges=[" ".join(pair) for pair in _merge_pairs(file)],
        notes=tuple(notes),
    )


def _pre_tokenizer_name(folder: Path, file: Mapping[str, Any]) -> str:
    """Find the name under which llama.cpp cuts text into words as this tokenizer does."""
    *cuts, last = _steps(file.get("pre_tokenizer")) or [{"type": None}]
    if last["type"] != "ByteLevel" or last.get("add_prefix_space"):
        raise _other_ids(folder, "it is no byte-level BPE, or it puts a space before text")
    patterns = tuple(_split_pattern(step) or "unknown" for step in cuts)
    if last.get("use_regex", True):
        patterns += (_GPT_2,)
    ignore_merges = bool(file["model"].get("ignore_merges"))
    for name, known in PRE_TOKENIZERS.items():
        if known == (patterns, ignore_merges):
            return name
    raise _other_ids(
        folder,
        f"it cuts words by a pattern with no known name in llama.cpp ({patterns}, "
        f"ignore_merges {ignore_merges})",
    )


def byte_level_words(patterns: Sequence[str]) -> Any:
    """Build the pre-tokenizer of a byte-level BPE that cuts text by patterns, one after another."""
    from tokenizers import Regex, pre_tokenizers

    cuts = [pre_tokenizers.Split(Regex(one), "isolated") for one in patterns]
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([*cuts, to_bytes])


def _listed(folder: Path, added: Sequence[Mapping[str, Any]]) -> dict[int, Token]:
    """Enter added tokens, which llama.cpp looks for in a text before it merges.

    It finds CONTROL ones only where it is told to read special tokens.
    """
    tokens = {}
    for token in added:
        special = bool(token.get("special"))
        bounded = [k for k in ("lstrip", "rstrip", "single_word") if token.get(k)]
        if bounded and not special:
            raise _other_ids(folder, f"its added token {token['content']!r} has {bounded[0]}")
        kind = TokenType.CONTROL if special else TokenType.USER_DEFINED
        tokens[token["id"]] = Token(token["content"], _ADDED_SCORE, kind)
    return tokens


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
    # Gemma's cut at spaces, of which the normaliser has left none.
    at_spaces = [step["type"] == "Split" and step["pattern"] == {"String": " "} for step in cuts]
    if not all(at_spaces) or to_space not in changes:
        return None
    others = [step for step in changes if step != to_space]
    if others not in ([], [{"type": "Prepend", "prepend": _SPACE}]):
        return None
    return bool(others)


def _split_pattern(step: Mapping[str, Any]) -> str | None:
    """Read the pattern of a step that cuts text into words and keeps all of it; else None."""
    if step["type"] == "Digits" and step.get("individual_digits"):
        return _DIGIT
    keeps = (step.get("behavior"), step.get("invert")) in (("Isolated", False), ("Removed", True))
    if step["type"] != "Split" or not keeps:
        return None
    pattern: str | None = step["pattern"].get("Regex")
    return pattern


def _merge_pairs(file: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Read merges by rank: pairs, or texts with a space between in files before 2024."""
    merges = (m.split(" ", 1) if isinstance(m, str) else m for m in file["model"]["merges"])
    return [(left, right) for left, right in merges]
