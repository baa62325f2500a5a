"""Adapter into base: equal to peft's merge, proved on every weight, refused where it is wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tinyagent_fast.errors import GateError, ModelError
from tinyagent_fast.export import merging
from tinyagent_fast.export.checkpoints import open_checkpoint, read_rows
from tinyagent_fast.export.merging import merge_adapter, read_adapter, write_tokenizer
from tinyagent_fast.prompts.templates import render_prompt


@pytest.fixture(scope="module")
def adapter(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of an adapter on all linear weights of the tiny base."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(str(tiny_base)),
        LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    folder = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(str(folder))
    return folder


def peft_merge(base: Path, adapter: Path) -> dict[str, Any]:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(base))
    merged = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    return {name: value.numpy() for name, value in merged.state_dict().items()}


def rewritten(adapter: Path, folder: Path, **settings: Any) -> Path:
    shutil.copytree(adapter, folder)
    path = folder / "adapter_config.json"
    content = {**json.loads(path.read_text(encoding="utf-8")), **settings}
    path.write_text(json.dumps(content), encoding="utf-8")
    return folder


def values(folder: Path) -> dict[str, Any]:
    tensors = open_checkpoint(folder).tensors
    return {name: read_rows(tensor, 0, tensor.shape[0]) for name, tensor in tensors.items()}


def test_merging_gives_what_peft_gives(tiny_base: Path, adapter: Path, tmp_path: Path) -> None:
    report = merge_adapter(tiny_base, adapter, tmp_path / "merged")
    theirs = peft_merge(tiny_base, adapter)
    for name, ours in values(tmp_path / "merged").items():
        np.testing.assert_allclose(ours, theirs[name], atol=1e-6, err_msg=name)
    assert report.adapted == 14
    assert report.dtype == "f32"
    assert 0 < report.worst_error_ulp <= 1


def test_scales_follow_rank_stabilised_lora_and_alpha_patterns(
    tiny_base: Path, adapter: Path, tmp_path: Path
) -> None:
    changed = rewritten(adapter, tmp_path / "a", use_rslora=True, alpha_pattern={"q_proj": 2})
    merge_adapter(tiny_base, changed, tmp_path / "merged")
    theirs = peft_merge(tiny_base, changed)
    for name, ours in values(tmp_path / "merged").items():
        np.testing.assert_allclose(ours, theirs[name], atol=1e-6, err_msg=name)


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_half_precision_rounds_once_and_says_what_it_cost(
    tiny_base: Path, adapter: Path, tmp_path: Path, dtype: Any
) -> None:
    report = merge_adapter(tiny_base, adapter, tmp_path / "merged", dtype=dtype)
    assert report.dtype == dtype
    assert 0 < report.update_lost < 0.1
    config = json.loads((tmp_path / "merged" / "config.json").read_text(encoding="utf-8"))
    assert config["dtype"] == {"bf16": "bfloat16", "f16": "float16"}[dtype]


def test_weights_without_an_update_are_the_bases_bit_for_bit(
    tiny_base: Path, adapter: Path, tmp_path: Path
) -> None:
    merge_adapter(tiny_base, adapter, tmp_path / "merged")
    before, after = values(tiny_base), values(tmp_path / "merged")
    untouched = set(before) - set(read_adapter(adapter))
    assert len(untouched) == 7
    assert all(np.array_equal(before[name], after[name]) for name in untouched)


@pytest.mark.parametrize("victim", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
@pytest.mark.parametrize("value", [0.75, float("nan")])
def test_a_wrongly_written_weight_stops_the_export(
    tiny_base: Path,
    adapter: Path,
    tmp_path: Path,
    victim: str,
    value: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    right = merging._write_configs

    def damage(base: Path, target: Path, dtype: Any) -> None:
        right(base, target, dtype)
        tensor = open_checkpoint(target).tensors[victim]
        with tensor.path.open("r+b") as stream:
            stream.seek(tensor.offset_bytes)
            stream.write(np.float32(value).tobytes())

    monkeypatch.setattr(merging, "_write_configs", damage)
    with pytest.raises(GateError, match=victim):
        merge_adapter(tiny_base, adapter, tmp_path / "merged")


def test_an_adapter_of_another_base_is_refused(adapter: Path, tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    other = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    LlamaForCausalLM(other).save_pretrained(str(tmp_path / "other"))
    with pytest.raises(ModelError, match="trained on"):
        merge_adapter(tmp_path / "other", adapter, tmp_path / "merged")


@pytest.mark.parametrize(
    "settings",
    [{"use_dora": True}, {"bias": "all"}, {"modules_to_save": ["lm_head"]}, {"peft_type": "IA3"}],
)
def test_adapters_that_are_more_than_plain_lora_are_refused(
    adapter: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    with pytest.raises(ModelError, match=next(iter(settings))):
        read_adapter(rewritten(adapter, tmp_path / "a", **settings))


def test_an_unfinished_adapter_is_named(adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="has no adapter_config"):
        read_adapter(tmp_path)
    shutil.copyfile(adapter / "adapter_config.json", tmp_path / "adapter_config.json")
    with pytest.raises(ModelError, match="adapter_model"):
        read_adapter(tmp_path)


def test_the_merged_folder_loads_in_plain_transformers_with_its_tokenizer_and_template(
    tiny_base: Path, adapter: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tinyagent_fast.prompts.loading import load_tokenizer
    from tinyagent_fast.prompts.tokens import PromptTokenizer

    merge_adapter(tiny_base, adapter, tmp_path / "merged")
    tokenizer = PromptTokenizer(load_tokenizer(tiny_base))
    write_tokenizer(tiny_base, tokenizer, tmp_path / "merged")
    model = AutoModelForCausalLM.from_pretrained(str(tmp_path / "merged"))
    loaded = AutoTokenizer.from_pretrained(str(tmp_path / "merged"))
    ids = loaded.apply_chat_template(
        [{"role": "user", "content": "who?"}],
        tokenize=True,
        add_generation_prompt=True,
        return_dict=False,
    )
    assert ids == tokenizer.encode_prompts([render_prompt(None, "who?", "alpaca")])[0]
    assert model.generation_config.eos_token_id == [2]
    assert tokenizer.hf.chat_template is None
    # transformers 4 before 4.57 looks for both in this file.
    settings = json.loads((tmp_path / "merged" / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert settings["chat_template"] == loaded.chat_template
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["rope_theta"] == model.config.rope_parameters["rope_theta"]
