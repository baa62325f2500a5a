"""A base model's own chat template: tried out before anything is rendered with it.

A template is a program that came with the base. transformers runs it in a sandbox; what it writes
is held against what it was given, because one that leaves a role out would drop the tools unseen.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from datetime import date
from typing import Any

from tinyagent_fast.errors import ConfigError, DataError, ModelError
from tinyagent_fast.prompts.templates import prompt_messages

TEMPLATE_DATE = date(2024, 7, 26)
"""The date that a template writes which asks for today's: the one that Llama 3 has as a default."""

_FIX = "use --model.prompt-format alpaca, which needs no chat template, or correct the template"
_DATE_CALL = re.compile(r"""strftime_now\(\s*(?:"([^"\\]*)"|'([^'\\]*)')\s*\)""")
_PROBES = (
    ('Tools:\n1. send(to: "a", it\'s <b> & {c})\n  \\n', "Question: who?\n\n{{ x }} ${1}"),
    (None, "Another <question> of one & only"),
)
_TIMES = 16
_SERVER_VALUES = {"date_string": "1 Jan 1970", "datetime": "1 Jan 1970", "enable_thinking": True}
"""Variables that a server sets for every template. Source: llama.cpp, common/chat.cpp."""


class ChatTemplate:
    """Renders messages by a tokenizer's chat template, as a server does.

    Attributes:
        source: The template's text, as an exported model gets it.
        notes: What was done with the base's template, one sentence each.
    """

    def __init__(self, tokenizer: Any) -> None:
        """Try the template out on prompts with and without a system text.

        Args:
            tokenizer: A transformers fast tokenizer (see `prompts.loading`).

        Raises:
            ConfigError: There is no template.
            ModelError: The template is broken, refuses such messages, leaves text out, writes BOS
                elsewhere than at the beginning of turns, or another text each time.
        """
        self._tokenizer = tokenizer
        self._bos: str = tokenizer.bos_token or ""
        self._markup: tuple[str, ...] = ()
        self.notes: tuple[str, ...] = ()
        self.source = self._with_fixed_values(
            self._with_fixed_date(self._chosen(tokenizer.chat_template))
        )
        written = ""
        for system, user in _PROBES:
            messages = prompt_messages(system, user)
            prompt = self(messages)
            if self._bos and (prompt.startswith(self._bos) or self._writes_bos_late(messages)):
                raise self._refused(
                    f"it writes BOS ({self._bos}) twice at the beginning, or only further on"
                )
            written += prompt
        special = {str(t) for t in tokenizer.added_tokens_decoder.values() if t.special}
        special &= set(tokenizer.backend_tokenizer.encode(written, add_special_tokens=False).tokens)
        self._markup = tuple(sorted({*special, self._bos, tokenizer.eos_token or ""} - {""}))

    def __call__(self, messages: Sequence[Mapping[str, str]]) -> str:
        """Render messages to where the assistant's turn begins, without BOS at the beginning.

        Raises:
            DataError: A text holds a token that the template ends turns with.
            ModelError: The template refuses the messages, or leaves one out.
        """
        for message in messages:
            self._refuse_markup(message["role"], message["content"])
        text = self._render(messages)
        for message in messages:
            if message["content"].strip() not in text:
                raise self._refused(
                    f"it leaves the {message['role']} text out of the prompt, or changes it"
                )
        return text.removeprefix(self._bos)

    def _chosen(self, template: Any) -> str:
        """Choose the template that transformers takes for messages without tools."""
        if isinstance(template, Mapping) and template:
            name = next(iter(template)) if len(template) == 1 else "default"
            listed = ", ".join(map(str, template))
            if name not in template:
                raise self._refused(f"there are several ({listed}), and none is named default")
            self.notes += (f"of the base's chat templates ({listed}), {name} is used",)
            template = template[name]
        if not template:
            raise ConfigError(
                "prompt format chat",
                f"the tokenizer in {self._tokenizer.name_or_path} has no chat template",
                "use --model.prompt-format alpaca, or a base model with a chat template",
            )
        if not isinstance(template, str):
            raise self._refused(f"it is no text, but {type(template).__name__}")
        return template

    def _with_fixed_date(self, template: str) -> str:
        """Write a fixed date in the place of today's, which would be another when it is served."""

        def written(call: re.Match[str]) -> str:
            return json.dumps(TEMPLATE_DATE.strftime(call[1] if call[2] is None else call[2]))

        fixed = _DATE_CALL.sub(written, template)
        if fixed != template:
            self.notes += (
                f"the chat template writes today's date; here and in every export it is always "
                f"{TEMPLATE_DATE}, so that prompts stay what they were in training",
            )
        return fixed

    def _with_fixed_values(self, template: str) -> str:
        """Fix the variables that servers set, to values that change nothing."""
        wanted, day = self._probed(template, {}), json.dumps(TEMPLATE_DATE.strftime("%d %b %Y"))
        if any(self._probed(template, {}) != wanted for _ in range(_TIMES)):
            raise self._refused("it writes another text each time")
        for name, value in _SERVER_VALUES.items():
            if self._gives(wanted, template, {name: value}):
                continue
            for fixed in (day, "false", "true"):
                # The line break is cut with its tag.
                pinned = f"{{% set {name} = {fixed} %}}\n{template}"
                if self._gives(wanted, pinned, {name: value}):
                    break
            else:
                raise self._refused(f"it depends on {name}, which servers set in their own way")
            self.notes += (f"{name} of the chat template is always {fixed}, whatever servers set",)
            template = pinned
        return template

    def _gives(self, wanted: list[str], template: str, values: Mapping[str, object]) -> bool:
        try:
            return self._probed(template, values) == wanted
        except ModelError:
            return False

    def _probed(self, template: str, values: Mapping[str, object]) -> list[str]:
        return [self._render(prompt_messages(*probe), template, values) for probe in _PROBES]

    def _render(
        self,
        messages: Sequence[Mapping[str, str]],
        template: str | None = None,
        values: Mapping[str, object] | None = None,
    ) -> str:
        try:
            text: str = self._tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                chat_template=self.source if template is None else template,
                tokenize=False,
                add_generation_prompt=True,
                strftime_now=_no_date,
                **(values or {}),
            )
        except Exception as error:  # whatever a program of a stranger does
            roles = " and ".join(f"a {message['role']}" for message in messages)
            said = f"{type(error).__name__}: {error}"
            raise self._refused(f"it cannot render {roles} message ({said})") from error
        return text

    def _writes_bos_late(self, messages: Sequence[Mapping[str, str]]) -> bool:
        text = self._render(messages)
        return self._bos in text and not text.startswith(self._bos)

    def _refuse_markup(self, role: str, text: str) -> None:
        for token in self._markup:
            if token in text:
                at = text.index(token)
                raise DataError(
                    f"a {role} text with {token!r}: {text[max(0, at - 40) : at + 60]!r}",
                    "the chat template ends or begins turns with this token, so the text would "
                    "break out of its turn",
                    "take it out of the text, or use --model.prompt-format alpaca",
                )

    def _refused(self, why: str) -> ModelError:
        return ModelError(f"the chat template of {self._tokenizer.name_or_path}", why, _FIX)


def _no_date(_format: str) -> str:
    raise ValueError("it asks for today's date in a way that cannot be given a fixed one")
