"""The one renderer: system and user text become the prompt, raw output becomes the completion.

Training, evaluation, chat and export all call `render`; nothing else builds a prompt.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from tinyagent_fast.data.schema import Example
from tinyagent_fast.plans.grammar import END_OF_PLAN, END_OF_RESPONSE

PromptFormat = Literal["alpaca", "flat", "chat"]
ChatRenderer = Callable[[Sequence[Mapping[str, str]]], str]
"""Messages to text that ends where the assistant's turn begins (a tokenizer's chat template)."""

STOP_STRINGS: Mapping[str, str] = {
    "plan": END_OF_PLAN,
    "replan": END_OF_PLAN,
    "join": END_OF_RESPONSE,
}
"""The text that ends a completion, by kind of example."""


@dataclass(frozen=True)
class RenderedExample:
    """What the model reads and what it must write, without BOS and EOS, which are token ids."""

    prompt: str
    completion: str


def prompt_messages(system: str | None, user: str) -> list[dict[str, str]]:
    """Give a prompt as a client sends it to a chat endpoint.

    Args:
        system: System text, or none.
        user: User text.

    Returns:
        Messages with role and content.
    """
    first = [{"role": "system", "content": system}] if system is not None else []
    return [*first, {"role": "user", "content": user}]


def render_prompt(
    system: str | None, user: str, prompt_format: PromptFormat, chat: ChatRenderer | None = None
) -> str:
    """Render a prompt that ends where the completion begins.

    Args:
        system: System text; none for prompts of a single message, such as the joiner's.
        user: User text.
        prompt_format: `alpaca` is the base model's own template, `flat` puts both texts behind
            one another as the published GGUF's template does, `chat` asks the tokenizer.
        chat: The tokenizer's chat template; needed for `chat` only.

    Returns:
        The prompt's text without BOS.

    Source: the chat template of Doctor-Shotgun/TinyLlama-1.1B-32k-Instruct (alpaca) and the
        template embedded in the published TinyAgent-1.1B GGUF (flat).
    """
    if prompt_format == "flat":
        return f"{system or ''}{user}"
    if prompt_format == "chat":
        assert chat is not None, "the chat format needs a chat template"
        return chat(prompt_messages(system, user))
    if system is None:
        return f"\n### Instruction:\n{user}\n\n### Response:\n"
    return f"\n### Instruction:\n{system}\n\n### Input:\n{user}\n\n### Response:\n"


def render(
    example: Example, prompt_format: PromptFormat, chat: ChatRenderer | None = None
) -> RenderedExample:
    """Render an example for training: its prompt, and its output with the stop string.

    Args:
        example: One point of the data.
        prompt_format: See `render_prompt`.
        chat: See `render_prompt`.

    Returns:
        Prompt and completion; the completion ends in the stop string of its kind.
    """
    stop = STOP_STRINGS[example.kind]
    completion = example.output if example.output.endswith(stop) else example.output + stop
    prompt = render_prompt(example.system, example.user, prompt_format, chat)
    return RenderedExample(prompt, completion)


def template_hash(prompt_format: PromptFormat, chat: ChatRenderer | None = None) -> str:
    """Name the template by what it renders, so that two runs can be told apart.

    Args:
        prompt_format: See `render_prompt`.
        chat: See `render_prompt`.

    Returns:
        The first 16 hex digits of the sha256 of two rendered prompts.
    """
    probe = render_prompt("S", "U", prompt_format, chat) + "\0"
    probe += render_prompt(None, "U", prompt_format, chat)
    return hashlib.sha256(probe.encode()).hexdigest()[:16]
