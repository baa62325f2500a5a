"""Shared prefixes by Unsloth's kernels: its GPU code, run on a CPU by Triton's interpreter.

Importing Unsloth changes other libraries for the whole process, so this file is also the program
that computes; the tests compare with transformers and peft, in their own process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tinyagent_fast.config import Config

MakeConfig = Callable[..., "Config"]

CASES: dict[str, dict[str, Any]] = {
    "nf4": {},
    "nf4, checkpointing": {"model": {"gradient_checkpointing": "true"}},
    "nf4, Unsloth's checkpointing": {"model": {"gradient_checkpointing": "unsloth"}},
    "attention only": {"lora": {"targets": "attention"}},
    "dropout": {"lora": {"dropout": 0.2}},
    "fp32 base": {"model": {"weights": "fp32"}},
    "fp16": {"model": {"weights": "fp16"}},
}
EXACT = [name for name in CASES if name != "fp16"]
"""Computed in fp32, apart from the types' own rounding."""


def case_config(config_in: MakeConfig, folder: Path, name: str, backend: str) -> Config:
    case = CASES[name]
    model = {"weights": "nf4", **case.get("model", {}), "backend": backend}
    return config_in(folder, name=name, model=model, lora=case.get("lora", {}))


def rows() -> list[dict[str, list[int]]]:
    """Rows that share 16 tokens, of which two share 8 more; four supervised tokens each."""
    import torch

    generator = torch.Generator().manual_seed(3)

    def tokens(count: int) -> list[int]:
        drawn: list[int] = torch.randint(5, 700, (count,), generator=generator).tolist()
        return drawn

    stem, branch = tokens(16), tokens(8)
    made = []
    for at in range(3):
        ids = stem + (branch if at else []) + tokens(5 + 2 * at)
        made.append({"input_ids": ids, "labels": [-100] * (len(ids) - 4) + ids[-4:]})
    return made


def fill(model: Any) -> None:
    """Give an adapter the same numbers whoever made it, none of them zero."""
    import torch

    generator = torch.Generator().manual_seed(7)
    for _, parameter in sorted(model.named_parameters()):
        if parameter.requires_grad:
            parameter.data.normal_(std=0.05, generator=generator)


def gradients(model: Any, loss: Any) -> dict[str, Any]:
    """Give loss and gradients by the names of the parameters, and leave none."""
    loss.backward()
    named = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return {"loss": loss.detach(), **named}


def shared(model: Any, **named: Any) -> dict[str, Any]:
    from tinyagent_fast.shared_prefix.forward import shared_prefix_loss
    from tinyagent_fast.shared_prefix.packing import pack

    packed = pack(rows(), smallest_shared_tokens=4)
    return gradients(model, shared_prefix_loss(model, packed, **named))


def in_parts(model: Any, **named: Any) -> dict[str, Any]:
    """Compute two micro-batches behind a prefix that is computed once."""
    from tinyagent_fast.shared_prefix.packing import pack_step
    from tinyagent_fast.shared_prefix.step import step_gradients

    step = pack_step(rows(), 2, smallest_shared_tokens=4)
    assert [(len(g.prefix_ids), len(g.parts)) for g in step.groups] == [(15, 2)]
    loss = step_gradients(model, step, **named)
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return {"loss": loss, **found}


def padded(model: Any) -> dict[str, Any]:
    """Compute what full rows give by the model's own forward."""
    from tinyagent_fast.training.trainer import collate

    return gradients(model, model(**collate(rows(), 0), use_cache=False).loss)


def main(folder: Path) -> None:
    """Compute every case in a folder with Unsloth, and write what was seen there."""
    sys.path.append(str(Path(__file__).resolve().parents[1]))
    import unsloth_on_cpu

    unsloth_on_cpu.start()
    import torch
    from safetensors.torch import save_file

    from tinyagent_fast.config import parse_config

    seen = {}
    for name in CASES:
        config = parse_config((folder / f"{name}.yaml").read_text(encoding="utf-8"))
        unsloth_on_cpu.fuse_in_fp32(name != "fp32 base")
        torch.manual_seed(0)
        tensors, seen[name] = look_at(name, config)
        save_file(tensors, folder / f"{name}.safetensors")
    (folder / "seen.json").write_text(json.dumps(seen), encoding="utf-8")


def look_at(name: str, config: Config) -> tuple[dict[str, Any], dict[str, Any]]:
    """Train one case by hand."""
    from dataclasses import replace

    import torch
    from unsloth import FastLanguageModel

    from tinyagent_fast.inference import torch_engine
    from tinyagent_fast.models import loading
    from tinyagent_fast.shared_prefix import forward

    half = name == "fp16"
    choose = loading._choose
    if half:
        loading._choose = lambda model: replace(choose(model), compute_dtype="float16")
    loaded = loading.load_for_training(config, config.model.base)
    loading._choose = choose
    model = loaded.model
    base = model.get_base_model()
    FastLanguageModel.for_training(model)
    fill(model)
    tokens: dict[str, int] = {}
    watched = {"last mlp": base.model.layers[-1].mlp, "first mlp": base.model.layers[0].mlp}
    hooks = [
        module.register_forward_pre_hook(
            lambda _, inputs, at=at: tokens.update({at: inputs[0].shape[-2]})
        )
        for at, module in {**watched, "head": base.lm_head}.items()
    ]
    checkpointing = bool(base.is_gradient_checkpointing)
    seen = {
        "layers": forward.layers_by(model),
        "unsupported": [forward.unsupported(model, use) for use in ("training", "decoding")],
        "notes": loaded.notes,
        "fused": loaded.fused,
        "checkpoint": torch.utils.checkpoint.checkpoint.__name__,
        "checkpointing": checkpointing,
        "tokens": tokens,
    }
    autocast = torch.autocast("cpu", torch.float16) if half else nullcontext()
    with autocast:
        if name == "dropout":
            losses = [float(shared(model)["loss"]) for _ in range(2)]
            seen["losses that dropout makes"] = losses
            model.eval()
        tensors = shared(model, checkpointing=checkpointing)
    for hook in hooks:
        hook.remove()
    with torch_engine.generating(loaded):
        seen["checkpointing while generating"] = bool(base.is_gradient_checkpointing)
    seen["checkpointing after"] = bool(base.is_gradient_checkpointing)
    if name == "nf4":
        seen["decoding"] = torch_engine.TorchEngine(loaded).notes()
        seen["texts"] = texts(loaded, lookup_tokens=2)
        model.save_pretrained("adapter")
        again = loading.load_for_generation(config, config.model.base, Path("adapter"))
        seen["fused again"] = again.fused
        seen["plain"] = worst(tensors, padded(model))
        seen["in parts"] = worst(in_parts(model), padded(model))
        seen["in parts, computed again"] = worst(in_parts(model, kept_tokens=0), padded(model))
        seen["asks for gradient"] = asks_for_gradient(model)
        tensors["positions"] = positions = torch.tensor([0, 3, 5000])
        states = torch.zeros(1, 3, 64)
        decoder = base.model
        cos, sin = forward.PIECES["unsloth"].rotary(
            decoder, states, positions[None], int(positions.max()) + 1
        )
        tensors |= {"cos": cos.contiguous(), "sin": sin.contiguous()}
    return tensors, seen


def texts(loaded: Any, **options: Any) -> list[str]:
    """Complete the rows without their ends, two at a time."""
    from tinyagent_fast.inference.engine import Limits
    from tinyagent_fast.inference.torch_engine import TorchEngine

    prompts = [row["input_ids"][:-4] for row in rows()]
    limits = Limits(stop="<END_OF_PLAN>", max_new_tokens=5, batch=2)
    found = dict(TorchEngine(loaded, **options).complete_tokens(prompts, limits))
    return [found[at].text for at in range(len(prompts))]


def asks_for_gradient(model: Any) -> bool:
    """Say whether states do, also where Unsloth does not see to it."""
    import torch

    from tinyagent_fast.shared_prefix.forward import DecoderForward

    forward = DecoderForward(model)
    forward.decoder.embed_tokens._forward_hooks.clear()
    states: torch.Tensor = forward.pieces.embedding(forward.decoder, torch.tensor([[5, 6]]))
    return states.requires_grad


def worst(found: dict[str, Any], wanted: dict[str, Any]) -> dict[str, float]:
    """Give the relative differences: of the loss, and the largest one of a gradient."""
    names = [name for name in wanted if name != "loss"]
    assert set(found) >= set(wanted) and len(names) > 1
    differences = [(found[n] - wanted[n]).norm() / wanted[n].norm() for n in names]
    loss = abs(found["loss"] - wanted["loss"]) / wanted["loss"]
    return {"loss": float(loss), "gradient": float(max(differences))}


@pytest.fixture(scope="module")
def folder(config_in: MakeConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a process that computed every case, or skip."""
    if find_spec("unsloth") is None or find_spec("triton") is None:
        pytest.skip("unsloth or triton is not installed (make setup-unsloth)")
    from tinyagent_fast.config import dump_config

    here = tmp_path_factory.mktemp("kernels")
    for name in CASES:
        config = case_config(config_in, here, name, "unsloth")
        (here / f"{name}.yaml").write_text(dump_config(config), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, __file__, str(here)],
        cwd=here,
        env={**os.environ, "HOME": str(here)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    return here


@pytest.fixture(scope="module")
def seen(folder: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((folder / "seen.json").read_text(encoding="utf-8"))
    return loaded


def by_transformers(config_in: MakeConfig, folder: Path, name: str) -> tuple[Any, dict[str, Any]]:
    from tinyagent_fast.models.loading import load_for_training

    config = case_config(config_in, folder, name, "transformers")
    loaded = load_for_training(config, config.model.base)
    fill(loaded.model)
    return loaded, padded(loaded.model.eval() if name == "dropout" else loaded.model.train())


@pytest.mark.parametrize("name", EXACT)
def test_loss_and_gradients_are_those_of_transformers_and_peft(
    name: str, folder: Path, config_in: MakeConfig
) -> None:
    """Also where in-place backwards, checkpointing and trimmed positions meet."""
    from safetensors.torch import load_file

    _, wanted = by_transformers(config_in, folder, name)
    found = worst(load_file(folder / f"{name}.safetensors"), wanted)
    assert found["loss"] < 1e-6
    assert found["gradient"] < 1e-5


def test_in_16_bits_they_are_within_their_rounding(folder: Path, config_in: MakeConfig) -> None:
    from safetensors.torch import load_file

    _, wanted = by_transformers(config_in, folder, "fp16")
    found = worst(load_file(folder / "fp16.safetensors"), wanted)
    assert 0 < found["loss"] < 0.01
    assert 1e-5 < found["gradient"] < 0.1


def test_they_are_those_of_unsloth_s_own_forward(seen: dict[str, Any]) -> None:
    assert seen["nf4"]["plain"]["loss"] < 1e-6
    assert seen["nf4"]["plain"]["gradient"] < 1e-5


@pytest.mark.parametrize("how", ["in parts", "in parts, computed again"])
def test_micro_batches_behind_a_prefix_that_is_computed_once_are_exact_too(
    how: str, seen: dict[str, Any]
) -> None:
    assert seen["nf4"][how]["loss"] < 1e-6
    assert seen["nf4"][how]["gradient"] < 1e-5


@pytest.mark.parametrize("name", CASES)
def test_no_reason_stands_against_unsloth_s_layers(name: str, seen: dict[str, Any]) -> None:
    assert seen[name]["layers"] == "unsloth"
    assert seen[name]["unsupported"] == [None, None]


@pytest.mark.parametrize("name", CASES)
def test_head_and_last_mlp_are_computed_at_supervised_positions_only(
    name: str, seen: dict[str, Any]
) -> None:
    from tinyagent_fast.shared_prefix.packing import pack

    packed = pack(rows(), smallest_shared_tokens=4)
    computed = packed.computed_tokens
    assert computed < 0.6 * packed.plain_tokens
    assert seen[name]["tokens"] == {"first mlp": computed, "last mlp": 12, "head": 12}


@pytest.mark.parametrize(
    ("name", "function", "on"),
    [
        ("nf4", "checkpoint", False),
        ("nf4, checkpointing", "checkpoint", True),
        ("nf4, Unsloth's checkpointing", "unsloth_checkpoint", True),
    ],
)
def test_checkpointing_is_the_one_asked_for(
    name: str, function: str, on: bool, seen: dict[str, Any]
) -> None:
    assert (seen[name]["checkpoint"], seen[name]["checkpointing"]) == (function, on)


@pytest.mark.parametrize("name", CASES)
def test_generation_puts_checkpointing_back(name: str, seen: dict[str, Any]) -> None:
    assert not seen[name]["checkpointing while generating"]
    assert seen[name]["checkpointing after"] == seen[name]["checkpointing"]


def test_plans_are_decoded_over_a_prefix_with_guesses_and_are_those_of_transformers(
    folder: Path, config_in: MakeConfig, seen: dict[str, Any]
) -> None:
    loaded, _ = by_transformers(config_in, folder, "nf4")
    assert seen["nf4"]["decoding"] == ["decoding: shared prefix"]
    wanted = texts(loaded, shared_prefix=False)
    assert seen["nf4"]["texts"] == wanted
    assert len(set(wanted)) > 1


@pytest.mark.parametrize(
    ("name", "fused", "noted"),
    [
        ("nf4", "2 of 2 QKV, O, MLP fused", False),
        ("dropout", "2 of 2 QKV, O, MLP fused", False),
        ("attention only", "2 of 2 QKV, O; 0 of 2 MLP fused", True),
        ("fp32 base", "0 of 2 QKV, O, MLP fused", True),
    ],
)
def test_fused_layers_are_counted_and_fewer_are_noted(
    name: str, fused: str, noted: bool, seen: dict[str, Any]
) -> None:
    assert seen[name]["fused"] == fused
    assert any(fused in note for note in seen[name]["notes"]) == noted


def test_they_are_fused_also_where_an_adapter_is_loaded(seen: dict[str, Any]) -> None:
    assert seen["nf4"]["fused again"] == "2 of 2 QKV, O, MLP fused"


def test_dropout_is_drawn_anew_in_training(seen: dict[str, Any]) -> None:
    first, second = seen["dropout"]["losses that dropout makes"]
    assert first != second


def test_states_ask_for_a_gradient(seen: dict[str, Any]) -> None:
    assert seen["nf4"]["asks for gradient"]


def test_rotary_tables_are_those_of_transformers_also_past_their_first_length(
    folder: Path, config_in: MakeConfig
) -> None:
    import torch
    from safetensors.torch import load_file

    loaded, _ = by_transformers(config_in, folder, "nf4")
    found = load_file(folder / "nf4.safetensors")
    states, positions = torch.zeros(1, 3, 64), found["positions"]
    rotary = loaded.model.get_base_model().model.rotary_emb
    for name, wanted in zip(("cos", "sin"), rotary(states, positions[None]), strict=True):
        torch.testing.assert_close(found[name], wanted, atol=1e-5, rtol=0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
