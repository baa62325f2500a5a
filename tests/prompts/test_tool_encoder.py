"""An encoder scores the tools: it learns, says the same after saving, and belongs to a run."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tinyagent_fast.cli import main
from tinyagent_fast.config import Config, DataConfig, check_config, dump_config
from tinyagent_fast.data.schema import Example
from tinyagent_fast.errors import ConfigError, ModelError, TrainingError
from tinyagent_fast.models.encoder import Encoder, EncoderTraining
from tinyagent_fast.prompts.retrieval import (
    RetrievalFigures,
    ToolRetriever,
    load_retriever,
    train_retriever,
)
from tinyagent_fast.prompts.system_text import parse
from tinyagent_fast.runs import Run
from tinyagent_fast.training.inputs import load_run_examples, retriever_of_run

CALLS = {
    "note": 'create_note("A", "b", "")',
    "text": 'send_sms(["$1"], "Hello")',
    "open": 'open_and_get_file_path("plan")',
    "map": 'maps_open_location("Rome")',
}
FILLERS = ["please", "now", "the", "my", "for", "and", "it", "today", "a", "new", "quick", "one"]


def keyword_examples(count: int, seed: int) -> list[Example]:
    """Make plans that call a tool exactly if its word stands in the query, anywhere in it."""
    draw = random.Random(seed)
    examples = []
    for at in range(count):
        words = draw.sample(sorted(CALLS), draw.randint(1, 3))
        mixed = [*words, *draw.choices(FILLERS, k=6)]
        draw.shuffle(mixed)
        query = f"{' '.join(mixed)} {at + 1000 * seed}"
        lines = [f"{k}. {CALLS[word]}" for k, word in enumerate(words, start=1)]
        plan = "\n".join([*lines, f"{len(lines) + 1}. join()"])
        key = f"{seed}-{at}"
        examples.append(
            Example(
                key=f"{key}/0",
                entry_key=key,
                kind="plan",
                query=query,
                system=None,
                user=query,
                output=plan,
            )
        )
    return examples


@pytest.fixture(scope="module")
def tiny_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a random BERT of 0.03 M parameters that knows a few words."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", *sorted(CALLS), *FILLERS]
    core = Tokenizer(models.WordLevel({word: at for at, word in enumerate(words)}, "[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A", special_tokens=[("[CLS]", 2)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]", model_max_length=32
    )
    shape = BertConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        initializer_range=0.2,
    )
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("encoder")
    BertModel(shape).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def settings_of(encoder: Path, **changes: float | int) -> EncoderTraining:
    plain = EncoderTraining(encoder=str(encoder), epochs=60, learning_rate=3e-3, seed=0)
    return replace(plain, **changes)


@pytest.fixture
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINYAGENT_FAST_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def trained(
    tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[ToolRetriever, list[tuple[str, ...]], list[tuple[int, int]]]:
    """Return a retriever, what it gives unseen queries, and the progress that was told."""
    told: list[tuple[int, int]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TINYAGENT_FAST_CACHE", str(tmp_path_factory.mktemp("cache")))
        retriever, retrieved = train_retriever(
            keyword_examples(160, 1),
            recall=0.98,
            encoder=settings_of(tiny_encoder),
            on_progress=lambda done, total: told.append((done, total)),
        )
    return retriever, retrieved, told


def test_it_learns_which_words_need_which_tools(
    trained: tuple[ToolRetriever, list[tuple[str, ...]], list[tuple[int, int]]],
) -> None:
    retriever, retrieved, told = trained
    figures: RetrievalFigures = retriever.rewrite(keyword_examples(60, 2)).figures()
    assert figures.whole >= 0.95
    assert figures.retrieved <= figures.called + 0.7  # of 4 tools
    assert retriever.figures.whole >= 0.98
    assert len(retrieved) == 160
    assert [done for done, _ in told] == list(range(1, len(told) + 1))
    assert {total for _, total in told} == {len(told)}


def test_long_queries_are_read_to_their_end(
    trained: tuple[ToolRetriever, list[tuple[str, ...]], list[tuple[int, int]]],
) -> None:
    retriever = trained[0]
    long = " ".join(["text", *FILLERS] * 5)  # twice as long as the encoder's context
    with_map = [f"map {long}", f"{long} map", f"{long} map {long}"]
    maps = retriever.tools.index("maps_open_location")
    without, *shares = retriever.scorer.probabilities([long, *with_map])[:, maps]
    assert all(share > without for share in shares)
    assert all("maps_open_location" in retriever.retrieve(query) for query in with_map)


def test_it_says_the_same_after_saving_and_loading_and_alone(
    trained: tuple[ToolRetriever, list[tuple[str, ...]], list[tuple[int, int]]], tmp_path: Path
) -> None:
    retriever = trained[0]
    paths = retriever.save(tmp_path)
    suffixes = {path.suffix for path in paths}
    assert suffixes == {".json", ".npz", ".safetensors"}
    again = load_retriever(tmp_path)
    assert again is not None
    assert again.key() == retriever.key()
    assert again.facts() == retriever.facts()
    queries = [example.query for example in keyword_examples(70, 3)]
    ours, theirs = (one.scorer.probabilities(queries) for one in (retriever, again))
    assert (ours == theirs).all()
    alone = [again.retrieve(query) for query in queries]
    assert alone == retriever.retrieve_all(queries)
    assert again.save(tmp_path) == paths  # into its own folder
    config = json.loads((tmp_path / "retriever-encoder" / "config.json").read_text("utf-8"))
    assert set(config["label2id"]) == set(retriever.tools)


def test_equal_trainings_are_equal_and_others_have_other_keys(
    tiny_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    examples = keyword_examples(40, 4)
    made = {}
    for name, seed in (("one", 0), ("two", 0), ("other", 1)):
        monkeypatch.setenv("TINYAGENT_FAST_CACHE", str(tmp_path / name))  # so each is trained
        torch.manual_seed(hash(name) % 1000)  # what went before does not count
        before = torch.get_rng_state()
        settings = settings_of(tiny_encoder, epochs=1, seed=seed)
        made[name], _ = train_retriever(examples, recall=0.9, encoder=settings)
        assert torch.equal(torch.get_rng_state(), before)  # nor does it change what comes after
    assert made["one"].key() == made["two"].key()
    assert made["one"].facts()["encoder"] == made["two"].facts()["encoder"]
    # Its weights count even where all else is equal.
    scorer = made["other"].scorer
    assert replace(made["one"], scorer=scorer).key() != made["one"].key()


@pytest.mark.usefixtures("_own_cache")
def test_an_equal_training_is_taken_from_the_cache_and_another_wanted_recall_costs_none(
    tiny_encoder: Path, tmp_path: Path
) -> None:
    examples = keyword_examples(40, 5)
    told: list[int] = []

    def train(recall: float, encoder: Path, epochs: int = 1) -> int:
        before = len(told)
        train_retriever(
            examples,
            recall=recall,
            encoder=settings_of(encoder, epochs=epochs),
            on_progress=lambda done, _: told.append(done),
        )
        return len(told) - before

    assert train(0.9, tiny_encoder) > 0
    assert train(0.5, tiny_encoder) == 0
    copy = tmp_path / "elsewhere"
    shutil.copytree(tiny_encoder, copy)
    assert train(0.9, copy) == 0  # the same files
    assert train(0.9, tiny_encoder, epochs=2) > 0


@pytest.mark.usefixtures("_own_cache")
@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "unseen.npy"])
def test_a_damaged_encoder_in_the_cache_is_trained_anew_and_it_is_said(
    name: str, tiny_encoder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    examples, settings = keyword_examples(20, 5), settings_of(tiny_encoder, epochs=1)
    before, _ = train_retriever(examples, recall=0.9, encoder=settings)
    (file,) = (tmp_path / "cache").rglob(name)
    content = bytearray(file.read_bytes())
    content[-9] ^= 1
    file.write_bytes(content)
    again, _ = train_retriever(examples, recall=0.9, encoder=settings)
    assert "damaged" in caplog.text
    assert again.key() == before.key()


@pytest.mark.usefixtures("_own_cache")
def test_encoders_that_cannot_be_had_are_the_users_errors(
    tiny_encoder: Path, tmp_path: Path
) -> None:
    examples = keyword_examples(20, 6)

    def train(encoder: str | Path, **changes: float) -> None:
        settings = replace(settings_of(tiny_encoder, epochs=1, **changes), encoder=str(encoder))
        train_retriever(examples, recall=0.9, encoder=settings)

    with pytest.raises(ModelError, match="no local folder, and HF_HUB_OFFLINE is set"):
        train("nobody/nothing-here")
    with pytest.raises(TrainingError, match="learning-rate"):
        train(tiny_encoder, learning_rate=1e30)
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        damaged = tmp_path / name
        shutil.copytree(tiny_encoder, damaged)
        (damaged / name).unlink()
        with pytest.raises(ModelError, match="retriever-encoder"):
            train(damaged)
    no_body = tmp_path / "no-body"
    shutil.copytree(tiny_encoder, no_body)
    from safetensors.torch import load_file, save_file

    tensors = load_file(no_body / "model.safetensors")
    left = {name: value for name, value in tensors.items() if "layer.1." not in name}
    save_file(left, no_body / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match="lack"):
        train(no_body)
    assert not list((tmp_path / "cache" / "encoders").iterdir())


def test_a_damaged_encoder_of_a_run_is_the_users_error(
    trained: tuple[ToolRetriever, list[tuple[str, ...]], list[tuple[int, int]]], tmp_path: Path
) -> None:
    trained[0].save(tmp_path)
    weights = tmp_path / "retriever-encoder" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    found = load_retriever(tmp_path)
    assert found is not None
    with pytest.raises(ModelError, match="not the one that was saved"):
        found.retrieve("map")
    weights.unlink()
    found = load_retriever(tmp_path)
    assert found is not None
    with pytest.raises(ModelError, match=r"retriever\.json"):
        found.retrieve("map")


def test_an_encoder_that_nothing_asks_for_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"needs data\.retriever encoder"):
        check_config(Config(data=DataConfig(retriever_encoder="my/encoder")))
    check_config(Config(data=DataConfig(retriever="encoder", retriever_encoder="my/encoder")))


@pytest.mark.usefixtures("_own_cache")
def test_a_run_has_its_encoder_and_its_prompts_follow_it(
    tiny_encoder: Path, config_in: Callable[..., Config], tmp_path: Path
) -> None:
    plain = config_in(tmp_path)
    data = replace(
        plain.data,
        prompts="retrieved",
        retriever="encoder",
        retriever_encoder=str(tiny_encoder),
        retriever_epochs=1,
    )
    config = replace(plain, data=data)
    found = load_run_examples(config)
    assert found.retriever is not None
    assert isinstance(found.retriever.scorer, Encoder)
    assert found.summary["retriever"]["encoder"] == found.retriever.scorer.sha256
    for example in (*found.validation, *found.test):
        tools = found.retriever.retrieve(example.query)
        assert set(parse(example.system or "").tools) == set(tools)
    run = Run(tmp_path / "runs" / "one")
    run.path.mkdir(parents=True)
    run.config_path.write_text(dump_config(config), encoding="utf-8")
    of_run = retriever_of_run(run)  # as chat, serve, eval and export find it
    assert of_run is not None
    assert of_run.key() == found.retriever.key()
    assert (run.path / "retriever-encoder" / "model.safetensors").exists()
    shutil.rmtree(tmp_path / "cache")
    alone = load_retriever(run.path)
    assert alone is not None
    assert alone.retrieve("Open the file") == found.retriever.retrieve("Open the file")


@pytest.mark.usefixtures("_own_cache")
def test_the_command_measures_an_encoder(
    tiny_encoder: Path, tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["data", "retrieval", str(tiny_data / "training_data.json")]
    command += ["--test", str(tiny_data / "testing_data.json"), "--out", str(tmp_path / "r")]
    command += ["--retriever", "encoder", "--retriever-encoder", str(tiny_encoder)]
    assert main([*command, "--retriever-epochs", "1"]) == 0
    said = capsys.readouterr().out
    assert "of 40 queries" in said
    assert "of 6 queries" in said
    assert "model.safetensors" in said
    assert load_retriever(tmp_path / "r") is not None
    assert main([*command, "--retriever-epochs", "0"]) == 2


def test_tfidf_needs_no_torch(tiny_data: Path, tmp_path: Path) -> None:
    code = """
import sys
from tinyagent_fast.cli import main
assert main(sys.argv[1:]) == 0
print(sorted({"torch", "transformers"} & set(sys.modules)))
"""
    files = [str(tiny_data / f"{name}_data.json") for name in ("training", "testing")]
    done = subprocess.run(
        [sys.executable, "-c", code, "data", "retrieval", files[0], "--test", files[1]],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.gpu
@pytest.mark.usefixtures("_own_cache")
def test_on_cuda_it_learns_and_leaves_the_gpu_and_its_random_numbers_as_they_were(
    tiny_encoder: Path, tmp_path: Path
) -> None:
    import torch

    # cuBLAS takes memory when it first multiplies, and keeps it.
    train_retriever(
        keyword_examples(80, 4), recall=0.98, encoder=settings_of(tiny_encoder, epochs=1)
    )
    torch.cuda.reset_peak_memory_stats()
    before, random_before = torch.cuda.memory_allocated(), torch.cuda.get_rng_state()
    retriever, _ = train_retriever(
        keyword_examples(160, 1), recall=0.98, encoder=settings_of(tiny_encoder)
    )
    assert retriever.rewrite(keyword_examples(100, 2)).figures().whole >= 0.95
    assert torch.cuda.max_memory_allocated() > before  # it was there
    assert torch.cuda.memory_allocated() == before
    assert torch.equal(torch.cuda.get_rng_state(), random_before)
    queries = [example.query for example in keyword_examples(100, 3)]
    many = retriever.scorer.probabilities(queries)  # on the GPU
    few = [retriever.scorer.probabilities([query])[0] for query in queries]  # on the CPU
    assert abs(many - few).max() < 1e-3
