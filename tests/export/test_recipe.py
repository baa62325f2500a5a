"""Which type each tensor is stored as: the choices of llama.cpp, stated one by one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyagent_fast.export.recipe import BLOCK_VALUES, FILE_TYPES, QUANTS, layer_of, tensor_type

WIDE = (2048, 2048)

# The layers of a model of 22 whose attn_v and ffn_down llama_model_quantize stores as Q6_K.
BETTER_OF_22 = {0, 1, 4, 7, 10, 13, 16, 19, 20, 21}


def chosen(name: str, quant: str, *, layers: int = 22, tied: bool = False) -> str:
    return tensor_type(name, WIDE, quant, layers, tied)[0]


@pytest.mark.parametrize("part", ["attn_v", "ffn_down"])
@pytest.mark.parametrize(("quant", "usual"), [("q4_k_m", "Q4_K"), ("q5_k_m", "Q5_K")])
def test_the_outer_and_every_third_layer_get_more_bits_where_it_matters(
    part: str, quant: str, usual: str
) -> None:
    for layer in range(22):
        expected = "Q6_K" if layer in BETTER_OF_22 else usual
        assert chosen(f"blk.{layer}.{part}.weight", quant) == expected


@pytest.mark.parametrize("part", ["attn_q", "attn_k", "attn_output", "ffn_gate", "ffn_up"])
def test_the_other_matrices_of_a_layer_are_stored_alike(part: str) -> None:
    assert {chosen(f"blk.{layer}.{part}.weight", "q4_k_m") for layer in range(22)} == {"Q4_K"}


def test_a_model_of_two_layers_has_more_bits_only_in_the_second() -> None:
    types = [chosen(f"blk.{layer}.attn_v.weight", "q4_k_m", layers=2) for layer in range(2)]
    assert types == ["Q4_K", "Q6_K"]


def test_the_output_layer_gets_more_bits_also_when_it_is_the_embedding() -> None:
    assert chosen("output.weight", "q4_k_m") == "Q6_K"
    assert chosen("token_embd.weight", "q4_k_m") == "Q4_K"
    assert chosen("token_embd.weight", "q4_k_m", tied=True) == "Q6_K"
    assert chosen("output.weight", "q8_0") == "Q8_0"


@pytest.mark.parametrize("quant", QUANTS)
def test_vectors_and_norms_stay_exact(quant: str) -> None:
    for name in ("output_norm.weight", "blk.3.attn_norm.weight", "rope_freqs.weight"):
        assert tensor_type(name, (2048,), quant, 22, False) == ("F32", None)


@pytest.mark.parametrize(
    ("quant", "name", "row", "expected"),
    [
        ("q4_k_m", "blk.0.attn_q.weight", 192, ("Q5_0", "Q4_K")),
        ("q5_k_m", "blk.0.attn_q.weight", 192, ("Q5_1", "Q5_K")),
        ("q6_k", "blk.0.attn_q.weight", 192, ("Q8_0", "Q6_K")),
        ("q4_k_m", "blk.1.attn_v.weight", 192, ("Q8_0", "Q6_K")),
        ("q4_k_m", "output.weight", 192, ("Q8_0", "Q6_K")),
        ("q4_k_m", "blk.0.attn_q.weight", 80, ("F16", "Q4_K")),
        ("q8_0", "blk.0.attn_q.weight", 80, ("F16", "Q8_0")),
        ("f16", "blk.0.attn_q.weight", 80, ("F16", None)),
    ],
)
def test_rows_that_do_not_divide_into_blocks_fall_back_and_it_is_said(
    quant: str, name: str, row: int, expected: tuple[str, str | None]
) -> None:
    assert tensor_type(name, (64, row), quant, 2, False) == expected


@given(
    st.sampled_from(QUANTS),
    st.sampled_from(["token_embd.weight", "output.weight", "blk.{}.attn_v.weight"]),
    st.integers(1, 40),
    st.integers(1, 2000),
    st.booleans(),
    st.data(),
)
def test_whatever_the_shape_the_type_fits_and_a_fallback_is_never_silent(
    quant: str, name: str, layers: int, row: int, tied: bool, data: st.DataObject
) -> None:
    named = name.format(data.draw(st.integers(0, layers - 1)))
    kind, wanted = tensor_type(named, (3, row), quant, layers, tied)
    assert row % BLOCK_VALUES[kind] == 0
    right, nothing = tensor_type(named, (3, 256), quant, layers, tied)
    assert nothing is None
    assert wanted == (None if kind == right else right)


def test_every_quant_has_a_file_type() -> None:
    assert set(FILE_TYPES) == set(QUANTS)
    assert len(set(FILE_TYPES.values())) == len(QUANTS)


def test_layers_are_read_from_names() -> None:
    names = ["blk.12.ffn_up.weight", "blk.0.attn_q.weight", "output.weight", "xblk.3.weight"]
    assert [layer_of(name) for name in names] == [12, 0, -1, -1]
