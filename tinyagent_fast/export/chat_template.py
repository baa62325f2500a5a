"""The chat template of an exported model: Jinja that renders what `prompts.templates` renders.

Part of the export stage: the template goes into the merged folder and into the GGUF, so a server
that is sent messages builds the very prompt the model was trained on. All text stands inside
expressions and every tag cuts white space on both sides, so no engine can add or lose a line break.
"""

from __future__ import annotations

import re

from tinyagent_fast.config import PromptFormat

_BOS = "{{- bos_token -}}\n"

_SYSTEM_FIRST = """\
{%- if message['role'] == 'system' -%}
{%- if not loop.first -%}
{{- raise_exception('only the first message can be a system message') -}}
{%- endif -%}
"""

_UNKNOWN_ROLE = """\
{%- else -%}
{{- raise_exception('a planner knows the roles system, user and assistant only') -}}
{%- endif -%}
{%- endfor -%}"""

_FLAT = (
    "{%- for message in messages -%}\n"
    + _SYSTEM_FIRST
    + """\
{{- message['content'] + '' -}}
{%- elif message['role'] == 'user' -%}
{{- message['content'] + '' -}}
{%- elif message['role'] == 'assistant' -%}
{{- message['content'] + eos_token -}}
"""
    + _UNKNOWN_ROLE
)

_ALPACA = (
    "{%- for message in messages -%}\n"
    + _SYSTEM_FIRST
    + """\
{{- '\\n### Instruction:\\n' + message['content'] + '\\n\\n### Input:\\n' -}}
{%- elif message['role'] == 'user' -%}
{%- if loop.index0 != 1 or messages[0]['role'] != 'system' -%}
{{- '\\n### Instruction:\\n' -}}
{%- endif -%}
{{- message['content'] + '' -}}
{%- elif message['role'] == 'assistant' -%}
{{- '\\n\\n### Response:\\n' + message['content'] + eos_token -}}
"""
    + _UNKNOWN_ROLE
    + """
{%- if add_generation_prompt -%}
{{- '\\n\\n### Response:\\n' -}}
{%- endif -%}"""
)


def chat_template(prompt_format: PromptFormat, base_template: str | None, *, bos: bool) -> str:
    """Write the Jinja template that renders messages as the model was trained on them.

    A request of a system and a user message, or of a user message alone, comes out as
    `prompts.templates.render_prompt` writes it. Assistant turns before the last message are
    written as their text and EOS, the next user turn as a new prompt without system text; no
    training row has several turns. Roles that training does not know are an error, not dropped.

    Args:
        prompt_format: `alpaca`, `flat`, or `chat` for the base model's own template.
        base_template: The base model's template; needed for `chat` only.
        bos: Whether the template writes BOS itself, exactly once. True for a Hugging Face folder,
            whose readers add none to a rendered chat; False for a GGUF, where the tokenizer does.
    """
    if prompt_format == "chat":
        assert base_template is not None, "the tokenizer has refused a base without one"
        return _with_bos(base_template) if bos else base_template
    template = _ALPACA if prompt_format == "alpaca" else _FLAT
    return _BOS + template if bos else template


def _with_bos(template: str) -> str:
    """Let a template begin with BOS exactly once, whether or not it writes it itself."""
    if re.match(r"\{\{-?\s*bos_token\s*-?\}\}", template):
        return template
    # The line break is cut with its tag, the empty expression keeps the other tag from cutting
    # white space of the template's own, and a line break at the very end, which Jinja ignores,
    # would count inside the block.
    body = template.removesuffix("\n") + "{{ '' }}"
    return (
        "{% set rendered %}\n" + body + "{% endset %}"
        "{{- '' if rendered.startswith(bos_token) else bos_token -}}{{- rendered -}}"
    )
