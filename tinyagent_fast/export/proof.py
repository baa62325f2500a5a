"""Gather what the gates compare: the trained model's answers, and those of every file made.

Adapter -> merged folder -> f32 file (temporary) -> f16 file -> quantised files: each is held
against the one before it, and each through the very program that will run it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tinyagent_fast.config import EvalConfig
from tinyagent_fast.data.schema import Example
from tinyagent_fast.evaluation.comparison import compare_predictions
from tinyagent_fast.evaluation.report import percent
from tinyagent_fast.evaluation.running import EvaluationResult, evaluate_examples
from tinyagent_fast.export import gates
from tinyagent_fast.export.chat_template import chat_template
from tinyagent_fast.export.conversion import convert_to_gguf
from tinyagent_fast.export.gates import Gate
from tinyagent_fast.export.reference import (
    Answers,
    answers,
    encode,
    next_logprobs,
    reference_model,
    spread_positions,
)
from tinyagent_fast.inference.engines import LlamaCppEngine
from tinyagent_fast.inference.llama_cpp import LlamaCppSettings, LlamaServer, llama_server
from tinyagent_fast.prompts.templates import prompt_messages, render_prompt
from tinyagent_fast.prompts.tokenizers import HARD_STRINGS
from tinyagent_fast.prompts.tokens import EncodedRow

if TYPE_CHECKING:
    from tinyagent_fast.export.preparation import Export

_LOGIT_ROWS = 4
_LOGIT_POSITIONS = 64
_SLOTS = 4


@dataclass(frozen=True, kw_only=True)
class _Witness:
    """What the merged model says, by transformers in fp32."""

    examples: Sequence[Example]
    rows: Sequence[EncodedRow]
    merged: Answers
    positions: Sequence[tuple[int, int]]
    logprobs_PV: Any


def prove(export: Export, work: Path, f16: Path | None) -> list[Gate]:
    """Run all gates, in the order in which mistakes can arise.

    Args:
        export: The export, with its files made.
        work: Folder for the temporary f32 file.
        f16: The f16 file; none if no GGUF was asked for.

    Returns:
        Every gate, passed or not.
    """
    examples = list(export.validation[: export.settings.gate_prompts])
    rows = encode(export.tokenizer, examples)
    gates_made, witness = _merged_gates(export, examples, rows)
    _announce(export, gates_made)
    if f16 is not None:
        f32 = work / "f32.gguf"
        _convert_f32(export, f32)
        for step in (_f32_gates, _file_gates):
            made = step(export, f32 if step is _f32_gates else f16, witness)
            _announce(export, made)
            gates_made += made
        f32.unlink()
        made = _quant_gates(export, f16, witness)
        gates_made += made
    return gates_made


def _announce(export: Export, made: Sequence[Gate]) -> None:
    for gate in made:
        export.display.say(gate.sentence())


def _merged_gates(
    export: Export, examples: Sequence[Example], rows: Sequence[EncodedRow]
) -> tuple[list[Gate], _Witness]:
    merged = next(a for a in export.record.artefacts if a.kind == "merged")
    details = merged.details
    found = [
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
    positions = spread_positions(rows[:_LOGIT_ROWS], _LOGIT_POSITIONS)
    base = str(export.base)
    with reference_model(export.config, base, export.adapter) as loaded:
        adapter = _answers(export, loaded, rows, "plans of the adapter")
    with reference_model(export.config, str(export.merged), None) as loaded:
        answer = _answers(export, loaded, rows, "plans of the merged model")
        logprobs_PV = next_logprobs(loaded, rows[:_LOGIT_ROWS], positions)
    dtype = _coarsest(details["dtype"])
    found.append(
        gates.same_answers(
            "merged model = adapter on its base",
            dtype,
            (adapter.loss, answer.loss),
            (adapter.plans, answer.plans),
        )
    )
    if export.config.model.weights == "nf4":
        found.append(_four_bit_figures(export, rows, answer))
    witness = _Witness(
        examples=examples,
        rows=rows,
        merged=answer,
        positions=positions,
        logprobs_PV=logprobs_PV,
    )
    return found, witness


def _answers(export: Export, loaded: Any, rows: Sequence[EncodedRow], label: str) -> Answers:
    settings = export.config.eval
    with export.display.bar(label, "plans") as update:
        return answers(
            loaded,
            rows,
            batch=min(settings.batch, len(rows)),
            max_new_tokens=settings.max_new_tokens,
            on_progress=update,
        )


def _coarsest(dtypes: str) -> str:
    return next(name for name in ("BF16", "F16", "F32") if name.lower() in dtypes.split(", "))


def _four_bit_figures(export: Export, rows: Sequence[EncodedRow], merged: Answers) -> Gate:
    """Say how far the 4-bit base, on which the adapter was trained, is from the merged model."""
    with reference_model(export.config, str(export.base), export.adapter, weights="nf4") as loaded:
        trained = _answers(export, loaded, rows, "plans on the 4-bit base")
    measured = gates.same_answers(
        "merged model beside the 4-bit base it was trained on",
        "F32",
        (trained.loss, merged.loss),
        (trained.plans, merged.plans),
    )
    return replace(measured, passed=True, rule="none: the two differ by design; for your eyes")


def _convert_f32(export: Export, path: Path) -> None:
    tokenizer = export.tokenizer
    with export.display.bar("converting to f32 for comparison", "bytes") as update:
        convert_to_gguf(
            export.merged,
            path,
            quant="f32",
            name=export.stem,
            chat_template=chat_template(
                tokenizer.prompt_format, tokenizer.hf.chat_template, bos=False
            ),
            extra={},
            on_progress=update,
        )


def _server_settings(export: Export, model: Path, **changes: Any) -> LlamaCppSettings:
    longest = export.config.model.max_length_tokens + export.config.eval.max_new_tokens
    plain = LlamaCppSettings(
        model=model,
        slots=_SLOTS,
        context_tokens_per_slot=longest,
        threads=export.settings.threads,
    )
    return replace(plain, **changes)


def _f32_gates(export: Export, f32: Path, witness: _Witness) -> list[Gate]:
    """Compare the f32 file with an f32 KV cache, which hides no mistake of the conversion."""
    with llama_server(_server_settings(export, f32, slots=1, cache_type="f32")) as server:
        found = _distributions(export, server, witness, "distributions of the f32 file")
    return [gates.same_logits("f32 GGUF = merged model, every logit", found)]


def _distributions(
    export: Export, server: LlamaServer, witness: _Witness, label: str
) -> gates.DistributionDifference:
    got = []
    with export.display.bar(label, "positions") as update:
        for done, (index, spot) in enumerate(witness.positions, start=1):
            got.append(server.next_logprobs(witness.rows[index].input_ids[: spot + 1]))
            update(done, len(witness.positions))
    return gates.distribution_difference(witness.logprobs_PV, np.stack(got))


def _file_gates(export: Export, f16: Path, witness: _Witness) -> list[Gate]:
    """Compare the f16 file as it ships: tokenizer, template, distributions."""
    tokenizer = export.tokenizer
    chat = tokenizer.chat if tokenizer.prompt_format == "chat" else None
    prompts = [
        render_prompt(e.system, e.user, tokenizer.prompt_format, chat) for e in witness.examples
    ]
    special = tokenizer.prompt_format == "chat"
    with llama_server(_server_settings(export, f16, slots=1)) as server:
        hard = [(t, tokenizer.encode_text(t), server.tokenize(t)) for t in HARD_STRINGS]
        ids = [
            (text, wanted, server.tokenize(text, special=special, bos=True))
            for text, wanted in zip(prompts, tokenizer.encode_prompts(prompts), strict=True)
        ]
        rendered = [
            server.apply_template(prompt_messages(e.system, e.user)) for e in witness.examples
        ]
        found = _distributions(export, server, witness, "distributions of the f16 file")
    return [
        gates.same_ids("ids of hard strings", hard, None),
        gates.same_ids("ids of prompts", ids, tokenizer.bos_id),
        gates.same_texts("prompt template in the file", list(zip(prompts, rendered, strict=True))),
        gates.near_logits("f16 GGUF, distributions", found),
    ]


@dataclass(frozen=True)
class _Measured:
    """What one GGUF file does on validation prompts."""

    result: EvaluationResult
    difference: gates.DistributionDifference
    """From the merged model's distributions."""

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


def _quant_gates(export: Export, f16: Path, witness: _Witness) -> list[Gate]:
    """Measure plan success of every file on the same prompts, f16 being the reference."""
    examples = list(export.validation[: export.settings.quant_prompts])
    reference = _measure(export, f16, examples, witness, "f16")
    texts = {p.key: p.prediction for p in reference.result.predictions}
    made = [
        gates.same_answers(
            "greedy plans of the f16 GGUF = merged model",
            "F16",
            (witness.merged.loss, witness.merged.loss),
            (witness.merged.plans, tuple(texts[e.key] for e in witness.examples)),
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
        paired = compare_predictions(
            reference.result.predictions, file.result.predictions, export.tools
        )
        gate = gates.no_great_loss(
            gates.success_gate(spec.name), paired, export.settings.max_loss_points
        )
        _announce(export, [gate])
        made.append(gate)
    export.record.update(success_on_validation=measured)
    return made


def _measure(
    export: Export, model: Path, examples: Sequence[Example], witness: _Witness, name: str
) -> _Measured:
    settings: EvalConfig = replace(export.config.eval, batch=_SLOTS, parity_prompts=0)
    digest = next(
        (a.sha256 for a in export.record.artefacts if export.folder / a.path == model), None
    )
    with llama_server(_server_settings(export, model)) as server:
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
    return _Measured(result, difference)
