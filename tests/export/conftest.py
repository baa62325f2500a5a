"""Model folders with a tokenizer, for everything that converts."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def llama_folder(
    tmp_path_factory: pytest.TempPathFactory, spm_folder: Path, make_llama: Callable[..., Path]
) -> Callable[..., Path]:
    """Return a maker of model folders with a tokenizer of 700 tokens."""

    def make(**changes: Any) -> Path:
        folder = make_llama(tmp_path_factory.mktemp("llama"), **changes)
        shutil.copy(spm_folder / "tokenizer.model", folder)
        return folder

    return make
