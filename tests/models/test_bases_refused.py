"""Bases and adapters that cannot be used are refused when they are loaded, with the cause."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from tinyagent_fast.config import Config, LoraConfig, ModelConfig
from tinyagent_fast.errors import ModelError
from tinyagent_fast.models.loading import check_adapter, load_for_generation, load_for_training
from tinyagent_fast.training.best import load_adapter_weights

CONFIG = Config(
    model=ModelConfig(backend="transformers", weights="fp32"), lora=LoraConfig(rank=4, alpha=4)
)
Change = Callable[[dict[str, Any]], None]


@pytest.fixture
def base(tiny_base: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    shutil.copytree(tiny_base, folder)
    return folder


def load(folder: Path) -> Any:
    return load_for_generation(CONFIG, str(folder), None)


def change_weights(folder: Path, change: Change, name: str = "model.safetensors") -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(str(folder / name))
    change(tensors)
    save_file(tensors, str(folder / name), {"format": "pt"})


def change_config(folder: Path, changes: Mapping[str, Any]) -> None:
    path = folder / "config.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**content, **changes}), encoding="utf-8")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00" * 64,
        b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 4400216536\n",
        b"<!DOCTYPE html><html></html>",
        (2**62).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"{}",
    ],
    ids=["empty", "zeros", "pointer", "page", "header beyond the end", "no tensors"],
)
def test_damaged_weights_are_the_users_error(content: bytes, base: Path) -> None:
    (base / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelError) as refused:
        load(base)
    assert ("Git LFS" in refused.value.why) == content.startswith(b"version")


def test_weights_that_end_early_are_the_users_error(base: Path) -> None:
    whole = (base / "model.safetensors").read_bytes()
    (base / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelError, match="cannot be loaded"):
        load(base)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b'{"model_type": "unheard"}'])
def test_a_damaged_config_is_the_users_error(content: bytes, base: Path) -> None:
    (base / "config.json").write_bytes(content)
    with pytest.raises(ModelError):
        load(base)


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": 128},
        {"hidden_size": "64"},
        {"num_attention_heads": 0},
        {"num_attention_heads": 3},
        {"num_hidden_layers": 4},
        {"vocab_size": 5},
        {"rope_parameters": "none"},
        {"hidden_act": "no such function"},
        {"tie_word_embeddings": None, "num_hidden_layers": None},
    ],
    ids=str,
)
def test_a_config_that_is_not_that_of_the_weights_is_the_users_error(
    changes: Mapping[str, Any], base: Path
) -> None:
    change_config(base, changes)
    with pytest.raises(ModelError):
        load(base)


def test_a_missing_tensor_is_not_filled_by_chance(base: Path) -> None:
    change_weights(base, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(ModelError, match=r"lack 1 tensors.*layers\.1\.mlp\.up_proj"):
        load(base)


def test_layers_beyond_the_config_are_named(base: Path) -> None:
    change_config(base, {"num_hidden_layers": 1})
    assert any("no part of the model" in note for note in load(base).notes)


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.norm.weight"])
def test_numbers_that_are_not_finite_are_found_in_the_base(
    name: str, value: str, base: Path
) -> None:
    def spoil(tensors: dict[str, Any]) -> None:
        tensors[name].view(-1)[7] = float(value)

    change_weights(base, spoil)
    with pytest.raises(ModelError, match=rf"{name} has 1 values"):
        load_for_training(CONFIG, str(base))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickled_weights_are_refused_and_never_read(name: str, base: Path) -> None:
    import pickle

    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (base / "ran",))

    (base / "model.safetensors").unlink()
    (base / name).write_bytes(pickle.dumps(Trap()))
    with pytest.raises(ModelError, match="run code"):
        load(base)
    assert not (base / "ran").exists()


@pytest.mark.parametrize("kind", ["llama", "unheard"])
def test_code_of_a_base_is_never_run(
    kind: str, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = f"from pathlib import Path\nPath({str(base / 'ran')!r}).touch()\n"
    for name in ("configuration_own.py", "modeling_own.py", "tokenization_own.py"):
        (base / name).write_text(code, encoding="utf-8")
    own = {
        "AutoConfig": "configuration_own.Own",
        "AutoModelForCausalLM": "modeling_own.Own",
        "AutoTokenizer": ["tokenization_own.Own", None],
    }
    change_config(base, {"auto_map": own, "model_type": kind})
    # A question on the terminal would be a way in too.
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    if kind == "llama":
        load(base)
    else:
        with pytest.raises(ModelError):
            load(base)
    assert not (base / "ran").exists()


@pytest.fixture
def adapter(tiny_base: Path, tmp_path: Path) -> Path:
    loaded = load_for_training(CONFIG, str(tiny_base))
    loaded.model.save_pretrained(str(tmp_path / "adapter"))
    return tmp_path / "adapter"


FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def shortened(tensors: dict[str, Any]) -> None:
    tensors[FIRST] = tensors[FIRST][:2].clone()


def without_first(tensors: dict[str, Any]) -> None:
    del tensors[FIRST]


def with_another(tensors: dict[str, Any]) -> None:
    tensors[FIRST.replace("layers.0", "layers.9")] = tensors[FIRST].clone()


def not_finite(tensors: dict[str, Any]) -> None:
    tensors[FIRST][0, 0] = float("nan")


@pytest.mark.parametrize("change", [shortened, without_first, with_another, not_finite])
def test_an_adapter_that_does_not_fit_its_base_is_refused(
    change: Change, adapter: Path, tiny_base: Path
) -> None:
    load_for_generation(CONFIG, str(tiny_base), adapter)
    change_weights(adapter, change, "adapter_model.safetensors")
    with pytest.raises(ModelError, match="adapter"):
        load_for_generation(CONFIG, str(tiny_base), adapter)


def test_an_adapter_of_a_smaller_base_is_refused(
    adapter: Path, base: Path, tiny_base: Path
) -> None:
    def doubled(tensors: dict[str, Any]) -> None:
        for name in [name for name in tensors if "layers.0." in name]:
            tensors[name.replace("layers.0.", "layers.2.")] = tensors[name].clone()

    change_weights(base, doubled)
    change_config(base, {"num_hidden_layers": 3})
    with pytest.raises(ModelError, match="do not fit the base"):
        load_for_generation(CONFIG, str(base), adapter)
    model = load_for_training(CONFIG, str(base)).model
    with pytest.raises(ModelError, match="do not fit the base"):
        load_adapter_weights(model, adapter)
    check_adapter(load_for_training(CONFIG, str(tiny_base)).model, adapter)


def test_a_pickled_adapter_is_refused(adapter: Path, tiny_base: Path) -> None:
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(ModelError, match=r"no adapter_model\.safetensors"):
        load_for_generation(CONFIG, str(tiny_base), adapter)
