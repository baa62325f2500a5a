"""Text to token ids and labels: exactly one BOS, EOS always supervised, nothing ever cut.

A row is `BOS prompt completion EOS`. The prompt is encoded alone, as it is when the model is
served, and the completion is encoded as its continuation, so the prompt's ids are an exact prefix
of the row; `encode_rows` proves that on every row, and that the labels decode to the completion.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from tinyagent_fast.config import PromptFormat
from tinyagent_fast.data.schema import Example
from tinyagent_fast.errors import DataError, ModelError
from tinyagent_fast.prompts.chat_template import ChatTemplate
from tinyagent_fast.prompts.templates import RenderedExample, render

IGNORED = -100
"""The label of tokens without loss."""

# Tokens that end a text in llama.cpp, whatever a model calls its EOS: the last two lines are those
# of code models. Source: llama.cpp, src/llama-vocab.cpp (special_eog_ids).
_END_TOKENS = (
    *("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>"),
    *("<end_of_turn>", "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]"),
    *("<|end_of_text|>", "<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>"),
    *("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
    *("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>", "<|file_sep|>"),
)


@dataclass(frozen=True)
class EncodedRow:
    """One training row: token ids and labels of equal length, prompt labels all `IGNORED`."""

    key: str
    input_ids: list[int]
    labels: list[int]
    prompt_tokens: int

    @property
    def supervised_tokens(self) -> int:
        """Count the tokens that carry loss."""
        return len(self.input_ids) - self.prompt_tokens


class PromptTokenizer:
    """A tokenizer with the project's rules for prompts and completions.

    Special tokens never come out of ordinary text: `</s>` typed by a user is five characters.
    Only the `chat` format reads them from the text, because its template writes them.
    """

    def __init__(self, tokenizer: Any, prompt_format: PromptFormat = "alpaca") -> None:
        """Wrap a transformers fast tokenizer (see `prompts.loading`).

        Raises:
            UserError: The format is `chat`, and the chat template cannot be used.
        """
        from tokenizers import Tokenizer

        self.hf = tokenizer
        self.prompt_format = prompt_format
        self.chat = ChatTemplate(tokenizer) if prompt_format == "chat" else None
        self.bos_id: int | None = tokenizer.bos_token_id
        self.eos_id: int = tokenizer.eos_token_id
        """Ends what training supervises."""
        self.pad_id: int = tokenizer.pad_token_id
        self._core = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._core.no_truncation()
        self._core.no_padding()
        ends = map(self._core.token_to_id, _END_TOKENS)
        self.end_ids = frozenset({self.eos_id, *(index for index in ends if index is not None)})
        """Any of them ends what a model writes, in every engine as in llama.cpp."""
        self._core.encode_special_tokens = True
        self._special = Tokenizer.from_str(self._core.to_str())
        self._adds_prefix_space = self._core.encode("x", add_special_tokens=False).tokens[0] != "x"
        self._letter = self.encode_text("x")

    def encode_text(self, text: str) -> list[int]:
        """Encode text as it stands at the start of a sequence, without BOS or EOS."""
        return list(self._core.encode(text, add_special_tokens=False).ids)

    def encode_texts(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode many texts at once, as `encode_text` does each."""
        encoded = self._core.encode_batch(list(texts), add_special_tokens=False)
        return [list(e.ids) for e in encoded]

    def encode_prompts(self, prompts: Sequence[str]) -> list[list[int]]:
        """Encode texts of `templates.render_prompt`, for training and generation alike.

        All cores take part. The ids begin with BOS if the tokenizer has one.

        Raises:
            DataError: A prompt has a second BOS; only a chat template may begin turns with it.
        """
        core = self._special if self.prompt_format == "chat" else self._core
        begin = [] if self.bos_id is None else [self.bos_id]
        rows = [
            begin + list(e.ids) for e in core.encode_batch(list(prompts), add_special_tokens=False)
        ]
        for row, prompt in zip(rows, prompts, strict=True):
            again = row[1:2] if self.prompt_format == "chat" else row[1:]
            if self.bos_id is not None and self.bos_id in again:
                raise DataError(
                    f"a prompt with a second BOS token: {prompt[:80]!r}",
                    "a row must have exactly one, apart from turns that a chat template begins",
                    "take it out of the text or the chat template",
                )
        return rows

    def encode_continuation(self, text: str) -> list[int]:
        """Encode text that follows other text, so without a space put before it.

        Raises:
            ModelError: The tokenizer puts a space before text and joins line breaks with it.
        """
        if not self._adds_prefix_space:
            return self.encode_text(text)
        line_break = self.encode_text("\n")
        ids = self.encode_text("\n" + text)
        if ids[: len(line_break)] != line_break:
            raise ModelError(
                f"a tokenizer that joins a line break with {text[:20]!r}",
                "it also puts a space before text, so text that follows a prompt has no ids of "
                "its own",
                "use a base model with a Llama tokenizer or a byte-level one",
            )
        return ids[len(line_break) :]

    def decode(self, ids: Sequence[int]) -> str:
        """Decode ids with special tokens shown."""
        text: str = self._core.decode(list(ids), skip_special_tokens=False)
        return text

    def decode_continuation(self, prompt_ids: Sequence[int], ids: Sequence[int]) -> str:
        """Decode ids that follow a prompt, special tokens shown; a leading space is kept."""
        anchor = list(prompt_ids[-1:])
        if not anchor or "\ufffd" in self.decode(anchor):
            # Part of a character would be read together with the first bytes that follow.
            anchor = self._letter
        return self.decode(anchor + list(ids))[len(self.decode(anchor)) :]

    def training_rows(self, examples: Iterable[Example]) -> list[EncodedRow]:
        """Render and encode examples; raises as `encode_rows` does."""
        return self.encode_rows(
            [(e.key, render(e, self.prompt_format, self.chat)) for e in examples]
        )

    def encode_rows(self, examples: Sequence[tuple[str, RenderedExample]]) -> list[EncodedRow]:
        """Encode rows, given by key and text, and prove each.

        Raises:
            DataError: No token would be supervised, or the labels do not decode to the completion.
        """
        prompts = self.encode_prompts([example.prompt for _, example in examples])
        return [
            self._finish_row(key, example.completion, prompt_ids)
            for (key, example), prompt_ids in zip(examples, prompts, strict=True)
        ]

    def _finish_row(self, key: str, completion: str, prompt_ids: list[int]) -> EncodedRow:
        if not completion:
            raise DataError(
                f"row {key}: its completion is empty",
                "a row without supervised tokens teaches nothing and makes the loss 0/0",
                "correct the entry, or skip it with --data.on-bad-entry skip",
            )
        supervised = [*self.encode_continuation(completion), self.eos_id]
        ids = prompt_ids + supervised
        row = EncodedRow(key, ids, [IGNORED] * len(prompt_ids) + supervised, len(prompt_ids))
        self.prove_row(row, prompt_ids, completion)
        return row

    def prove_row(self, row: EncodedRow, prompt_ids: Sequence[int], completion: str) -> None:
        """Prove that a row is a prompt, as it is encoded for generation, and a completion.

        Raises:
            DataError: The prompt is no exact prefix, a prompt token is supervised, EOS is not the
                last label, or the labels decode to another text.
        """
        wrong = None
        end = row.prompt_tokens
        supervised = row.labels[end:]
        if row.input_ids[:end] != list(prompt_ids):
            wrong = "the prompt's ids are no prefix of the row's"
        elif any(label != IGNORED for label in row.labels[:end]):
            wrong = "a prompt token is supervised"
        elif not supervised or supervised != row.input_ids[end:]:
            wrong = "the labels differ from the completion's ids"
        elif supervised[-1] != self.eos_id:
            wrong = "the last supervised token is not EOS"
        elif (seen := self.decode_continuation(prompt_ids, supervised[:-1])) != completion:
            wrong = f"the labels decode to {seen[:200]!r}, not to {completion[:200]!r}"
        if wrong:
            raise DataError(
                f"row {row.key}",
                f"{wrong}, so the model would be taught something else",
                "remove characters that the tokenizer cannot give back, or use another tokenizer",
            )
