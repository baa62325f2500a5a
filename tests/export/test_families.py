"""Every family becomes a GGUF that llama.cpp reads with the same ids and the same logits."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_conversion import convert, largest_difference
from test_vocabulary import different, pieces_of, strings
from tiny_families import MODELS

from tinyagent_fast.config import Config
from tinyagent_fast.display import Display
from tinyagent_fast.doctor import check_exportable_base
from tinyagent_fast.errors import ModelError
from tinyagent_fast.export.conversion import check_exportable
from tinyagent_fast.export.gates import MAX_LOGIT_DIFFERENCE
from tinyagent_fast.export.merging import write_tokenizer
from tinyagent_fast.export.pipeline import run_export
from tinyagent_fast.export.preparation import prepare_export
from tinyagent_fast.export.settings import ExportSettings
from tinyagent_fast.inference.llama_cpp import LlamaCppSettings, LlamaServer
from tinyagent_fast.models.families import FAMILIES
from tinyagent_fast.prompts.loading import load_tokenizer
from tinyagent_fast.prompts.tokens import PromptTokenizer
from tinyagent_fast.training.fit import train


@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_gives_the_ids_and_logits_of_every_family(
    name: str, tiny_family: Callable[[str], Path], tmp_path: Path
) -> None:
    import unicodedata

    folder = tiny_family(name)
    gguf = convert(folder, tmp_path / "m.gguf").path
    noise = FAMILIES[MODELS[name].model_type].logit_noise
    assert largest_difference(folder, gguf) < MAX_LOGIT_DIFFERENCE + noise
    texts = [unicodedata.normalize("NFC", text) for text in strings(2000)]
    assert different(folder, gguf, texts + pieces_of(folder)) == []


def embeddings(folder: Path, rows: int) -> None:
    """Give a saved model so many embeddings and outputs."""
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in weights:
            had = weights[name]
            weights[name] = had.new_zeros(rows, had.shape[1])
            weights[name][: len(had)] = had
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def ends_in_llama_cpp(gguf: Path, ids: Iterable[int]) -> set[int]:
    """Let llama.cpp write each of some tokens, and give those at which it stops."""
    with LlamaServer(LlamaCppSettings(model=gguf, slots=1, threads=1)) as server:
        body = {"prompt": server.tokenize("a"), "n_predict": 2, "temperature": 0}
        answers = {
            at: server.request("POST", "/completion", {**body, "logit_bias": [[at, 1e6]]})
            for at in ids
        }
    return {at for at, answer in answers.items() if answer["stop_type"] == "eos"}


@pytest.mark.parametrize("name", MODELS)
def test_a_text_ends_at_the_same_tokens_in_torch_in_llama_cpp_and_by_the_exported_settings(
    name: str, tiny_family: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_family(name), folder)
    hf = load_tokenizer(folder)
    # Tokens of code models, as SmolLM2's and Qwen's vocabularies have them, and one of no meaning.
    more = ["<reponame>", "<|file_sep|>", "<|fim_pad|>", "<|end|>", "<other>"]
    hf.add_special_tokens({"extra_special_tokens": more})
    hf.save_pretrained(str(folder))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    embeddings(folder, len(hf))
    config["vocab_size"] = len(hf)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    tokenizer = PromptTokenizer(load_tokenizer(folder))
    special = {at for at, token in hf.added_tokens_decoder.items() if token.special}
    found = ends_in_llama_cpp(convert(folder, tmp_path / "m.gguf").path, sorted(special))
    assert found == tokenizer.end_ids
    assert hf.convert_tokens_to_ids("<other>") in special - found
    write_tokenizer(folder, tokenizer, tmp_path)
    written = json.loads((tmp_path / "generation_config.json").read_text(encoding="utf-8"))
    assert set(written["eos_token_id"]) == found
    assert written["eos_token_id"][0] == tokenizer.eos_id


@pytest.mark.parametrize(
    ("name", "prompt_format"), [("smollm2", "alpaca"), *((name, "chat") for name in MODELS)]
)
def test_every_family_is_trained_and_exported_through_all_gates(
    name: str,
    prompt_format: str,
    tiny_family: Callable[[str], Path],
    tiny_config: Callable[..., Config],
    no_picture: None,
    quiet: Any,
) -> None:
    base = tiny_family(name)
    config = tiny_config(
        model={"base": str(base), "prompt_format": prompt_format, "max_length_tokens": 1500},
        train={"learning_rate": 2e-2, "max_steps": 16},
    )
    run = train(config, quiet)
    family = FAMILIES[MODELS[name].model_type]
    shared = json.loads((run.path / "shared_prefix.json").read_text(encoding="utf-8"))
    assert shared["on"] is not bool(family.whole_rows)
    settings = ExportSettings(
        quant="f16,q8_0,q4_k_m", gate_prompts=2, quant_prompts=2, importance_rows=2, threads=1
    )
    config = replace(config, eval=replace(config.eval, max_new_tokens=24))
    run_export(prepare_export(run, config, settings, run.adapter, Display(quiet)))
    record = json.loads((run.path / "export" / "export.json").read_text(encoding="utf-8"))
    assert record["passed"] is True
    files = {a["quant"]: a["details"] for a in record["artefacts"] if a["kind"] == "gguf"}
    assert set(files) == {"f16", "q8_0", "q4_k_m"}
    # Rows of 96 are no whole blocks of K-quants, those of 256 are; llama.cpp's own substitutes.
    assert "blk.0.ffn_gate.weight: Q4_K -> Q5_0" in files["q4_k_m"]["fallbacks"]
    assert {"Q4_K", "Q5_0", "Q8_0", "F32"} <= set(files["q4_k_m"]["types"])
    assert not files["q8_0"]["fallbacks"]


def unexportable(base: Path, folder: Path) -> Path:
    """Copy a base and make it one whose words are cut as llama.cpp cuts none."""
    shutil.copytree(base, folder)
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["pre_tokenizer"]["pretokenizers"][0]["individual_digits"] = False
    path.write_text(json.dumps(content), encoding="utf-8")
    return folder


def test_what_export_would_refuse_is_said_before_the_first_step_and_by_doctor(
    tiny_family: Callable[[str], Path],
    tiny_config: Callable[..., Config],
    no_picture: None,
    quiet: Any,
    tmp_path: Path,
) -> None:
    good = tiny_family("smollm2")
    bad = unexportable(good, tmp_path / "bad")
    reason = "a pattern with no known name in llama.cpp"
    config = tiny_config(model={"base": str(bad), "max_length_tokens": 1500})
    run = train(config, quiet)
    warning = quiet.file.getvalue().index("warning: the trained model cannot become a GGUF file")
    assert reason in quiet.file.getvalue()[warning:]
    assert warning < quiet.file.getvalue().index("checked:")
    (finding,) = check_exportable_base(config)
    assert (finding.status, reason in finding.text) == ("warning", True)
    settings = ExportSettings(quant="f16", threads=1)
    with pytest.raises(ModelError, match=reason):
        prepare_export(run, config, settings, run.adapter, Display(quiet))
    (finding,) = check_exportable_base(tiny_config(model={"base": str(good)}))
    assert finding.status == "ok"


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("qwen2", {"use_sliding_window": True}, "use_sliding_window is True"),
        ("qwen3", {"attention_bias": True}, "attention_bias is True"),
        ("qwen3", {"rope_parameters": {"rope_type": "llama3"}}, "only default, linear"),
        ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types is"),
        ("gemma3", {"layer_types": ["full_attention"] * 7}, "layer_types is"),
        ("gemma3", {"query_pre_attn_scalar": 168}, "query_pre_attn_scalar is 168"),
        ("gemma3", {"hidden_activation": "gelu"}, "hidden_activation is 'gelu'"),
        ("gemma3", {"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0"),
        ("gemma3", {"sliding_window": None}, "sliding_window is None"),
        (
            "gemma3",
            {"rope_parameters": {"sliding_attention": {"rope_theta": 20000.0}}},
            "within a sliding window",
        ),
    ],
)
def test_a_relative_that_computes_otherwise_is_refused(
    name: str,
    change: dict[str, Any],
    reason: str,
    tiny_family: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_family(name), folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, **change}), encoding="utf-8")
    with pytest.raises(ModelError) as caught:
        check_exportable(folder, PromptTokenizer(load_tokenizer(folder)))
    assert reason in str(caught.value)
    with pytest.raises(ModelError):
        convert(folder, tmp_path / "m.gguf")
