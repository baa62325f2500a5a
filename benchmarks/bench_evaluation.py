"""Time greedy evaluation: prompt by prompt, in left-padded batches, and over shared prefixes.

Random weights never write the stop string, so every way writes the same number of tokens, as many
as a published plan has. How many guesses of prompt lookup hold depends on what a model writes;
beside the random model's figure stands the one for the data's own plans where there are any.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from bench_inputs import NEVER_WRITTEN_ID, Prompts, shared_share
from bench_rounds import in_turns, summary
from bench_sizes import Sizes

from tinyagent_fast.inference.decoding import complete, generating
from tinyagent_fast.inference.lookup import PromptLookup, agreeing_tokens
from tinyagent_fast.plans.grammar import END_OF_PLAN
from tinyagent_fast.prompts.tokens import PromptTokenizer

SINGLE, STATIC, SHARED = "one at a time", "static left-padded", "ours"
LOOKUP_TOKENS = 4
LOOKUP = f"ours, lookup {LOOKUP_TOKENS}"

Prompted = dict[int, list[int]]
"""Prompts by their index."""


@dataclass(frozen=True)
class Written:
    """What a way wrote, by the prompt's index, and in how many passes of the output layer."""

    texts: dict[int, str]
    passes: int


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How prompts are completed."""

    batch: int
    new_tokens: int
    shared_prefix: bool = True
    lookup_tokens: int = 0


def write(model: Any, tokenizer: PromptTokenizer, prompts: Prompted, how: Decoding) -> Written:
    """Complete prompts as evaluation does.

    Args:
        model: A Llama.
        tokenizer: Decodes.
        prompts: By index.
        how: Batch, length and way.

    Returns:
        The texts.
    """
    keys, texts, passes = list(prompts), {}, 0

    def count(*_: object) -> None:
        nonlocal passes
        passes += 1

    hook = model.get_output_embeddings().register_forward_hook(count)
    try:
        with generating(model):
            for pairs in complete(
                model,
                tokenizer,
                list(prompts.values()),
                batch=how.batch,
                max_new_tokens=how.new_tokens,
                stop=END_OF_PLAN,
                shared_prefix=how.shared_prefix,
                lookup_tokens=how.lookup_tokens,
            ):
                texts.update({keys[index]: completion.text for index, completion in pairs})
    finally:
        hook.remove()
    return Written(texts, passes)


def never_stopping(tokenizer: PromptTokenizer) -> PromptTokenizer:
    """Let a tokenizer's EOS be an id that no model writes.

    Args:
        tokenizer: Changed in place.

    Returns:
        The same.
    """
    tokenizer.eos_id = NEVER_WRITTEN_ID
    return tokenizer


def measure_evaluation(
    model: Any,
    tokenizer: PromptTokenizer,
    prompts: Prompts,
    sizes: Sizes,
    tell: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Time all ways on the same prompts; one at a time, only some of them.

    The prompts are one batch, so that what they share is computed once for this batch alone.

    Args:
        model: A Llama of random weights.
        tokenizer: From `never_stopping`.
        prompts: What is completed.
        sizes: Batch, tokens to write, prompts that go one at a time, rounds.
        tell: Called with a way's name before it runs.

    Returns:
        The figures.
    """
    todo = _ways(prompts.ids, sizes)
    ways = {
        name: partial(write, model, tokenizer, chosen, how) for name, (chosen, how) in todo.items()
    }
    # Warms up.
    write(model, tokenizer, {0: prompts.ids[0]}, Decoding(batch=1, new_tokens=1))
    timed = in_turns(ways, sizes.rounds, tell)
    samples = {name: len(chosen) for name, (chosen, _) in todo.items()}
    over_static = summary(timed, samples, STATIC)
    tokens = [len(ids) for ids in prompts.ids]
    return {
        "what": f"{sizes.new_tokens} tokens written greedily behind each prompt, random weights",
        "prompts": len(tokens),
        "batch": sizes.eval_batch,
        "new_tokens": sizes.new_tokens,
        "mean_tokens": round(sum(tokens) / len(tokens), 1),
        "shared_share": round(shared_share(prompts.ids), 4),
        "baseline": SINGLE,
        "ways": summary(timed, samples, SINGLE),
        "over_static": {name: over_static[name]["ratio"] for name in (SHARED, LOOKUP)},
        "output_passes": {name: written.passes for name, written in timed.results.items()},
        "equal_outputs": {
            "to_one_at_a_time": _equal(timed.results, SINGLE),
            "to_static": _equal(timed.results, STATIC),
        },
        "lookup_tokens_per_pass_on_the_datas_plans": tokens_per_pass(prompts),
    }


def _ways(prompts: Sequence[list[int]], sizes: Sizes) -> dict[str, tuple[Prompted, Decoding]]:
    """Say which prompts go which way."""
    everything = dict(enumerate(prompts))
    some = _spread_by_length(prompts, sizes.singles)
    how = Decoding(batch=sizes.eval_batch, new_tokens=sizes.new_tokens)
    return {
        SINGLE: (some, replace(how, batch=1, shared_prefix=False)),
        STATIC: (everything, replace(how, shared_prefix=False)),
        SHARED: (everything, how),
        LOOKUP: (everything, replace(how, lookup_tokens=LOOKUP_TOKENS)),
    }


def _spread_by_length(prompts: Sequence[list[int]], count: int) -> dict[int, list[int]]:
    """Choose prompts from all lengths, so that their mean is about that of all."""
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    count = min(count, len(order))
    chosen = [order[(2 * k + 1) * len(order) // (2 * count)] for k in range(count)]
    return {index: prompts[index] for index in chosen}


def _equal(results: Mapping[str, Written], name: str) -> dict[str, str]:
    """Count the texts that are those of another way, as `equal of compared`."""
    wanted = results[name].texts
    found = {}
    for other, written in results.items():
        both = wanted.keys() & written.texts.keys()
        if other != name:
            equal = sum(wanted[index] == written.texts[index] for index in both)
            found[other] = f"{equal} of {len(both)}"
    return found


def tokens_per_pass(prompts: Prompts) -> float | None:
    """Count how many tokens a pass would write with prompt lookup if it wrote the data's plans.

    Args:
        prompts: With their plans.

    Returns:
        Mean tokens of a pass, or none for prompts without plans.
    """
    if prompts.plans is None:
        return None
    tokens = passes = 0
    for prompt, plan in zip(prompts.ids, prompts.plans, strict=True):
        lookup = PromptLookup(prompt)
        lookup.extend(plan[:1])
        at = 1  # the first token comes with the prompt
        passes += 1
        while at < len(plan):
            rest = plan[at:]
            kept = 1 + agreeing_tokens(lookup.draft(LOOKUP_TOKENS)[: len(rest) - 1], rest)
            lookup.extend(rest[:kept])
            at, passes = at + kept, passes + 1
        tokens += len(plan)
    return round(tokens / passes, 3)
