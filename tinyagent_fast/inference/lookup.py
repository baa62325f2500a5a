"""Prompt lookup: guesses of the next tokens, copied from where the last tokens stood before.

Plans repeat what their prompt says (tool names, names of people, the user's words). A forward pass
over a few guessed tokens costs little more than one over a single token, and those guesses that the
model would have written anyway are kept, so greedy output stays the same.
Source of the idea: prompt lookup decoding, https://github.com/apoorvumang/prompt-lookup-decoding.
"""

from __future__ import annotations

from collections.abc import Sequence

_NGRAM_TOKENS = (3, 2, 1)


class PromptLookup:
    """Guesses how one text goes on, from the text itself."""

    def __init__(self, tokens: Sequence[int], ngram_tokens: Sequence[int] = _NGRAM_TOKENS) -> None:
        """Index a prompt.

        Args:
            tokens: The prompt's token ids.
            ngram_tokens: How many of the last tokens are looked up, the most telling first.
        """
        self._sizes = tuple(ngram_tokens)
        self._tokens: list[int] = []
        self._next_at: dict[tuple[int, ...], int] = {}
        self.extend(tokens)

    def extend(self, tokens: Sequence[int]) -> None:
        """Add what was written since.

        Args:
            tokens: Token ids that follow those known.
        """
        for token in tokens:
            for size in self._sizes:
                if len(self._tokens) >= size:
                    self._next_at[tuple(self._tokens[-size:])] = len(self._tokens)
            self._tokens.append(token)

    def draft(self, most_tokens: int) -> list[int]:
        """Guess the next tokens.

        Args:
            most_tokens: How many at most.

        Returns:
            What followed the latest earlier occurrence of the longest of the last n-grams; nothing
            if none of them occurred before.
        """
        if most_tokens <= 0:
            return []
        for size in self._sizes:
            at = self._next_at.get(tuple(self._tokens[-size:]))
            if at is not None and len(self._tokens) >= size:
                return self._tokens[at : at + most_tokens]
        return []


def agreeing_tokens(draft: Sequence[int], following: Sequence[int]) -> int:
    """Count the guesses that the model would have written itself.

    Args:
        draft: Guessed tokens.
        following: What the model writes before the first guess, behind it, and so on.

    Returns:
        How many guesses are right before the first wrong one.
    """
    count = 0
    while count < len(draft) and draft[count] == following[count]:
        count += 1
    return count
