"""Flags of export: the list of files is read strictly."""

from __future__ import annotations

import pytest

from tinyagent_fast.errors import ConfigError
from tinyagent_fast.export.settings import ExportSettings, check_settings, quant_specs


def test_f16_comes_first_because_others_are_made_from_it() -> None:
    specs = quant_specs(ExportSettings(quant="q4_k_m-imatrix, Q8_0,f16"))
    assert [spec.name for spec in specs] == ["f16", "q4_k_m-imatrix", "q8_0"]
    assert [spec.importance for spec in specs] == [False, True, False]


def test_merged_alone_makes_no_gguf() -> None:
    assert quant_specs(ExportSettings(to="merged", quant="q8_0")) == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (ExportSettings(quant="q4_km"), "did you mean 'q4_k_m'"),
        (ExportSettings(quant="q8_0-imatrix"), "K-quants"),
        (ExportSettings(quant="f16,f16"), "occurs twice"),
        (ExportSettings(quant=""), "no such thing"),
        (ExportSettings(to="mergd"), "did you mean 'merged'"),
        (ExportSettings(to=""), "no such thing"),
    ],
)
def test_what_cannot_be_made_is_refused(settings: ExportSettings, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        quant_specs(settings)


def test_all_faulty_numbers_are_named_at_once() -> None:
    settings = ExportSettings(
        gate_prompts=0, quant_prompts=-1, threads=-1, max_loss_points=101, name="a/b", dry_run=True
    )
    with pytest.raises(ConfigError, match="7 flag") as caught:
        check_settings(settings)
    for word in ("gate-prompts", "threads", "max-loss-points", "--name", "--push-to-hub"):
        assert word in str(caught.value)


@pytest.mark.parametrize("name", ["sid", "a/b/c", "/sid"])
def test_a_repository_needs_an_owner_and_a_name(name: str) -> None:
    check_settings(ExportSettings(push_to_hub="me/sid"))
    with pytest.raises(ConfigError, match="owner/name"):
        check_settings(ExportSettings(push_to_hub=name))
