"""What stands before an export's first file: data, tokenizer, flags, disk and memory."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tinyagent_fast.config import Config
from tinyagent_fast.data.generation.catalogue import plan_tools
from tinyagent_fast.data.schema import Example
from tinyagent_fast.display import Display, size_text
from tinyagent_fast.errors import ConfigError, ModelError
from tinyagent_fast.export.checkpoints import (
    VALUE_BYTES,
    Checkpoint,
    base_folder,
    open_checkpoint,
)
from tinyagent_fast.export.companions import MERGED
from tinyagent_fast.export.conversion import check_exportable
from tinyagent_fast.export.record import ExportRecord
from tinyagent_fast.export.settings import QUANTS, ExportSettings, QuantSpec, quant_specs
from tinyagent_fast.plans.tools import Tool
from tinyagent_fast.prompts.loading import load_tokenizer
from tinyagent_fast.prompts.tokens import PromptTokenizer
from tinyagent_fast.runs import Run
from tinyagent_fast.training.inputs import load_run_examples

_GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Export:
    """Everything that the steps of an export share."""

    run: Run
    config: Config
    settings: ExportSettings
    base: Path
    """Local folder of the base model."""
    adapter: Path
    stem: str
    specs: Sequence[QuantSpec]
    tokenizer: PromptTokenizer
    validation: Sequence[Example]
    """Plans for the gates; training never saw them."""
    training: Sequence[Example]
    """Plans from which the importance matrix is measured."""
    tools: Mapping[str, Tool] | None
    """Tools that plans may call; None stands for TinyAgent's own."""
    record: ExportRecord
    display: Display

    @property
    def folder(self) -> Path:
        """Where everything goes."""
        return self.record.folder

    @property
    def merged(self) -> Path:
        """The merged Hugging Face folder."""
        return self.folder / MERGED

    def gguf_path(self, spec: QuantSpec) -> str:
        """Name a GGUF file, relative to the folder."""
        return f"gguf/{self.stem}-{spec.name}.gguf"


def prepare_export(
    run: Run, config: Config, settings: ExportSettings, adapter: Path, display: Display
) -> Export:
    """Read what an export needs, make its folder, and refuse what cannot end well.

    Raises:
        UserError: Flags, files, disk or memory do not allow it.
    """
    config = replace(config, eval=replace(config.eval, sample=settings.quant_prompts))
    base = base_folder(run.base_of(config), config.model.revision)
    folder = settings.out or run.path / "export"
    folder.mkdir(parents=True, exist_ok=True)
    examples = load_run_examples(config, display.bar)
    rows = min(settings.importance_rows, len(examples.train))
    export = Export(
        run=run,
        config=config,
        settings=settings,
        base=base,
        adapter=adapter,
        stem=settings.name or run.path.name,
        specs=quant_specs(settings),
        tokenizer=PromptTokenizer(load_tokenizer(base), config.model.prompt_format),
        validation=examples.validation,
        training=[examples.train[k * len(examples.train) // rows] for k in range(rows)],
        tools=plan_tools(config.data.catalogue),
        record=ExportRecord(folder),
        display=display,
    )
    if export.specs:
        check_exportable(base, export.tokenizer)
    checkpoint = open_checkpoint(base)
    display.say(refuse_full_disk(folder, _needed_bytes(export, checkpoint)))
    if settings.gates == "on":
        if not examples.validation:
            raise ConfigError(
                "export with gates",
                "the run has no validation plans, so nothing can be compared",
                "train with --data.validation-entries above 0, or export with --gates off",
            )
        # They compare in fp32.
        display.say(refuse_small_memory(int(4.5 * _values(checkpoint)) + _GIB))
    return export


def refuse_full_disk(folder: Path, needed_bytes: Mapping[str, int]) -> str:
    """Compare what artefacts will take with what is free, and say both in a line.

    Those that are there already count 0.

    Raises:
        ModelError: The disk is too small.
    """
    free, needed = shutil.disk_usage(folder).free, sum(needed_bytes.values())
    listed = ", ".join(f"{name} {size_text(size)}" for name, size in needed_bytes.items() if size)
    line = f"disk: {size_text(needed)} needed ({listed or 'all there'}), {size_text(free)} free"
    if needed * 1.02 > free:
        raise ModelError(
            f"export into {folder}",
            f"the disk is too small; {line}",
            "free space, name another folder with --out, or leave files out with --quant",
        )
    return line


def refuse_small_memory(needed_bytes: int) -> str:
    """Compare the gates' peak of memory with what is available, and say both in a line.

    Raises:
        ModelError: Too little is available.
    """
    import psutil

    available = psutil.virtual_memory().available
    line = f"memory: {needed_bytes / _GIB:.2f} GiB for the gates, {available / _GIB:.1f} available"
    if needed_bytes > available:
        raise ModelError(
            "export",
            f"there is too little memory; {line}",
            "close other programs, or export with --gates off and compare on a larger machine",
        )
    return line


def _values(checkpoint: Checkpoint) -> int:
    return sum(tensor.values for tensor in checkpoint.tensors.values())


def _needed_bytes(export: Export, checkpoint: Checkpoint) -> dict[str, int]:
    """Estimate the size of every artefact that is not there yet."""
    values, dtype = _values(checkpoint), export.settings.merged_dtype.upper()
    sizes = {
        MERGED: sum(
            tensor.values * VALUE_BYTES[tensor.dtype if dtype == "BASE" else dtype]
            for tensor in checkpoint.tensors.values()
        )
    }
    for spec in export.specs:
        sizes[export.gguf_path(spec)] = int(values * QUANTS[spec.quant][1] / 8)
    needed = {
        path: 0 if (export.folder / path).exists() and not export.settings.fresh else size
        for path, size in sizes.items()
    }
    if export.specs and export.settings.gates == "on":
        needed["f32 to compare with (temporary)"] = 4 * values
        if not any(spec.quant == "f16" for spec in export.specs):
            needed["f16 to compare with (temporary)"] = 2 * values
    return needed
