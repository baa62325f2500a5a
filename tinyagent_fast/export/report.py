"""export.json as text: what was made, what it is worth, and every gate with its figures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tinyagent_fast.export.gates import Gate


def export_report(content: Mapping[str, Any]) -> str:
    """Write the report of an export.

    Args:
        content: What export.json holds.

    Returns:
        Markdown.
    """
    lines = [f"# Export of {content['run']}", "", _verdict(content), ""]
    lines += [
        "| file | type | MiB | made in | bits per weight | success on validation prompts "
        "| top-1 as the merged model | mean KL, nats |",
        "|---|---|---|---|---|---|---|---|",
    ]
    successes = content.get("success_on_validation", {})
    for artefact in content["artefacts"]:
        details = artefact.get("details", {})
        bits = details.get("bits_per_weight")
        success = successes.get(artefact["quant"], {}) if artefact["kind"] == "gguf" else {}
        lines.append(
            f"| {artefact['path']} | {artefact['quant']} | {artefact['size_bytes'] / 2**20:,.1f} "
            f"| {artefact['seconds']:.1f} s | {f'{bits:.2f}' if bits else ''} "
            f"| {success.get('text', 'not measured')} | {_top1(success)} "
            f"| {success.get('mean_kl_nats', '')} |"
        )
    lines += ["", "## Gates", ""]
    gates = [Gate(**gate) for gate in content["gates"]]
    lines += [f"- {gate.sentence()}" for gate in gates] or ["None was run (--gates off)."]
    notes = [
        f"- {artefact['quant']}: {fallback}"
        for artefact in content["artefacts"]
        for fallback in artefact.get("details", {}).get("fallbacks", [])
    ]
    if notes:
        lines += ["", "## Tensors in another type than asked", "", *notes]
    return "\n".join(lines) + "\n"


def _top1(success: Mapping[str, Any]) -> str:
    return f"{100 * success['top1_as_merged']:.1f} %" if success else ""


def _verdict(content: Mapping[str, Any]) -> str:
    passed = content["passed"]
    if passed is None:
        return "Nothing was proved: the gates were switched off."
    failed = [gate["name"] for gate in content["gates"] if not gate["passed"]]
    return (
        "All gates passed." if passed else f"**{len(failed)} gates failed: {', '.join(failed)}.**"
    )
