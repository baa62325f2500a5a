"""Importance matrices: how large the inputs of each weight column are, measured on real prompts.

Quantising rounds columns with large inputs more carefully. The file layout is that of llama.cpp's
own tool, so its programs read what is written here, and the other way round.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tinyagent_fast.errors import DataError, ModelError
from tinyagent_fast.export.gguf_file import encode_value, header_bytes, padding, read_gguf

_CHUNK_TOKENS = 512
_SOURCE_BYTES = 127
_SUMS, _COUNTS = ".in_sum2", ".counts"
_MODULES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


@dataclass(frozen=True)
class Importance:
    """Mean square of each input of each weight matrix."""

    mean_squares: Mapping[str, NDArray[np.float32]]
    """By GGUF name of the weight, one number per column."""
    tokens: int
    """Tokens that were averaged over."""
    source: str
    """What was measured on, in at most 127 bytes, as much as llama.cpp keeps."""

    def __post_init__(self) -> None:
        """Refuse numbers that cannot be means of squares, and a source that would be cut."""
        if len(self.source.encode()) > _SOURCE_BYTES:
            raise DataError(
                f"importance source {self.source!r}",
                f"it is longer than {_SOURCE_BYTES} bytes",
                "give a shorter name",
            )
        if self.tokens < 1:
            raise DataError("importance of 0 tokens", "nothing was measured", "give some rows")
        for name, one in self.mean_squares.items():
            if not np.isfinite(one).all() or (one < 0).any() or not one.any():
                raise DataError(
                    f"importance of {name}",
                    "its numbers are negative, infinite, NaN or all zero",
                    "measure it again with a model that works",
                )

    @property
    def chunks(self) -> int:
        """Tokens in units of 512, at least 1, as llama.cpp counts them."""
        return max(1, self.tokens // _CHUNK_TOKENS)


def collect_importance(
    model: Any,
    rows: Sequence[Sequence[int]],
    *,
    source: str = "training prompts",
    on_progress: Callable[[int, int], None] = lambda _done, _all: None,
) -> Importance:
    """Run rows of token ids through a model and average the squares of each matrix's inputs.

    A token embedding that is also the output layer is left out: half of its work is to be looked
    up, which has no inputs to weigh.

    Args:
        model: A transformers LlamaForCausalLM with merged weights; its mode is not changed.
        rows: Token ids as the model sees them, each row by itself.
        source: Name of the rows' origin, kept in the file.
        on_progress: Told how many rows are done, and of how many.

    Returns:
        Means over all tokens of all rows.

    Raises:
        DataError: If there are no tokens.
        ModelError: If the model has not the layers of a Llama.

    Source:
        llama.cpp, tools/imatrix/imatrix.cpp: collect_imatrix.
    """
    import torch

    if not any(rows):
        raise DataError("importance of 0 tokens", "nothing can be measured", "give some rows")
    modules = _weighted_modules(model)
    sums: dict[str, torch.Tensor] = {}

    def add(name: str, inputs: torch.Tensor) -> None:
        columns_F = inputs.detach().reshape(-1, inputs.shape[-1]).double().square().sum(0).cpu()
        sums[name] = sums[name] + columns_F if name in sums else columns_F

    has_output = model.get_output_embeddings().weight is not model.get_input_embeddings().weight
    hooks = []
    tokens = 0
    device = model.get_input_embeddings().weight.device
    try:
        for name, one in modules:
            hooks.append(one.register_forward_pre_hook(lambda _, x, name=name: add(name, x[0])))
        with torch.inference_mode():
            for done, row in enumerate(rows, start=1):
                if row:
                    ids_1T = torch.tensor([list(row)], device=device)
                    hidden_1TH = model.model(input_ids=ids_1T, use_cache=False).last_hidden_state
                    if has_output:
                        add("output.weight", hidden_1TH)
                    tokens += len(row)
                on_progress(done, len(rows))
    finally:
        for hook in hooks:
            hook.remove()
    means = {name: (one / tokens).numpy().astype(np.float32) for name, one in sums.items()}
    return Importance(means, tokens, source)


def save_importance(importance: Importance, path: Path) -> None:
    """Write an importance matrix as llama.cpp's tools do.

    Args:
        importance: What was measured.
        path: File to write, `.gguf` by custom.
    """
    entries = {
        "general.type": encode_value("imatrix"),
        "imatrix.datasets": encode_value([importance.source]),
        "imatrix.chunk_count": encode_value(importance.chunks),
        "imatrix.chunk_size": encode_value(_CHUNK_TOKENS),
    }
    count = np.array([importance.tokens], dtype="<f4")
    arrays: dict[str, NDArray[np.float32]] = {}
    for name in sorted(importance.mean_squares):
        sums = importance.mean_squares[name].astype(np.float64) * float(count[0])
        arrays[name + _SUMS] = sums.astype("<f4")
        arrays[name + _COUNTS] = count
    part = path.with_name(path.name + ".part")
    with part.open("wb") as file:
        file.write(header_bytes(entries, [(n, one.shape, "F32") for n, one in arrays.items()]))
        for one in arrays.values():
            file.write(one.tobytes() + padding(one.nbytes))
    part.replace(path)


def load_importance(path: Path) -> Importance:
    """Read an importance matrix that `save_importance` or llama.cpp's tool wrote.

    Args:
        path: GGUF file.

    Returns:
        The means.

    Raises:
        ModelError: If the file is not whole, or holds no importance matrix of dense layers.
    """
    file = read_gguf(path)
    names = [name.removesuffix(_SUMS) for name in file.tensors if name.endswith(_SUMS)]
    if file.value("general.type") != "imatrix" or not names:
        raise ModelError(str(path), "it holds no importance matrix", "give one that does")
    datasets = file.value("imatrix.datasets")
    means: dict[str, NDArray[np.float32]] = {}
    tokens = 0
    with path.open("rb") as opened:

        def read(name: str) -> NDArray[np.float32]:
            tensor = file.tensors.get(name)
            if tensor is None or tensor.type != "F32":
                raise ModelError(str(path), f"{name} is missing or not F32", "write it again")
            opened.seek(tensor.offset_bytes)
            return np.frombuffer(opened.read(tensor.rows * tensor.row_bytes), dtype="<f4")

        for name in names:
            counts = read(name + _COUNTS)
            if counts.size != 1 or counts[0] < 1:
                raise ModelError(
                    str(path), f"{name} has {counts.size} counts, {counts[:1]}", "use a dense model"
                )
            means[name] = read(name + _SUMS) / counts[0]
            tokens = max(tokens, round(float(counts[0])))
    source = str(datasets[0]) if isinstance(datasets, list) and datasets else path.name
    return Importance(means, tokens, source)


def _weighted_modules(model: Any) -> list[tuple[str, Any]]:
    """List the matrices of a Llama's layers under their GGUF names."""
    found = []
    try:
        for at, layer in enumerate(model.model.layers):
            for path, short in _MODULES.items():
                found.append((f"blk.{at}.{short}.weight", layer.get_submodule(path)))
    except AttributeError as error:
        raise ModelError(
            f"importance of a {type(model).__name__}",
            f"its layers are not those of a Llama: {error}",
            "merge the adapter and give the LlamaForCausalLM",
        ) from error
    return found
