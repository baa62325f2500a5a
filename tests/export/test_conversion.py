"""A converted model answers as transformers does, and a model that would not is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tinyagent_fast.errors import ModelError
from tinyagent_fast.export.checkpoints import (
    NewTensor,
    open_checkpoint,
    read_rows,
    write_safetensors,
)
from tinyagent_fast.export.conversion import convert_to_gguf

# An untrained model is compared on logits of a few units; float32 noise is a thousandth of this.
SAME, OTHER = 1e-3, 2e-2

ROPES: dict[str, dict[str, Any]] = {
    "base": {"rope_theta": 1000.0},
    "transformers 5": {
        "rope_theta": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0},
    },
    "linear": {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "linear, transformers 5": {
        "rope_theta": None,
        "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0},
    },
    "llama3": {
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
}


def confident(random: np.random.Generator, shape: tuple[int, ...]) -> Any:
    """Draw weights so large that attention looks at single positions, and norms around 1."""
    values = random.standard_normal(shape, np.float32)
    return 1 + values * np.float32(0.1) if len(shape) == 1 else values * np.float32(0.2)


def convert(source: Path, target: Path, quant: str = "f32", **changes: Any) -> Any:
    return convert_to_gguf(source, target, quant=quant, **{"name": "tiny", **changes})


def keys_of(path: Path) -> dict[str, Any]:
    from gguf import GGUFReader

    return {name: field.contents() for name, field in GGUFReader(path).fields.items()}


def largest_difference(folder: Path, gguf: Path) -> float:
    """Compare the probabilities of the next token after some ids, whole and shortened."""
    pytest.importorskip("xllamacpp")
    import torch
    from transformers import AutoModelForCausalLM

    from tinyagent_fast.inference.llama_cpp import LlamaCppSettings, LlamaServer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    rows = model.config.vocab_size
    ids = np.random.default_rng(1).integers(3, rows, 300).tolist()
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0].log_softmax(-1).numpy()
    settings = LlamaCppSettings(
        model=gguf, slots=1, context_tokens_per_slot=512, threads=1, cache_type="f32"
    )
    with LlamaServer(settings) as server:
        return max(
            float(np.abs(server.next_logprobs(ids[:length]) - expected[length - 1]).max())
            for length in (1, 2, 40, 299, 300)
        )


# What llama.cpp makes of it.


@pytest.mark.parametrize("rope", ROPES)
def test_every_way_to_rotate_positions_arrives_in_llama_cpp(
    rope: str, llama_folder: Callable[..., Path], tmp_path: Path
) -> None:
    folder = llama_folder(draw=confident, num_hidden_layers=2, dtype="F32", **ROPES[rope])
    assert largest_difference(folder, convert(folder, tmp_path / "m.gguf").path) < SAME


@pytest.mark.parametrize("fault", ["base", "linear", "llama3", "epsilon", "kv_heads"])
def test_the_comparison_finds_a_model_that_is_converted_wrongly(
    fault: str,
    llama_folder: Callable[..., Path],
    tmp_path: Path,
) -> None:
    right = ROPES.get(fault, {}) | ({"rms_norm_eps": 0.1} if fault == "epsilon" else {})
    wrong = {"rope_theta": 10000.0, "rope_scaling": None, "rms_norm_eps": 1e-5}
    if fault == "kv_heads":
        # The same matrices cut into heads of another width.
        wrong = {"num_attention_heads": 8, "num_key_value_heads": 4}
    folder = llama_folder(draw=confident, num_hidden_layers=2, dtype="F32", **right)
    copy = shutil.copytree(folder, tmp_path / "wrong")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, **wrong}))
    assert largest_difference(folder, convert(copy, tmp_path / "m.gguf").path) > OTHER


# What is in the file.


@pytest.mark.parametrize("file_type", ["f32", "f16", "bf16"])
def test_weights_are_those_of_the_model_in_llama_cpps_order(
    file_type: str, llama_folder: Callable[..., Path], tmp_path: Path
) -> None:
    from gguf import GGUFReader, dequantize

    folder = llama_folder(num_hidden_layers=2, tie_word_embeddings=False)
    report = convert(folder, tmp_path / "m.gguf", file_type)
    checkpoint = open_checkpoint(folder)
    source = {name: read_rows(t, 0, t.rows) for name, t in checkpoint.tensors.items()}
    tensors = {tensor.name: tensor for tensor in GGUFReader(report.path).tensors}
    assert sum(report.types.values()) == len(tensors) == len(source) == 21
    assert report.parameters == sum(values.size for values in source.values())
    assert report.size_bytes == report.path.stat().st_size

    def of(name: str) -> Any:
        return np.asarray(dequantize(tensors[name].data, tensors[name].tensor_type))

    rounding = 2.0**-11 if file_type == "f16" else 0.0  # the source is bf16
    close = {"rtol": rounding, "atol": 2.0**-25 if rounding else 0}
    for ours, theirs in (
        ("token_embd", "model.embed_tokens"),
        ("output", "lm_head"),
        ("output_norm", "model.norm"),
        ("blk.1.attn_norm", "model.layers.1.input_layernorm"),
        ("blk.1.attn_v", "model.layers.1.self_attn.v_proj"),
        ("blk.1.attn_output", "model.layers.1.self_attn.o_proj"),
        ("blk.0.ffn_norm", "model.layers.0.post_attention_layernorm"),
        ("blk.0.ffn_gate", "model.layers.0.mlp.gate_proj"),
        ("blk.0.ffn_up", "model.layers.0.mlp.up_proj"),
        ("blk.1.ffn_down", "model.layers.1.mlp.down_proj"),
    ):
        np.testing.assert_allclose(of(f"{ours}.weight"), source[f"{theirs}.weight"], **close)
    # Two halves of a head, value by value in turn: rows 0 and 8 of 16 become rows 0 and 1.
    order = [head * 16 + half * 8 + at for head in range(4) for at in range(8) for half in (0, 1)]
    for letter, heads in (("q", 4), ("k", 2)):
        theirs_qk = source[f"model.layers.1.self_attn.{letter}_proj.weight"]
        expected = theirs_qk[order[: heads * 16]]
        np.testing.assert_allclose(of(f"blk.1.attn_{letter}.weight"), expected, **close)
    kinds = {n: t.tensor_type.name for n, t in tensors.items()}
    assert {kind for n, kind in kinds.items() if "norm" in n} == {"F32"}
    assert {kind for n, kind in kinds.items() if "norm" not in n} == {file_type.upper()}
    number = {"f32": 0, "f16": 1, "bf16": 32}[file_type]
    assert keys_of(report.path)["general.file_type"] == number


def test_llama_3_frequencies_are_divided_as_transformers_divides_them(
    llama_folder: Callable[..., Path], tmp_path: Path
) -> None:
    from gguf import GGUFReader
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    folder = llama_folder(**ROPES["llama3"])
    report = convert(folder, tmp_path / "m.gguf", "f16")
    written = {t.name: t for t in GGUFReader(report.path).tensors}["rope_freqs.weight"]
    assert written.tensor_type.name == "F32"
    config = AutoConfig.from_pretrained(folder)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 10000.0 ** -(np.arange(0, 16, 2) / 16)
    np.testing.assert_allclose(plain / written.data, scaled.numpy(), rtol=1e-6)
    assert len(set(written.data.tolist())) > 2  # short, long and in between
    assert report.parameters == sum(
        np.prod(t.shape) for t in open_checkpoint(folder).tensors.values()
    )


def test_keys_tell_the_models_sizes_its_template_and_what_is_added(
    llama_folder: Callable[..., Path], tmp_path: Path
) -> None:
    template = "{% for m in messages %}\n{{ m['content'] }}\u00e9{% endfor %}"
    texts = {"tokenizer.chat_template": template, "tinyagent_fast.a": "", "tinyagent_fast.b": "x"}
    report = convert(
        llama_folder(head_dim=32, max_position_embeddings=32768, rope_theta=1e6),
        tmp_path / "m.gguf",
        name="my model",
        texts=texts,
    )
    keys = keys_of(report.path)
    assert texts.items() <= keys.items()
    expected = {
        "general.architecture": "llama",
        "general.name": "my model",
        "llama.vocab_size": 700,
        "llama.context_length": 32768,
        "llama.embedding_length": 64,
        "llama.feed_forward_length": 96,
        "llama.block_count": 1,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 32,
        "llama.attention.value_length": 32,
        "llama.rope.dimension_count": 32,
        "llama.rope.freq_base": 1e6,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
    }
    assert {name: keys.get(name) for name in expected} == expected
    assert "llama.rope.scaling.type" not in keys
    assert len(keys["tokenizer.ggml.tokens"]) == 700


def test_a_file_without_template_has_no_template_key(
    llama_folder: Callable[..., Path], tmp_path: Path
) -> None:
    assert "tokenizer.chat_template" not in keys_of(convert(llama_folder(), tmp_path / "m").path)


def test_an_output_matrix_beside_tied_embeddings_is_left_out_and_said(
    llama_folder: Callable[..., Path], tmp_path: Path
) -> None:
    folder = llama_folder(tie_word_embeddings=False)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    report = convert(folder, tmp_path / "m.gguf")
    assert sum(report.types.values()) == 11
    assert report.notes == ("lm_head.weight is left out: config.json ties it to the embeddings",)


# What is refused.


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mistral"}, "model_type 'mistral'"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"sliding_window": 1024}, "sliding_window is 1024"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "only default, linear, llama3"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "only default, linear, llama3"),
        ({"rope_scaling": {"type": "linear"}}, "has no 'factor'"),
        (
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
            "partial_rotary_factor",
        ),
        ({"num_hidden_layers": 2}, r"no tensor model\.layers\.1"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"num_key_value_heads": 4}, r"k_proj\.weight has shape \(32, 64\)"),
        ({"vocab_size": 699}, r"embed_tokens\.weight has shape \(700, 64\)"),
        ({"intermediate_size": None}, "intermediate_size is None"),
        ({"rms_norm_eps": None}, "rms_norm_eps is None"),
        ({"max_position_embeddings": None}, "max_position_embeddings is None"),
    ],
)
def test_a_model_that_is_no_plain_llama_is_refused(
    change: dict[str, Any], message: str, llama_folder: Callable[..., Path], tmp_path: Path
) -> None:
    folder = llama_folder()
    config = {**json.loads((folder / "config.json").read_text()), **change}
    config = {key: value for key, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=message):
        convert(folder, tmp_path / "m.gguf")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.q_proj.bias",
        "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",
    ],
)
def test_a_tensor_that_would_be_left_out_is_refused(
    name: str, llama_folder: Callable[..., Path], tmp_path: Path
) -> None:
    folder = llama_folder()
    more = NewTensor(name, "F32", (64,), [np.zeros(64, np.float32)])
    write_safetensors(folder / "more.safetensors", [more])
    where = dict.fromkeys(open_checkpoint(folder).tensors, "model.safetensors")
    index = {"weight_map": {**where, name: "more.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="1 tensors that a Llama has not"):
        convert(folder, tmp_path / "m.gguf")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused(
    value: float, llama_folder: Callable[..., Path], tmp_path: Path
) -> None:
    def broken(random: np.random.Generator, shape: tuple[int, ...]) -> Any:
        values = confident(random, shape)
        values[-1] = value if shape == (64, 96) else values[-1]  # ffn_down only
        return values

    target = tmp_path / "m.gguf"
    target.write_text("what was there before")
    with pytest.raises(ModelError, match=r"blk\.0\.ffn_down\.weight\n.*not finite"):
        convert(llama_folder(draw=broken), target)
    assert [file.name for file in tmp_path.iterdir()] == ["m.gguf"]
    assert target.read_text() == "what was there before"


@pytest.mark.parametrize("quant", ["f16", "q8_0"])
def test_weights_too_large_for_f16_are_refused_there_and_taken_in_bf16(
    quant: str, llama_folder: Callable[..., Path], tmp_path: Path
) -> None:
    def large(random: np.random.Generator, shape: tuple[int, ...]) -> Any:
        return confident(random, shape) * np.float32(1e6)

    if quant == "q8_0":
        pytest.importorskip("xllamacpp")
    folder = llama_folder(draw=large)
    with pytest.raises(ModelError, match=r"beyond the largest f16 number(.|\n)*bf16 or f32"):
        convert(folder, tmp_path / "m.gguf", quant)
    assert list(tmp_path.iterdir()) == []
    assert convert(folder, tmp_path / "m.gguf", "bf16").notes == ()


def test_values_too_small_for_f16_are_counted(
    llama_folder: Callable[..., Path], tmp_path: Path
) -> None:
    def small(random: np.random.Generator, shape: tuple[int, ...]) -> Any:
        values = confident(random, shape)
        if shape == (64, 96):
            values[0, :5], values[0, 5:7] = 1e-9, 0.0
        return values

    folder = llama_folder(draw=small, dtype="F32")
    (note,) = convert(folder, tmp_path / "m.gguf", "f16").notes
    assert note == "5 values are too small for f16 and became 0"


def test_a_base_without_theta_has_llamas_own(
    llama_folder: Callable[..., Path], tmp_path: Path
) -> None:
    report = convert(llama_folder(rope_theta=None), tmp_path / "m.gguf")
    assert keys_of(report.path)["llama.rope.freq_base"] == 10000.0


# How much memory it takes.

MEASURE = """
import sys
from pathlib import Path
from tinyagent_fast.export.conversion import convert_to_gguf

def peak_mib():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024

quant, *sources = sys.argv[1:]
sizes = []
for source in map(Path, sources):
    convert_to_gguf(source, source / "m.gguf", quant=quant, name="m")
    sizes.append(peak_mib())
print(*sizes)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux to measure memory")
@pytest.mark.parametrize("quant", ["f16", "q8_0"])
def test_a_tensor_larger_than_a_block_is_never_held_whole(
    quant: str, llama_folder: Callable[..., Path]
) -> None:
    if quant == "q8_0":
        pytest.importorskip("xllamacpp")
    folders = [llama_folder(), llama_folder(intermediate_size=262144)]  # matrices of 64 MiB as f32
    command = [sys.executable, "-c", MEASURE, quant, *map(str, folders)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    before, after = map(float, done.stdout.split())
    assert before > 20
    # Measured: 32, for blocks and what rounding makes of them.
    assert after - before < 48, f"{after - before} MiB more than for a small model"
