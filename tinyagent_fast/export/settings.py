"""What an export makes and proves; flags of the command are these fields."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tinyagent_fast.errors import ConfigError, did_you_mean

_IMATRIX = "-imatrix"

QUANTS = {
    "f32": ("F32", 32.0), "f16": ("F16", 16.0), "bf16": ("BF16", 16.0), "q8_0": ("Q8_0", 8.5),
    "q6_k": ("Q6_K", 6.6), "q5_k_m": ("Q5_K", 5.7), "q4_k_m": ("Q4_K", 4.9),
}  # fmt: skip
"""Kinds of GGUF files from many bits to few: the ggml type of most tensors, and the bits per weight
of whole files, for estimates of their size."""


@dataclass(frozen=True, kw_only=True)
class ExportSettings:
    """Flags of `export`."""

    run: str = "latest"
    """Run to export: its name, its folder, or `latest`."""
    runs: Path = Path("runs")
    """Folder of all runs."""
    adapter: str = "best"
    """`best` for the run's adapter, or a folder."""
    to: str = "merged,gguf"
    """What to make: `merged` (a Hugging Face folder), `gguf`, or both."""
    quant: str = "f16,q8_0,q4_k_m,q4_k_m-imatrix"
    """GGUF files to make: f32, f16, bf16, q8_0, q6_k, q5_k_m, q4_k_m; `-imatrix` behind a K-quant
    weights its rounding by what the training prompts activate."""
    merged_dtype: Literal["base", "f32", "f16", "bf16"] = "base"
    """Type of the merged weights; `base` keeps that of the base model."""
    name: str | None = None
    """Stem of the GGUF files' names; the run's name by default."""
    out: Path | None = None
    """Folder for everything; `export/` in the run's folder by default."""
    gates: Literal["on", "off"] = "on"
    """Prove that the files do what the adapter does; exit 1 when one does not."""
    gate_prompts: int = 16
    """Validation prompts on which adapter, merged model and f16 file must give the same plans."""
    quant_prompts: int = 100
    """Validation prompts on which each quantised file's success is compared with f16's."""
    max_loss_points: float = 5.0
    """A quantised file fails when it surely loses more than this many points of success."""
    importance_rows: int = 64
    """Training rows from which the importance matrix is measured."""
    threads: int | None = None
    """CPU threads of llama.cpp; None takes one per core."""
    push_to_hub: str | None = None
    """Put the proved export into this repository of the hub, `owner/name`, private."""
    dry_run: bool = False
    """With --push-to-hub: say what would be sent, and send nothing."""
    fresh: bool = False
    """Make everything anew, even what is there and whole."""


@dataclass(frozen=True)
class QuantSpec:
    """One GGUF file to make."""

    name: str
    """As asked for, such as `q4_k_m-imatrix`."""

    @property
    def quant(self) -> str:
        """The kind of file, of `QUANTS`."""
        return self.name.removesuffix(_IMATRIX)

    @property
    def importance(self) -> bool:
        """Whether an importance matrix weighs its rounding."""
        return self.name.endswith(_IMATRIX)


def quant_specs(settings: ExportSettings) -> list[QuantSpec]:
    """Read the list of GGUF files: f16 first where it is asked for, no file without `gguf`.

    Raises:
        ConfigError: A name is unknown or occurs twice, or nothing would be made.
    """
    wanted = [word.strip() for word in settings.to.split(",") if word.strip()]
    unknown = [word for word in wanted if word not in ("merged", "gguf")]
    if unknown or not wanted:
        raise _unknown("--to", unknown or [settings.to], ["merged", "gguf"])
    if "gguf" not in wanted:
        return []
    names = [word.strip().lower() for word in settings.quant.split(",") if word.strip()]
    specs = [QuantSpec(name) for name in names]
    strange = [spec.name for spec in specs if spec.quant not in QUANTS]
    if strange or not specs:
        raise _unknown("--quant", strange or [settings.quant], list(QUANTS))
    no_use = [s.name for s in specs if s.importance and not QUANTS[s.quant][0].endswith("_K")]
    if no_use or len(set(names)) < len(names):
        raise ConfigError(
            f"--quant {settings.quant}",
            f"an importance matrix changes only K-quants, not {', '.join(no_use)}"
            if no_use
            else "a name occurs twice",
            "for example: --quant f16,q8_0,q4_k_m,q4_k_m-imatrix",
        )
    return sorted(specs, key=lambda spec: spec.quant != "f16")


def check_settings(settings: ExportSettings) -> None:
    """Refuse flags that make no sense.

    Raises:
        ConfigError: Lists every problem with a number; or nothing would be made.
    """
    counts = {
        "gate-prompts": settings.gate_prompts,
        "quant-prompts": settings.quant_prompts,
        "importance-rows": settings.importance_rows,
        "threads": settings.threads,
    }
    problems = [
        f"--{name} must be 1 or more, got {value}"
        for name, value in counts.items()
        if value is not None and value < 1
    ]
    if not 0 <= settings.max_loss_points <= 100:
        problems.append(f"--max-loss-points is in 0..100, got {settings.max_loss_points}")
    if settings.quant_prompts < settings.gate_prompts:
        problems.append(
            f"--quant-prompts ({settings.quant_prompts}) must be at least "
            f"--gate-prompts ({settings.gate_prompts})"
        )
    if settings.dry_run and settings.push_to_hub is None:
        problems.append("--dry-run belongs to --push-to-hub")
    if settings.push_to_hub is not None and not re.fullmatch(
        r"[\w.-]+/[\w.-]+", settings.push_to_hub
    ):
        problems.append(f"--push-to-hub must be owner/name, got {settings.push_to_hub!r}")
    if settings.name is not None and settings.name != (Path(settings.name).name or None):
        problems.append(f"--name must be the name of a file, got {settings.name!r}")
    if problems:
        raise ConfigError(
            f"{len(problems)} flag(s) cannot be used", "\n       ".join(problems), "correct them"
        )
    quant_specs(settings)


def _unknown(flag: str, words: list[str], known: list[str]) -> ConfigError:
    return ConfigError(
        f"{flag} {', '.join(words)}",
        f"there is no such thing{did_you_mean(words[0], known)}",
        f"take from: {', '.join(known)}",
    )
