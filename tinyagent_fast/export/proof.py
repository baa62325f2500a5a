"""Gather what the gates compare: the trained model's answers, and those of every file made.

Adapter -> merged folder -> f32 file (temporary) -> f16 file -> quantised files: each is held
against the one before it, and each through the very program that will run it. The models answer
through transformers in fp32.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tinyagent_fast.config import Config, EvalConfig, Weights
from tinyagent_fast.data.schema import Example
from tinyagent_fast.evaluation.comparison import compare_plans
from tinyagent_fast.evaluation.report import percent
from tinyagent_fast.evaluation.running import EvaluationResult, evaluate_examples
from tinyagent_fast.export import gates
from tinyagent_fast.export.gates import DistributionDifference, Gate
from tinyagent_fast.export.settings import QuantSpec
from tinyagent_fast.inference.llama_cpp import LlamaCppEngine, LlamaCppSettings, LlamaServer
from tinyagent_fast.inference.torch_engine import TorchEngine, generating
from tinyagent_fast.models.loading import LoadedModel, load_for_generation
from tinyagent_fast.plans.grammar import END_OF_PLAN
from tinyagent_fast.prompts.templates import prompt_messages, render, render_prompt
from tinyagent_fast.prompts.tokenizers import HARD_STRINGS
from tinyagent_fast.prompts.tokens import IGNORED, EncodedRow, PromptTokenizer

if TYPE_CHECKING:
    from tinyagent_fast.export.preparation import Export

_LOGIT_ROWS = 4
_LOGIT_POSITIONS = 64
_SLOTS = 4

NextLogprobs = Callable[[Sequence[int]], NDArray[np.float32]]
"""Gives the log-probabilities of all tokens after some ids."""


def prove(
    export: Export, work: Path, f16: Path | None, convert: Callable[[Path, QuantSpec], object]
) -> list[Gate]:
    """Run all gates, in the order in which mistakes can arise.

    Args:
        export: The export, with its files made.
        work: Folder for the temporary f32 file.
        f16: The f16 file; None if no GGUF was asked for.
        convert: Converts the merged folder to a file.

    Returns:
        Every gate, passed or not.
    """
    made, witness = merged_gates(export)
    if f16 is not None:
        f32 = work / "f32.gguf"
        convert(f32, QuantSpec("f32", "f32", False))
        made += f32_gates(export, f32, witness)
        f32.unlink()
        made += file_gates(export, f16, witness)
        made += quant_gates(export, f16, witness)
    return made


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
    """Compare the merged folder with the adapter on its base.

    Args:
        export: The export, merged.

    Returns:
        The gates, and what the merged model says.
    """
    examples = list(export.validation[: export.settings.gate_prompts])
    rows = encode(export.tokenizer, examples)
    details = next(a for a in export.record.artefacts if a.kind == "merged").details
    made = [
        Gate(
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
    ]
    with reference_model(export.config, str(export.base), export.adapter) as loaded:
        adapter = _ask(export, loaded, examples, rows, "plans of the adapter")
    with reference_model(export.config, str(export.merged), None) as loaded:
        merged = _ask(export, loaded, examples, rows, "plans of the merged model")
        noise = gates.distribution_difference(adapter.logprobs_PV, merged.logprobs_PV).max_abs
        different = gates.different_plans(adapter.plans, merged.plans)

        def after(ids: Sequence[int]) -> NDArray[np.float32]:
            last: NDArray[np.float32] = next_logprobs(loaded, ids, [len(ids) - 1])[0]
            return last

        gaps = _gaps(export.tokenizer, adapter, merged.plans, different, after)
    made.append(
        gates.same_answers(
            "merged model = adapter on its base",
            _coarsest(details["dtype"]),
            (adapter.loss, merged.loss),
            len(rows),
            gaps,
            noise,
        )
    )
    if export.config.model.weights == "nf4":
        made.append(_four_bit_figures(export, merged))
    _announce(export, made)
    return made, merged


def _announce(export: Export, made: Sequence[Gate]) -> None:
    for gate in made:
        export.display.say(gate.sentence())


def encode(tokenizer: PromptTokenizer, examples: Sequence[Example]) -> list[EncodedRow]:
    """Encode examples as training does.

    Args:
        tokenizer: Of the run.
        examples: Plans.

    Returns:
        Their rows.
    """
    chat = tokenizer.chat if tokenizer.prompt_format == "chat" else None
    return tokenizer.encode_rows(
        [(e.key, render(e, tokenizer.prompt_format, chat)) for e in examples]
    )


@contextmanager
def reference_model(
    config: Config, base: str, adapter: Path | None, *, weights: Weights = "fp32"
) -> Iterator[LoadedModel]:
    """Load a model for comparison and free it afterwards.

    Args:
        config: The run's config.
        base: Folder of the base or of the merged model.
        adapter: Put on it, or None.
        weights: `fp32`, or what the run was trained on.

    Yields:
        The model, by plain transformers.
    """
    import torch

    model = replace(config.model, backend="transformers", weights=weights, base=base)
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
    positions = spread_positions(rows[:_LOGIT_ROWS], _LOGIT_POSITIONS)
    measured = []
    for index, row in enumerate(rows[:_LOGIT_ROWS]):
        spots = [spot for at, spot in positions if at == index]
        measured.append(next_logprobs(loaded, row.input_ids, spots))
    plans = [""] * len(rows)
    completions = TorchEngine(loaded).complete_tokens(
        [row.input_ids[: row.prompt_tokens] for row in rows],
        stop=END_OF_PLAN,
        max_new_tokens=settings.max_new_tokens,
        batch=min(settings.batch, len(rows)),
    )
    with export.display.bar(label, "plans") as update:
        for done, (index, completion) in enumerate(completions, start=1):
            plans[index] = completion.text
            update(done, len(rows))
    return Witness(
        examples=examples,
        rows=rows,
        loss=mean_loss(loaded, rows),
        plans=plans,
        positions=positions,
        logprobs_PV=np.concatenate(measured),
    )


def mean_loss(loaded: LoadedModel, rows: Sequence[EncodedRow]) -> float:
    """Measure the loss of rows.

    Args:
        loaded: The model.
        rows: With labels.

    Returns:
        Nats per supervised token.
    """
    total, tokens = 0.0, 0
    for row in rows:
        spots = [at for at, label in enumerate(row.labels[1:]) if label != IGNORED]
        logprobs_NV = next_logprobs(loaded, row.input_ids, spots)
        total -= sum(float(logprobs_NV[n, row.labels[at + 1]]) for n, at in enumerate(spots))
        tokens += len(spots)
    return total / tokens


def next_logprobs(
    loaded: LoadedModel, ids: Sequence[int], positions: Sequence[int]
) -> NDArray[np.float32]:
    """Give the distributions of the next token at positions of a row.

    Args:
        loaded: The model.
        ids: Token ids.
        positions: Each position's token is the last one that is read.

    Returns:
        Natural log-probabilities, positions x vocabulary.
    """
    import torch

    with generating(loaded):
        ids_1T = torch.tensor([ids[: max(positions) + 1]], device=loaded.device)
        # The logits of all positions would not fit into memory.
        keep_N = torch.tensor(positions, device=loaded.device)
        output = loaded.model(input_ids=ids_1T, use_cache=False, logits_to_keep=keep_N)
        logprobs_NV = torch.log_softmax(output.logits[0].float(), dim=-1)
    found: NDArray[np.float32] = logprobs_NV.cpu().numpy()
    return found


def spread_positions(rows: Sequence[EncodedRow], count: int) -> list[tuple[int, int]]:
    """Choose positions at which distributions are compared: all over the rows, ends included.

    Args:
        rows: Encoded rows; mistakes of RoPE show only far from their beginnings.
        count: How many positions in all.

    Returns:
        Pairs of row and position; the position's token is the last one read.
    """
    each = max(2, count // len(rows))
    chosen = []
    for index, row in enumerate(rows):
        last = len(row.input_ids) - 2
        # Half of them in the completion, which is what the model was trained to write.
        first = row.prompt_tokens - 1
        spots = {round(first * k / (each - each // 2)) for k in range(each - each // 2)}
        spots |= {first + round((last - first) * k / (each // 2)) for k in range(each // 2)}
        chosen += [(index, spot) for spot in sorted(spots)]
    return chosen


def _gaps(
    tokenizer: PromptTokenizer,
    witness: Witness,
    plans: Sequence[str],
    different: Sequence[int],
    next_logprobs: NextLogprobs,
) -> list[float]:
    """Measure how near the two tokens are at which a plan parts from the witness's.

    Args:
        tokenizer: Of the run.
        witness: What one model says.
        plans: The other model's plans.
        different: Indices of the plans that differ.
        next_logprobs: Asks the other model.

    Returns:
        A gap in log-probability for each plan that differs.
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


def _coarsest(dtypes: str) -> str:
    return next(name for name in ("BF16", "F16", "F32") if name.lower() in dtypes.split(", "))


def _four_bit_figures(export: Export, merged: Witness) -> Gate:
    """Say how far the 4-bit base, on which the adapter was trained, is from the merged model."""
    with reference_model(export.config, str(export.base), export.adapter, weights="nf4") as loaded:
        trained = _ask(export, loaded, merged.examples, merged.rows, "plans on the 4-bit base")
    different = gates.different_plans(trained.plans, merged.plans)
    measured = gates.same_answers(
        "merged model beside the 4-bit base it was trained on",
        "F32",
        (trained.loss, merged.loss),
        len(merged.rows),
        [float("inf")] * len(different),
        0.0,
    )
    figures = {k: v for k, v in measured.figures.items() if k in ("loss", "same plans")}
    rule = "none: the two differ by design; for your eyes"
    return replace(measured, passed=True, rule=rule, figures=figures)


# What the files say, in llama.cpp.


def _server_settings(export: Export, model: Path, **changes: Any) -> LlamaCppSettings:
    longest = export.config.model.max_length_tokens + export.config.eval.max_new_tokens
    plain = LlamaCppSettings(
        model=model,
        slots=_SLOTS,
        context_tokens_per_slot=longest,
        threads=export.settings.threads,
    )
    return replace(plain, **changes)


def _distributions(
    export: Export, server: LlamaServer, witness: Witness, label: str
) -> DistributionDifference:
    got = []
    with export.display.bar(label, "positions") as update:
        for done, (index, spot) in enumerate(witness.positions, start=1):
            got.append(server.next_logprobs(witness.rows[index].input_ids[: spot + 1]))
            update(done, len(witness.positions))
    return gates.distribution_difference(witness.logprobs_PV, np.stack(got))


def f32_gates(export: Export, f32: Path, witness: Witness) -> list[Gate]:
    """Compare the f32 file with an f32 KV cache, which hides no mistake of the conversion.

    Args:
        export: The export.
        f32: The file.
        witness: What the merged model says.

    Returns:
        The gate.
    """
    with LlamaServer(_server_settings(export, f32, slots=1, cache_type="f32")) as server:
        found = _distributions(export, server, witness, "distributions of the f32 file")
    made = [gates.same_logits("f32 GGUF = merged model, every logit", found)]
    _announce(export, made)
    return made


def file_gates(export: Export, f16: Path, witness: Witness) -> list[Gate]:
    """Compare the f16 file as it ships: tokenizer, template, distributions.

    Args:
        export: The export.
        f16: The file.
        witness: What the merged model says.

    Returns:
        The gates.
    """
    tokenizer = export.tokenizer
    special = tokenizer.prompt_format == "chat"
    chat = tokenizer.chat if special else None
    prompts = [
        render_prompt(e.system, e.user, tokenizer.prompt_format, chat) for e in witness.examples
    ]
    with LlamaServer(_server_settings(export, f16, slots=1)) as server:
        hard = [(t, tokenizer.encode_text(t), server.tokenize(t)) for t in HARD_STRINGS]
        ids = [
            (text, wanted, server.tokenize(text, special=special, bos=True))
            for text, wanted in zip(prompts, tokenizer.encode_prompts(prompts), strict=True)
        ]
        rendered = [
            server.apply_template(prompt_messages(e.system, e.user)) for e in witness.examples
        ]
        found = _distributions(export, server, witness, "distributions of the f16 file")
    made = [
        gates.same_ids("ids of hard strings", hard, None),
        gates.same_ids("ids of prompts", ids, tokenizer.bos_id),
        gates.same_texts("prompt template in the file", list(zip(prompts, rendered, strict=True))),
        gates.near_logits("f16 GGUF, distributions", found),
    ]
    _announce(export, made)
    return made


@dataclass(frozen=True)
class _Measured:
    """What one GGUF file does on validation prompts."""

    result: EvaluationResult
    difference: DistributionDifference
    """From the merged model's distributions."""
    gaps: Sequence[float]
    """Of the plans that differ from the witness's, as `same_answers` judges them."""

    def figures(self) -> Mapping[str, Any]:
        """Give plain values for export.json and the report."""
        success = self.result.metrics.success
        return {
            **success.to_json(),
            "text": percent(success),
            "top1_as_merged": round(self.difference.top1, 4),
            "mean_kl_nats": float(f"{self.difference.mean_kl:.3g}"),
            "seconds": round(self.result.seconds, 1),
        }


def quant_gates(export: Export, f16: Path, witness: Witness) -> list[Gate]:
    """Measure plan success of every file on the same prompts, f16 being the reference.

    Args:
        export: The export.
        f16: The f16 file.
        witness: What the merged model says.

    Returns:
        The gates; the record gets the figures.
    """
    examples = list(export.validation[: export.settings.quant_prompts])
    reference = _measure(export, f16, examples, witness, "f16")
    made = [
        gates.same_answers(
            "greedy plans of the f16 GGUF = merged model",
            "F16",
            (witness.loss, witness.loss),
            len(witness.rows),
            reference.gaps,
            reference.difference.max_abs,
        )
    ]
    _announce(export, made)
    measured = {"f16": reference.figures()}
    for spec in export.specs:
        if spec.quant == "f16":
            continue
        path = export.folder / export.gguf_path(spec)
        file = _measure(export, path, examples, witness, spec.name)
        measured[spec.name] = file.figures()
        paired = compare_plans(reference.result.plans, file.result.plans)
        name = gates.success_gate(spec.name)
        made.append(gates.no_great_loss(name, paired, export.settings.max_loss_points))
        _announce(export, made[-1:])
    export.record.update(success_on_validation=measured)
    return made


def _measure(
    export: Export, model: Path, examples: Sequence[Example], witness: Witness, name: str
) -> _Measured:
    settings: EvalConfig = replace(export.config.eval, batch=_SLOTS, parity_prompts=0)
    digest = next(
        (a.sha256 for a in export.record.artefacts if export.folder / a.path == model), None
    )
    with LlamaServer(_server_settings(export, model)) as server:
        difference = _distributions(export, server, witness, f"distributions of {name}")
        with export.display.bar(f"plans of {name}", "plans") as update:
            result = evaluate_examples(
                LlamaCppEngine(server, tokenizer=export.tokenizer),
                examples,
                settings,
                export.folder / "proof" / name,
                made_with={
                    "model_sha256": digest or time.time(),
                    "keys": [e.key for e in examples],
                },
                tools=export.tools,
                title=f"{name} on validation prompts",
                on_progress=update,
            )
        texts = {p.key: p.prediction for p in result.predictions}
        plans = [texts[e.key] for e in witness.examples]
        different = gates.different_plans(witness.plans, plans)
        # Of quantised files it is the success that counts.
        wanted = different if name == "f16" else []
        gaps = _gaps(export.tokenizer, witness, plans, wanted, server.next_logprobs)
    return _Measured(result, difference, gaps)
