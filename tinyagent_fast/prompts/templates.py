"""The one renderer: system and user text become the prompt, raw output becomes the completion.

Training, evaluation, chat and export all call `render`; nothing else builds a prompt.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from tinyagent_fast.config import PromptFormat
from tinyagent_fast.data.schema import Example
from tinyagent_fast.errors import ConfigError
from tinyagent_fast.plans.grammar import END_OF_PLAN, END_OF_RESPONSE

ChatRenderer = Callable[[Sequence[Mapping[str, str]]], str]
"""Messages to text that ends where the assistant's turn begins (a tokenizer's chat template)."""

STOP_STRINGS: Mapping[str, str] = {
    "plan": END_OF_PLAN,
    "replan": END_OF_PLAN,
    "join": END_OF_RESPONSE,
}
"""The text that ends a completion, by kind of example."""


class RenderedExample(NamedTuple):
    """What the model reads and what it must write, without BOS and EOS, which are token ids."""

    prompt: str
    completion: str


def prompt_messages(system: str | None, user: str) -> list[dict[str, str]]:
    """Give a prompt as a client sends it to a chat endpoint: messages with role and content."""
    first = [{"role": "system", "content": system}] if system is not None else []
    return [*first, {"role": "user", "content": user}]


def render_prompt(
    system: str | None, user: str, prompt_format: PromptFormat, chat: ChatRenderer | None = None
) -> str:
    """Render a prompt that ends where the completion begins.

    Args:
        system: System text; None for prompts of a single message, such as the joiner's.
        user: User text.
        prompt_format: `alpaca` is the base model's own template, `flat` puts both texts behind
            one another as the published GGUF's template does, `chat` asks the tokenizer.
        chat: The tokenizer's chat template; used for `chat` only.

    Returns:
        The prompt's text without BOS.

    Raises:
        ConfigError: The format is `chat` and there is no chat template.

    Source: the chat template of Doctor-Shotgun/TinyLlama-1.1B-32k-Instruct (alpaca) and the
        template embedded in the published TinyAgent-1.1B GGUF (flat).
    """
    if prompt_format == "flat":
        return f"{system or ''}{user}"
    if prompt_format == "chat":
        if chat is None:
            raise ConfigError(
                "prompt format chat",
                "there is no tokenizer with a chat template",
                "use --model.prompt-format alpaca, or a base model with a chat template",
            )
        return chat(prompt_messages(system, user))
    if system is None:
        return f"\n### Instruction:\n{user}\n\n### Response:\n"
    return f"\n### Instruction:\n{system}\n\n### Input:\n{user}\n\n### Response:\n"


def render(
    example: Example, prompt_format: PromptFormat, chat: ChatRenderer | None = None
) -> RenderedExample:
    """Render an example for training: its prompt, and its output with the stop string of its kind.

    Args and Raises as in `render_prompt`.
    """
    stop = STOP_STRINGS[example.kind]
    completion = example.output if example.output.endswith(stop) else example.output + stop
    prompt = render_prompt(example.system, example.user, prompt_format, chat)
    return RenderedExample(prompt, completion)


def template_hash(prompt_format: PromptFormat, chat: ChatRenderer | None = None) -> str:
    """Name a template by 16 hex digits of the sha256 of what it renders, to tell runs apart."""
    probe = render_prompt("S", "U", prompt_format, chat) + "\0"
    probe += render_prompt(None, "U", prompt_format, chat)
    return hashlib.sha256(probe.encode()).hexdigest()[:16]
