"""What is saved is read alike by transformers 4 and 5: classes, merges, templates, RoPE."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_families import MODELS, make_tokenizer
from tokenizers import Tokenizer

from tinyagent_fast.models.older_readers import config_for_both, write_for_older_readers
from tinyagent_fast.prompts.loading import HARD_STRINGS, load_tokenizer

TEXTS = ['1. send_sms(["$1"], "Hello there")\n2. join()'] * 50


def content(path: Path) -> dict[str, Any]:
    read: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return read


@pytest.mark.parametrize("name", list(MODELS))
def test_every_family_is_saved_with_both_spellings(
    name: str, tiny_family: Callable[[str], Path]
) -> None:
    from transformers import AutoConfig, AutoTokenizer

    folder = tiny_family(name)
    settings = content(folder / "tokenizer_config.json")
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert settings["chat_template"] == MODELS[name].template
    assert all(
        isinstance(merge, str) for merge in content(folder / "tokenizer.json")["model"]["merges"]
    )
    config = content(folder / "config.json")
    wanted = MODELS[name].config.get("rope_parameters") or config["rope_parameters"]
    wanted = wanted.get("full_attention", wanted)
    assert config["rope_theta"] == wanted["rope_theta"]
    scaled = wanted["rope_type"] != "default"
    assert bool(config["rope_scaling"]) == scaled
    assert config["torch_dtype"] == config["dtype"]
    # This version of transformers reads what it has written, and nothing else.
    read = AutoConfig.from_pretrained(str(folder))
    kept = config["rope_parameters"]
    for part in ("full_attention", "sliding_attention"):
        for key, value in kept.get(part, kept).items():
            assert read.rope_parameters.get(part, read.rope_parameters)[key] == value
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    ours = load_tokenizer(folder)
    for text in HARD_STRINGS:
        assert tokenizer.encode(text, add_special_tokens=False) == ours.encode(
            text, add_special_tokens=False
        )


@pytest.mark.parametrize(
    ("given", "theta", "scaling"),
    [
        ({"rope_type": "default", "rope_theta": 5e5}, 5e5, None),
        ({"rope_theta": 1e6}, 1e6, None),
        # Before transformers 4.43 these two keys and no others.
        ({"rope_type": "linear", "rope_theta": 1e4, "factor": 16.0}, 1e4,
         {"type": "linear", "factor": 16.0}),
        ({"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0}, 5e5,
         {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}),
        ({"full_attention": {"rope_type": "default", "rope_theta": 1e6},
          "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}, 1e6, None),
    ],
)  # fmt: skip
def test_rope_in_the_words_of_transformers_4(
    given: dict[str, Any], theta: float, scaling: dict[str, Any] | None
) -> None:
    found = config_for_both({"rope_parameters": given})
    assert (found["rope_theta"], found["rope_scaling"]) == (theta, scaling)
    assert found["rope_parameters"] == given
    assert found.get("rope_local_base_freq") == (1e4 if "full_attention" in given else None)


@pytest.mark.parametrize(
    "config",
    [
        {"rope_theta": 7.0, "rope_scaling": None},
        {"rope_theta": 7.0, "rope_parameters": {"a": 1}},
        {},
    ],
)
def test_what_says_it_already_stays_as_it_is(config: dict[str, Any]) -> None:
    assert config_for_both(config) == config


def test_further_special_tokens_have_the_name_that_both_read(
    tmp_path: Path,
) -> None:
    from transformers import AutoTokenizer

    made = make_tokenizer(MODELS["qwen2"], TEXTS)
    made.add_special_tokens({"extra_special_tokens": ["<one>", "<two>"]})
    made.save_pretrained(str(tmp_path))
    assert isinstance(content(tmp_path / "tokenizer_config.json")["extra_special_tokens"], list)
    write_for_older_readers(tmp_path)
    settings = content(tmp_path / "tokenizer_config.json")
    assert settings["additional_special_tokens"] == ["<one>", "<two>"]
    assert "extra_special_tokens" not in settings
    read = AutoTokenizer.from_pretrained(str(tmp_path))
    assert read.convert_tokens_to_ids("<two>") == made.convert_tokens_to_ids("<two>")
    assert "<two>" in read.all_special_tokens


def test_a_merge_with_a_space_keeps_the_spelling_that_can_say_it(tmp_path: Path) -> None:
    from tokenizers import models

    Tokenizer(models.BPE({" ": 0, "a": 1, " a": 2}, [(" ", "a")])).save(
        str(tmp_path / "tokenizer.json")
    )
    before = content(tmp_path / "tokenizer.json")
    write_for_older_readers(tmp_path)
    assert content(tmp_path / "tokenizer.json") == before
    assert Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode(" a").ids == [2]
