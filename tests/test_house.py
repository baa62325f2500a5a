"""House rules that no linter checks: docstrings, imports, who prints, no traces of a machine."""

from __future__ import annotations

import ast
import fnmatch
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ("torch", "transformers", "datasets", "pyarrow", "tokenizers", "trl", "peft", "numpy")

MODULES = sorted(
    path.relative_to(ROOT)
    for folder in ("tinyagent_fast", "benchmarks")
    for path in (ROOT / folder).rglob("*.py")
)
PROGRAM = [path for path in MODULES if path.parts[0] == "tinyagent_fast"]
IMPURE = {Path("tinyagent_fast/evaluation/running.py"), Path("tinyagent_fast/__main__.py")}
PURE = [
    path
    for path in PROGRAM
    if path not in IMPURE
    and (
        len(path.parts) == 2
        or path.parts[1] in ("plans", "data", "evaluation", "commands", "reports", "agent")
        or path == Path("tinyagent_fast/prompts/templates.py")
    )
]

Function = ast.FunctionDef | ast.AsyncFunctionDef


def tree_of(path: Path) -> ast.Module:
    return ast.parse((ROOT / path).read_text(encoding="utf-8"), str(path))


def walk(path: Path) -> Iterator[ast.AST]:
    return ast.walk(tree_of(path))


def public(body: list[ast.stmt], owner: str = "") -> Iterator[tuple[str, ast.ClassDef | Function]]:
    """Give the public classes, functions and methods of a module, not what is inside functions."""
    for node in body:
        if not isinstance(node, ast.ClassDef | Function) or node.name.startswith("_"):
            continue
        name = f"{owner}{node.name}"
        if isinstance(node, ast.ClassDef):
            yield from public(node.body, f"{name}.")
        elif any(isinstance(d, ast.Name) and d.id == "overload" for d in node.decorator_list):
            continue
        yield name, node


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_everything_public_has_a_docstring(path: Path) -> None:
    tree = tree_of(path)
    assert ast.get_docstring(tree), f"{path} says nothing of itself"
    missing = [name for name, node in public(tree.body) if not ast.get_docstring(node)]
    assert missing == []


def is_silent(handler: ast.ExceptHandler) -> bool:
    caught = handler.type
    broad = isinstance(caught, ast.Name) and caught.id in ("Exception", "BaseException")
    does_nothing = all(
        isinstance(step, ast.Pass | ast.Continue)
        or (isinstance(step, ast.Expr) and isinstance(step.value, ast.Constant))
        for step in handler.body
    )
    return caught is None or (broad and does_nothing)


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_no_error_is_swallowed_whatever_it_is(path: Path) -> None:
    handlers = [node for node in walk(path) if isinstance(node, ast.ExceptHandler)]
    assert [handler.lineno for handler in handlers if is_silent(handler)] == []
    broad_suppress = [
        node.lineno
        for node in walk(path)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "suppress"
        and any(isinstance(a, ast.Name) and a.id.endswith("Exception") for a in node.args)
    ]
    assert broad_suppress == []


@pytest.mark.parametrize("path", PROGRAM, ids=str)
def test_only_commands_print(path: Path) -> None:
    if path.name == "cli.py" or path.parts[1] == "commands":
        return
    calls = [
        node.lineno
        for node in walk(path)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "print"
    ]
    assert calls == []


IMPORT_EACH = f"""
import importlib, json, sys
found, before = {{}}, set()
for name in sys.argv[1:]:
    importlib.import_module(name)
    heavy = {{top for top in {HEAVY!r} if top in sys.modules}}
    found[name] = sorted(heavy - before)
    before |= heavy
print(json.dumps(found))
"""


def test_modules_that_work_without_torch_import_nothing_heavy() -> None:
    names = [module_name(path) for path in PURE]
    assert {"tinyagent_fast.cli", "tinyagent_fast.data.cache", "tinyagent_fast.runs"} <= set(names)
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_EACH, *names], capture_output=True, text=True, check=True
    )
    found = json.loads(done.stdout)
    assert set(found) == set(names)
    assert {name: heavy for name, heavy in found.items() if heavy} == {}


def module_name(path: Path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def imported_modules(path: Path, known: Iterable[str]) -> set[str]:
    """List the project's modules that one imports: at its top, for types, or inside functions."""
    found = set()
    for node in walk(path):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            # What is imported from a package may be one of its modules, or a name in its __init__.
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in known else str(node.module) for name in names}
    return found & set(known)


def cycles(graph: Mapping[str, set[str]]) -> list[str]:
    """Give a path back to its beginning for each module that can reach itself."""

    def way_back(start: str) -> list[str] | None:
        ways, seen = [[start]], set()
        while ways:
            way = ways.pop()
            for target in sorted(graph[way[-1]] - seen):
                if target == start:
                    return [*way, start]
                seen.add(target)
                ways.append([*way, target])
        return None

    return [" -> ".join(way) for module in sorted(graph) if (way := way_back(module))]


def test_no_module_imports_itself_in_a_circle() -> None:
    names = {module_name(path): path for path in PROGRAM}
    graph = {name: imported_modules(path, names) for name, path in names.items()}
    assert "tinyagent_fast.errors" in graph["tinyagent_fast.config"]
    assert cycles(graph) == []


def test_a_circle_of_imports_is_found() -> None:
    assert cycles({"a": {"b"}, "b": {"c"}, "c": set()}) == []
    found = cycles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"d"}})
    assert found == ["b -> c -> b", "c -> b -> c", "d -> d"]


def generates(tree: ast.Module) -> list[int]:
    """List the lines that make a model write: all but asking an engine through its interface."""
    lines = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            asked = ast.unparse(node.func.value).rpartition(".")[2]
            if node.func.attr == "generate" and asked != "engine":
                lines.append(node.lineno)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names = [getattr(node, "module", None), *(alias.name for alias in node.names)]
            if any(str(name).partition(".")[0] in ("vllm", "xllamacpp") for name in names):
                lines.append(node.lineno)
        elif isinstance(node, ast.Name | ast.arg | ast.keyword):
            name = node.id if isinstance(node, ast.Name) else node.arg
            lines += [node.lineno] if name == "past_key_values" else []
    return lines


def test_only_the_inference_room_generates() -> None:
    inside = [path for path in PROGRAM if path.parts[1] == "inference"]
    assert any(generates(tree_of(path)) for path in inside)
    found = {path: generates(tree_of(path)) for path in PROGRAM if path not in inside}
    assert {path: lines for path, lines in found.items() if lines} == {}
    for code in ("model.generate(ids)", "import vllm", "f(past_key_values=c)"):
        assert generates(ast.parse(code)) == [1], code


def project_files() -> list[Path]:
    """List the files that belong to the project, as .gitignore tells them from products."""
    lines = (ROOT / ".gitignore").read_text(encoding="utf-8").split()
    anchored = [line.strip("/") for line in lines if line.startswith("/")]
    anywhere = [line.strip("/") for line in lines if not line.startswith("/")]
    tool_folders = [".git", ".idea", ".vscode", ".pytest_cache", ".ipynb_checkpoints"]

    def is_product(path: Path) -> bool:
        where = path.relative_to(ROOT)
        return (
            any(fnmatch.fnmatch(where.as_posix(), pattern) for pattern in anchored)
            or any(fnmatch.fnmatch(where.name, pattern) for pattern in anywhere)
            or where.name in tool_folders
        )

    def files(folder: Path) -> Iterator[Path]:
        for path in sorted(folder.iterdir()):
            if path.is_symlink() or is_product(path):
                continue
            if path.is_dir():
                yield from files(path)
            else:
                yield path

    return list(files(ROOT))


# Spelled so that this file does not match itself.
TRACES = {
    "a path of one machine": r"/wor[k]/|/hom[e]/\w|/roo[t]/|/User[s]/\w|/tm[p]/brief|[.]pyen[v]",
    "a package registry": r"pypi[.]or[g]|pythonhosted[.]or[g]|download[.]pytorch[.]or[g]"
    r"|conda[.]anaconda[.]or[g]|--extra-index-ur[l]|--index-ur[l]|--find-link[s]",
}


@pytest.mark.parametrize("kind", TRACES)
def test_no_text_names_what_belongs_to_one_machine(kind: str) -> None:
    pattern = re.compile(TRACES[kind])
    found = []
    texts = 0
    for path in project_files():
        if path == ROOT / "tests" / "test_requirements.py":
            continue  # It names registries to see that the lock files do not.
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        texts += 1
        found += [
            f"{path.relative_to(ROOT)}:{number}: {line.strip()[:80]}"
            for number, line in enumerate(text.splitlines(), start=1)
            if pattern.search(line)
        ]
    assert texts > 60
    assert found == []


def test_the_traces_are_recognised_in_a_text_that_has_them() -> None:
    machine, registry = (re.compile(pattern) for pattern in TRACES.values())
    for text in ("see /" + "work/main", "cd /" + "home/ann", "/" + "root/x"):
        assert machine.search(text)
        assert not registry.search(text)
    assert registry.search("https://" + "pypi" + ".org/simple")
    assert not machine.search("the user's home folder, ./work")


def test_project_files_are_the_sources_and_not_the_products() -> None:
    names = {path.relative_to(ROOT).as_posix() for path in project_files()}
    assert {"pyproject.toml", "Makefile", "data/README.md", "tinyagent_fast/cli.py"} <= names
    assert "tinyagent_fast/data/generation/tinyagent.yaml" in names
    products = ("runs/", ".venv/", "data/generated/", ".git/", ".cache/")
    assert not [name for name in names if name.startswith(products) or "__pycache__" in name]


def test_the_pre_commit_hooks_are_the_checks_of_make_lint() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    (local,) = hooks["repos"]
    assert local["repo"] == "local"  # needs no network
    words = ["make", "--no-print-directory", "--dry-run", "lint", "VENV=.venv"]
    # Within `make test`, make tells its children that they are inside another make.
    outside = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True, env=outside)
    commands = done.stdout.strip().splitlines()[-1].split(" && ")
    assert [hook["entry"] for hook in local["hooks"]] == commands
    assert all(hook["pass_filenames"] is False for hook in local["hooks"])


def test_every_file_that_is_no_code_is_packaged() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    section = text.split("[tool.setuptools.package-data]\n")[1]
    names = json.loads(section.partition("tinyagent_fast = ")[2].partition("\n")[0])
    packaged = {path for name in names for path in (ROOT / "tinyagent_fast").glob(name)}
    others = {
        path
        for path in (ROOT / "tinyagent_fast").rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc")
    }
    assert len(others) > 5
    assert others - packaged == set()


SEEN = """
import os
from pathlib import Path

Path("visible").write_text(os.environ["CUDA_VISIBLE_DEVICES"])
"""


@pytest.mark.parametrize(
    ("marks", "visible"),
    [("", ""), ("not gpu and not slow", ""), ("gpu and not slow", "0")],
)
def test_only_sessions_of_tests_marked_gpu_see_one(
    marks: str, visible: str, tmp_path: Path
) -> None:
    (tmp_path / "test_seen.py").write_text(SEEN, encoding="utf-8")
    tests = os.pathsep.join([str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "conftest", "-m", marks, "--collect-only"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": tests, "CUDA_VISIBLE_DEVICES": "0"},
        capture_output=True,
        check=False,
    )
    assert (tmp_path / "visible").read_text() == visible
