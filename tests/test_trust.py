"""Nothing that comes out of files, bases, data or models is executed, and no secret gets out."""

from __future__ import annotations

import ast
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tinyagent_fast.cli import main
from tinyagent_fast.config import Config, dump_config, parse_config
from tinyagent_fast.errors import ConfigError, DataError, ModelError, UserError
from tinyagent_fast.models.loading import load_for_generation, load_for_training
from tinyagent_fast.plans.grammar import read_plan
from tinyagent_fast.prompts.loading import load_tokenizer
from tinyagent_fast.prompts.retrieval import load_retriever
from tinyagent_fast.prompts.tokens import PromptTokenizer
from tinyagent_fast.runs import Run
from tinyagent_fast.strict_yaml import load_yaml
from tinyagent_fast.training import fit
from tinyagent_fast.training.resume import keep_checkpoint

ROOT = Path(__file__).resolve().parents[1]
MODULES = sorted((ROOT / "tinyagent_fast").rglob("*.py"))
_PICKLES = frozenset({"pickle", "marshal", "shelve", "dill", "joblib", "cloudpickle"})
CANARY = "hf_CaNaRyThatMustNeverBeWritten0123456789"


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, made: Path) -> None:
        self.made = made

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.made),)


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """Return the folder that code hidden in files would make."""
    return tmp_path / "executed"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_module_can_execute_what_it_reads(path: Path) -> None:
    """Calls of eval, pickle and shells do not occur; whoever needs one has to change this test."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names]
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert {"pickle", "marshal", "shelve", "dill", "joblib", "cloudpickle"}.isdisjoint(
                names
            )
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        assert called not in ("eval", "exec", "compile", "os.system", "os.popen", "torch.load")
        flags = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        assert flags.get("shell", "False") == "False"
        assert flags.get("trust_remote_code", "False") == "False"
        assert flags.get("allow_pickle", "False") == "False"
        if called == "np.load":
            assert "allow_pickle" in flags
        if called == "yaml.load":
            assert path.name == "strict_yaml.py"


@pytest.mark.parametrize(
    "text", ["!!python/object/apply:os.mkdir ['{made}']", "!!python/name:os.system", "!made x"]
)
def test_a_config_makes_no_objects(text: str, made: Path) -> None:
    with pytest.raises(ValueError):
        load_yaml(text.format(made=made))
    with pytest.raises(ConfigError):
        parse_config("preset: " + text.format(made=made))
    assert not made.exists()


@pytest.mark.parametrize("section", ["model", "train", "data", "eval"])
def test_no_setting_trusts_the_code_of_a_base(section: str, capsys: Any) -> None:
    with pytest.raises(ConfigError, match="trust_remote_code"):
        parse_config(f"{section}: {{trust_remote_code: true}}")
    assert main(["train", f"--{section}.trust-remote-code", "true"]) == 2
    capsys.readouterr()


def test_code_in_the_folder_of_a_base_is_not_run(
    tiny_base: Path, tiny_config: Callable[..., Config], made: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "base"
    shutil.copytree(tiny_base, folder)
    code = f"import os\nos.makedirs({str(made)!r}, exist_ok=True)\nclass Own: pass\n"
    for name in ("modeling_own", "configuration_own", "tokenization_own"):
        (folder / f"{name}.py").write_text(code, encoding="utf-8")
    classes = {"AutoConfig": "configuration_own.Own", "AutoModelForCausalLM": "modeling_own.Own"}
    edit(folder / "config.json", auto_map=classes)
    tokenizers = {"AutoTokenizer": ["tokenization_own.Own", "tokenization_own.Own"]}
    edit(folder / "tokenizer_config.json", auto_map=tokenizers)
    config = tiny_config()
    assert load_for_generation(config, str(folder), None).tokenizer.eos_id == 2  # as a plain Llama
    edit(folder / "config.json", model_type="own", architectures=["Own"])
    with pytest.raises(ModelError):
        load_for_training(config, str(folder))
    assert not made.exists()


def edit(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**content, **changes}), encoding="utf-8")


def test_weights_that_can_run_code_are_refused(
    tiny_base: Path, tiny_config: Callable[..., Config], made: Path, tmp_path: Path
) -> None:
    for name in ("pytorch_model.bin", "model.safetensors"):
        folder = tmp_path / name
        shutil.copytree(tiny_base, folder)
        (folder / "model.safetensors").unlink()
        (folder / name).write_bytes(pickle.dumps({"model.norm.weight": Bomb(made)}))
        with pytest.raises(ModelError):
            load_for_training(tiny_config(), str(folder))
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA"}', encoding="utf-8")
    (adapter / "adapter_model.bin").write_bytes(pickle.dumps(Bomb(made)))
    with pytest.raises(ModelError, match=r"adapter_model\.safetensors"):
        load_for_generation(tiny_config(), str(tiny_base), adapter)
    assert not made.exists()


@pytest.mark.usefixtures("no_picture")
@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_checkpoint_that_can_run_code_is_refused(
    name: str, tiny_config: Callable[..., Config], quiet: Any, made: Path
) -> None:
    config = tiny_config(name="one", train={"save_every_steps": 2, "max_steps": 4})
    run = fit.train(config, quiet)
    shutil.rmtree(run.path / "checkpoints" / "checkpoint-4")
    shutil.rmtree(run.adapter)
    checkpoint = run.path / "checkpoints" / "checkpoint-2"
    (checkpoint / name).write_bytes(pickle.dumps(Bomb(made)))
    # Whoever put it there wrote its checksum too.
    (checkpoint / "checksums.json").unlink()
    written = checkpoint.with_name("written")
    checkpoint.replace(written)
    keep_checkpoint(written, checkpoint)
    with pytest.raises(UserError, match=r"checkpoint-2") as refused:
        fit.train(config, quiet, resume=Run(run.path))
    assert "run code" in refused.value.why or "cannot be loaded" in refused.value.why
    assert not made.exists()


def test_a_retriever_that_can_run_code_is_refused(tmp_path: Path, made: Path) -> None:
    import numpy as np

    (tmp_path / "retriever.json").write_text('{"terms": [[], []]}', encoding="utf-8")
    bombs = np.array([Bomb(made)], dtype=object)
    np.savez(tmp_path / "retriever.npz", idf=bombs, weights=bombs, bias=bombs)
    with pytest.raises(DataError):
        load_retriever(tmp_path)
    assert not made.exists()


@pytest.mark.parametrize(
    "attack",
    [
        "{{ cycler.__init__.__globals__.os.mkdir(MADE) }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__.__base__.__subclasses__() }}",
        "{% for message in messages %}{{ message.update({'content': 'x'}) }}{% endfor %}",
        "{{ raise_exception.__globals__.os }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
    ],
)
def test_a_chat_template_is_a_program_without_hands(
    attack: str, tiny_base: Path, made: Path
) -> None:
    tokenizer = load_tokenizer(tiny_base)
    whole = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    tokenizer.chat_template = attack.replace("MADE", repr(str(made))) + whole
    with pytest.raises(ModelError):
        PromptTokenizer(tokenizer, "chat")
    assert not made.exists()


@pytest.mark.parametrize(
    "text",
    [
        "1. __import__('os').mkdir('{made}')\n2. join()",
        "1. open_note(__import__('os').mkdir('{made}'), \"\")\n2. join()",
        "1. open_note(f\"{{__import__('os').mkdir('{made}')}}\", \"\")\n2. join()",
        "1. open_note((lambda: __import__('os').mkdir('{made}'))(), \"\")\n2. join()",
    ],
)
def test_what_a_model_writes_is_read_and_never_evaluated(text: str, made: Path) -> None:
    read_plan(text.format(made=made))
    assert not made.exists()


@pytest.mark.usefixtures("no_picture")
def test_no_secret_of_the_environment_is_written_or_said(
    tiny_config: Callable[..., Config],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, CANARY)
    for name in ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy"):
        monkeypatch.setenv(name, f"http://user:{CANARY}@127.0.0.1:9")
    home = tmp_path / "hf"
    home.mkdir()
    (home / "token").write_text(CANARY, encoding="utf-8")
    monkeypatch.setenv("HF_TOKEN_PATH", str(home / "token"))
    config = tiny_config(
        name="one", train={"max_steps": 2, "evaluations": 1}, eval={"max_new_tokens": 4}
    )
    (tmp_path / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    run = ["--run", "one"]
    codes = [
        main(command)
        for command in (
            ["train", "--config", "config.yaml"],
            ["eval", *run],
            ["export", *run, "--quant", "f16", "--gates", "off"],
            ["export", *run, "--quant", "f16", "--push-to-hub", "me/planner", "--dry-run"],
            ["report", *run],
            ["chat", *run, "--once", "open the note", "--json"],
            ["doctor", "--config", "config.yaml"],
            ["train", "--config", "config.yaml", "--name", "two", "--model.base", "no/such-base"],
        )
    ]
    assert codes[:3] == [0, 0, 0]
    assert codes[-1] == 2
    said = capfd.readouterr()
    assert CANARY not in said.out + said.err
    files = [path for path in tmp_path.rglob("*") if path.is_file() and path.parent != home]
    assert len(files) > 30
    assert [path for path in files if CANARY.encode() in path.read_bytes()] == []
