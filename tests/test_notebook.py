"""The notebook is what its source says, and its cells run in order, in Colab and elsewhere."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "notebooks"
NOTEBOOK = FOLDER / "TinyAgent_fast.ipynb"
SMALL = (
    "--preset smoke --data.generated-entries 100 --data.limit-entries 32 --train.max-steps 2 "
    "--eval.limit 4 --eval.sample 2 --eval.no-before-and-after"
)
REPOSITORY = "https://github.com/OWNER/tinyagent_fast"


def load_build() -> ModuleType:
    spec = importlib.util.spec_from_file_location("notebook_build", FOLDER / "build.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


build = load_build()


def code_cells() -> list[str]:
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def test_the_notebook_is_the_one_that_its_source_makes() -> None:
    source = build.SOURCE.read_text(encoding="utf-8")
    made = build.notebook_text(source)
    assert NOTEBOOK.read_text(encoding="utf-8") == made, "python notebooks/build.py makes it anew"


def test_check_tells_a_changed_notebook_from_an_up_to_date_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(build, "NOTEBOOK", tmp_path / "copy.ipynb")
    assert build.main(["--check"]) == 1
    assert build.main([]) == 0
    assert build.main(["--check"]) == 0
    build.NOTEBOOK.write_text(build.NOTEBOOK.read_text(encoding="utf-8").replace("train", "drain"))
    assert build.main(["--check"]) == 1
    assert "python notebooks/build.py" in capsys.readouterr().out
    assert build.main(["--chekc"]) == 2


def test_the_notebook_has_the_form_that_jupyter_and_colab_read() -> None:
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(set(ids)) == len(ids) > 25
    for cell in notebook["cells"]:
        assert cell["cell_type"] in ("markdown", "code")
        assert cell.get("outputs", []) == []
        assert all(line.endswith("\n") for line in cell["source"][:-1])


def test_every_code_cell_is_plain_python() -> None:
    for cell in code_cells():
        ast.parse(cell)


def test_no_address_of_a_repository_is_made_up() -> None:
    source = build.SOURCE.read_text(encoding="utf-8")
    assert set(re.findall(r"github\.com/([\w-]+)/tinyagent_fast", source)) <= {"NAME"}


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["markdown", "code"]),
            st.lists(st.text("ab #%é'", max_size=8), min_size=1, max_size=4),
        ),
        max_size=5,
    )
)
def test_cells_come_out_as_they_were_put_in(cells: list[tuple[str, list[str]]]) -> None:
    wanted, source = [], '"""Not a cell."""\n\n'
    for kind, drawn in cells:
        # The ends of a cell are stripped, and a mark would begin another cell.
        lines = ["x", *(re.sub("%+", "%", line) for line in drawn), "x"]
        wanted.append(build.Cell(kind, "\n".join(lines)))
        comments = ["#" if line == "" else f"# {line}" for line in lines]
        body = comments if kind == "markdown" else lines
        mark = "# %% [markdown]" if kind == "markdown" else "# %%"
        source += "\n".join([mark, *body, "", ""])
    assert build.read_cells(source) == wanted


def test_code_in_a_text_cell_is_refused_and_not_lost() -> None:
    with pytest.raises(ValueError, match="x = 1"):
        build.read_cells("# %% [markdown]\n# text\nx = 1\n")


def run_cells(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    variables: dict[str, str] | None = None,
    preset: str = "cpu",
    links: bool = True,
    **settings: Any,
) -> list[list[str]]:
    """Run all cells with nothing started: give the command lines that they would have run."""
    monkeypatch.chdir(folder)
    for name, value in (variables or {}).items():
        monkeypatch.setenv(name, value)
    commands: list[list[str]] = []

    def record(*words: str, **_: str) -> None:
        commands.append(list(words))
        if "clone" in words:
            (folder / words[-1]).mkdir()
            (folder / words[-1] / "pyproject.toml").touch()
        if words[1] == "-c":
            Path(words[-1]).write_text("<svg/>")
        if "train" in words:
            make_products(Path(words[words.index("--runs") + 1]), links)

    run = subprocess.run

    def answered(words: list[str], **how: Any) -> Any:
        if "choose_preset" in words[-1]:
            return SimpleNamespace(stdout=f"a note of torch\n{preset}|because of a test\n")
        return run([sys.executable, *words[1:]], **how, env={**os.environ, "PYTHONPATH": str(ROOT)})

    namespace: dict[str, Any] = {"__name__": "__main__"}
    for number, cell in enumerate(code_cells()):
        exec(compile(cell, f"cell {number}", "exec"), namespace)
        if number == 0:
            namespace["shell"] = record
            namespace["subprocess"] = SimpleNamespace(run=answered, PIPE=-1)
            namespace.update(settings)
    return commands


def make_products(runs: Path, links: bool) -> None:
    """Write what the commands would leave for the cells that read files."""
    run = runs / "a-run"
    for name in ("gguf", "merged"):
        (run / "export" / name).mkdir(parents=True)
    (run / "eval").mkdir()
    (run / "eval" / "predictions.jsonl").write_text('{"query": "do it"}\n{"query": "no"}\n')
    (run / "report.html").write_text("<p>a page</p>")
    (run / "export" / "Modelfile").write_text("FROM x")
    (run / "export" / "importance.gguf").write_text("not needed")
    for name, size in (("a-f16.gguf", 20), ("a-q4_k_m.gguf", 5)):
        (run / "export" / "gguf" / name).write_bytes(bytes(size))
    if links:
        (runs / "latest").symlink_to("a-run")
    else:
        (runs / "latest").write_text("a-run")


def of_the_project(commands: list[list[str]]) -> list[list[str]]:
    return [words[3:] for words in commands if words[1:3] == ["-m", "tinyagent_fast"]]


def test_outside_colab_all_stages_run_in_order_and_nothing_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TINYAGENT_FAST_NOTEBOOK_ARGS", raising=False)
    commands = run_cells(tmp_path, monkeypatch)
    ours = of_the_project(commands)
    assert len(ours) == len(commands) - 1
    assert {words[0] for words in commands} == {sys.executable}
    stages = [words[0] for words in ours]
    order = ["--version", "doctor", "data", "data", "memory", "preview", "train"]
    assert stages == [*order, "eval", "export", "eval", "report"]
    for words in ours:
        if words[0] in ("doctor", "memory", "preview", "train"):
            assert words[1:3] == ["--preset", "cpu"]
    smallest = (tmp_path / "runs/a-run/export/gguf/a-q4_k_m.gguf").resolve()
    assert commands[-1][-3:-1] == [str(smallest), "do it"]


def test_runs_lie_where_there_are_no_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = run_cells(tmp_path, monkeypatch, links=False)
    assert commands[-1][-3] == "runs/a-run/export/gguf/a-q4_k_m.gguf"
    assert (tmp_path / "runs/a-run/download.zip").exists()


def test_the_archive_has_the_smallest_gguf_and_what_serves_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import zipfile

    run_cells(tmp_path, monkeypatch)
    names = zipfile.ZipFile(tmp_path / "runs/a-run/download.zip").namelist()
    files = {name for name in names if not name.endswith("/")}
    assert files == {"Modelfile", "report.html", "gguf/a-q4_k_m.gguf"}


@pytest.mark.parametrize("preset", ["nano", "t4"])
def test_data_are_downloaded_only_for_a_preset_that_generates_none(
    preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tinyagent_fast.presets import preset_config

    monkeypatch.delenv("TINYAGENT_FAST_NOTEBOOK_ARGS", raising=False)
    ours = of_the_project(run_cells(tmp_path, monkeypatch, preset=preset))
    assert (["data", "download"] in ours) == (preset_config(preset).data.train is not None)
    assert ["train", "--preset", preset, "--runs", "runs"] in ours


def test_flags_of_the_environment_reach_every_command_that_takes_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    variables = {"TINYAGENT_FAST_NOTEBOOK_ARGS": SMALL}
    ours = of_the_project(run_cells(tmp_path, monkeypatch, variables=variables))
    with_flags = [words[0] for words in ours if "--eval.no-before-and-after" in words]
    assert with_flags == ["doctor", "memory", "preview", "train"]


def test_a_run_that_was_broken_off_is_resumed_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = of_the_project(run_cells(tmp_path, monkeypatch, RESUME="my-run"))
    assert ["train", "--resume", "my-run", "--runs", "runs"] in ours


@pytest.fixture
def colab(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """Pretend to be in Colab: give what the cells asked of it."""
    asked: dict[str, list[str]] = {"mounted": [], "downloaded": []}
    package = types.ModuleType("google.colab")
    package.drive = SimpleNamespace(mount=asked["mounted"].append)  # type: ignore[attr-defined]
    package.files = SimpleNamespace(download=asked["downloaded"].append)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "google", types.ModuleType("google"))
    monkeypatch.setitem(sys.modules, "google.colab", package)
    return asked


def test_colab_clones_installs_apart_and_downloads_but_leaves_drive_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, colab: dict[str, list[str]]
) -> None:
    asked: list[str] = []
    monkeypatch.setattr("builtins.input", lambda text: asked.append(text) or REPOSITORY)
    commands = run_cells(tmp_path, monkeypatch)
    assert commands[0] == ["git", "clone", "--depth", "1", REPOSITORY, "tinyagent_fast"]
    assert len(asked) == 1
    home = tmp_path / "tinyagent_fast"
    assert Path.cwd() == home
    python = str(home / ".venv" / "bin" / "python")
    assert commands[1] == [sys.executable, "-m", "venv", "--without-pip", ".venv"]
    installed = [words for words in commands if "install" in words]
    assert all(words[1:5] == ["-m", "pip", "--python", python] for words in installed)
    assert installed[0][-1] in ("requirements.txt", "requirements-cpu.txt")
    assert (ROOT / installed[0][-1]).exists()
    after = commands[commands.index(installed[-1]) + 1 :]
    assert {words[0] for words in after} == {python}
    assert colab["mounted"] == []
    assert [Path(name).name for name in colab["downloaded"]] == ["download.zip"]


def test_an_address_without_a_repository_is_named_before_anything_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, colab: dict[str, list[str]]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TINYAGENT_FAST_REPOSITORY", str(tmp_path / "nothing"))
    namespace: dict[str, Any] = {"__name__": "__main__"}
    with pytest.raises(RuntimeError, match=r"put its address.*REPOSITORY in the first cell"):
        for cell in code_cells()[:2]:
            exec(compile(cell, "cell", "exec"), namespace)
    assert list(tmp_path.iterdir()) == []


def test_pip_fills_an_environment_that_has_none(tmp_path: Path) -> None:
    """As the notebook does it."""
    subprocess.run(
        [sys.executable, "-m", "venv", "--without-pip", str(tmp_path / ".venv")], check=True
    )
    python = str(tmp_path / ".venv" / "bin" / "python")
    done = subprocess.run(
        [sys.executable, "-m", "pip", "--python", python, "list", "--format=json"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout) == []


def test_runs_go_to_drive_only_when_asked_for(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    colab: dict[str, list[str]],
) -> None:
    seen = []

    def elsewhere(*parts: Any) -> Path:
        path = Path(*parts)
        if not path.is_relative_to("/content/drive"):
            return path
        seen.append(str(path))
        return Path(f"{tmp_path}{path}")

    run_cells(tmp_path, monkeypatch, USE_DRIVE=True, Path=elsewhere, REPOSITORY=REPOSITORY)
    assert colab["mounted"] == ["/content/drive"]
    assert seen == ["/content/drive/MyDrive/tinyagent_fast/runs"]


def test_in_a_notebook_the_report_is_shown_in_a_frame_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[str] = []
    package, parts = types.ModuleType("IPython"), types.ModuleType("IPython.display")
    package.get_ipython = object  # type: ignore[attr-defined]
    parts.HTML = parts.SVG = str  # type: ignore[attr-defined]
    parts.display = shown.append  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", package)
    monkeypatch.setitem(sys.modules, "IPython.display", parts)
    run_cells(tmp_path, monkeypatch)
    frame, graph = shown
    assert graph == "<svg/>"
    assert frame.startswith("<iframe ")
    assert "&lt;p&gt;a page&lt;/p&gt;" in frame


def first_cell() -> dict[str, Any]:
    namespace: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(code_cells()[0], "first cell", "exec"), namespace)
    return namespace


def test_a_command_that_fails_stops_the_notebook_and_shows_what_it_said(
    capsys: pytest.CaptureFixture[str],
) -> None:
    shell: Callable[..., None] = first_cell()["shell"]
    with pytest.raises(RuntimeError, match="the lines above say why"):
        shell(sys.executable, "-c", "print('no disk'); raise SystemExit(1)")
    assert "no disk" in capsys.readouterr().out


def test_only_a_cell_that_asks_for_colours_gets_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    shell: Callable[..., None] = first_cell()["shell"]
    show = "import os; print('colours:', os.environ.get('FORCE_COLOR'))"
    shell(sys.executable, "-c", show)
    shell(sys.executable, "-c", show, FORCE_COLOR="2")
    said = capsys.readouterr().out
    assert "\ncolours: None\n" in said
    assert "\ncolours: 2\n" in said


def test_an_interrupt_lets_the_command_save_what_it_has() -> None:
    namespace, shown = first_cell(), []

    def show(*texts: str, **_: Any) -> None:
        shown.append(" ".join(texts))
        if texts == ("ready\n",):
            raise KeyboardInterrupt

    namespace["print"] = show
    work = "print('ready'); time.sleep(60)"
    # Whoever runs the tests may have told its children to ignore the signal.
    start = "import signal, time\nsignal.signal(signal.SIGINT, signal.default_int_handler)"
    code = f"{start}\ntry:\n {work}\nexcept KeyboardInterrupt:\n print('saved')\n exit(2)"
    with pytest.raises(RuntimeError):
        namespace["shell"](sys.executable, "-c", code)
    assert "saved" in shown[-1]


@pytest.mark.slow
def test_all_cells_run_top_to_bottom_on_a_small_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TINYAGENT_FAST_NOTEBOOK_ARGS", SMALL)
    monkeypatch.setenv("TINYAGENT_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for number, cell in enumerate(code_cells()):
        exec(compile(cell, f"cell {number}", "exec"), namespace)
    run = tmp_path / "runs" / "latest"
    assert json.loads((run / "export" / "export.json").read_text(encoding="utf-8"))["passed"]
    assert len(list(run.glob("eval-gguf-*/metrics.json"))) == 4
    assert json.loads((run / "eval" / "metrics.json").read_text(encoding="utf-8"))["n"] == 4
    assert (run / "download.zip").stat().st_size > 10_000
    assert "problem" in capsys.readouterr().out  # random weights plan nothing
