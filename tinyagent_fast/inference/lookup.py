"""Prompt lookup: guesses of the next tokens, copied from where the last tokens stood before.

Plans repeat what their prompt says (tool names, names of people, the user's words). A forward pass
over a few guessed tokens costs little more than one over a single token, and those guesses that the
model would have written anyway are kept, so greedy output stays the same.
Source of the idea: prompt lookup decoding, https://github.com/apoorvumang/prompt-lookup-decoding.
"""

from __future__ import annotations

from collections.abc import Sequence

_NGRAM_TOKENS = (3, 2, 1)
"""How many of the last tokens are looked up, the most telling first."""


class PromptLookup:
    """Guesses how one text goes on, from the text itself."""

    def __init__(self, tokens: Sequence[int]) -> None:
        """Index the token ids of a prompt."""
        self._tokens: list[int] = []
        self._next_at: dict[tuple[int, ...], int] = {}
        self.extend(tokens)

    def extend(self, tokens: Sequence[int]) -> None:
        """Add what was written since."""
        for token in tokens:
            for size in _NGRAM_TOKENS:
                if len(self._tokens) >= size:
                    self._next_at[tuple(self._tokens[-size:])] = len(self._tokens)
            self._tokens.append(token)

    def draft(self, most_tokens: int) -> list[int]:
        """Guess the next tokens: what followed the last n-gram that occurred before.

        The longest n-gram counts, and the latest of its earlier occurrences.
        """
        if most_tokens <= 0:
            return []
        for size in _NGRAM_TOKENS:
            at = self._next_at.get(tuple(self._tokens[-size:]))
            if at is not None and len(self._tokens) >= size:
                return self._tokens[at : at + most_tokens]
        return []
