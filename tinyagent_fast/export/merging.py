"""Adapter into base: a merged Hugging Face folder, written row by row and proved against both.

The sum is made in fp32 from the base's own weights, never from 4-bit ones that training may have
used, and rounded once. Afterwards every weight is read back: adapted ones must be base + update
within that rounding, all others must be the base's, bit for bit.
"""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tinyagent_fast.errors import GateError, ModelError
from tinyagent_fast.export.chat_template import chat_template
from tinyagent_fast.export.checkpoints import (
    INDEX,
    VALUE_BYTES,
    Checkpoint,
    Floats,
    NewTensor,
    StoredTensor,
    open_checkpoint,
    read_rows,
    row_blocks,
    stored_tensors,
    write_safetensors,
)
from tinyagent_fast.models.older_readers import config_for_both, write_for_older_readers
from tinyagent_fast.prompts.loading import read_model_json
from tinyagent_fast.prompts.tokens import PromptTokenizer
from tinyagent_fast.runs import ADAPTER_WEIGHTS, write_json

_DTYPE_NAMES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}
_HALF_ULP = {"F32": 2.0**-24, "F16": 2.0**-11, "BF16": 2.0**-8}
_SMALLEST = {"F32": 2.0**-149, "F16": 2.0**-24, "BF16": 2.0**-133}
_MATRIX = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
# Settings of adapter_config.json that are empty, false or "none" in plain LoRA.
_UNUSUAL = (
    *("modules_to_save", "trainable_token_indices", "fan_in_fan_out", "use_dora", "lora_bias"),
    *("layer_replication", "bias"),
)


@dataclass(frozen=True)
class LowRankUpdate:
    """The update of one weight: `scale * b_OR @ a_RI` in fp32."""

    a_RI: Floats
    b_OR: Floats
    scale: float

    def rows(self, start: int, stop: int) -> Floats:
        """Multiply out output rows from `start` to before `stop`."""
        product_OI: Floats = self.b_OR[start:stop] @ self.a_RI
        product_OI *= np.float32(self.scale)
        return product_OI


def read_adapter(folder: Path) -> dict[str, LowRankUpdate]:
    """Read an adapter's updates by the names that their weights have in the base.

    Not through peft, so that merging goes row by row in fp32.

    Raises:
        ModelError: Files are missing, or the adapter holds more than plain LoRA updates.
    """
    settings = read_model_json(folder / "adapter_config.json")
    unusual = [name for name in _UNUSUAL if settings.get(name) and settings[name] != "none"]
    if settings.get("peft_type") != "LORA":
        unusual.append("another peft_type")
    if unusual:
        raise _not_plain(folder, f"it uses {', '.join(unusual)}")
    halves: dict[str, dict[str, Floats]] = {}
    for name, tensor in stored_tensors(folder / ADAPTER_WEIGHTS).items():
        found = _MATRIX.fullmatch(name)
        if found is None:
            raise _not_plain(folder, f"it holds {name}, which is no LoRA matrix")
        halves.setdefault(found[1], {})[found[2]] = read_rows(tensor, 0, tensor.rows)
    updates = {}
    for stem, pair in halves.items():
        if set(pair) != {"A", "B"}:
            raise _not_plain(folder, f"{stem} has only one of its two matrices")
        rank = pair["A"].shape[0]
        if not np.isfinite(pair["A"]).all() or not np.isfinite(pair["B"]).all():
            raise _not_plain(folder, f"{stem} holds values that are not finite")
        scale = _alpha(settings, stem) / (math.sqrt(rank) if settings.get("use_rslora") else rank)
        updates[f"{stem}.weight"] = LowRankUpdate(pair["A"], pair["B"], scale)
    return updates


def _alpha(settings: Mapping[str, Any], stem: str) -> float:
    for pattern, alpha in (settings.get("alpha_pattern") or {}).items():
        if stem == pattern or stem.endswith(f".{pattern}"):
            return float(alpha)
    return float(settings["lora_alpha"])


def _not_plain(folder: Path, why: str) -> ModelError:
    return ModelError(
        f"adapter {folder}",
        f"{why}; only plain LoRA on linear weights can be merged",
        "export an adapter that `tinyagent-fast train` has made",
    )


@dataclass(frozen=True, kw_only=True)
class MergeReport:
    """What was merged, and how far the result is from base + update."""

    dtype: str
    """Of the merged weights; all of them, where there are several."""
    tensors: int
    adapted: int
    """Weights that the adapter changes; each was compared with base + update."""
    worst_error_ulp: float
    """Largest difference from base + update, in units of half a unit in the last place."""
    update_lost: float
    """Largest share of an update's norm that rounding to `dtype` has cost, over the weights."""


def merge_adapter(
    base: Path,
    adapter_folder: Path,
    target: Path,
    *,
    dtype: str = "base",
    on_progress: Callable[[int, int], None] = lambda _done, _all: None,
) -> MergeReport:
    """Write base + adapter as safetensors and prove the result.

    Args:
        base: Folder of the base model in 16 or 32 bits.
        adapter_folder: Folder of the adapter.
        target: Gets config.json and the shards; `write_tokenizer` adds the rest.
        dtype: Type of the merged weights: f32, f16, bf16, or `base` for each weight's own.
        on_progress: Called with bytes of the base done and in all; the proof counts as much again.

    Raises:
        ModelError: The adapter does not belong to the base.
        GateError: A written weight is not base + update.
    """
    checkpoint, updates = open_checkpoint(base), read_adapter(adapter_folder)
    for name, one in updates.items():
        _refuse_stranger(checkpoint, adapter_folder, name, one)
    tensors = list(checkpoint.tensors.values())
    done, total = 0, 2 * sum(tensor.size_bytes for tensor in tensors)

    def blocks(tensor: StoredTensor) -> Iterator[tuple[int, Floats]]:
        nonlocal done
        for start, block in row_blocks(tensor):
            yield start, block
            done += block.size * VALUE_BYTES[tensor.dtype]
            on_progress(done, total)

    def summed(tensor: StoredTensor) -> Iterator[Floats]:
        update = updates.get(tensor.name)
        for start, block in blocks(tensor):
            yield block if update is None else block + update.rows(start, start + len(block))

    target.mkdir(parents=True, exist_ok=True)
    for path in sorted({tensor.path for tensor in tensors}):
        shard = [
            NewTensor(
                one.name, one.dtype if dtype == "base" else dtype.upper(), one.shape, summed(one)
            )
            for one in tensors
            if one.path == path
        ]
        write_safetensors(target / path.name, shard)
    _write_configs(base, target, dtype)
    merged = open_checkpoint(target)
    worst, lost = 0.0, 0.0
    for tensor in tensors:
        written, update = merged.tensors[tensor.name], updates.get(tensor.name)
        error, share = _compare(blocks(tensor), tensor, written, update)
        worst, lost = max(worst, error), max(lost, share)
    return MergeReport(
        dtype=", ".join(sorted({t.dtype for t in merged.tensors.values()})).lower(),
        tensors=len(merged.tensors),
        adapted=len(updates),
        worst_error_ulp=round(worst, 4),
        update_lost=round(lost, 6),
    )


def _refuse_stranger(
    checkpoint: Checkpoint, adapter: Path, name: str, update: LowRankUpdate
) -> None:
    tensor = checkpoint.tensors.get(name)
    shape = (update.b_OR.shape[0], update.a_RI.shape[1])
    if tensor is None or tensor.shape != shape:
        found = "no such weight" if tensor is None else f"{tensor.shape} there"
        raise ModelError(
            f"adapter {adapter} on base {checkpoint.folder}",
            f"the adapter changes {name} of shape {shape}, and the base has {found}",
            "merge it into the base that it was trained on (data.json of the run names it)",
        )


def _compare(
    blocks: Iterator[tuple[int, Floats]],
    base: StoredTensor,
    merged: StoredTensor,
    update: LowRankUpdate | None,
) -> tuple[float, float]:
    """Compare a written weight with what it must be; give its error and the update's loss."""
    worst, lost, norm = 0.0, 0.0, 0.0
    for (start, before), (_, after) in zip(blocks, row_blocks(merged), strict=True):
        delta = np.zeros_like(before) if update is None else update.rows(start, start + len(before))
        if update is None and merged.dtype == base.dtype:
            if not np.array_equal(before, after):
                raise _not_the_sum(base.name, "it differs from the base, and no adapter changes it")
            continue
        wanted = before.astype(np.float64) + delta
        error = np.abs(after - wanted)
        # Beside the final rounding, the fp32 sum itself is off by half a unit of fp32.
        allowed = _HALF_ULP[merged.dtype] * np.abs(wanted) + 2.0**-23 * np.abs(before)
        allowed += 2.0**-22 * np.abs(delta) + _SMALLEST[merged.dtype]
        off = float((error / allowed).max(initial=0.0))
        if not off <= 1.0:
            raise _not_the_sum(base.name, f"it is off by {off:.1f} times what rounding allows")
        worst = max(worst, off)
        change = (after - before.astype(np.float64)) - delta
        lost += float((change**2).sum())
        norm += float((delta.astype(np.float64) ** 2).sum())
    return worst, (lost / norm) ** 0.5 if norm else 0.0


def _not_the_sum(name: str, why: str) -> GateError:
    return GateError(f"merged weight {name}: {why}; nothing was exported")


def _write_configs(base: Path, target: Path, dtype: str) -> None:
    config = config_for_both(read_model_json(base / "config.json"))
    if dtype != "base":
        config["dtype"] = config["torch_dtype"] = _DTYPE_NAMES[dtype]
    write_json(target / "config.json", config)
    index = base / INDEX
    if index.exists():
        content = read_model_json(index)
        size_bytes = sum(path.stat().st_size for path in target.glob("*.safetensors"))
        content["metadata"] = {**content.get("metadata", {}), "total_size": size_bytes}
        write_json(target / index.name, content)


def write_tokenizer(base: Path, tokenizer: PromptTokenizer, target: Path) -> None:
    """Put the run's tokenizer, chat template and generation config beside merged weights.

    The base's tokenizer.model, if any, is copied for other converters.
    """
    hf = tokenizer.hf
    hf.save_pretrained(str(target))
    # Of several templates one was trained with.
    shutil.rmtree(target / "additional_chat_templates", ignore_errors=True)
    own = tokenizer.chat.source if tokenizer.chat else None
    template = chat_template(tokenizer.prompt_format, own, bos=tokenizer.bos_id is not None)
    write_for_older_readers(target, template)
    if (base / "tokenizer.model").exists():
        shutil.copyfile(base / "tokenizer.model", target / "tokenizer.model")
    generation = {
        "bos_token_id": tokenizer.bos_id,
        # All of them: transformers and vLLM then stop where llama.cpp does.
        "eos_token_id": [tokenizer.eos_id, *sorted(tokenizer.end_ids - {tokenizer.eos_id})],
        "pad_token_id": tokenizer.pad_id,
        "do_sample": False,
    }
    write_json(target / "generation_config.json", generation)
