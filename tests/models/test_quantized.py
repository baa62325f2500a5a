"""NF4 weights, LoRA and 8-bit AdamW, for real on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tinyagent_fast.config import Config
from tinyagent_fast.inference.engine import Limits
from tinyagent_fast.inference.torch_engine import TorchEngine, generating
from tinyagent_fast.models.loading import LoadedModel, load_for_training
from tinyagent_fast.plans.grammar import END_OF_PLAN
from tinyagent_fast.training.trainer import build_trainer, collate, validation_loss

MakeConfig = Callable[..., Config]
NF4: dict[str, Any] = {
    "model": {"weights": "nf4"},
    # Wide enough for 8-bit states: bitsandbytes keeps tensors below 4096 elements in 32 bits.
    "lora": {"rank": 128, "alpha": 128},
    "train": {
        "optimizer": "adamw_8bit",
        "max_steps": 10,
        "batch": 8,
        "learning_rate": 3e-3,
        "save_every_steps": 100,
    },
}


def cpu_has_avx512_bf16() -> bool:
    path = Path("/proc/cpuinfo")
    return path.exists() and "avx512_bf16" in path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def nf4_config(config_in: MakeConfig, tmp_path_factory: pytest.TempPathFactory) -> Config:
    return config_in(tmp_path_factory.mktemp("nf4"), **NF4)


@pytest.fixture(scope="module")
def trained(nf4_config: Config, tiny_rows: Callable[..., Any]) -> Iterator[tuple[Any, LoadedModel]]:
    """Return a trainer after ten steps on eight rows, and its model."""
    config = nf4_config
    loaded = load_for_training(config, config.model.base)
    before = {n: p.detach().clone() for n, p in loaded.model.named_parameters()}
    trainer = build_trainer(
        loaded,
        tiny_rows(loaded.tokenizer, 8),
        config,
        output_dir=config.runs / "checkpoints",
    )
    trainer.train()
    trainer.before = before
    yield trainer, loaded


def test_base_weights_are_held_in_four_bits_with_double_quantisation(
    trained: tuple[Any, LoadedModel],
) -> None:
    import bitsandbytes as bnb
    import torch

    _, loaded = trained
    layers = [m for m in loaded.model.modules() if isinstance(m, bnb.nn.Linear4bit)]
    assert len(layers) == 2 * 7
    for layer in layers:
        assert isinstance(layer.weight, bnb.nn.Params4bit)
        assert layer.weight.dtype is torch.uint8
        assert layer.weight.quant_state.quant_type == "nf4"
        assert layer.weight.quant_state.nested
        # Two weights a byte.
        assert layer.weight.numel() * 2 == layer.in_features * layer.out_features
    assert loaded.notes == ()


def test_the_loss_falls_and_only_the_adapter_moves(trained: tuple[Any, LoadedModel]) -> None:
    import torch

    trainer, loaded = trained
    losses = [r["loss"] for r in trainer.state.log_history if "loss" in r]
    assert len(losses) == 10
    assert losses[-1] < 0.8 * losses[0]
    for name, parameter in loaded.model.named_parameters():
        moved = not torch.equal(parameter.detach(), trainer.before[name])
        assert moved is ("lora_" in name), name


def test_the_adapter_is_trained_in_32_bits(trained: tuple[Any, LoadedModel]) -> None:
    """Rounded to bf16, as trl does on a quantised base, small steps of AdamW would be lost."""
    import torch

    _, loaded = trained
    adapter = [p for p in loaded.model.parameters() if p.requires_grad]
    assert {p.dtype for p in adapter} == {torch.float32}
    assert any(not torch.equal(p, p.bfloat16().float()) for p in adapter)


def test_the_optimizer_holds_its_states_in_eight_bits(trained: tuple[Any, LoadedModel]) -> None:
    import torch

    trainer, _ = trained
    states = list(trainer.optimizer.state.values())
    large = [s for s in states if s["state1"].numel() >= 4096]
    assert len(large) >= len(states) / 2
    for state in large:
        assert state["state1"].dtype is torch.uint8
        assert state["state2"].dtype is torch.uint8


def gradients_of(loaded: LoadedModel, rows: Any) -> dict[str, Any]:
    batch = collate([rows[i] for i in range(4)], loaded.tokenizer.pad_id)
    loaded.model.train()
    loaded.model.zero_grad(set_to_none=True)
    loaded.model(**batch, use_cache=False).loss.backward()
    found = {n: p.grad.clone() for n, p in loaded.model.named_parameters() if p.grad is not None}
    loaded.model.zero_grad(set_to_none=True)
    return found


def evaluate_once(trainer: Any, loaded: LoadedModel, rows: Any) -> None:
    prompts = [list(row["input_ids"][:20]) for row in rows]
    with generating(loaded):
        validation_loss(trainer, list(rows), loaded.tokenizer.pad_id)
    limits = Limits(stop=END_OF_PLAN, max_new_tokens=4, batch=4)
    for _ in TorchEngine(loaded).complete_tokens(prompts, limits):
        pass


def test_gradients_after_an_evaluation_equal_those_before_it(
    trained: tuple[Any, LoadedModel], tiny_rows: Callable[..., Any]
) -> None:
    """On CPUs with AVX512-BF16 the first forward without gradients could repack the weights."""
    import torch

    trainer, loaded = trained
    rows = tiny_rows(loaded.tokenizer, 8)
    before = gradients_of(loaded, rows)
    weights = {n: p.detach().clone() for n, p in loaded.model.named_parameters()}
    evaluate_once(trainer, loaded, rows)
    after = gradients_of(loaded, rows)
    assert before.keys() == after.keys()
    assert len(before) == 2 * 7 * 2
    assert all(torch.equal(before[name], after[name]) for name in before)
    for name, parameter in loaded.model.named_parameters():
        assert torch.equal(parameter.detach(), weights[name]), name


@pytest.mark.filterwarnings("ignore:bitsandbytes")
@pytest.mark.skipif(not cpu_has_avx512_bf16(), reason="this CPU has no AVX512-BF16")
def test_without_our_switch_an_evaluation_would_change_the_gradients(
    nf4_config: Config, tiny_rows: Callable[..., Any]
) -> None:
    """Shows that the switch in loading.py is needed; drop both when bitsandbytes repairs this."""
    import bitsandbytes as bnb
    import torch

    loaded = load_for_training(nf4_config, nf4_config.model.base)
    for module in loaded.model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = True
    rows = tiny_rows(loaded.tokenizer, 8)
    before = gradients_of(loaded, rows)
    loaded.model.eval()
    with torch.no_grad():
        loaded.model(input_ids=torch.tensor([rows[0]["input_ids"]]))
    try:
        after = gradients_of(loaded, rows)
    except RuntimeError:
        return  # shapes no longer fit, which at least is no silence
    assert not all(torch.equal(before[name], after[name]) for name in before)


def test_an_adapter_trained_on_four_bits_loads_onto_four_bits(
    trained: tuple[Any, LoadedModel], nf4_config: Config, tmp_path: Path, tiny_rows: Any
) -> None:
    import torch

    from tinyagent_fast.models.loading import load_for_generation, save_model

    _, loaded = trained
    save_model(loaded.model, loaded.tokenizer.hf, tmp_path / "adapter", {"n.json": {"a": 1}})
    again = load_for_generation(nf4_config, nf4_config.model.base, tmp_path / "adapter")
    ids = torch.tensor([tiny_rows(loaded.tokenizer, 3)[2]["input_ids"]])
    with generating(loaded), generating(again):
        torch.testing.assert_close(again.model(ids).logits, loaded.model(ids).logits)
    assert (tmp_path / "adapter" / "n.json").exists()


def test_weights_that_could_not_be_quantised_are_said(
    config_in: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    original = AutoModelForCausalLM.from_pretrained

    def without_quantisation(*arguments: Any, **keywords: Any) -> Any:
        return original(*arguments, **{**keywords, "quantization_config": None})

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", without_quantisation)
    config = config_in(tmp_path, **NF4)
    loaded = load_for_training(config, config.model.base)
    assert any("not in 4 bits" in note for note in loaded.notes)
