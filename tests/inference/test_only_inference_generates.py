"""Text is generated in `inference/` alone: no other module asks a model or a server for tokens."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import tinyagent_fast

PACKAGE = Path(tinyagent_fast.__file__).parent
ENDPOINTS = ("/completion", "/v1/completions", "/v1/chat/completions", "/infill")
"""Where llama.cpp's server generates."""
CHOOSING = ("argmax", "multinomial", "topk")
"""How torch chooses a next token from logits."""


def generations(source: str) -> Iterator[str]:
    """Name the calls in a module that generate text."""
    uses_torch = "import torch" in source or "from torch" in source
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            if node.func.attr == "generate" and _root(node.func) != "engine":
                yield f"line {node.lineno}: {ast.unparse(node.func)}()"
            if node.func.attr in CHOOSING and uses_torch:
                yield f"line {node.lineno}: {ast.unparse(node.func)}()"
        if isinstance(node, ast.Constant) and node.value in ENDPOINTS:
            yield f"line {node.lineno}: {node.value}"


def _root(call: ast.Attribute) -> str:
    """Name what a method is called on, without what it hangs on."""
    value = call.value
    return value.attr if isinstance(value, ast.Attribute) else getattr(value, "id", "")


def test_no_module_outside_inference_generates() -> None:
    found = {
        str(path.relative_to(PACKAGE)): calls
        for path in sorted(PACKAGE.rglob("*.py"))
        if path.relative_to(PACKAGE).parts[0] != "inference"
        and (calls := list(generations(path.read_text(encoding="utf-8"))))
    }
    assert not found


def test_what_generates_there_would_be_found_elsewhere() -> None:
    """Shows that the search above can find something."""
    sources = [p.read_text(encoding="utf-8") for p in (PACKAGE / "inference").glob("*.py")]
    found = [call for source in sources for call in generations(source)]
    assert any("model.generate" in call for call in found)
    assert any(endpoint in call for call in found for endpoint in ENDPOINTS)


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ("self.loaded.model.generate(ids)", 1),
        ("import torch\nlogits[0, -1].argmax(-1)", 1),
        ("import numpy\nlogits.argmax(-1)", 0),
        ("connection.request('POST', '/completion')", 1),
        ("engine.generate(prompts)", 0),
        ("self.engine.generate(prompts)", 0),
        ("'an answer of /completion is'", 0),
    ],
)
def test_asking_an_engine_is_no_generation(source: str, count: int) -> None:
    assert len(list(generations(source))) == count
