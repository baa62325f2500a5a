"""The files beside the weights, from the templates in `templates/`: for people and for programs.

A Modelfile for Ollama, a command line for llama-server, the grammar of plans, the keys of the
TinyAgent app, a README that says which prompt the model expects, a report and a model card.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import ModelCardData

from tinyagent_fast.config import Config, PromptFormat, dump_config
from tinyagent_fast.data.splits import mixture_text
from tinyagent_fast.export.gates import SUCCESS_OF, Gate
from tinyagent_fast.export.record import Artefact
from tinyagent_fast.export.settings import QUANTS, QuantSpec
from tinyagent_fast.plans.gbnf import MAX_TEXT_UNITS, NO_CHARACTERS, plan_grammar
from tinyagent_fast.plans.grammar import END_OF_PLAN
from tinyagent_fast.plans.tools import TINYAGENT, Tool
from tinyagent_fast.prompts.templates import render_prompt
from tinyagent_fast.runs import Run, read_json, write_text
from tinyagent_fast.training.best import Best
from tinyagent_fast.version import __version__

CARD = "MODEL_CARD.md"
"""Publishing sends it along as the repository's README."""

MERGED = "merged"
"""The folder of the merged model in an export's folder."""

ADAPTER_CARD = "README.md"
"""In an adapter's folder."""

_CONTEXT_TOKENS = 8192
_PORT = 50002
_EXCERPT_CHARS = 300


def write_companions(
    folder: Path,
    *,
    name: str,
    files: Sequence[Artefact],
    gates: Sequence[Gate],
    prompt_format: PromptFormat,
    tools: Mapping[str, Tool] | None,
    example_prompt: str,
) -> list[Path]:
    """Write what other programs need to serve the model as it was trained.

    Args:
        folder: The export's folder, to which all paths are relative.
        name: Under which servers offer the model.
        files: The GGUF files, of which the best one is served.
        gates: What was proved of them.
        prompt_format: Without a Modelfile if it is `chat`: Ollama has templates of another
            language, and the base's own cannot be translated.
        tools: Tools of the grammar; None stands for TinyAgent's own.
        example_prompt: One rendered prompt, without BOS.

    Returns:
        The files.
    """
    plain = prompt_format != "chat"
    context = {
        "name": name,
        "gguf_files": [file.path for file in files],
        "recommended_gguf": recommended(files, gates),
        "plans_compared": any(gate.name.startswith(SUCCESS_OF) for gate in gates),
        "prompt_format": prompt_format,
        "example_prompt": example_prompt,
        "stop": END_OF_PLAN,
        "context_tokens": _CONTEXT_TOKENS,
        "port": _PORT,
        "tokenizer_folder": MERGED,
        "both": render_prompt("{system}", "{user}", prompt_format) if plain else None,
        "alone": render_prompt(None, "{user}", prompt_format) if plain else None,
        "ollama_template": go_template(prompt_format) if plain else None,
        # Ollama allows nothing else in a name.
        "ollama_name": re.sub(r"[^A-Za-z0-9_.-]+", "-", name).strip("-._") or "planner",
        "excerpt_chars": _EXCERPT_CHARS,
        "max_text_units": MAX_TEXT_UNITS,
        "no_characters": NO_CHARACTERS,
    }
    # The TinyAgent app takes the length of each value, so all are texts.
    # Source: src/tiny_agent/config.py of github.com/SqueezeAILab/TinyAgent.
    app_keys = {
        "provider": "local",
        "localModelName": name,
        "localPort": str(_PORT),
        "localCtxLen": str(_CONTEXT_TOKENS),
        "localTokenizerNameOrPath": str((folder / MERGED).resolve()),
    }
    texts = {
        "README.md": _render("README.md", context),
        "llama-server.sh": _render("llama-server.sh", context),
        "plan.gbnf": plan_grammar(TINYAGENT if tools is None else tools),
        "Configuration.json": json.dumps(app_keys, indent=2) + "\n",
    }
    if plain:
        texts["Modelfile"] = _render("Modelfile", context)
    for file, text in texts.items():
        write_text(folder / file, text)
    (folder / "llama-server.sh").chmod(0o755)
    return [folder / file for file in texts]


def recommended(files: Sequence[Artefact], gates: Sequence[Gate]) -> str:
    """Choose the GGUF file for users: fewest bits with plans that are not surely worse than f16's.

    Of files with equal bits it is that with more success, and else that with importance matrix.
    """
    figures = {gate.name.removeprefix(SUCCESS_OF): gate.figures for gate in gates}
    failed = {gate.name.removeprefix(SUCCESS_OF) for gate in gates if not gate.passed}

    def is_worse(file: Artefact) -> bool:
        return file.quant in failed or (
            file.quant in figures and figures[file.quant]["interval"][1] < 0
        )

    def order(file: Artefact) -> tuple[int, float, bool]:
        spec = QuantSpec(file.quant)
        success = figures.get(file.quant, {}).get("success", 0.0)
        return -list(QUANTS).index(spec.quant), -success, not spec.importance

    return min([file for file in files if not is_worse(file)] or files, key=order).path


def go_template(prompt_format: PromptFormat) -> str:
    """Write the prompt format in the template language of Ollama.

    Ollama cannot tell an empty system text from none.

    Source: template/template.go of github.com/ollama/ollama (the variables, and that a request's
        system text is an empty string when there is none).
    """
    alone = render_prompt(None, "{{ .Prompt }}", prompt_format)
    both = render_prompt("{{ .System }}", "{{ .Prompt }}", prompt_format)
    return f"{{{{ if .System }}}}{both}{{{{ else }}}}{alone}{{{{ end }}}}{{{{ .Response }}}}"


def export_report(content: Mapping[str, Any]) -> str:
    """Write in Markdown what export.json holds: what was made, what it is worth, and every gate."""
    gates = [Gate(**gate) for gate in content["gates"]]
    success = content.get("success_on_validation", {})
    return _render("report.md", {**content, "gates": gates, "success_on_validation": success})


def model_card(run: Run, config: Config, content: Mapping[str, Any]) -> str:
    """Write what the model is, what it was made from, what was measured, and its limits.

    The run's evaluations are quoted; `content` is what export.json holds.
    """
    config = _config_for_others(config)
    success = content.get("success_on_validation", {})
    ggufs = [a for a in content["artefacts"] if a["kind"] == "gguf"]
    tested = dict(_evaluations_of(run, ggufs))
    data = _read(run.path / "data.json")
    context = {
        **content,
        "base": _for_others(str(content["base"])),
        "header": _header(str(content["base"]), "transformers", "gguf"),
        "config": config,
        "config_text": dump_config(config).strip(),
        "generated": config.data.train is None,
        "mixture": mixture_text(data["generated"]) if "generated" in data else "",
        "unfinished": run.unfinished(),
        "data_sha256": data.get("train_file", {}).get("sha256", "unknown"),
        "data_rows": data.get("examples", {}).get("train", "unknown"),
        "unmeasured": sorted(
            {a["quant"] for a in ggufs} - {*success, *tested},
            key=lambda name: (list(QUANTS).index(QuantSpec(name).quant), name),
        ),
        "measured": [
            *_evaluations(run, str(content["adapter_sha256"])),
            *tested.values(),
            *(
                (f"{name}, {found['total']} validation queries, llama.cpp", found["text"])
                for name, found in success.items()
            ),
        ],
    }
    return _render("MODEL_CARD.md", context)


def adapter_card(run: Run, config: Config, best: Best | None) -> str:
    """Write what an adapter is and how it is loaded; no path of this machine is in it.

    `best` says why it was kept; None if nothing was measured during training.
    """
    base = str(config.model.base)
    context = {
        "header": _header(base, "peft"),
        "run": run.path.name,
        "base": _for_others(base),
        "config": config,
        "best": best,
        "stop": END_OF_PLAN,
        "tinyagent_fast": __version__,
    }
    return _render("ADAPTER_CARD.md", context)


def _for_others(place: str) -> str:
    """Name a file or folder of this machine by its last part, and what is on the hub as it is."""
    path = Path(place).expanduser()
    here = path.is_absolute() or place.startswith(".") or path.exists()
    return (path.resolve().name or "a local folder") if here else place


def _config_for_others(config: Config) -> Config:
    """Give a config without the folders of this machine, as a card is read elsewhere."""
    sections: dict[str, Any] = {}
    for section in fields(config):
        values = getattr(config, section.name)
        if is_dataclass(values) and not isinstance(values, type):
            paths = {
                one.name: type(value)(_for_others(str(value)))
                for one in fields(values)
                if isinstance(value := getattr(values, one.name), str | Path)
                and Path(value).expanduser().is_absolute()
            }
            sections[section.name] = replace(values, **paths)
    return replace(config, **sections)


def _header(base: str, library: str, *tags: str) -> str:
    """Write the YAML that begins a card; a base is named in it only if it is one of the hub's."""
    on_hub = base.count("/") == 1 and not base.startswith((".", "/")) and not Path(base).exists()
    header = ModelCardData(
        library_name=library,
        pipeline_tag="text-generation",
        base_model=base if on_hub else None,
        tags=["planner", "function-calling", "lora", *tags, "tinyagent"],
    )
    return str(header.to_yaml())


def _evaluations(run: Run, adapter_sha256: str) -> list[tuple[str, str]]:
    """Quote the run's own evaluations on test queries, of the adapter the latest."""
    base = _quoted("base model, test queries", run.path / "test" / "before")
    adapter = _quoted("adapter, test queries, after training", run.path / "test" / "after")
    made_with = _read(run.evaluation / "made_with.json")
    if made_with.get("adapter_sha256", adapter_sha256) == adapter_sha256:
        adapter = _quoted("adapter, test queries", run.evaluation) or adapter
    return [found for found in (base, adapter) if found]


def _evaluations_of(
    run: Run, ggufs: Sequence[Mapping[str, Any]]
) -> Iterator[tuple[str, tuple[str, str]]]:
    """Give what `eval --engine gguf` measured of these very files, by their quant."""
    for file in ggufs:
        folder = run.path / f"eval-gguf-{Path(file['path']).stem}"
        if _read(folder / "made_with.json").get("model_sha256") == file["sha256"]:
            found = _quoted(f"{file['quant']}, test queries, llama.cpp", folder)
            if found:
                yield file["quant"], found


def _quoted(what: str, folder: Path) -> tuple[str, str] | None:
    """Give the plan success of one evaluation with its interval; None where there is none."""
    success = _read(folder / "metrics.json").get("success")
    if not success:
        return None
    low, high = success["interval_95"]
    figure = f"{100 * success['share']:.1f} % ({100 * low:.1f} - {100 * high:.1f})"
    return f"{what}, n = {success['total']}", figure


def _read(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}


def _render(name: str, context: Mapping[str, Any]) -> str:
    # Markdown and shell scripts, so nothing is escaped for HTML; `shell` and `python` quote.
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("tinyagent_fast.export"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"shell": shlex.quote, "python": repr}
    return environment.get_template(f"{name}.j2").render(context)
