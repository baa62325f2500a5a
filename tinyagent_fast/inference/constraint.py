"""Plans held to a grammar in torch: which tokens may follow what is written, by llguidance.

The token that the model finds most likely is asked about first. A trained planner writes plans, so
the whole vocabulary is only looked through at the few places where the grammar forbids that token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from tinyagent_fast.errors import ModelError
from tinyagent_fast.plans.gbnf import without_surrogates

if TYPE_CHECKING:
    from llguidance import LLMatcher

    from tinyagent_fast.prompts.tokens import PromptTokenizer

_SAMPLE = '1. send_sms(["$1"], "Grüße,\\nAnn")\n2. join()<END_OF_PLAN>'
_MOST_GRAMMARS = 256


class Constraints:
    """The grammars of one tokenizer, each read once."""

    def __init__(self, tokenizer: PromptTokenizer) -> None:
        """Read the tokenizer, which takes about a second.

        Raises:
            ModelError: llguidance takes its tokens for other text than it does.
        """
        from llguidance.hf import from_tokenizer

        fault = None
        try:
            self._tokens = from_tokenizer(tokenizer.hf, eos_token=tokenizer.eos_id)
            read = self._tokens.decode_bytes(tokenizer.encode_continuation(_SAMPLE))
        except ValueError as error:
            fault = f"llguidance cannot read the tokenizer: {error}"
        else:
            if read != _SAMPLE.encode():
                fault = f"llguidance reads its tokens as {read!r}, not as {_SAMPLE!r}"
        if fault is not None:
            raise ModelError(
                "plans held to a grammar", fault, "switch the grammar off (--grammar off)"
            )
        self._begun: dict[str, LLMatcher] = {}

    def begin(self, grammar: str) -> Constraint:
        """Begin a text under a grammar as `plans.gbnf` writes it."""
        begun = self._begun.get(grammar)
        if begun is None:
            from llguidance import LLMatcher
            from llguidance.gbnf_to_lark import gbnf_to_lark

            lark = gbnf_to_lark(without_surrogates(grammar))
            begun = LLMatcher(self._tokens, LLMatcher.grammar_from_lark(lark))
            assert not begun.is_error(), begun.get_error()
            if len(self._begun) == _MOST_GRAMMARS:
                self._begun.clear()
            self._begun[grammar] = begun
        return Constraint(begun.deep_copy(), self._tokens.vocab_size)


@dataclass(frozen=True)
class Constraint:
    """One text that is being written under a grammar."""

    _matcher: LLMatcher
    _vocab_size: int
    """Tokens there are; a model may have more logits."""

    @property
    def ended(self) -> bool:
        """Whether nothing can follow but EOS."""
        ended: bool = self._matcher.is_stopped()
        return ended

    def choose(self, token: int, best_of: Callable[[np.ndarray], int]) -> int:
        """Choose the next token and go on behind it.

        Args:
            token: The most likely of all.
            best_of: Gives the most likely token of those that a mask [vocabulary] allows.

        Returns:
            `token` where the grammar allows it, else the most likely that it allows.
        """
        if token < self._vocab_size and self._matcher.try_consume_tokens([token]) == 1:
            return token
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        mask = np.unpackbits(bits, count=self._vocab_size, bitorder="little")
        token = best_of(mask.astype(bool))
        # An error is for good, and would allow nothing but EOS from now on.
        consumed = self._matcher.consume_token(token)
        assert consumed and not self._matcher.is_error(), self._matcher.get_error()
        return token
