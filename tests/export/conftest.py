"""Model folders with a tokenizer, for everything that converts."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tinyagent_fast.prompts.loading import load_tokenizer


@pytest.fixture(scope="session")
def spm_json(tmp_path_factory: pytest.TempPathFactory, spm_folder: Path) -> Path:
    """Return a folder with the tokenizer.json alone that training makes of a tokenizer.model."""
    folder = tmp_path_factory.mktemp("spm_json")
    load_tokenizer(spm_folder).save_pretrained(str(folder))
    assert not (folder / "tokenizer.model").exists()
    return folder


@pytest.fixture(scope="session")
def llama_folder(
    tmp_path_factory: pytest.TempPathFactory, spm_json: Path, make_llama: Callable[..., Path]
) -> Callable[..., Path]:
    """Return a maker of model folders with a tokenizer of 700 tokens."""

    def make(**changes: Any) -> Path:
        folder = make_llama(tmp_path_factory.mktemp("llama"), **changes)
        shutil.copytree(spm_json, folder, dirs_exist_ok=True)
        return folder

    return make
