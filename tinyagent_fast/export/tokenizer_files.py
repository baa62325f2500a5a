"""Read the parts of a tokenizer folder in the spellings that several versions gave them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tinyagent_fast.export.checkpoints import read_json

_SPACE = "\u2581"


def steps(part: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    """List the steps of a normaliser or pre-tokenizer, whether it is a sequence or not.

    Args:
        part: Value of `normalizer` or `pre_tokenizer` in tokenizer.json.

    Returns:
        Its steps; none for null.
    """
    if part is None:
        return []
    if part["type"] == "Sequence":
        return list(part.get("normalizers") or part.get("pretokenizers") or [])
    return [part]


def space_prefix(file: Mapping[str, Any]) -> bool | None:
    """Read whether a Llama tokenizer puts a space before text, and that it changes nothing else.

    Args:
        file: A tokenizer.json.

    Returns:
        Whether it does; none if text is changed in a way that is not known here.
    """
    changes, cuts = steps(file.get("normalizer")), steps(file.get("pre_tokenizer"))
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


def split_pattern(step: Mapping[str, Any]) -> str | None:
    """Read the pattern of a step that cuts text into words and keeps all of it.

    Args:
        step: A step of a pre-tokenizer.

    Returns:
        The regular expression; none if the step is something else.
    """
    keeps = (step.get("behavior"), step.get("invert")) in (("Isolated", False), ("Removed", True))
    if step["type"] != "Split" or not keeps:
        return None
    pattern: str | None = step["pattern"].get("Regex")
    return pattern


def merge_pairs(file: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Read merges, which are pairs, or texts with a space between in files before 2024.

    Args:
        file: A tokenizer.json.

    Returns:
        Pairs of tokens in order of their rank.
    """
    merges = (m.split(" ", 1) if isinstance(m, str) else m for m in file["model"]["merges"])
    return [(left, right) for left, right in merges]


def byte_characters() -> list[str]:
    """List the characters by which byte-level BPE writes the 256 bytes.

    Returns:
        256 characters, in no meaningful order.

    Source: openai/gpt-2, src/encoder.py, bytes_to_unicode.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return [chr(byte) for byte in printable] + [chr(256 + n) for n in range(256 - len(printable))]


def added_tokens(folder: Path, file: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """List added tokens: those of tokenizer.json, and those only in tokenizer_config.json.

    Args:
        folder: The tokenizer's folder.
        file: Its tokenizer.json.

    Returns:
        Their entries with `id`, in order of their ids.
    """
    added: dict[int, Mapping[str, Any]] = {t["id"]: t for t in file.get("added_tokens", [])}
    config = folder / "tokenizer_config.json"
    if config.exists():
        for index, token in read_json(config).get("added_tokens_decoder", {}).items():
            added.setdefault(int(index), token)
    return [{**token, "id": index} for index, token in sorted(added.items())]


def special_names(folder: Path) -> dict[str, str | None]:
    """Read the texts of the special tokens as transformers does.

    Args:
        folder: The tokenizer's folder.

    Returns:
        Text by `bos`, `eos`, `unk` and `pad`, none where there is no such token.
    """
    names: dict[str, str | None] = dict.fromkeys(("bos", "eos", "unk", "pad"))
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        settings = read_json(folder / file) if (folder / file).exists() else {}
        for name, before in names.items():
            token = settings.get(f"{name}_token")
            text = token.get("content") if isinstance(token, dict) else token
            names[name] = text or before
    return names
