"""Companions: what other programs are told agrees with the prompt the model was trained on."""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyagent_fast.config import PromptFormat
from tinyagent_fast.export.companions import go_template, recommended, write_companions
from tinyagent_fast.export.gates import Gate
from tinyagent_fast.export.record import Artefact
from tinyagent_fast.plans.gbnf import plan_grammar
from tinyagent_fast.plans.tools import TINYAGENT, Parameter, Tool, tools_by_name
from tinyagent_fast.prompts.templates import render_prompt

FORMATS: tuple[PromptFormat, ...] = ("alpaca", "flat")


def made(quant: str, path: str) -> Artefact:
    return Artefact(
        path=path, kind="gguf", quant=quant, sha256="", size_bytes=1, seconds=0.1, made_from=""
    )


def written(folder: Path, **changes: Any) -> list[Path]:
    plain: dict[str, Any] = {
        "name": "planner",
        "files": [made("f16", "gguf/planner-f16.gguf"), made("q8_0", "gguf/planner-q8_0.gguf")],
        "gates": [],
        "prompt_format": "alpaca",
        "tools": None,
        "example_prompt": render_prompt("the tools", "Question: who?", "alpaca"),
    }
    return write_companions(folder, **(plain | changes))


def render_go(template: str, values: Mapping[str, str]) -> str:
    """Run the part of Go's text/template that is used: if, else, end and fields."""
    parts = re.split(r"\{\{ (.*?) \}\}", template)
    shown, output = [True], ""
    for position, part in enumerate(parts):
        if position % 2 == 0:
            output += part if all(shown) else ""
        elif part.startswith("if ."):
            shown.append(bool(values[part[4:]]))
        elif part == "else":
            shown[-1] = not shown[-1]
        elif part == "end":
            shown.pop()
        else:
            assert re.fullmatch(r"\.[A-Z][a-z]+", part), part
            output += values[part[1:]] if all(shown) else ""
    assert shown == [True]
    return output


@pytest.mark.parametrize("prompt_format", FORMATS)
@given(system=st.none() | st.text(min_size=1), user=st.text())
def test_ollamas_template_renders_as_training_did(
    prompt_format: PromptFormat, system: str | None, user: str
) -> None:
    values = {"System": system or "", "Prompt": user, "Response": ""}
    template = go_template(prompt_format)
    assert render_go(template, values) == render_prompt(system, user, prompt_format)
    assert template.endswith("{{ .Response }}")


@pytest.mark.parametrize("prompt_format", FORMATS)
def test_the_modelfile_holds_the_template_and_greedy_settings(
    tmp_path: Path, prompt_format: PromptFormat
) -> None:
    written(tmp_path, prompt_format=prompt_format)
    text = (tmp_path / "Modelfile").read_text()
    template = text.split('"""')[1]
    assert text.count('"""') == 2
    assert template == go_template(prompt_format)
    assert text.replace(template, "").splitlines()[1:] == [
        "FROM ./gguf/planner-q8_0.gguf",
        'TEMPLATE """"""',
        'PARAMETER stop "<END_OF_PLAN>"',
        "PARAMETER temperature 0",
        "PARAMETER repeat_penalty 1",
        "PARAMETER num_ctx 8192",
    ]


def test_the_chat_format_has_no_modelfile_and_the_readme_says_why(tmp_path: Path) -> None:
    paths = written(tmp_path, prompt_format="chat", example_prompt="<|user|>who?")
    assert "Modelfile" not in {path.name for path in paths}
    assert not (tmp_path / "Modelfile").exists()
    readme = (tmp_path / "README.md").read_text()
    assert "there is no `Modelfile`" in readme
    assert "-f Modelfile" not in readme
    assert repr("<|user|>who?") in readme


def test_all_files_are_written_and_returned(tmp_path: Path) -> None:
    paths = written(tmp_path)
    assert {path.name for path in paths} == {
        "README.md",
        "llama-server.sh",
        "plan.gbnf",
        "Configuration.json",
        "Modelfile",
    }
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in paths}
    assert written(tmp_path) == paths


def test_the_grammar_is_that_of_the_tools(tmp_path: Path) -> None:
    written(tmp_path)
    assert (tmp_path / "plan.gbnf").read_text() == plan_grammar(TINYAGENT)
    own = tools_by_name([Tool("water", (Parameter("plant", "str"),))])
    written(tmp_path, tools=own)
    assert (tmp_path / "plan.gbnf").read_text() == plan_grammar(own)


def test_the_apps_keys_are_texts_because_the_app_takes_their_length(tmp_path: Path) -> None:
    written(tmp_path)
    assert json.loads((tmp_path / "Configuration.json").read_text()) == {
        "provider": "local",
        "localModelName": "planner",
        "localPort": "50002",
        "localCtxLen": "8192",
        "localTokenizerNameOrPath": str(tmp_path.resolve() / "merged"),
    }


@pytest.mark.skipif(os.name != "posix", reason="the command line is a shell script")
@pytest.mark.parametrize(
    ("variables", "options", "wanted"),
    [
        ({}, [], {"-m": "gguf/a b.gguf", "-c": "8192", "-np": "1", "--port": "50002"}),
        ({"SLOTS": "4"}, [], {"-c": "32768", "-np": "4"}),
        ({"MODEL": "x y.gguf", "PORT": "1"}, [], {"-m": "x y.gguf", "--port": "1"}),
        ({}, ["-t", "2"], {"-t": "2"}),
    ],
)
def test_the_command_line_gives_every_slot_the_whole_context(
    tmp_path: Path, variables: dict[str, str], options: list[str], wanted: dict[str, str]
) -> None:
    folder, programs = tmp_path / "my export", tmp_path / "bin"
    folder.mkdir()
    programs.mkdir()
    written(folder, name="it's $HOME", files=[made("f16", "gguf/a b.gguf")])
    script = folder / "llama-server.sh"
    assert script.stat().st_mode & stat.S_IXUSR
    stand_in = programs / "llama-server"
    stand_in.write_text('#!/bin/sh\npwd\nfor word in "$@"; do echo "$word"; done\n')
    stand_in.chmod(0o755)
    environment = {"PATH": f"{programs}:{os.environ['PATH']}", **variables}
    done = subprocess.run(
        [str(script), *options], env=environment, capture_output=True, text=True, check=True
    )
    where, *words = done.stdout.splitlines()
    assert Path(where).resolve() == folder.resolve()
    assert words[words.index("--alias") + 1] == "it's $HOME"
    assert words[words.index("--host") + 1] == "127.0.0.1"
    assert "--jinja" in words
    assert {flag: words[words.index(flag) + 1] for flag in wanted} == wanted


@pytest.mark.parametrize("prompt_format", FORMATS)
def test_the_readme_shows_the_format_byte_by_byte_and_every_file(
    tmp_path: Path, prompt_format: PromptFormat
) -> None:
    written(tmp_path, prompt_format=prompt_format)
    text = (tmp_path / "README.md").read_text()
    block = text.split("```python\n")[1].split("```")[0]
    shown: dict[str, str] = {}
    exec(block, {}, shown)
    assert shown == {
        "with_system": render_prompt("{system}", "{user}", prompt_format),
        "without_system": render_prompt(None, "{user}", prompt_format),
    }
    for word in ("planner-f16.gguf", "planner-q8_0.gguf` (recommended)", "`<END_OF_PLAN>`"):
        assert word in text
    assert repr(render_prompt("the tools", "Question: who?", "alpaca")) in text


def test_a_long_example_is_cut_and_the_readme_says_so(tmp_path: Path) -> None:
    long = "BEGIN" + "x" * 4000 + "MIDDLE" + "y" * 4000 + "END"
    written(tmp_path, example_prompt=long)
    text = (tmp_path / "README.md").read_text()
    assert f"An example of {len(long):,} characters" in text
    assert "BEGIN" in text
    assert "END'" in text
    assert "MIDDLE" not in text


def test_the_readmes_python_and_json_can_be_read(tmp_path: Path) -> None:
    written(tmp_path)
    text = (tmp_path / "README.md").read_text()
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        compile(block, "README.md", "exec")
    sent = text.split("-d '")[1].split("'")[0]
    assert json.loads(sent)["stop"] == ["<END_OF_PLAN>"]


def test_the_grammar_without_what_the_readme_names_is_read_by_other_libraries(
    tmp_path: Path,
) -> None:
    from llguidance import LLMatcher
    from llguidance.gbnf_to_lark import gbnf_to_lark

    written(tmp_path)
    grammar = (tmp_path / "plan.gbnf").read_text()
    text = (tmp_path / "README.md").read_text()
    ranges = text.split("Its rules exclude `")[1].split("`")[0]
    assert grammar.count(ranges) > 2

    def problems(source: str) -> str:
        lark = gbnf_to_lark(source)
        return str(LLMatcher.validate_grammar(LLMatcher.grammar_from_lark(lark)))

    assert problems(grammar)
    assert not problems(grammar.replace(ranges, ""))


@pytest.mark.parametrize(
    ("name", "wanted"), [("my run!", "my-run"), ("../x", "x"), ("\u00e9", "planner")]
)
def test_ollama_is_given_a_name_it_allows(tmp_path: Path, name: str, wanted: str) -> None:
    written(tmp_path, name=name)
    for file in ("README.md", "Modelfile"):
        assert f"ollama create {wanted} -f Modelfile" in (tmp_path / file).read_text()


@pytest.mark.parametrize(
    ("found", "wanted"),
    [
        ({}, "q4_k_m-imatrix"),
        ({"q8_0": (0.6, 5), "q4_k_m": (0.55, 3), "q4_k_m-imatrix": (0.58, 6)}, "q4_k_m-imatrix"),
        ({"q8_0": (0.6, 5), "q4_k_m": (0.59, 3), "q4_k_m-imatrix": (0.58, 6)}, "q4_k_m"),
        ({"q8_0": (0.6, 5), "q4_k_m": (0.5, -1), "q4_k_m-imatrix": (0.5, -2)}, "q8_0"),
        ({"q8_0": (0.5, -1), "q4_k_m": (0.5, -1), "q4_k_m-imatrix": (0.5, -2)}, "f16"),
    ],
)
def test_a_file_that_surely_plans_worse_than_f16_is_not_recommended(
    found: dict[str, tuple[float, float]], wanted: str
) -> None:
    """`found` has the success of a file and the upper end of its difference, in points."""
    files = [made(name, name) for name in ("f16", "q8_0", "q4_k_m", "q4_k_m-imatrix")]
    measured = [
        Gate(
            name=f"success of {name}",
            passed=True,
            rule="",
            figures={"success": share, "interval": [-9.0, high]},
        )
        for name, (share, high) in found.items()
    ]
    assert recommended(files, measured) == wanted
