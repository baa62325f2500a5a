"""The files beside a GGUF that let other programs serve it as it was trained.

Last step of the export: a Modelfile for Ollama, a command line for llama-server, the grammar of
plans, the keys of the TinyAgent app, and a README that says which prompt the model expects.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tinyagent_fast.plans.gbnf import MAX_TEXT_UNITS, plan_grammar
from tinyagent_fast.plans.tools import TINYAGENT, Tool
from tinyagent_fast.prompts.templates import PromptFormat, render_prompt
from tinyagent_fast.runs import write_text

_EXCERPT_CHARS = 300


@dataclass(frozen=True, kw_only=True)
class CompanionFacts:
    """What the companions of one export say."""

    name: str
    """Name under which servers offer the model."""
    gguf_files: Sequence[str]
    """Relative to the export's folder."""
    recommended_gguf: str
    prompt_format: PromptFormat
    stop: str
    """The text after which a plan is complete."""
    context_tokens: int = 8192
    port: int = 50002
    tokenizer_folder: str
    """Relative to the export's folder."""
    tools: Mapping[str, Tool] | None
    """Tools of the grammar; none stands for TinyAgent's own."""
    example_prompt: str
    """One rendered prompt, without BOS."""


def write_companions(folder: Path, facts: CompanionFacts) -> list[Path]:
    """Write the companions of an export.

    Args:
        folder: The export's folder.
        facts: What they say.

    Returns:
        The files. There is no Modelfile for the `chat` format: Ollama has templates of another
        language, and the base's own cannot be translated.
    """
    tools = TINYAGENT if facts.tools is None else facts.tools
    texts = {
        "README.md": _readme(facts),
        "llama-server.sh": _llama_server(facts),
        "plan.gbnf": plan_grammar(tools),
        "Configuration.json": json.dumps(_app_keys(folder, facts), indent=2) + "\n",
    }
    if facts.prompt_format != "chat":
        texts["Modelfile"] = _modelfile(facts)
    paths = []
    for name, text in texts.items():
        write_text(folder / name, text)
        paths.append(folder / name)
    (folder / "llama-server.sh").chmod(0o755)
    return paths


def go_template(prompt_format: PromptFormat) -> str:
    """Write the prompt format in the template language of Ollama.

    Args:
        prompt_format: `alpaca` or `flat`.

    Returns:
        A Go template. Ollama cannot tell an empty system text from none.

    Source: template/template.go of github.com/ollama/ollama (the variables, and that a request's
        system text is an empty string when there is none).
    """
    alone = render_prompt(None, "{{ .Prompt }}", prompt_format)
    both = render_prompt("{{ .System }}", "{{ .Prompt }}", prompt_format)
    return f"{{{{ if .System }}}}{both}{{{{ else }}}}{alone}{{{{ end }}}}{{{{ .Response }}}}"


def _modelfile(facts: CompanionFacts) -> str:
    # Versions of Ollama before August 2026 penalise repetition unless told not to.
    return f"""\
# ollama create {_ollama_name(facts.name)} -f Modelfile
FROM ./{facts.recommended_gguf}
TEMPLATE \"\"\"{go_template(facts.prompt_format)}\"\"\"
PARAMETER stop "{facts.stop}"
PARAMETER temperature 0
PARAMETER repeat_penalty 1
PARAMETER num_ctx {facts.context_tokens}
"""


def _ollama_name(name: str) -> str:
    """Leave out what Ollama allows in no name."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", name).strip("-._") or "planner"


def _llama_server(facts: CompanionFacts) -> str:
    return f"""\
#!/bin/sh
# Serves the planner at http://127.0.0.1:{facts.port}/v1. Further flags are passed on.
# SLOTS=4 answers four requests at a time, each with {facts.context_tokens} tokens of context.
# MODEL=other.gguf serves another file.
set -eu
cd "$(dirname "$0")"
SLOTS="${{SLOTS:-1}}"
[ -n "${{MODEL:-}}" ] || MODEL={shlex.quote(facts.recommended_gguf)}
exec llama-server -m "$MODEL" --alias {shlex.quote(facts.name)} --jinja \\
  -c "$(({facts.context_tokens} * SLOTS))" -np "$SLOTS" \\
  --host 127.0.0.1 --port "${{PORT:-{facts.port}}}" --temp 0 --repeat-penalty 1 "$@"
"""


def _app_keys(folder: Path, facts: CompanionFacts) -> dict[str, str]:
    """Name the TinyAgent app's keys; it takes the length of each value, so all are texts.

    Source: src/tiny_agent/config.py of github.com/SqueezeAILab/TinyAgent.
    """
    return {
        "provider": "local",
        "localModelName": facts.name,
        "localPort": str(facts.port),
        "localCtxLen": str(facts.context_tokens),
        "localTokenizerNameOrPath": str((folder / facts.tokenizer_folder).resolve()),
    }


def _readme(facts: CompanionFacts) -> str:
    return "\n".join(
        [_about(facts), _prompt(facts), _serving(facts), _grammar_section(facts), _app(facts)]
    )


def _about(facts: CompanionFacts) -> str:
    rows = []
    for path in facts.gguf_files:
        rows.append(f"- `{path}`" + (" (recommended)" if path == facts.recommended_gguf else ""))
    files = "\n".join(rows)
    return f"""\
# {facts.name}

A planner: for a request it writes a plan of function calls, one a line, and ends it with `join()`.
`export.json` says from what it was made, and which checks it passed.

{files}
- `{facts.tokenizer_folder}/`: the same weights for transformers and vLLM, with the tokenizer
"""


def _prompt(facts: CompanionFacts) -> str:
    lines = [
        "## Prompt\n",
        f"The format is `{facts.prompt_format}`. The chat template in the files writes it: send a "
        "system and a user\nmessage, or a user message alone, and nothing around them.\n",
    ]
    if facts.prompt_format != "chat":
        both = render_prompt("{system}", "{user}", facts.prompt_format)
        alone = render_prompt(None, "{user}", facts.prompt_format)
        lines += [
            "Byte by byte, as Python strings:\n",
            f"```python\nwith_system = {both!r}\nwithout_system = {alone!r}\n```\n",
        ]
    return "\n".join(
        [
            *lines,
            f"- Stop string: `{facts.stop}`, as plain text. Stop there: what follows is no plan.",
            "- BOS comes exactly once, if the tokenizer has one. llama.cpp, Ollama and LM Studio "
            "put it in front\n  of what the GGUF's template writes; the template in "
            f"`{facts.tokenizer_folder}/` writes it itself. A prompt\n  that you render by hand "
            "must not begin with the text of BOS.",
            "- Sampling: temperature 0, no repetition penalty. A plan repeats names and "
            "references, and a penalty\n  changes them.",
            "- llama.cpp reads a special token, such as `</s>`, wherever a request has its text. "
            "Training never\n  did: remove it from requests.\n",
            _example(facts.example_prompt),
        ]
    )


def _example(prompt: str) -> str:
    """Show a prompt, or its two ends where it is long, saying so."""
    if len(prompt) <= 2 * _EXCERPT_CHARS:
        return f"An example:\n\n```python\n{prompt!r}\n```\n"
    ends = (prompt[:_EXCERPT_CHARS], prompt[-_EXCERPT_CHARS:])
    return (
        f"An example of {len(prompt):,} characters, its first and its last {_EXCERPT_CHARS}:\n\n"
        f"```python\n{ends[0]!r}\n...\n{ends[1]!r}\n```\n"
    )


def _serving(facts: CompanionFacts) -> str:
    name, context = facts.name, facts.context_tokens
    ollama = f"""\
**Ollama**

```bash
ollama create {_ollama_name(name)} -f Modelfile
```

The `Modelfile` has the prompt format in Ollama's own template language, for one request at a time:
no earlier turns. It cannot tell an empty system text from none.
"""
    if facts.prompt_format == "chat":
        ollama = """\
**Ollama**: there is no `Modelfile`. Ollama has a template language of its own, and the base model's
template cannot be translated; render prompts yourself and send them with `"raw": true`.
"""
    return f"""\
## Serving

A prompt with many tools and examples has thousands of tokens: give {context} tokens of context.

**llama.cpp**, on port {facts.port}:

```bash
./llama-server.sh
curl http://127.0.0.1:{facts.port}/v1/chat/completions -H 'Content-Type: application/json' -d '{{
  "messages": [{{"role": "system", "content": "..."}}, {{"role": "user", "content": "..."}}],
  "temperature": 0, "stop": ["{facts.stop}"]}}'
```

{ollama}
**LM Studio**: `lms import -c {shlex.quote(facts.recommended_gguf)}`. It renders the template in the
file. Set context length {context}, temperature 0, repeat penalty off, and the stop string.

**vLLM**, on a GPU:

```bash
vllm serve {facts.tokenizer_folder} --served-model-name {shlex.quote(name)} \
--max-model-len {context} --port {facts.port}
```
"""


def _grammar_section(facts: CompanionFacts) -> str:
    return f"""\
## Grammar

`plan.gbnf` lets llama.cpp write nothing but plans: lines numbered from 1, each call with the number
and kinds of arguments of its tool, references to earlier lines only, `join()` and `{facts.stop}` at
the end. Send it with a request for a plan, and not with other requests, such as the joiner's:

```python
import json, urllib.request

body = {{
    "messages": [{{"role": "system", "content": "..."}}, {{"role": "user", "content": "..."}}],
    "temperature": 0,
    "stop": ["{facts.stop}"],
    "grammar": open("plan.gbnf", encoding="utf-8").read(),
}}
request = urllib.request.Request(
    "http://127.0.0.1:{facts.port}/v1/chat/completions",
    json.dumps(body).encode(),
    {{"Content-Type": "application/json"}},
)
print(json.load(urllib.request.urlopen(request))["choices"][0]["message"]["content"])
```

A text in a plan has up to {MAX_TEXT_UNITS} characters, and `$` before a digit only as a reference.
A plan that is cut by a limit of tokens is not whole, with a grammar or without.
"""


def _app(facts: CompanionFacts) -> str:
    return f"""\
## TinyAgent app

Start `./llama-server.sh`, then put the keys of `Configuration.json` into the app's own file of that
name, in its folder under `Library/Application Support/TinyAgent`, and leave its other keys as they
are. `localTokenizerNameOrPath` is the full path of `{facts.tokenizer_folder}/`: change it when you
move this folder. The app sends the stop string and temperature 0 itself.
"""
