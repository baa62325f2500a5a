"""Source of TinyAgent_fast.ipynb: `python notebooks/build.py` makes the notebook from it.

A line `# %%` begins a code cell, `# %% [markdown]` a text cell. It also runs as a plain script.
"""

# %% [markdown]
# # tinyagent_fast: train a planner and measure its plans
#
# To open it in Colab: *File - Upload notebook*.
#
# For a request, the model writes a plan of function calls in which `$1` stands for the result of
# call 1. This notebook trains such a planner, measures it, exports it as GGUF, measures the GGUF,
# and lets you try it.
#
# Every cell works as it is, in Colab and elsewhere: *Runtime - Run all*. With a GPU it trains
# TinyLlama-1.1B on the published TinyAgent data, which takes hours: "Memory" below says how many.
# Without a GPU it trains SmolLM2-135M on generated data; the preset `nano`, a toy, takes 5 to 10
# minutes.
# Training runs as a program of its own, which gives the GPU's memory back when it ends.

# %%
import html
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

# Flags for every command, as in: FLAGS = ["--preset", "t4", "--data.limit-entries", "8000"]
FLAGS = shlex.split(os.environ.get("TINYAGENT_FAST_NOTEBOOK_ARGS", ""))
# Keep the runs on Google Drive, so that they outlive the Colab session.
USE_DRIVE = False
# The name of a run that was broken off, to go on with it.
RESUME = ""
# What the planner is asked at the end; empty takes the first test query.
REQUEST = ""
# Where this project lies, for Colab; left empty, it is asked for once.
REPOSITORY = os.environ.get("TINYAGENT_FAST_REPOSITORY", "")

IN_COLAB = "google.colab" in sys.modules
# What runs the commands; in Colab the cell below makes a virtual environment for them.
PYTHON = sys.executable


def shell(*words: str, **variables: str) -> None:
    """Run a program, show what it prints as it comes, and stop the notebook when it fails."""
    print("$", shlex.join(words).partition("\n")[0], flush=True)
    # Jupyter sets FORCE_COLOR, which would fill the cell with every state of a progress bar.
    inherited = {name: value for name, value in os.environ.items() if name != "FORCE_COLOR"}
    child = subprocess.Popen(
        words,
        env={**inherited, "PYTHONUNBUFFERED": "1", "COLUMNS": "110", **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        start_new_session=True,
    )
    assert child.stdout is not None
    try:
        for line in child.stdout:
            print(line, end="", flush=True)
    except KeyboardInterrupt:
        # Training saves a checkpoint when it is interrupted: RESUME goes on from it.
        child.send_signal(signal.SIGINT)
        print(*child.stdout, sep="")
    if child.wait():
        raise RuntimeError(f"{shlex.join(words)} failed; the lines above say why")


def tinyagent_fast(*words: str, **variables: str) -> None:
    """Run one command of the project."""
    shell(PYTHON, "-m", "tinyagent_fast", *words, **variables)


# %% [markdown]
# ## Install
#
# In Colab the repository is cloned, and its pinned requirements go into a virtual environment of
# its own: Colab's other packages would not work beside them. Elsewhere the Python that runs this
# notebook is used as it is; the README says how to install the project into it.

# %%
if IN_COLAB:
    if not Path("tinyagent_fast").is_dir():
        REPOSITORY = REPOSITORY or input("Address of the repository, https://...: ").strip()
        CLONE = ("git", "clone", "--depth", "1", REPOSITORY, "tinyagent_fast")
        try:
            shell(*CLONE, GIT_TERMINAL_PROMPT="0")
        except RuntimeError:
            raise RuntimeError(
                f"no repository can be had from {REPOSITORY!r}: put its address, such as "
                "https://github.com/NAME/tinyagent_fast, into REPOSITORY in the first cell, and "
                "run both cells again; or upload a private one as /content/tinyagent_fast"
            ) from None
    if Path("tinyagent_fast/pyproject.toml").exists():  # else this cell was run before
        os.chdir("tinyagent_fast")
    CUDA = shutil.which("nvidia-smi") is not None
    REQUIREMENTS = "requirements.txt" if CUDA else "requirements-cpu.txt"
    PYTHON = str(Path(".venv/bin/python").absolute())
    shell(sys.executable, "-m", "venv", "--without-pip", ".venv")  # Colab's Python has no ensurepip
    PIP = (sys.executable, "-m", "pip", "--python", PYTHON, "install", "--quiet")
    shell(*PIP, "-r", REQUIREMENTS)
    shell(*PIP, "--no-deps", "-e", ".")
elif Path("build.py").exists() and Path("../tinyagent_fast").is_dir():
    os.chdir("..")  # the notebook was opened in its own folder
tinyagent_fast("--version")

# %% [markdown]
# ## Where runs are kept
#
# In `runs/`, or on Google Drive if `USE_DRIVE` above says so.

# %%
RUNS = Path("runs")
if IN_COLAB and USE_DRIVE:
    from google.colab import drive

    drive.mount("/content/drive")
    RUNS = Path("/content/drive/MyDrive/tinyagent_fast/runs")

# %% [markdown]
# ## Preset
#
# Chosen from the GPU: `t4`, `l4` or `a100`, and `cpu` without one.

# %%
CHOOSE = "from tinyagent_fast.presets import choose_preset; print(*choose_preset(), sep='|')"
if "--preset" in FLAGS:
    PRESET = FLAGS[FLAGS.index("--preset") + 1]
    print(f"preset {PRESET}, as FLAGS says")
else:
    # In a process of its own, because torch would keep GPU memory in this one.
    ANSWER = subprocess.run([PYTHON, "-c", CHOOSE], stdout=subprocess.PIPE, text=True, check=True)
    PRESET, _, REASON = ANSWER.stdout.splitlines()[-1].partition("|")
    print(f"preset {PRESET}: {REASON}")
    FLAGS = ["--preset", PRESET, *FLAGS]

# %% [markdown]
# ## Doctor
#
# What this machine has and lacks for that preset. A failure stops here and says how to repair it.

# %%
tinyagent_fast("doctor", *FLAGS)

# %% [markdown]
# ## Data
#
# The GPU presets train on the published data, which is downloaded (0.75 GB). The others generate
# their own when training starts; a small sample shows what it is like.

# %%
GENERATES = f"from tinyagent_fast.presets import PRESETS; print(PRESETS[{PRESET!r}]().data.train)"
ANSWER = subprocess.run([PYTHON, "-c", GENERATES], stdout=subprocess.PIPE, text=True, check=True)
if ANSWER.stdout.strip() == "None":
    SAMPLE = Path("data/sample")
    tinyagent_fast(
        *("data", "generate", "--out", str(SAMPLE), "--overwrite"),
        *("--train-entries", "200", "--test-entries", "20"),
    )
    tinyagent_fast("data", "check", str(SAMPLE / "training_data.json"))
else:
    tinyagent_fast("data", "download")
    tinyagent_fast("data", "check", "data/training_data.json")

# %% [markdown]
# ## Memory
#
# Memory and hours, predicted from the shapes of model and rows; nothing is measured here. If an
# epoch is too long for a session, put `["--data.limit-entries", "8000"]` into `FLAGS` above: hours
# fall in proportion.

# %%
tinyagent_fast("memory", *FLAGS)

# %% [markdown]
# ## Preview
#
# Rows as the trainer sees them. Only the tokens in colour are trained on.

# %%
tinyagent_fast("preview", *FLAGS, "--rows", "2", FORCE_COLOR="1")

# %% [markdown]
# ## Train
#
# During training, plans are written for validation queries; the adapter whose plans are best is
# kept. *Interrupt* saves a checkpoint: put the run's name into `RESUME` above to go on.

# %%
if RESUME:
    tinyagent_fast("train", "--resume", RESUME, "--runs", str(RUNS))
else:
    tinyagent_fast("train", *FLAGS, "--runs", str(RUNS))

# %% [markdown]
# ## Evaluate
#
# Plan success on the test queries, with its 95 % interval. A plan counts when its graph of calls
# equals the label's.

# %%
tinyagent_fast("eval", "--runs", str(RUNS))

# %% [markdown]
# ## Export
#
# Merged weights and GGUF files. Gates prove that they do what the adapter does; one that fails
# stops here.

# %%
tinyagent_fast("export", "--runs", str(RUNS))

# %% [markdown]
# ## Evaluate the GGUF files
#
# The same test queries through llama.cpp, and each file's difference from the adapter.

# %%
tinyagent_fast("eval", "--engine", "gguf", "--runs", str(RUNS))

# %% [markdown]
# ## Report
#
# Everything about the run on one page: curves, success by number of calls and by tool, causes of
# failure, failing plans drawn as graphs, the exported files side by side.

# %%
tinyagent_fast("report", "--runs", str(RUNS))
LATEST = RUNS / "latest"  # a link, or a file with the run's name where Drive knows no links
RUN = RUNS / LATEST.read_text(encoding="utf-8") if LATEST.is_file() else LATEST.resolve()
PAGE = (RUN / "report.html").read_text(encoding="utf-8")
try:
    from IPython import get_ipython
    from IPython.display import HTML, SVG, display
except ImportError:
    IN_NOTEBOOK = False
else:
    IN_NOTEBOOK = get_ipython() is not None
if IN_NOTEBOOK:
    # A frame keeps the page's style from this one's.
    FRAME = f'<iframe srcdoc="{html.escape(PAGE)}" width="100%" height="900"></iframe>'
    display(HTML(FRAME))
else:
    print(f"{RUN / 'report.html'}: {len(PAGE):,} characters")

# %% [markdown]
# ## Try it
#
# One request, `REQUEST` above, to the smallest GGUF file. A prompt also says which tools there are:
# `nearest` takes that part from the most similar test query. An arrow says which call needs which.

# %%
TRY = """from tinyagent_fast import load
import sys

_, gguf, request, picture = sys.argv
with load(gguf, system="nearest") as planner:
    planned = planner.plan(request)
print(f"{request}\\n\\n{planned.text}\\n\\n{planned.drawing.to_text()}")
with open(picture, "w", encoding="utf-8") as stream:
    stream.write(planned.drawing.to_svg())
"""
GGUF = min((RUN / "export" / "gguf").glob("*.gguf"), key=lambda path: path.stat().st_size)
if not REQUEST:
    with (RUN / "eval" / "predictions.jsonl").open(encoding="utf-8") as predictions:
        REQUEST = json.loads(predictions.readline())["query"]
shell(PYTHON, "-c", TRY, str(GGUF), REQUEST, str(RUN / "plan.svg"))
if IN_NOTEBOOK:
    display(SVG((RUN / "plan.svg").read_text(encoding="utf-8")))

# %% [markdown]
# ## Download
#
# In Colab the browser gets the smallest GGUF file, the files that serve it, and the report.

# %%
FOLDER = RUN / "download"
shutil.rmtree(FOLDER, ignore_errors=True)
(FOLDER / "gguf").mkdir(parents=True)
for path in (RUN / "report.html", *sorted((RUN / "export").iterdir())):
    if path.is_file() and path.suffix != ".gguf":
        shutil.copy2(path, FOLDER)
shutil.copy2(GGUF, FOLDER / "gguf")
ARCHIVE = Path(shutil.make_archive(str(FOLDER), "zip", FOLDER))
shutil.rmtree(FOLDER)
print(f"{ARCHIVE}: {ARCHIVE.stat().st_size / 2**20:,.1f} MiB")
if IN_COLAB:
    from google.colab import files

    files.download(str(ARCHIVE))
