"""Fixtures that tests of several stages share: a tiny base model, a small data set, real data.

Nothing heavy is imported here, so tests of the pure stages stay fast.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

    from tinyagent_fast.config import Config

REAL_DATA = "TINYAGENT_FAST_REAL_DATA"
"""Environment variable that names the folder with the published data and tokenizer."""

# A machine that others use too is slow at times, which says nothing about what is tested.
settings.register_profile("shared", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("shared")

# Read by OpenMP when torch is imported, so it must be set before; tests share their cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

SEES_GPU = pytest.StashKey[bool]()


def pytest_configure(config: pytest.Config) -> None:
    """Hide CUDA, also from child processes, unless `-m` asks for the tests marked gpu.

    All other tests say what a CPU does, to the last bit, and must say it on every machine.
    """
    # A shell that starts this in the background has Ctrl-C ignored, and tests send it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    asked = config.option.markexpr
    sees = bool(re.search(r"\bgpu\b", asked)) and not re.search(r"\bnot\s+gpu\b", asked)
    config.stash[SEES_GPU] = sees
    if not sees:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_sessionstart(session: pytest.Session) -> None:
    """Say whether this session sees a GPU."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None:  # a worker of another session
        return
    if not session.config.stash[SEES_GPU]:
        reporter.write_line("CUDA: hidden (pytest -m gpu runs the tests that need it)")
        return
    import torch

    cuda = torch.cuda.is_available()
    reporter.write_line(f"CUDA: {'there' if cuda else 'not found'}, for tests marked gpu alone")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip tests that need what this session has not."""
    sees = config.stash[SEES_GPU]
    reason = "this session is for tests marked gpu" if sees else "pytest -m gpu runs it"
    wrong = [item for item in items if (item.get_closest_marker("gpu") is not None) is not sees]
    if sees and len(wrong) < len(items):
        import torch

        if not torch.cuda.is_available():
            reason, wrong = "needs a CUDA device", items
    for item in wrong:
        item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Give torch one thread, also after a test that let it have more."""
    yield
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Return the folder with the published data, or skip."""
    folder = os.environ.get(REAL_DATA)
    if not folder:
        pytest.skip(f"set {REAL_DATA} to a folder with the published data to run this test")
    path = Path(folder)
    assert path.is_dir(), f"{REAL_DATA}={folder} is no folder"
    return path


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with small generated training_data.json and testing_data.json."""
    from tinyagent_fast.data.generation.dataset import GenerationSpec, generate_dataset

    folder = tmp_path_factory.mktemp("data")
    generate_dataset(GenerationSpec(train_entries=40, test_entries=6, seed=11), folder)
    return folder


@pytest.fixture(scope="session")
def spm_folder(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path) -> Path:
    """Return a folder with a tokenizer.model as Llama's: SentencePiece BPE with byte fallback."""

    import sentencepiece

    entries = json.loads((tiny_data / "training_data.json").read_text(encoding="utf-8"))
    texts = [p["raw_output"] for e in entries.values() for p in e["output"]]
    folder = tmp_path_factory.mktemp("spm")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for text in texts for line in text.splitlines()]),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=700,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        minloglevel=2,
    )
    return folder


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path) -> Path:
    """Return the folder of a random Llama of 0.2 M parameters with a byte-level BPE."""

    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from tinyagent_fast.models.loading import save_model
    from tinyagent_fast.models.nano import train_bpe_tokenizer

    torch.set_num_threads(1)
    entries = json.loads((tiny_data / "training_data.json").read_text(encoding="utf-8"))
    points = [point for entry in entries.values() for point in entry["output"]]
    texts = [p["raw_input"] + p["raw_output"] + "<END_OF_PLAN>\n" for p in points]
    tokenizer = train_bpe_tokenizer([*texts, "### Instruction:\n### Input:\n### Response:\n"], 768)
    torch.manual_seed(0)
    # Wide initial weights: with those of a real model, 64 dimensions give no confident logits.
    shape = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        initializer_range=0.2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )
    folder = tmp_path_factory.mktemp("base")
    save_model(LlamaForCausalLM(shape), tokenizer, folder)
    return folder


@pytest.fixture(scope="session")
def tiny_family(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path) -> Callable[[str], Path]:
    """Return a maker of model folders, each made once, by a name in `tiny_families.MODELS`."""
    from tiny_families import make_model

    made: dict[str, Path] = {}
    entries = json.loads((tiny_data / "training_data.json").read_text(encoding="utf-8"))
    points = [point for entry in entries.values() for point in entry["output"]]
    texts = [p["raw_input"] + p["raw_output"] + "<END_OF_PLAN>\n" for p in points]

    def make(name: str) -> Path:
        if name not in made:
            made[name] = make_model(name, tmp_path_factory.mktemp("families") / name, texts)
        return made[name]

    return make


@pytest.fixture(scope="session")
def config_in(tiny_base: Path, tiny_data: Path) -> Callable[..., Config]:
    """Return a maker of complete configs for the tiny base, with runs in the folder given.

    A keyword is a section with a mapping of fields, as in `config_in(folder, train={"batch": 4})`,
    or a field of `Config` itself.
    """
    from tinyagent_fast.config import (
        Config,
        DataConfig,
        EvalConfig,
        LoraConfig,
        ModelConfig,
        TrainConfig,
    )

    plain = Config(
        preset="smoke",
        name="tiny",
        data=DataConfig(
            train=tiny_data / "training_data.json",
            test=tiny_data / "testing_data.json",
            validation_entries=8,
        ),
        model=ModelConfig(
            base=str(tiny_base), backend="transformers", weights="fp32", max_length_tokens=768
        ),
        lora=LoraConfig(rank=4, alpha=8),
        train=TrainConfig(
            max_steps=4,
            batch=2,
            accumulation=1,
            learning_rate=1e-3,
            schedule="constant",
            warmup=0.0,
            optimizer="adamw_torch",
            evaluations=0,
            threads=1,
        ),
        eval=EvalConfig(batch=4, max_new_tokens=6, sample=3, parity_prompts=0),
    )

    def make(folder: Path, **changes: Any) -> Config:
        sections = {
            name: replace(getattr(plain, name), **value) if isinstance(value, dict) else value
            for name, value in changes.items()
        }
        return replace(plain, **{"runs": folder / "runs", **sections})

    return make


@pytest.fixture
def tiny_config(
    tmp_path: Path, config_in: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Config]:
    """Return `config_in` for a test that trains: it runs in its own folder, with its own cache."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TINYAGENT_FAST_CACHE", str(tmp_path / "cache"))
    return lambda **changes: config_in(tmp_path, **changes)


@pytest.fixture
def no_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let runs draw no picture, which takes as long as a short training."""
    from tinyagent_fast.training import fit

    monkeypatch.setattr(fit, "plot_training", lambda _: None)


@pytest.fixture(scope="session")
def tiny_rows(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Return a maker of encoded plan rows, all different and of different lengths."""
    from tinyagent_fast.data.schema import Example
    from tinyagent_fast.prompts.rows import encode_examples

    def make(tokenizer: Any, count: int, *, max_length_tokens: int = 768) -> Any:
        examples = []
        for at in range(count):
            calls = [f'{n + 1}. open_note("{"ab" * (at + n)}", "")' for n in range(1 + at % 3)]
            examples.append(
                Example(
                    key=f"k{at}/0",
                    entry_key=f"k{at}",
                    kind="plan",
                    query=f"open note {at}",
                    system="tools: open_note",
                    user=f"Question: open note {at}" + " now" * (at * 7 % 5),
                    output="\n".join([*calls, f"{len(calls) + 1}. join()"]),
                )
            )
        folder = tmp_path_factory.mktemp("rows") / "rows"
        file = encode_examples(examples, tokenizer, folder, max_length_tokens=max_length_tokens)
        return file.dataset()

    return make


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    """Return a headless Chromium, or skip."""
    found = [shutil.which(program) for program in ("chromium", "chromedriver")]
    if None in found:
        pytest.skip("needs chromium and chromedriver (Debian: apt install chromium-driver)")
    from browser import chromium

    with chromium(*found, tmp_path_factory.mktemp("profile")) as running:
        yield running


@pytest.fixture
def quiet() -> Any:
    """Return a console that keeps what it is given, to be read with `.file.getvalue()`."""
    import io

    from rich.console import Console

    return Console(file=io.StringIO(), width=200, highlight=False)


# Another text than the one it trains on would do; it has braces and a newline, as templates have.
TINY_TEMPLATE = (
    "{% for m in messages %}{{ '### ' + m['role'] + ':\n' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### assistant:\n' }}{% endif %}"
)


@pytest.fixture(scope="session")
def make_llama() -> Callable[..., Path]:
    """Return a maker of Llama folders with random weights and no tokenizer, made without torch.

    Keywords go into config.json; None removes a key. Weights are drawn by `draw(random, shape)`.
    """
    import numpy as np

    from tinyagent_fast.export.checkpoints import NewTensor, write_safetensors
    from tinyagent_fast.models.families import LLAMA, ModelShape

    def standard(random: np.random.Generator, shape: tuple[int, ...]) -> Any:
        return random.standard_normal(shape, np.float32) * np.float32(0.05)

    def make(
        folder: Path, *, dtype: str = "BF16", draw: Callable[..., Any] = standard, **changes: Any
    ) -> Path:
        plain: dict[str, Any] = {
            "model_type": "llama",
            "vocab_size": 700,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "tie_word_embeddings": True,
        }
        config = {k: v for k, v in {**plain, **changes}.items() if v is not None}
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        random = np.random.default_rng(0)
        tensors = [
            NewTensor(one.source, dtype, one.shape, [draw(random, one.shape)])
            for one in LLAMA.tensors(ModelShape.from_config(config))
        ]
        write_safetensors(folder / "model.safetensors", tensors)
        return folder

    return make


@pytest.fixture(scope="session")
def tiny_merged(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path) -> Path:
    """Return the folder of a random Llama whose rows 256 divides, with a byte-level BPE."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from tinyagent_fast.models.loading import save_model
    from tinyagent_fast.models.nano import train_bpe_tokenizer

    torch.set_num_threads(1)
    entries = json.loads((tiny_data / "training_data.json").read_text(encoding="utf-8"))
    points = [point for entry in entries.values() for point in entry["output"]]
    texts = [p["raw_input"] + p["raw_output"] + "<END_OF_PLAN>\n" for p in points]
    tokenizer = train_bpe_tokenizer([*texts, "### Instruction:\n### Input:\n### Response:\n"], 768)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 50000.0},
        initializer_range=0.1,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )
    folder = tmp_path_factory.mktemp("merged")
    save_model(LlamaForCausalLM(config), tokenizer, folder)
    return folder


@pytest.fixture(scope="session")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory, tiny_merged: Path) -> dict[str, Path]:
    """Return the GGUF files of `tiny_merged` by file type, f32 and f16, with a chat template."""
    from tinyagent_fast.export.conversion import convert_to_gguf

    folder = tmp_path_factory.mktemp("gguf")
    files = {}
    for file_type in ("f32", "f16"):
        files[file_type] = convert_to_gguf(
            tiny_merged,
            folder / f"tiny-{file_type}.gguf",
            quant=file_type,
            name="tiny",
            texts={
                "tokenizer.chat_template": TINY_TEMPLATE,
                "tinyagent_fast.prompt_format": "alpaca",
            },
        ).path
    return files
