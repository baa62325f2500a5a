"""Model folders as transformers 5 writes them, readable by transformers 4 and old tokenizers too.

The TinyAgent app is pinned to transformers 4.38 and tokenizers 0.15. What they cannot read they
refuse, or read as something else in silence; every spelling written here means the same to both.

Source: tried with transformers 4.38.2, 4.46.3, 4.51.3, 4.57.6 and 5.17.0.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tinyagent_fast.runs import write_json

_ROPE_OF_4 = ("rope_theta", "rope_scaling", "rope_local_base_freq")


def write_for_older_readers(folder: Path, chat_template: str | None = None) -> None:
    """Rewrite the JSON files of a model, an adapter or a tokenizer as transformers has saved it.

    A chat template is written instead of the tokenizer's own; None leaves that.
    """
    _rewrite(folder / "config.json", config_for_both)
    _rewrite(folder / "tokenizer.json", _with_text_merges)
    template = folder / "chat_template.jinja"
    if chat_template is not None:
        template.write_text(chat_template, encoding="utf-8", newline="")
    elif template.exists():
        chat_template = template.read_bytes().decode()
    _rewrite(
        folder / "tokenizer_config.json", lambda settings: _known_class(settings, chat_template)
    )


def config_for_both(config: Mapping[str, Any]) -> dict[str, Any]:
    """Add transformers 4's names for RoPE and dtype to a config.json that has only 5's.

    Without them, 4 rotates by the base 10000 whatever the file says.
    """
    found = dict(config)
    if "dtype" in found:
        found["torch_dtype"] = found["dtype"]
    given = found.get("rope_parameters")
    if not given or any(key in found for key in _ROPE_OF_4):
        return found
    windowed = given.get("sliding_attention") or {}
    if "rope_theta" in windowed:
        found["rope_local_base_freq"] = windowed["rope_theta"]
    given = given.get("full_attention") or given
    scaling = {key: value for key, value in given.items() if key != "rope_theta"}
    kind = scaling.pop("rope_type", None) or scaling.pop("type", "default")
    # Before 4.43 a scaling may have these two keys only, and the first one is called `type`.
    name = "type" if kind in ("linear", "dynamic") else "rope_type"
    found["rope_theta"] = given.get("rope_theta")
    found["rope_scaling"] = None if kind == "default" else {name: kind, **scaling}
    return found


def _known_class(settings: dict[str, Any], chat_template: str | None) -> dict[str, Any]:
    """Name a class of both, and put the template where 4.38 and 4.46 look for it."""
    # Not LlamaTokenizerFast, for which transformers 5 changes the ids.
    found = {**settings, "tokenizer_class": "PreTrainedTokenizerFast"}
    if isinstance(found.get("extra_special_tokens"), list):
        found["additional_special_tokens"] = found.pop("extra_special_tokens")
    return found if chat_template is None else {**found, "chat_template": chat_template}


def _with_text_merges(file: dict[str, Any]) -> dict[str, Any]:
    """Spell merges `a b`, as files before 2024; a part with a space can only stand in a pair."""
    model = file.get("model") or {}
    merges = model.get("merges") or []
    pairs = [merge for merge in merges if not isinstance(merge, str)]
    if not pairs or any(" " in part for pair in pairs for part in pair):
        return file
    spelled = [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]
    return {**file, "model": {**model, "merges": spelled}}


def _rewrite(path: Path, change: Any) -> None:
    if path.exists():
        write_json(path, change(json.loads(path.read_text(encoding="utf-8"))))
