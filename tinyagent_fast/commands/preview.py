"""`preview`: rows as the trainer sees them, supervised tokens in colour, or between marks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any

from tinyagent_fast.commands.config_flags import parser_of, resolve_config
from tinyagent_fast.errors import ConfigError, count_of
from tinyagent_fast.presets import choose_preset

_ROWS = 3
_FIRST, _LAST = "\u00ab", "\u00bb"
"""Stand around each supervised token where there are no colours."""


def run(arguments: Sequence[str]) -> int:
    """Show rows; the flags are those of `train`, and `--rows`."""
    parser = parser_of("preview")
    parser.add_argument("--rows", type=int, default=_ROWS)
    known, rest = parser.parse_known_args(list(arguments))
    more = "--rows N shows that many rows."
    config = resolve_config("preview", rest, lambda: choose_preset()[0], more_flags=more)
    if known.rows < 1:
        raise ConfigError(f"--rows {known.rows}", "there is nothing to show", "ask for 1 or more")
    from rich.console import Console

    from tinyagent_fast.data.splits import mixture_text
    from tinyagent_fast.display import Display
    from tinyagent_fast.models.bases import base_tokenizer, resolve_base
    from tinyagent_fast.prompts.loading import load_tokenizer, resolve_tokenizer_folder
    from tinyagent_fast.prompts.tokens import PromptTokenizer
    from tinyagent_fast.training.inputs import load_run_examples

    console = Console(highlight=False)
    display = Display(Console(stderr=True))
    examples = load_run_examples(config, display.working)
    with display.working("tokenizer of a base that is made on the spot"):
        hf = base_tokenizer(config, examples.train, [e.query for e in examples.test])
    if hf is None:
        base = resolve_base(config, examples.train, stage=display.working, say=console.print)
        with display.working("loading the tokenizer"):
            hf = load_tokenizer(resolve_tokenizer_folder(base, config.model.revision))
    tokenizer = PromptTokenizer(hf, config.model.prompt_format)
    mixed = examples.summary.get("generated")
    if mixed is not None:
        console.print(mixture_text(mixed), markup=False)
    chosen = chosen_rows(known.rows, len(examples.train), mixed)
    rows = tokenizer.training_rows(examples.train[row] for row in chosen)
    for row in rows:
        _show(console, tokenizer, row)
    supervised = sum(row.supervised_tokens for row in rows)
    tokens = sum(len(row.input_ids) for row in rows)
    said = f"{count_of(len(rows), 'row')}: {tokens} tokens, {supervised} supervised "
    said += f"({100 * supervised / max(1, tokens):.1f} %)"
    if len(rows) > 1:
        columns = zip(*(row.input_ids for row in rows), strict=False)
        shared = sum(1 for _ in takewhile(lambda ids: len(set(ids)) == 1, columns))
        said += f", shared prefix {shared} tokens"
    console.print(said, markup=False)
    return 0


def chosen_rows(most: int, rows: int, mixed: Mapping[str, Any] | None) -> list[int]:
    """Choose the rows to show: the first ones, and of a mixture some of own and generated rows."""
    if mixed is None:
        return list(range(min(most, rows)))
    own, generated = mixed["own_rows"], mixed["rows"]
    behind = min(generated, max(most // 2, most - own))
    return [*range(min(own, most - behind)), *range(own, own + behind)]


def _show(console: Any, tokenizer: Any, row: Any) -> None:
    """Print one row: the prompt dim, each supervised token on green in turn light and dark."""
    from rich.text import Text

    coloured = console.color_system is not None and not console.no_color
    text = Text()
    prompt = row.input_ids[: row.prompt_tokens]
    text.append(tokenizer.decode(prompt), style="dim")
    shown = ""
    supervised = row.input_ids[row.prompt_tokens :]
    for count in range(1, len(supervised) + 1):
        # Decoded from the start each time: a piece of a character shows with its last token.
        now = tokenizer.decode_continuation(prompt, supervised[:count])
        if now.endswith("\ufffd") and count < len(supervised):
            continue
        piece = now[len(shown) :]
        style = "black on green" if count % 2 else "black on bright_green"
        text.append(piece if coloured else f"{_FIRST}{piece}{_LAST}", style=style)
        shown = now
    console.rule(
        f"{row.key}: {row.prompt_tokens} prompt + {row.supervised_tokens} supervised tokens"
    )
    console.print(text, soft_wrap=True)
