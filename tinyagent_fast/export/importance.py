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
from gguf import GGUFReader, GGUFWriter
from numpy.typing import NDArray

from tinyagent_fast.errors import DataError
from tinyagent_fast.models.families import family_of

_CHUNK_TOKENS = 512
_SUMS, _COUNTS = ".in_sum2", ".counts"

SOURCE = "training prompts"
"""What is measured on, as the files name it."""


@dataclass(frozen=True)
class Importance:
    """Mean square of each input of each weight matrix."""

    mean_squares: Mapping[str, NDArray[np.float32]]
    """By GGUF name of the weight, one number per column."""
    tokens: int
    """Tokens that were averaged over."""

    @property
    def chunks(self) -> int:
        """Tokens in units of 512, at least 1, as llama.cpp counts them."""
        return max(1, self.tokens // _CHUNK_TOKENS)


def collect_importance(
    model: Any,
    rows: Sequence[Sequence[int]],
    *,
    on_progress: Callable[[int, int], None] = lambda _done, _all: None,
) -> Importance:
    """Run rows of token ids through a model and average the squares of each matrix's inputs.

    A token embedding that is also the output layer is left out: half of its work is to be looked
    up, which has no inputs to weigh. Each row is run by itself, and the mode stays as it is.

    Raises:
        DataError: A mean is not finite or all are zero.
        ModelError: The model is of no family that can be exported.

    Source: llama.cpp, tools/imatrix/imatrix.cpp: collect_imatrix.
    """
    import torch

    family = family_of(model.config.to_dict(), "config of the model")
    sums: dict[str, torch.Tensor] = {}

    def add(name: str, inputs: torch.Tensor) -> None:
        columns_F = inputs.detach().reshape(-1, inputs.shape[-1]).double().square().sum(0).cpu()
        sums[name] = sums[name] + columns_F if name in sums else columns_F

    embeddings = model.get_input_embeddings().weight
    has_output = model.get_output_embeddings().weight is not embeddings
    hooks = []
    tokens = 0
    try:
        for at, layer in enumerate(model.model.layers):
            for one in family.linears:
                name = f"blk.{at}.{one.gguf}.weight"
                module = layer.get_submodule(one.module)
                hooks.append(
                    module.register_forward_pre_hook(lambda _, x, name=name: add(name, x[0]))
                )
        with torch.inference_mode():
            for done, row in enumerate(rows, start=1):
                ids_1T = torch.tensor([list(row)], device=embeddings.device)
                hidden_1TH = model.model(input_ids=ids_1T, use_cache=False).last_hidden_state
                if has_output:
                    add("output.weight", hidden_1TH)
                tokens += len(row)
                on_progress(done, len(rows))
    finally:
        for hook in hooks:
            hook.remove()
    means = {name: (one / tokens).numpy().astype(np.float32) for name, one in sums.items()}
    for name, mean in means.items():
        if not np.isfinite(mean).all() or not mean.any():
            raise DataError(
                f"importance of {name}",
                "its numbers are infinite, NaN or all zero",
                "measure it again with a model that works",
            )
    return Importance(means, tokens)


def save_importance(importance: Importance, path: Path) -> None:
    """Write an importance matrix as llama.cpp's tools do."""
    writer = GGUFWriter(path, "")  # as by llama.cpp's tool, there is no key for an architecture
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", [SOURCE])
    writer.add_uint32("imatrix.chunk_count", importance.chunks)
    writer.add_uint32("imatrix.chunk_size", _CHUNK_TOKENS)
    count = np.array([importance.tokens], dtype="<f4")
    for name in sorted(importance.mean_squares):
        sums = importance.mean_squares[name].astype(np.float64) * float(count[0])
        writer.add_tensor(name + _SUMS, sums.astype("<f4"))
        writer.add_tensor(name + _COUNTS, count)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def load_importance(path: Path) -> Importance:
    """Read an importance matrix that `save_importance` wrote."""
    tensors = {tensor.name: tensor.data for tensor in GGUFReader(path).tensors}
    names = [name.removesuffix(_SUMS) for name in tensors if name.endswith(_SUMS)]
    tokens = float(tensors[names[0] + _COUNTS][0])
    means = {name: np.array(tensors[name + _SUMS] / tokens, np.float32) for name in names}
    return Importance(means, round(tokens))
