"""`data check`: what is in a data file, in numbers, and what is wrong with it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import tyro

from tinyagent_fast.config import PromptFormat


@dataclass(frozen=True, kw_only=True)
class CheckFlags:
    """Flags of `data check`."""

    file: Annotated[Path, tyro.conf.Positional]
    """Data file in the published schema."""
    tokenizer: str | None = None
    """Folder or hub name of a base model whose tokens are counted; None counts words."""
    prompt_format: PromptFormat = "alpaca"
    """Prompt template that is counted too."""
    max_length_tokens: int = 4608
    """Rows with more count as over-long."""
    catalogue: Path | None = None
    """YAML catalogue of the tools that plans may call; None stands for TinyAgent's own."""
    against: tuple[Path, ...] = ()
    """More data files in which to look for the same queries."""
    json: bool = False
    """Print all figures as JSON."""


def run(arguments: Sequence[str]) -> int:
    """Check a data file; the exit code is 1 when entries cannot be used or labels scored."""
    flags = tyro.cli(CheckFlags, args=list(arguments), prog="tinyagent-fast data check")
    from rich.console import Console

    from tinyagent_fast.data.generation.catalogue import plan_tools
    from tinyagent_fast.data.report import Measure, check_file
    from tinyagent_fast.display import Display
    from tinyagent_fast.evaluation.scoring import why_hopeless
    from tinyagent_fast.plans.tools import TINYAGENT
    from tinyagent_fast.prompts.templates import render

    encode = chat = None
    if flags.tokenizer is not None:
        from tinyagent_fast.prompts.loading import load_tokenizer, resolve_tokenizer_folder
        from tinyagent_fast.prompts.tokens import PromptTokenizer

        folder = resolve_tokenizer_folder(flags.tokenizer)
        tokenizer = PromptTokenizer(load_tokenizer(folder), flags.prompt_format)
        encode, chat = tokenizer.encode_texts, tokenizer.chat

    measure = Measure(
        render=lambda example: render(example, flags.prompt_format, chat),
        encode=encode,
        max_length_tokens=flags.max_length_tokens if encode else None,
    )
    tools = plan_tools(flags.catalogue)
    with Display(Console(stderr=True)).working("data check", "entries") as update:
        check = check_file(
            flags.file,
            measure,
            others={str(path): path for path in flags.against},
            judge=lambda label: why_hopeless(label, tools),
            known_tools=TINYAGENT if tools is None else tools,
            on_progress=lambda done: update(done, 0),
        )
    print(json.dumps(asdict(check), indent=2) if flags.json else check.render_text())
    return 1 if check.problem_count else 0
