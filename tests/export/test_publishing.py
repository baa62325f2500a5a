"""The model card quotes only what was measured; publishing sends only what was proved."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tinyagent_fast.config import Config, DataConfig
from tinyagent_fast.errors import GateError, ModelError
from tinyagent_fast.export.companions import adapter_card, model_card
from tinyagent_fast.export.publishing import publish
from tinyagent_fast.runs import Run


def artefact(path: str, kind: str, quant: str) -> dict[str, Any]:
    return {
        "path": path,
        "kind": kind,
        "quant": quant,
        "sha256": "0" * 64,
        "size_bytes": 3,
        "seconds": 0.1,
        "made_from": "k",
        "details": {},
    }


def content(**changes: Any) -> dict[str, Any]:
    plain = {
        "run": "sid",
        "base": "nano",
        "base_sha256": "abc",
        "adapter_sha256": "def",
        "tinyagent_fast": "0.1.0",
        "prompt_format": "alpaca",
        "stop": "<END_OF_PLAN>",
        "passed": True,
        "gates": [{"name": "g", "passed": True, "rule": "r", "figures": {}}],
        "artefacts": [
            artefact("merged", "merged", "bf16"),
            artefact("gguf/sid-f16.gguf", "gguf", "f16"),
            artefact("gguf/sid-q4_k_m.gguf", "gguf", "q4_k_m"),
        ],
        "success_on_validation": {"f16": {"total": 50, "text": "70.0 % (56.2 - 80.9)"}},
    }
    return {**plain, **changes}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("merged/model.safetensors", "gguf/sid-f16.gguf", "gguf/sid-q4_k_m.gguf"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"abc")
    for name in ("MODEL_CARD.md", "README.md", "Configuration.json", "Modelfile", "export.json"):
        (tmp_path / name).write_text(name, encoding="utf-8")
    return tmp_path


def test_a_card_names_no_folder_of_the_machine(tmp_path: Path) -> None:
    config = Config()
    config = replace(
        config,
        model=replace(config.model, base="/secret/base"),
        data=replace(config.data, train=Path("/secret/rows.json")),
    )
    run = Run(tmp_path)
    card = model_card(run, config, {**content(), "base": "/secret/base"})
    for text in (card, adapter_card(run, config, None)):
        assert "secret" not in text
        assert "`base`" in text
    assert "rows.json" in card


def test_the_card_has_measured_figures_and_names_what_was_not_measured(tmp_path: Path) -> None:
    after = tmp_path / "test" / "after"
    after.mkdir(parents=True)
    success = {"share": 0.85, "interval_95": [0.794, 0.893], "total": 200, "count": 170}
    (after / "metrics.json").write_text(json.dumps({"success": success}), encoding="utf-8")
    card = model_card(Run(tmp_path), Config(), content())
    assert "| adapter, test queries, after training, n = 200 | 85.0 % (79.4 - 89.3) |" in card
    assert "| f16, 50 validation queries, llama.cpp | 70.0 % (56.2 - 80.9) |" in card
    assert "Success of these files was not measured: q4_k_m." in card
    assert "base_model" not in card.split("---")[1]
    assert "generated requests" in card


def test_the_card_of_a_mixed_run_says_what_was_mixed(tmp_path: Path) -> None:
    mixed = {"path": "gen.json", "rows": 299, "left_out": 1, "own_rows": 64, "own_passes": 3}
    (tmp_path / "data.json").write_text(json.dumps({"generated": mixed}), encoding="utf-8")
    card = model_card(Run(tmp_path), Config(data=DataConfig(train=Path("own.json"))), content())
    assert "64 rows, 3 times each, among 299 generated ones" in card
    assert "Trained on generated requests too" in card


def evaluated(folder: Path, total: int, **made_with: str) -> None:
    folder.mkdir(parents=True)
    success = {"share": 0.5, "interval_95": [0.4, 0.6], "total": total, "count": total // 2}
    (folder / "metrics.json").write_text(json.dumps({"success": success}), encoding="utf-8")
    (folder / "made_with.json").write_text(json.dumps(made_with), encoding="utf-8")


def test_the_card_quotes_the_adapter_once_and_the_very_files_that_were_tested(
    tmp_path: Path,
) -> None:
    evaluated(tmp_path / "test" / "after", 200)
    evaluated(tmp_path / "eval", 201, adapter_sha256="def")
    evaluated(tmp_path / "eval-gguf-sid-q4_k_m", 202, model_sha256="0" * 64)
    evaluated(tmp_path / "eval-gguf-sid-f16", 203, model_sha256="1" * 64)
    card = model_card(Run(tmp_path), Config(), content())
    assert card.count("| adapter, ") == 1
    assert "n = 201" in card
    assert "| q4_k_m, test queries, llama.cpp, n = 202 | 50.0 % (40.0 - 60.0) |" in card
    assert "n = 203" not in card, "the file has been made anew since"
    assert "was not measured" not in card


def test_the_card_of_an_evaluation_with_another_adapter_has_what_training_measured(
    tmp_path: Path,
) -> None:
    evaluated(tmp_path / "test" / "after", 200)
    evaluated(tmp_path / "eval", 201, adapter_sha256="another")
    card = model_card(Run(tmp_path), Config(), content())
    assert "n = 200" in card
    assert "n = 201" not in card


def test_the_card_of_a_hub_base_names_it_in_the_header(tmp_path: Path) -> None:
    card = model_card(Run(tmp_path), Config(), content(base="owner/name", gates=[]))
    assert "base_model: owner/name" in card.split("---")[1]


def test_the_card_of_an_unfinished_run_says_how_far_it_came(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.append_history({"event": "step", "step": 3, "of": 8})
    run.best.mkdir()
    (run.best / "adapter_model.safetensors").write_bytes(b"weights")
    (run.best / "best.json").write_text('{"step": 2}', encoding="utf-8")
    told = "unfinished: at step 3 of 8; the adapter is that of step 2"
    assert told in model_card(run, Config(), content())
    run.best.replace(run.adapter)
    assert "unfinished" not in model_card(run, Config(), content())


def test_a_run_without_figures_says_so(tmp_path: Path) -> None:
    card = model_card(Run(tmp_path), Config(), content(success_on_validation={}, gates=[]))
    assert "Nothing was measured" in card


def test_a_dry_run_lists_the_files_and_sends_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "HfApi", None)
    said: list[str] = []
    publish(folder, content(passed=None), "me/sid", dry_run=True, say=said.append)
    assert {line.split()[-1] for line in said[:-1]} == {
        "README.md",
        "SERVING.md",
        "Modelfile",
        "export.json",
        "model.safetensors",
        "gguf/sid-f16.gguf",
        "gguf/sid-q4_k_m.gguf",
    }
    assert "nothing was sent" in said[-1]


class Hub:
    """Stands for the hub's client."""

    sent: list[Any]

    def __init__(self, refuses: bool = False) -> None:
        self.refuses = refuses
        self.sent = []

    def create_repo(self, name: str, **settings: Any) -> str:
        if self.refuses:
            raise OSError("401 Unauthorized")
        assert settings["private"] is True
        return f"https://hub.invalid/{name}"

    def create_commit(self, name: str, operations: Any, **_: Any) -> None:
        self.sent += [operation.path_in_repo for operation in operations]


def test_a_proved_export_goes_out_in_one_commit(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    hub = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    said: list[str] = []
    publish(folder, content(), "me/sid", dry_run=False, say=said.append)
    assert "model.safetensors" in hub.sent
    assert "README.md" in hub.sent
    assert "Configuration.json" not in hub.sent
    assert said[-1] == "published: https://hub.invalid/me/sid"


@pytest.mark.parametrize("passed", [None, False])
def test_what_is_not_proved_does_not_go_out(folder: Path, passed: bool | None) -> None:
    with pytest.raises(GateError, match="not proved"):
        publish(folder, content(passed=passed), "me/sid", dry_run=False, say=lambda _: None)


def test_a_missing_token_is_the_users_to_repair(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: Hub(refuses=True))
    with pytest.raises(ModelError, match="hf auth login"):
        publish(folder, content(), "me/sid", dry_run=False, say=lambda _: None)
