"""What several tests of shared prefixes train."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module")
def four_bits(
    config_in: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Any]:
    import torch

    from tinyagent_fast.models.loading import load_for_training

    folder: Path = tmp_path_factory.mktemp("four-bits")
    config = config_in(folder, model={"weights": "nf4"})
    model = load_for_training(config, config.model.base).model
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    yield model.train()
