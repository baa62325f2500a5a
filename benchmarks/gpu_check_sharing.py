"""What `gpu_check` measures of evaluation where prompts begin alike: shared once, and guessed."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Any

from bench_inputs import shared_share
from gpu_check_decoding import same_prefixes
from gpu_check_parts import memory, synchronize
from gpu_check_worker import Bench, Part, release

from tinyagent_fast.plans.grammar import END_OF_PLAN
from tinyagent_fast.prompts.tokens import IGNORED

_WARM_UP_TOKENS = 4
_TEXTS = "generate_alike.json"


def generate_alike(bench: Bench, item: Mapping[str, Any]) -> dict[str, Any]:
    """Time the plans of whole training prompts, which share their beginning, as evaluation does.

    The first row leaves its texts in the work folder; the others compare theirs with them.
    """
    from tinyagent_fast.inference.decoding import complete, decoding_path, generating

    loaded, how = bench.loaded(item["model"]), dict(item["arguments"])
    scale = bench.scale
    release(bench.cuda)
    prompts = whole_prompts(bench.rows(), scale.prompts)
    batch = scale.batches[0]

    def write(chosen: list[list[int]], new_tokens: int) -> dict[int, str]:
        batches = complete(
            loaded.model,
            loaded.tokenizer,
            chosen,
            batch=batch,
            max_new_tokens=new_tokens,
            stop=END_OF_PLAN,
            backend=loaded.backend,
            **how,
        )
        return {index: completion.text for pairs in batches for index, completion in pairs}

    with generating(loaded.model, loaded.backend):
        write(prompts[:batch], _WARM_UP_TOKENS)
        release(bench.cuda)
        synchronize(bench)
        started = time.perf_counter()
        texts = write(prompts, scale.new_tokens)
        synchronize(bench)
        seconds = time.perf_counter() - started
    path = decoding_path(loaded.model, loaded.backend) if how["shared_prefix"] else "left padding"
    return {
        "prompts": len(prompts),
        "mean_tokens": round(sum(map(len, prompts)) / len(prompts), 1),
        "shared_share": round(shared_share(prompts), 4),
        "batch": batch,
        "new_tokens": scale.new_tokens,
        "path": path,
        "plans_per_s": round(len(prompts) / seconds, 4),
        "agreement_with_the_first": _compared(bench, texts),
        **memory(bench),
    }


def whole_prompts(rows: Any, count: int) -> list[list[int]]:
    """Give the prompts of encoded rows: what stands before the first supervised token.

    Args:
        rows: The encoded rows.
        count: How many.

    Returns:
        Token ids of each.
    """
    prompts = []
    for index in range(min(count, len(rows))):
        row = rows[index]
        end = next(at for at, label in enumerate(row["labels"]) if label != IGNORED)
        prompts.append(list(row["input_ids"][:end]))
    return prompts


def _compared(bench: Bench, texts: dict[int, str]) -> dict[str, float | int] | None:
    """Compare texts with those of the first row, or keep them if this is it."""
    path = bench.work / _TEXTS
    if path.exists():
        kept = json.loads(path.read_text(encoding="utf-8"))
        return same_prefixes({int(index): text for index, text in kept.items()}, texts)
    path.write_text(json.dumps(texts), encoding="utf-8")
    return None


PARTS: Mapping[str, Part] = {"generate_alike": generate_alike}
"""Every function by the kind that a measurement names."""
