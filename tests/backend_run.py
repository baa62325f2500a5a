"""The program that trains and evaluates by a backend in a process of its own, and says what it saw.

    python tests/backend_run.py FOLDER [kernels]

Importing Unsloth changes trl and transformers for the whole process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tinyagent_fast.config import Config


def start(folder: Path, *words: str, timeout_s: float, **environment: str) -> dict[str, Any]:
    """Run this program with a folder; gives what it saw, by the config's name.

    What it printed goes to stdout.txt in the folder.
    """
    done = subprocess.run(
        [sys.executable, __file__, str(folder), *words],
        cwd=folder,
        env={**os.environ, "TINYAGENT_FAST_CACHE": str(folder / "cache"), **environment},
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    (folder / "stdout.txt").write_text(done.stdout, encoding="utf-8")
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    seen: dict[str, Any] = json.loads((folder / "seen.json").read_text(encoding="utf-8"))
    return seen


def main(folder: Path, *, kernels: bool = False) -> None:
    """Train and evaluate the configs in a folder and write what was seen to seen.json there.

    `kernels` takes Unsloth's code for GPUs, whose kernels Triton's interpreter runs.
    """
    if kernels:
        import unsloth_on_cpu

        unsloth_on_cpu.start()
        unsloth_on_cpu.fuse_in_fp32()
    import torch

    from tinyagent_fast.commands import evaluate
    from tinyagent_fast.config import parse_config

    torch.set_num_threads(1)
    seen: dict[str, Any] = {}
    for path in sorted(folder.glob("*.yaml")):
        config = parse_config(path.read_text(encoding="utf-8"))
        seen[path.stem] = train_and_look(config)
        flags = ["--run", path.stem, "--runs", str(folder / "runs")]
        most = "2" if kernels else "4"
        evaluate.run([*flags, "--parity-prompts", most, "--limit", most])
    (folder / "seen.json").write_text(json.dumps(seen), encoding="utf-8")


def train_and_look(config: Config) -> dict[str, Any]:
    import io

    from rich.console import Console

    from tinyagent_fast.training import fit

    kept: dict[str, Any] = {}
    original = fit.build_trainer

    def build_trainer(loaded: Any, *arguments: Any, **keywords: Any) -> Any:
        kept["loaded"], kept["trainer"] = loaded, original(loaded, *arguments, **keywords)
        return kept["trainer"]

    fit.build_trainer = build_trainer
    console = Console(file=io.StringIO(), width=200)
    try:
        fit.train(config, console)
    finally:
        fit.build_trainer = original
    loaded, arguments = kept["loaded"], kept["trainer"].args
    parameters = list(loaded.model.named_parameters())
    return {
        "output": console.file.getvalue(),  # type: ignore[attr-defined]
        "backend": loaded.backend,
        "notes": list(loaded.notes),
        "compute_dtype": loaded.compute_dtype,
        "devices": sorted({p.device.type for _, p in parameters}),
        "optimizer": str(getattr(arguments.optim, "value", arguments.optim)),
        "packing": arguments.packing,
        "trainable": sorted({str(p.dtype) for _, p in parameters if p.requires_grad}),
        "only_adapter": all("lora_" in n for n, p in parameters if p.requires_grad),
        "four_bit": sum(type(p).__name__ == "Params4bit" for _, p in parameters),
        "unsloth": "unsloth" in sys.modules,
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]), kernels=sys.argv[2:] == ["kernels"])
