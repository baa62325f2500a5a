"""`data generate`: write a generated dataset in the published schema."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tinyagent_fast.data.generation.dataset import GenerationSpec


@dataclass(frozen=True, kw_only=True)
class GenerateFlags:
    """Flags of `data generate`."""

    out: Path = Path("data/generated")
    """Folder for training_data.json and testing_data.json."""


def run(arguments: Sequence[str]) -> int:
    """Generate.

    Args:
        arguments: Flags of the command.

    Returns:
        0 when both files are written.
    """
    import tyro

    from tinyagent_fast.data.generation.dataset import generate_dataset
    from tinyagent_fast.errors import ConfigError

    both = tuple[
        Annotated[GenerationSpec, tyro.conf.arg(name="")],
        Annotated[GenerateFlags, tyro.conf.arg(name="")],
    ]
    try:
        spec, flags = tyro.cli(both, args=list(arguments), prog="tinyagent-fast data generate")
    except ValueError as error:
        raise ConfigError("data generate", str(error), "change the flag") from error
    files = generate_dataset(spec, flags.out)
    for path, entries in ((files.train, spec.train_entries), (files.test, spec.test_entries)):
        print(f"{path}: {entries} entries, {path.stat().st_size / 1e6:.1f} MB")
    print(f"train on them: make train ARGS='--data.train {files.train} --data.test {files.test}'")
    return 0
