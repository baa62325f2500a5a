"""Weights are read exactly, written as other programs read them, and never half."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyagent_fast.errors import ModelError
from tinyagent_fast.export import checkpoints
from tinyagent_fast.export.checkpoints import (
    NewTensor,
    StoredTensor,
    encode_values,
    open_checkpoint,
    read_rows,
    row_blocks,
    stored_tensors,
    write_safetensors,
)

ALL_16_BITS = np.arange(2**16, dtype=np.uint16)
TORCH_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
SPECIAL_BITS = (0, 1, 0x7F7FFFFF, 0x7F800000, 0x7F800001, 0x7FC00000, 0x3F808000, 0x3F818000)

bit_patterns = st.lists(
    st.integers(0, 2**32 - 1) | st.sampled_from(SPECIAL_BITS), min_size=1, max_size=64
)


def write(path: Path, dtype: str, values: np.ndarray) -> StoredTensor:
    write_safetensors(path, [NewTensor("w", dtype, values.shape, [values])])
    return stored_tensors(path)["w"]


def written_folder(folder: Path, config: dict[str, Any] | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    write(folder / "model.safetensors", "F32", np.ones((4, 2), np.float32))
    (folder / "config.json").write_text(json.dumps(config or {"model_type": "llama"}))
    return folder


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_every_16_bit_number_is_read_as_torch_reads_it(dtype: str, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    stored = torch.from_numpy(ALL_16_BITS.view(np.int16)).view(getattr(torch, TORCH_NAMES[dtype]))
    save_file({"w": stored}, str(tmp_path / "w.safetensors"))
    tensor = stored_tensors(tmp_path / "w.safetensors")["w"]
    assert tensor.dtype == dtype
    np.testing.assert_array_equal(read_rows(tensor, 0, 2**16), stored.float().numpy())


@given(bits=bit_patterns)
@settings(max_examples=300, deadline=None)
def test_bf16_rounds_as_torch_does(bits: list[int]) -> None:
    import torch

    values = np.array(bits, np.uint32).view(np.float32)
    expected = torch.from_numpy(values).to(torch.bfloat16).float().numpy()
    stored = encode_values(values, "BF16", "w").view(np.uint16)
    ours = (stored.astype(np.uint32) << 16).view(np.float32)
    np.testing.assert_array_equal(ours, expected)  # NaN equals NaN here


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_what_was_read_is_written_back_unchanged(dtype: str, tmp_path: Path) -> None:
    bits = ALL_16_BITS.astype(np.uint32) << 16
    values = bits.view(np.float32)
    if dtype == "F16":
        values = ALL_16_BITS.view(np.float16).astype(np.float32)
    values = values[np.isfinite(values)].reshape(-1, 8)
    first = write(tmp_path / "first.safetensors", dtype, values)
    read = read_rows(first, 0, first.rows)
    np.testing.assert_array_equal(read.view(np.uint32), values.view(np.uint32))
    write(tmp_path / "second.safetensors", dtype, read)
    paths = [tmp_path / "first.safetensors", tmp_path / "second.safetensors"]
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_a_number_beyond_f16_is_refused_and_the_largest_one_is_not(tmp_path: Path) -> None:
    largest = np.array([65504.0, -65504.0, 65519.0], np.float32)
    np.testing.assert_array_equal(encode_values(largest, "F16", "w"), [65504.0, -65504.0, 65504.0])
    with pytest.raises(ModelError, match="65520 is beyond"):
        encode_values(np.array([1.0, -65520.0], np.float32), "F16", "w")
    with pytest.raises(ModelError, match=r"1e\+09 is beyond"):
        encode_values(np.array([0.0, np.nan, 1e9], np.float32), "F16", "w")
    with pytest.raises(ModelError, match="inf is beyond"):
        encode_values(np.array([np.inf, np.nan, 1e9], np.float32), "F16", "w")
    with pytest.raises(ModelError, match="tensor w"):
        write(tmp_path / "w.safetensors", "F16", np.array([1e9], np.float32))
    assert list(tmp_path.iterdir()) == []


@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 9),
    unit=st.integers(1, 5),
    block_values=st.integers(1, 60),
)
@settings(max_examples=60, deadline=None)
def test_blocks_give_every_row_once_and_cut_only_between_units(
    tmp_path_factory: pytest.TempPathFactory,
    rows: int,
    columns: int,
    unit: int,
    block_values: int,
) -> None:
    values = np.arange(rows * unit * columns, dtype=np.float32).reshape(-1, columns)
    tensor = write(tmp_path_factory.mktemp("blocks") / "w.safetensors", "F32", values)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoints, "BLOCK_BYTES", 4 * block_values)
        blocks = list(row_blocks(tensor, multiple_of_rows=unit))
    np.testing.assert_array_equal(np.concatenate([block for _, block in blocks]), values)
    assert [start for start, _ in blocks] == [
        sum(len(b) for _, b in blocks[:at]) for at in range(len(blocks))
    ]
    assert all(len(block) % unit == 0 for _, block in blocks)
    # A block is larger than asked only if a single unit is.
    assert all(block.size <= max(block_values, unit * columns) for _, block in blocks)


def test_a_file_written_in_pieces_is_read_by_safetensors(tmp_path: Path) -> None:
    from safetensors import safe_open

    random = np.random.default_rng(3)
    norm, matrix = random.standard_normal(5, np.float32), random.standard_normal((7, 3), np.float32)
    path = tmp_path / "model.safetensors"
    write_safetensors(
        path,
        [
            NewTensor("norm", "F32", (5,), [norm[:2], norm[2:]]),
            NewTensor("matrix", "BF16", (7, 3), [matrix[row : row + 1] for row in range(7)]),
        ],
    )
    with safe_open(str(path), "pt") as file:
        assert file.metadata() == {"format": "pt"}
        np.testing.assert_array_equal(file.get_tensor("norm").numpy(), norm)
        read = file.get_tensor("matrix").float().numpy()
    np.testing.assert_allclose(read, matrix, rtol=2**-8)
    assert not np.array_equal(read, matrix)


def test_an_interrupted_file_leaves_what_was_there_before(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    write(path, "F32", np.zeros((2, 2), np.float32))
    before = path.read_bytes()

    def interrupted() -> Iterator[np.ndarray]:
        yield np.ones((2, 2), np.float32)
        assert (tmp_path / "w.safetensors.part").exists()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_safetensors(path, [NewTensor("w", "F32", (4, 2), interrupted())])
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["w.safetensors"]


@pytest.mark.parametrize("shape", [(5, 2), (3, 2), (4, 3)])
def test_rows_that_do_not_fit_the_plan_are_a_bug(tmp_path: Path, shape: tuple[int, int]) -> None:
    tensor = NewTensor("w", "F32", (4, 2), [np.ones(shape, np.float32)])
    with pytest.raises(AssertionError, match="w "):
        write_safetensors(tmp_path / "w.safetensors", [tensor])
    assert list(tmp_path.iterdir()) == []


def test_shards_are_read_as_one_model(tiny_base: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    whole = open_checkpoint(tiny_base)
    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    sharded = open_checkpoint(tmp_path)
    assert len({tensor.path for tensor in sharded.tensors.values()}) > 2
    assert set(sharded.tensors) == set(whole.tensors)
    for name, tensor in whole.tensors.items():
        one, other = (read_rows(t, 0, t.rows) for t in (tensor, sharded.tensors[name]))
        np.testing.assert_array_equal(one, other)
        np.testing.assert_array_equal(one, model.state_dict()[name].numpy())


def test_a_missing_shard_and_a_wrong_index_are_refused(tiny_base: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    renamed = {"other.weight": next(iter(content["weight_map"].values())), **content["weight_map"]}
    index.write_text(json.dumps({"weight_map": renamed}))
    with pytest.raises(ModelError, match=r"holds other\.weight, and it does not"):
        open_checkpoint(tmp_path)
    index.write_text(json.dumps(content))
    lost = sorted(tmp_path.glob("model-*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(ModelError, match=rf"not there: {lost.name}"):
        open_checkpoint(tmp_path)
    for name in ("../x.safetensors", "/etc/passwd", "", "..", 7, None, ["a"], "a\0b"):
        index.write_text(json.dumps({"weight_map": {"w": name}}))
        with pytest.raises(ModelError, match="no name of a file beside it"):
            open_checkpoint(tmp_path)
    for name in ("a" * 5000, "a\ud800"):
        index.write_text(json.dumps({"weight_map": {"w": name}}))
        with pytest.raises(ModelError, match="not there"):
            open_checkpoint(tmp_path)
    index.write_text("{}")
    with pytest.raises(ModelError, match="no weight_map"):
        open_checkpoint(tmp_path)


def test_a_file_cut_off_anywhere_is_refused(tmp_path: Path) -> None:
    folder = written_folder(tmp_path)
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    for length in (0, 4, 12, len(whole) - 33, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ModelError, match="header"):
            open_checkpoint(folder)
    path.write_bytes(whole)
    assert set(open_checkpoint(folder).tensors) == {"w"}


def test_a_file_that_shrinks_after_it_was_opened_is_noticed(tmp_path: Path) -> None:
    tensor = write(tmp_path / "w.safetensors", "F32", np.ones((8, 2), np.float32))
    tensor.path.write_bytes(tensor.path.read_bytes()[:-4])
    np.testing.assert_array_equal(read_rows(tensor, 0, 7), np.ones((7, 2)))
    with pytest.raises(ModelError, match="ends within w"):
        read_rows(tensor, 0, 8)


def header_of(entry: dict[str, Any]) -> bytes:
    text = json.dumps({"w": entry}).encode()
    return len(text).to_bytes(8, "little") + text + bytes(64)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"dtype": "U8", "shape": [64], "data_offsets": [0, 64]}, "stored as U8"),
        ({"dtype": "F8_E4M3", "shape": [64], "data_offsets": [0, 64]}, "stored as F8_E4M3"),
        ({"dtype": "F32", "shape": [8], "data_offsets": [0, 8]}, "invalid shape"),
        ({"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}, "invalid JSON"),
        ({"dtype": "F32", "shape": [2]}, "missing field `data_offsets`"),
    ],
)
def test_a_header_that_cannot_be_right_is_refused(
    entry: dict[str, Any], message: str, tmp_path: Path
) -> None:
    written_folder(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(header_of(entry))
    with pytest.raises(ModelError, match=message):
        open_checkpoint(tmp_path)


def test_folders_that_hold_no_whole_float_model_are_refused(tmp_path: Path) -> None:
    folder = written_folder(tmp_path / "model")
    weights = folder / "model.safetensors"

    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="holds an adapter"):
        open_checkpoint(folder)
    (folder / "adapter_config.json").unlink()

    written_folder(folder, {"quantization_config": {"quant_method": "bitsandbytes"}})
    with pytest.raises(ModelError, match=r"quantised \(bitsandbytes\)"):
        open_checkpoint(folder)
    written_folder(folder)

    weights.rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"pytorch_model\.bin, a format that can run code"):
        open_checkpoint(folder)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(ModelError, match=r"neither model\.safetensors nor"):
        open_checkpoint(folder)

    for content, message in (("[]", "no JSON object"), ("{", "no JSON:")):
        (folder / "config.json").write_text(content)
        with pytest.raises(ModelError, match=message):
            open_checkpoint(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match=r"has no config\.json"):
        open_checkpoint(folder)
