"""Gather what the gates compare: the trained model's answers, and those of every file made.

Adapter -> merged folder -> f32 file (temporary) -> f16 file -> quantised files: each is held
against the one before it, and each through the very program that will run it. The models answer
through transformers in fp32.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tinyagent_fast.config import Config
from tinyagent_fast.data.schema import Example
from tinyagent_fast.evaluation.comparison import compare_plans
from tinyagent_fast.evaluation.report import percent
from tinyagent_fast.evaluation.running import (
    EvaluationResult,
    EvaluationTask,
    evaluate_examples,
)
from tinyagent_fast.export import gates
from tinyagent_fast.export.gates import DistributionDifference, Gate
from tinyagent_fast.inference.engine import Limits
from tinyagent_fast.inference.llama_cpp import LlamaCppEngine, LlamaCppSettings, LlamaServer
from tinyagent_fast.inference.torch_engine import TorchEngine, generating
from tinyagent_fast.models.families import family_of
from tinyagent_fast.models.loading import LoadedModel, load_for_generation
from tinyagent_fast.plans.grammar import END_OF_PLAN
from tinyagent_fast.prompts.loading import HARD_STRINGS, read_model_json
from tinyagent_fast.prompts.templates import prompt_messages, render_prompt
from tinyagent_fast.prompts.tokens import IGNORED, EncodedRow, PromptTokenizer
from tinyagent_fast.runs import key_of

if TYPE_CHECKING:
    from tinyagent_fast.export.preparation import Export

_LOGIT_ROWS = 4
_LOGIT_POSITIONS = 64
_SLOTS = 4


def prove(export: Export, f32: Path | None, f16: Path | None) -> Iterator[Gate]:
    """Run all gates, in the order in which mistakes can arise; without GGUF files where None."""
    made, witness = merged_gates(export)
    yield from made
    if f32 is not None and f16 is not None:
        yield f32_gate(export, f32, witness)
        yield from file_gates(export, f16, witness)
        yield from quant_gates(export, f16, witness)


# What the merged model says.


@dataclass(frozen=True, kw_only=True)
class Witness:
    """What the merged model says."""

    examples: Sequence[Example]
    rows: Sequence[EncodedRow]
    loss: float
    """Nats per supervised token."""
    plans: Sequence[str]
    positions: Sequence[tuple[int, int]]
    """Pairs of row and position, at which distributions are compared."""
    logprobs_PV: NDArray[np.float32]


def merged_gates(export: Export) -> tuple[list[Gate], Witness]:
    """Compare the merged folder with the adapter on its base; keep what the merged model says."""
    examples = list(export.validation[: export.settings.gate_prompts])
    rows = export.tokenizer.training_rows(examples)
    details = next(a for a in export.record.artefacts if a.kind == "merged").details
    weights = Gate(
        name="merged weights = base + update",
        passed=True,  # merge_adapter stops the export otherwise
        rule="within one rounding on every weight; others bit for bit the base's",
        figures={
            "weights": details["tensors"],
            "adapted": details["adapted"],
            "worst error by allowed": details["worst_error_ulp"],
            "update lost to rounding": details["update_lost"],
        },
    )
    with reference_model(export.config, str(export.base), export.adapter) as loaded:
        adapter = _ask(export, loaded, examples, rows, "plans of the adapter")
    with reference_model(export.config, str(export.merged), None) as loaded:
        merged = _ask(export, loaded, examples, rows, "plans of the merged model")
        different = gates.different_plans(adapter.plans, merged.plans)
        gaps = _gaps(
            export.tokenizer,
            adapter,
            merged.plans,
            different,
            lambda ids: _next_logprobs(loaded, ids, [len(ids) - 1])[0],
        )
    answers = gates.same_answers(
        "merged model = adapter on its base",
        next(one for one in ("BF16", "F16", "F32") if one.lower() in details["dtype"].split(", ")),
        (adapter.loss, merged.loss),
        len(rows),
        gaps,
        gates.distribution_difference(adapter.logprobs_PV, merged.logprobs_PV).max_abs,
    )
    return [weights, answers], merged


@contextmanager
def reference_model(config: Config, base: str, adapter: Path | None) -> Iterator[LoadedModel]:
    """Load a base or merged model by plain transformers, and free it afterwards."""
    import torch

    model = replace(
        config.model, backend="transformers", weights="fp32", cpu_compute="fp32", base=base
    )
    loaded = load_for_generation(replace(config, model=model), base, adapter)
    try:
        yield loaded
    finally:
        del loaded
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _ask(
    export: Export,
    loaded: LoadedModel,
    examples: Sequence[Example],
    rows: Sequence[EncodedRow],
    label: str,
) -> Witness:
    """Measure a model's loss and distributions, and let it complete the prompts greedily."""
    settings = export.config.eval
    compared = rows[:_LOGIT_ROWS]
    spots = [_spread_positions(row, max(2, _LOGIT_POSITIONS // len(compared))) for row in compared]
    measured = [
        _next_logprobs(loaded, row.input_ids, at) for row, at in zip(compared, spots, strict=True)
    ]
    plans = [""] * len(rows)
    limits = Limits(
        stop=END_OF_PLAN,
        max_new_tokens=settings.max_new_tokens,
        batch=min(settings.batch, len(rows)),
    )
    prompts = [row.input_ids[: row.prompt_tokens] for row in rows]
    completions = TorchEngine(loaded).complete_tokens(prompts, limits)
    with export.display.bar(label, "plans") as update:
        for done, (index, completion) in enumerate(completions, start=1):
            plans[index] = completion.text
            update(done, len(rows))
    return Witness(
        examples=examples,
        rows=rows,
        loss=mean_loss(loaded, rows),
        plans=plans,
        positions=[(index, spot) for index, at in enumerate(spots) for spot in at],
        logprobs_PV=np.concatenate(measured),
    )


def mean_loss(loaded: LoadedModel, rows: Sequence[EncodedRow]) -> float:
    """Measure the loss of rows with labels, in nats per supervised token."""
    total, tokens = 0.0, 0
    for row in rows:
        spots = [at for at, label in enumerate(row.labels[1:]) if label != IGNORED]
        logprobs_NV = _next_logprobs(loaded, row.input_ids, spots)
        total -= sum(float(logprobs_NV[n, row.labels[at + 1]]) for n, at in enumerate(spots))
        tokens += len(spots)
    return total / tokens


def _next_logprobs(
    loaded: LoadedModel, ids: Sequence[int], positions: Sequence[int]
) -> NDArray[np.float32]:
    """Give the log-probabilities of all tokens behind some positions: positions x vocabulary."""
    import torch

    with generating(loaded):
        ids_1T = torch.tensor([ids[: max(positions) + 1]], device=loaded.device)
        # The logits of all positions would not fit into memory.
        keep_N = torch.tensor(positions, device=loaded.device)
        output = loaded.model(input_ids=ids_1T, use_cache=False, logits_to_keep=keep_N)
        logprobs_NV = torch.log_softmax(output.logits[0].float(), dim=-1)
    found: NDArray[np.float32] = logprobs_NV.cpu().numpy()
    return found


def _spread_positions(row: EncodedRow, count: int) -> list[int]:
    """Choose positions all over a row: mistakes of RoPE show only far from its beginning.

    Half of them are in the completion, which is what the model was trained to write. The token at
    a position is the last one that is read.
    """
    last, first = len(row.input_ids) - 2, row.prompt_tokens - 1
    before, behind = count - count // 2, count // 2
    spots = {round(first * k / before) for k in range(before)}
    return sorted(spots | {first + round((last - first) * k / behind) for k in range(behind)})


def _gaps(
    tokenizer: PromptTokenizer,
    witness: Witness,
    plans: Sequence[str],
    different: Sequence[int],
    next_logprobs: Callable[[Sequence[int]], NDArray[np.float32]],
) -> list[float]:
    """Measure how near the two tokens are at which another model's plans part from the witness's.

    Gives a gap in the other model's log-probability for each index of a plan that differs.
    """
    gaps = []
    for at in different:
        row = witness.rows[at]
        one, other = (
            tokenizer.encode_continuation(text + END_OF_PLAN)
            for text in (witness.plans[at], plans[at])
        )
        parts = next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), None)
        if parts is None:
            gaps.append(float("inf"))
            continue
        logprobs_V = next_logprobs([*row.input_ids[: row.prompt_tokens], *one[:parts]])
        gaps.append(abs(float(logprobs_V[one[parts]] - logprobs_V[other[parts]])))
    return gaps


# What the files say, in llama.cpp.


def _server(export: Export, model: Path, **changes: Any) -> LlamaServer:
    longest = export.config.model.max_length_tokens + export.config.eval.max_new_tokens
    plain = LlamaCppSettings(
        model=model,
        slots=_SLOTS,
        context_tokens_per_slot=longest,
        threads=export.settings.threads,
    )
    return LlamaServer(replace(plain, **changes))


def _distributions(
    export: Export, server: LlamaServer, witness: Witness, label: str
) -> DistributionDifference:
    got = []
    with export.display.bar(label, "positions") as update:
        for done, (index, spot) in enumerate(witness.positions, start=1):
            got.append(server.next_logprobs(witness.rows[index].input_ids[: spot + 1]))
            update(done, len(witness.positions))
    return gates.distribution_difference(witness.logprobs_PV, np.stack(got))


def f32_gate(export: Export, f32: Path, witness: Witness) -> Gate:
    """Compare the f32 file with an f32 KV cache, which hides no mistake of the conversion."""
    with _server(export, f32, slots=1, cache_type="f32") as server:
        found = _distributions(export, server, witness, "distributions of the f32 file")
    config = read_model_json(export.merged / "config.json")
    return gates.same_logits(found, family_of(config).logit_noise)


def file_gates(export: Export, f16: Path, witness: Witness) -> list[Gate]:
    """Compare the f16 file as it ships: tokenizer, template, distributions."""
    tokenizer, examples = export.tokenizer, witness.examples
    prompts = [
        render_prompt(e.system, e.user, tokenizer.prompt_format, tokenizer.chat) for e in examples
    ]
    special = tokenizer.prompt_format == "chat"
    with _server(export, f16, slots=1) as server:
        hard = [(t, tokenizer.encode_text(t), server.tokenize(t)) for t in HARD_STRINGS]
        ids = [
            (text, wanted, server.tokenize(text, special=special, bos=True))
            for text, wanted in zip(prompts, tokenizer.encode_prompts(prompts), strict=True)
        ]
        rendered = [server.apply_template(prompt_messages(e.system, e.user)) for e in examples]
        found = _distributions(export, server, witness, "distributions of the f16 file")
    return [
        gates.same_ids("ids of hard strings", hard, None),
        gates.same_ids("ids of prompts", ids, tokenizer.bos_id, begins_turns=special),
        gates.same_texts("prompt template in the file", list(zip(prompts, rendered, strict=True))),
        gates.near_logits(found),
    ]


def quant_gates(export: Export, f16: Path, witness: Witness) -> Iterator[Gate]:
    """Measure plan success of every file on the same prompts; the record gets the figures.

    The f16 file must write the witness's plans, and the others are compared with it.
    """
    measured = {}
    with _measured(export, f16, witness, "f16") as (reference, found, server):
        measured["f16"] = _figures(reference, found)
        texts = {p.key: p.prediction for p in reference.predictions}
        plans = [texts[e.key] for e in witness.examples]
        different = gates.different_plans(witness.plans, plans)
        gaps = _gaps(export.tokenizer, witness, plans, different, server.next_logprobs)
    yield gates.same_answers(
        "greedy plans of the f16 GGUF = merged model",
        "F16",
        (witness.loss, witness.loss),
        len(witness.rows),
        gaps,
        found.max_abs,
    )
    for spec in export.specs:
        if spec.quant == "f16":
            continue
        path = export.folder / export.gguf_path(spec)
        with _measured(export, path, witness, spec.name) as (file, found, _):
            measured[spec.name] = _figures(file, found)
        paired = compare_plans(reference.plans, file.plans)
        yield gates.no_great_loss(spec.name, paired, export.settings.max_loss_points)
    export.record.update(success_on_validation=measured)


@contextmanager
def _measured(
    export: Export, model: Path, witness: Witness, name: str
) -> Iterator[tuple[EvaluationResult, DistributionDifference, LlamaServer]]:
    """Evaluate a file and compare its distributions; its server stays until the end."""
    examples = export.validation[: export.settings.quant_prompts]
    with _server(export, model) as server:
        found = _distributions(export, server, witness, f"distributions of {name}")
        with export.display.bar(f"plans of {name}", "plans") as update:
            task = EvaluationTask(
                examples=examples,
                settings=replace(export.config.eval, batch=_SLOTS, parity_prompts=0),
                made_with={"examples": key_of([[e.key, e.system, e.user] for e in examples])},
                tools=export.tools,
                title=f"{name} on validation prompts",
            )
            engine = LlamaCppEngine(server, tokenizer=export.tokenizer)
            folder = export.folder / "proof" / name
            result = evaluate_examples(engine, task, folder, on_progress=update)
        yield result, found, server


def _figures(result: EvaluationResult, found: DistributionDifference) -> dict[str, Any]:
    """Give plain values for export.json and the report."""
    success = result.metrics.success
    return {
        **success.to_json(),
        "text": percent(success),
        "top1_as_merged": round(found.top1, 4),
        "mean_kl_nats": float(f"{found.mean_kl:.3g}"),
        "seconds": round(result.seconds, 1),
    }
