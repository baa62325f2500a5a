"""Read a trained LoRA adapter as plain matrices: what is added to which weight of the base.

Export reads it here instead of through peft, so that a merge can go tensor by tensor in fp32.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tinyagent_fast.errors import ModelError
from tinyagent_fast.export.checkpoints import read_rows, stored_tensors

_PREFIX = "base_model.model."


@dataclass(frozen=True)
class LowRankUpdate:
    """The update of one weight: `scale * b_OR @ a_RI` in fp32."""

    a_RI: NDArray[np.float32]
    b_OR: NDArray[np.float32]
    scale: float

    def rows(self, start: int, stop: int) -> NDArray[np.float32]:
        """Multiply out some rows of the update.

        Args:
            start: First output row.
            stop: After the last output row.

        Returns:
            Rows x inputs in fp32.
        """
        product_OI: NDArray[np.float32] = self.b_OR[start:stop] @ self.a_RI
        product_OI *= np.float32(self.scale)
        return product_OI


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """A LoRA adapter by the names of the base's weights."""

    folder: Path
    rank: int
    updates: Mapping[str, LowRankUpdate]


def read_adapter(folder: Path) -> Adapter:
    """Read an adapter that training has written.

    Args:
        folder: Holds adapter_config.json and adapter_model.safetensors.

    Returns:
        Every update by the weight's name in the base.

    Raises:
        ModelError: Files are missing, or the adapter holds more than plain LoRA updates.
    """
    settings = _settings(folder)
    tensors = stored_tensors(folder / "adapter_model.safetensors")
    halves: dict[str, dict[str, NDArray[np.float32]]] = {}
    for name, tensor in tensors.items():
        stem, half = _split(name, folder)
        halves.setdefault(stem, {})[half] = read_rows(tensor, 0, tensor.shape[0])
    updates = {}
    for stem, pair in halves.items():
        if set(pair) != {"A", "B"}:
            raise _not_plain(folder, f"{stem} has only one of its two matrices")
        rank = pair["A"].shape[0]
        if not np.isfinite(pair["A"]).all() or not np.isfinite(pair["B"]).all():
            raise _not_plain(folder, f"{stem} holds values that are not finite")
        scale = _alpha(settings, stem) / (math.sqrt(rank) if settings.get("use_rslora") else rank)
        updates[f"{stem}.weight"] = LowRankUpdate(pair["A"], pair["B"], scale)
    return Adapter(folder=folder, rank=int(settings["r"]), updates=updates)


def _settings(folder: Path) -> dict[str, Any]:
    path = folder / "adapter_config.json"
    if not path.exists() or not (folder / "adapter_model.safetensors").exists():
        raise ModelError(
            f"adapter {folder}",
            "adapter_config.json or adapter_model.safetensors is missing",
            "let training finish, or name another run",
        )
    settings: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    unusual = {
        "peft_type": settings.get("peft_type") != "LORA",
        "bias": settings.get("bias", "none") != "none",
        "modules_to_save": bool(settings.get("modules_to_save")),
        "trainable_token_indices": bool(settings.get("trainable_token_indices")),
        "fan_in_fan_out": bool(settings.get("fan_in_fan_out")),
        "use_dora": bool(settings.get("use_dora")),
        "lora_bias": bool(settings.get("lora_bias")),
        "layer_replication": bool(settings.get("layer_replication")),
    }
    if any(unusual.values()):
        raise _not_plain(folder, f"it uses {', '.join(k for k, is_so in unusual.items() if is_so)}")
    return settings


def _split(name: str, folder: Path) -> tuple[str, str]:
    """Turn `base_model.model.X.lora_A.weight` into `X` and `A`."""
    for half in ("A", "B"):
        end = f".lora_{half}.weight"
        if name.startswith(_PREFIX) and name.endswith(end):
            return name[len(_PREFIX) : -len(end)], half
    raise _not_plain(folder, f"it holds {name}, which is no LoRA matrix")


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
