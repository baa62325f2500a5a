"""`data check`: what is in a data file, in numbers, and what is wrong with it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tinyagent_fast.config import PromptFormat
from tinyagent_fast.data.schema import Example


@dataclass(frozen=True, kw_only=True)
class CheckFlags:
    """Flags of `data check`."""

    file: Path
    """Data file in the published schema (also without --file, as the first word)."""
    tokenizer: str | None = None
    """Folder or hub name of a base model whose tokens are counted; none counts words."""
    prompt_format: PromptFormat = "alpaca"
    """Prompt template that is counted too."""
    max_length_tokens: int = 4608
    """Rows with more count as over-long."""
    against: tuple[Path, ...] = ()
    """More data files in which to look for the same queries."""
    json: bool = False
    """Print all figures as JSON."""


def run(arguments: Sequence[str]) -> int:
    """Check a data file.

    Args:
        arguments: Flags of the command; the file may come first without a flag.

    Returns:
        0 when every entry can be used, 1 when some cannot.
    """
    import tyro

    words = list(arguments)
    if words and not words[0].startswith("-"):
        words.insert(0, "--file")
    flags = tyro.cli(CheckFlags, args=words, prog="tinyagent-fast data check")
    from tinyagent_fast.data.report import check_file

    encode, render = _encoder(flags)
    check = check_file(
        flags.file,
        encode=encode,
        max_length_tokens=flags.max_length_tokens if encode else None,
        others={str(path): path for path in flags.against},
        render=render,
    )
    print(json.dumps(check.to_json(), indent=2) if flags.json else check.render_text())
    return 1 if check.read.problem_count else 0


Encode = Annotated[Callable[[list[str]], list[list[int]]] | None, "None counts words"]


def _encoder(flags: CheckFlags) -> tuple[Encode, Callable[[Example], tuple[str, str]]]:
    """Give the functions that count rows as training would see them."""
    from tinyagent_fast.prompts.templates import render

    if flags.tokenizer is None:
        return None, lambda example: _texts(render(example, flags.prompt_format))
    from tinyagent_fast.prompts.tokenizers import load_tokenizer, resolve_tokenizer_folder
    from tinyagent_fast.prompts.tokens import PromptTokenizer

    folder = resolve_tokenizer_folder(flags.tokenizer)
    tokenizer = PromptTokenizer(load_tokenizer(folder), flags.prompt_format)
    chat = tokenizer.chat if flags.prompt_format == "chat" else None
    return tokenizer.encode_texts, lambda e: _texts(render(e, flags.prompt_format, chat))


def _texts(rendered: object) -> tuple[str, str]:
    from tinyagent_fast.prompts.templates import RenderedExample

    assert isinstance(rendered, RenderedExample)
    return rendered.prompt, rendered.completion
