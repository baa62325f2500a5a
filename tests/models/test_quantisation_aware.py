"""Quantisation-aware training: what is computed is what a quantised file computes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tinyagent_fast.config import Config, check_config
from tinyagent_fast.errors import ConfigError
from tinyagent_fast.models.quantisation_aware import rounded

GRIDS = {"Q8_0": 0.01, "Q6_K": 0.03, "Q5_K": 0.06, "Q5_0": 0.06, "Q4_K": 0.11}


def weight(seed: int = 0) -> Any:
    import torch

    torch.manual_seed(seed)
    return torch.randn(8, 512) * torch.rand(8, 1)


@pytest.mark.parametrize("grid", GRIDS)
def test_rounding_costs_what_the_format_costs(grid: str) -> None:
    before = weight()
    after = rounded(before, grid)
    error = float((after - before).norm() / before.norm())
    assert 0.2 * GRIDS[grid] < error < GRIDS[grid]


@pytest.mark.parametrize("grid", GRIDS)
def test_a_rounded_weight_is_on_the_grid_already(grid: str) -> None:
    once = rounded(weight(), grid)
    np.testing.assert_allclose(rounded(once, grid), once, atol=2e-2 * float(once.abs().max()))


@pytest.mark.parametrize("grid", GRIDS)
def test_zeros_and_constants_survive(grid: str) -> None:
    import torch

    assert torch.equal(rounded(torch.zeros(2, 256), grid), torch.zeros(2, 256))
    constant = torch.full((2, 256), -0.5)
    torch.testing.assert_close(rounded(constant, grid), constant, rtol=0.02, atol=0)


def test_four_bits_hold_at_most_sixteen_values_a_block() -> None:
    blocks = rounded(weight(), "Q4_K").reshape(-1, 32)
    assert max(len(np.unique(np.round(block, 6))) for block in blocks.numpy()) <= 16


def quantised_model(tiny_base: Any) -> Any:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from tinyagent_fast.models.quantisation_aware import train_quantised

    torch.manual_seed(0)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(str(tiny_base)),
        LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"),
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    counts = train_quantised(model, "q8_0")
    return model, counts


def test_the_model_computes_with_the_rounded_sum_of_base_and_adapter(tiny_base: Any) -> None:
    import torch

    model, counts = quantised_model(tiny_base)
    assert counts == {"Q8_0": 14}
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    update = layer.scaling["default"] * (
        layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    )
    expected = rounded((layer.base_layer.weight + update).detach(), "Q8_0")
    x = torch.randn(3, expected.shape[1])
    torch.testing.assert_close(layer(x), x @ expected.T)
    plain = model.base_model.model.model.layers[0].mlp.up_proj
    torch.testing.assert_close(plain(x), x @ rounded(plain.weight, "Q8_0").T)


def test_gradients_pass_the_rounding_and_the_base_stays(tiny_base: Any) -> None:
    import torch

    model, _ = quantised_model(tiny_base)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ids = torch.arange(3, 20)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all(grad is not None and float(grad.abs().max()) > 0 for grad in trained.values())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("section", "change", "word"),
    [
        ("model", {"weights": "nf4"}, "model.weights"),
        ("model", {"backend": "unsloth"}, "model.backend"),
        ("lora", {"dropout": 0.1}, "lora.dropout"),
    ],
)
def test_settings_that_hide_the_weights_are_refused(
    tiny_config: Callable[..., Config], section: str, change: dict[str, Any], word: str
) -> None:
    config = tiny_config(train={"qat": "q4_k_m"}, lora={"rank": 2})
    check_config(config)
    changed = replace(config, **{section: replace(getattr(config, section), **change)})
    with pytest.raises(ConfigError, match=word):
        check_config(changed)


def test_a_run_trains_with_rounded_weights_and_leaves_an_ordinary_adapter(
    tiny_config: Callable[..., Config], quiet: Any, no_picture: None
) -> None:
    from tinyagent_fast.export.merging import read_adapter
    from tinyagent_fast.training.fit import train

    run = train(tiny_config(train={"qat": "q8_0"}), quiet)
    assert "weights rounded for q8_0: 14 as Q8_0" in quiet.file.getvalue()
    assert run.config().train.qat == "q8_0"
    assert len(read_adapter(run.adapter)) == 14
