"""Files to rows for one run: reading, split, leaks, encoding, with every count kept."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from tinyagent_fast.config import Config, DataConfig, Points
from tinyagent_fast.data import generation, splits
from tinyagent_fast.data.cache import ExampleTable, cache_folder, load_examples
from tinyagent_fast.data.generation.catalogue import BUILT_IN_CATALOGUE, plan_tools
from tinyagent_fast.data.generation.dataset import GenerationSpec, generate_dataset
from tinyagent_fast.data.generation.prompts import short_planner_prompt
from tinyagent_fast.data.schema import Example, called_tools
from tinyagent_fast.data.splits import (
    LeakReport,
    leak_report,
    split_validation,
    without_leaks,
)
from tinyagent_fast.display import Stage, unseen
from tinyagent_fast.errors import DataError
from tinyagent_fast.evaluation.scoring import refuse_unknown_tools
from tinyagent_fast.models.encoder import EncoderTraining
from tinyagent_fast.plans import grammar
from tinyagent_fast.plans.tools import TINYAGENT
from tinyagent_fast.prompts.retrieval import (
    RewrittenExamples,
    ToolRetriever,
    load_retriever,
    train_retriever,
)
from tinyagent_fast.prompts.rows import RowFile, encode_examples
from tinyagent_fast.prompts.system_text import parse
from tinyagent_fast.prompts.templates import template_hash
from tinyagent_fast.prompts.tokens import PromptTokenizer
from tinyagent_fast.runs import Run, key_of, sha256_of

GENERATED = Path("data/generated")
_SOME_MOMENT = datetime(2000, 1, 1)
"""Stands in prompts only where a row tells no other."""


@dataclass(frozen=True)
class DataFiles:
    """The files of a run and whether they were generated for it."""

    train: Path
    test: Path | None
    generated: bool
    """Whether the training file is."""
    mixed_in: Path | None = None
    """A generated file whose rows stand among those of the training file."""


@dataclass(frozen=True, kw_only=True)
class RunExamples:
    """The examples of a run, split."""

    files: DataFiles
    train: Sequence[Example]
    validation: Sequence[Example]
    """Plans of the fixed validation sample."""
    test: Sequence[Example]
    """Plans of the test file, or the first `eval.limit` of them."""
    test_in_file: int
    """How many plans the test file has."""
    summary: dict[str, Any]
    """Hashes and counts, written to data.json; a resumed run must have the same."""
    leaks: LeakReport
    left_out_as_leaks: int
    """Training rows that were left out because their query stands in the test file."""
    retriever: ToolRetriever | None = None
    """It has rewritten all prompts; None where they are as in the files."""


@dataclass(frozen=True, kw_only=True)
class RunRows:
    """The encoded rows of a run."""

    train: RowFile
    validation: RowFile | None


def data_files(config: Config, stage: Stage = unseen, mixed_in: Path | None = None) -> DataFiles:
    """Find the run's files; generate them, as a stage, when the config names no file.

    Args:
        config: The run's config.
        stage: Generating is one.
        mixed_in: The file whose rows were mixed in before; it is generated where it is gone.

    Raises:
        DataError: A named file is missing, or only the test file is named.
    """
    data = config.data
    if data.train is None:
        if data.test is not None:
            raise DataError(
                f"test file {data.test} without a training file",
                "a generated training file may hold its queries",
                "name --data.train too, or neither",
            )
        return DataFiles(*_generated_files(data, stage), True)
    for path in (data.train, data.test):
        if path is not None and not path.exists():
            raise DataError(
                f"data file {path}",
                "it is not there",
                "make data downloads the published files; --data.train and --data.test name others",
            )
    if data.with_generated and (mixed_in is None or not mixed_in.exists()):
        mixed_in = _generated_files(data, stage)[0]
    return DataFiles(data.train, data.test, False, mixed_in)


def _generated_files(data: DataConfig, stage: Stage) -> tuple[Path, Path]:
    """Generate a training and a test file, unless they are there."""
    spec = GenerationSpec(
        train_entries=data.generated_entries,
        max_calls=data.generated_max_calls,
        seed=data.seed,
        catalogue=data.catalogue or BUILT_IN_CATALOGUE,
    )
    key = hashlib.sha256(_generation_key(spec).encode()).hexdigest()[:10]
    folder = GENERATED / f"seed{data.seed}-{data.generated_entries}-{key}"
    train, test = folder / "training_data.json", folder / "testing_data.json"
    if not (train.exists() and test.exists()):
        with stage("generating entries", "") as update:
            generate_dataset(spec, folder, update)
    return train, test


def _generation_key(spec: GenerationSpec) -> str:
    """Name the generated files by all they depend on: spec, catalogue and the generator's code."""
    sources = sorted(p for p in Path(generation.__path__[0]).glob("*.*") if p.suffix != ".pyc")
    used = (*sources, Path(grammar.__file__), Path(splits.__file__), spec.catalogue)
    contents = [path.read_bytes() for path in used]
    settings = repr(replace(spec, catalogue=Path()))
    return settings + hashlib.sha256(b"".join(contents)).hexdigest()


def load_run_examples(
    config: Config, stage: Stage = unseen, mixed_in: Path | None = None
) -> RunExamples:
    """Read, split and sample the examples of a run; each part that takes long is a stage.

    The arguments are those of `data_files`.

    Returns:
        The examples; validation entries and test queries are kept out of training.

    Raises:
        DataError: A file is faulty or too small.
    """
    files = data_files(config, stage, mixed_in)
    with stage("reading data", ""):
        examples, train, epoch = _read_examples(files, config)
    if config.data.prompts == "as-is":
        return examples
    return _with_retrieved_tools(examples, train, epoch, config, stage)


def _read_examples(
    files: DataFiles, config: Config
) -> tuple[RunExamples, ExampleTable, Sequence[int]]:
    """Give the examples with prompts as in the files, and what `_with_retrieved_tools` takes."""
    data = config.data
    table = _load(files.train, config, data.points)
    keys, queries = table.column("entry_key"), table.column("query")
    split = split_validation(
        keys, queries, validation_entries=data.validation_entries, seed=data.seed
    )
    test = _load(files.test, config, "plan") if files.test else None
    test_examples = test[: config.eval.limit] if test else ()
    held_out = test.column("query") if test else []
    train_indices = without_leaks(split.train, queries, held_out, data.leaks)
    leaked = len(split.train) - len(train_indices)
    if data.limit_entries is not None:
        train_indices = _limit(keys, train_indices, data.limit_entries, data.seed)
    train = _with_joins_as_asked(table.select(train_indices), data)
    own_rows = len(train)
    mixed_in: dict[str, Any] = {}
    if files.mixed_in is not None:
        measured = [*held_out, *(queries[row] for row in split.validation)]
        train, mixed_in = _with_generated_rows(train, files.mixed_in, measured, config)
    # What a retriever is trained on has each row once, so that it is tried on unseen queries.
    epoch = [*range(len(train)), *[*range(own_rows)] * (data.own_passes - 1)]
    plans = _plans(table, split.validation)
    sample = plans
    if config.eval.sample < len(plans):
        sample = sorted(random.Random(data.seed).sample(plans, config.eval.sample))
    validation = table.select(sample)
    leaks = leak_report(
        {
            "train": train.column("query"),
            "validation": [queries[row] for row in split.validation],
            "test": [e.query for e in test_examples],
        }
    )
    summary = {
        "train_file": {"path": str(files.train), "sha256": table.sha256},
        "test_file": {"path": str(files.test), "sha256": test.sha256} if test else None,
        "examples": {
            "train": len(epoch),
            "left_out_as_leaks": leaked,
            "validation": len(split.validation),
            "sample": len(validation),
            "test": len(test_examples),
        },
        **({"generated": mixed_in} if mixed_in else {}),
        **_about_catalogue(data.catalogue),
        "read": {"train": asdict(table.report), "test": asdict(test.report) if test else None},
        "leaks": asdict(leaks),
    }
    examples = RunExamples(
        files=files,
        train=train,
        validation=validation,
        test=test_examples,
        test_in_file=len(test) if test else 0,
        summary=summary,
        leaks=leaks,
        left_out_as_leaks=leaked,
    )
    return examples, train, epoch


def _about_catalogue(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    plan_tools(path)  # refuses one that is not there
    return {"catalogue_file": {"path": str(path), "sha256": sha256_of(path)}}


def _with_generated_rows(
    own: ExampleTable, file: Path, measured: Sequence[str], config: Config
) -> tuple[ExampleTable, dict[str, Any]]:
    """Put generated rows behind those of one's own, apart from queries that success is measured on.

    Returns:
        All rows, each once, and what data.json says of the mixture.
    """
    generated = _load(file, config, config.data.points)
    rows = range(len(generated))
    kept = without_leaks(rows, generated.column("query"), measured, policy="drop")
    both = own.followed_by(_with_joins_as_asked(generated.select(kept), config.data))
    return both, {
        "path": str(file),
        "sha256": generated.sha256,
        "rows": len(both) - len(own),
        "left_out": len(generated) - len(kept),
        "own_rows": len(own),
        "own_passes": config.data.own_passes,
    }


def _with_retrieved_tools(
    examples: RunExamples,
    train: ExampleTable,
    epoch: Sequence[int],
    config: Config,
    stage: Stage,
) -> RunExamples:
    """Train a retriever on the training plans, and rewrite the prompts of all plans.

    Training rows list what is retrieved for a query that the retriever has not seen, as at
    inference, and the tools of their plan; the others list what is retrieved.

    Args:
        examples: Those of the run.
        train: Its training rows, each once.
        epoch: The rows of `train` that are trained on in an epoch; one may come several times.
        config: The run's config.
        stage: The training is one.
    """
    retriever, retrieved = _train_retriever(train, config, stage)
    of_plans = iter(retrieved)
    listed = [(*called_tools(e.output), *next(of_plans)) if e.kind == "plan" else () for e in train]
    return replace(
        examples,
        train=RewrittenExamples(train.select(epoch), retriever, [listed[row] for row in epoch]),
        validation=retriever.rewrite(examples.validation),
        test=retriever.rewrite(examples.test),
        summary={**examples.summary, "retriever": retriever.facts()},
        retriever=retriever,
    )


def _train_retriever(
    train: Sequence[Example], config: Config, stage: Stage
) -> tuple[ToolRetriever, list[tuple[str, ...]]]:
    data = config.data
    with stage("training the tool retriever", "steps") as update:
        retriever, retrieved = train_retriever(
            [example for example in train if example.kind == "plan"],
            recall=data.retrieval_recall,
            known=plan_tools(data.catalogue) or TINYAGENT,
            encoder=EncoderTraining.of(data),
            on_progress=update,
        )
    if data.prompts == "short":
        system = parse(short_planner_prompt(retriever.tools, _SOME_MOMENT), retriever.tools)
        retriever = replace(retriever, system=system, examples=0, solved=())
    return retriever, retrieved


def retriever_of_run(run: Run, stage: Stage = unseen) -> ToolRetriever | None:
    """Read the tool retriever of a run, or train and save it from the run's training queries.

    Returns:
        The retriever; None if there is none and the training file is not here or has one plan.

    Raises:
        DataError: Its files or the training file are damaged.
    """
    saved = load_retriever(run.path)
    train, test = run.train_file(), run.test_file()
    if saved is not None or train is None or not train.exists():
        return saved
    config = run.config()
    data = replace(
        config.data,
        train=train,
        test=test if test is not None and test.exists() else None,
        points="plan",
        prompts="as-is",
    )
    examples = load_run_examples(replace(config, data=data), stage, run.mixed_in_file())
    if len(examples.train) < 2:
        return None
    retriever, _ = _train_retriever(examples.train, config, stage)
    retriever.save(run.path)
    return retriever


def load_test_examples(config: Config) -> tuple[Sequence[Example], str]:
    """Read the plans of a config's test file alone.

    Returns:
        The plans and the file's sha256.

    Raises:
        DataError: There is no test file, or it is faulty.
    """
    test_file = config.data.test or data_files(config).test
    if test_file is None:
        raise DataError("no test file", "the run's config names none", "name one with --test FILE")
    test = _load(test_file, config, "plan")
    return test[: config.eval.limit], test.sha256


def refuse_unscorable(
    config: Config, test: Sequence[Example], validation: Sequence[Example] = ()
) -> None:
    """Refuse labels that call tools outside the config's catalogue, which no prediction can match.

    A test file may have none of them, unless faulty entries are to be skipped; of the validation
    plans, which stand in the training file, at least one must be scorable.

    Raises:
        DataError: There are too many of them.
    """
    skip = config.data.on_bad_entry == "skip"
    for what, examples, some_are_fine in (
        ("test labels", test, skip),
        ("validation labels", validation, True),
    ):
        refuse_unknown_tools(
            what,
            [example.output for example in examples],
            plan_tools(config.data.catalogue),
            "train with a --data.catalogue FILE that lists these tools (a run that is there: "
            "`catalogue: FILE` under `data` in its config.yaml)",
            some_are_fine=some_are_fine,
        )


def _load(path: Path, config: Config, points: Points) -> ExampleTable:
    return load_examples(path, on_bad_entry=config.data.on_bad_entry, points=points)


def _limit(keys: Sequence[str], indices: list[int], entries: int, seed: int) -> list[int]:
    """Keep the points of `entries` entries, chosen with the seed, in file order."""
    different = sorted({keys[index] for index in indices})
    chosen = set(random.Random(seed).sample(different, min(entries, len(different))))
    return [index for index in indices if keys[index] in chosen]


def _with_joins_as_asked(table: ExampleTable, data: DataConfig) -> ExampleTable:
    """Keep `data.joins_per_plan` joins for each plan, chosen with the seed, and all else."""
    if data.joins_per_plan is None:
        return table
    kinds = table.column("kind")
    joins = [row for row, kind in enumerate(kinds) if kind == "join"]
    wanted = min(len(joins), round(data.joins_per_plan * kinds.count("plan")))
    left_out = set(joins).difference(random.Random(data.seed).sample(joins, wanted))
    return table.select([row for row in range(len(table)) if row not in left_out])


def _plans(table: ExampleTable, indices: list[int]) -> list[int]:
    """Keep the plans, on which success is measured; with `points: join` there are none."""
    kinds = table.column("kind")
    return [index for index in indices if kinds[index] == "plan"]


def encode_run_rows(
    config: Config,
    examples: RunExamples,
    tokenizer: PromptTokenizer,
    on_progress: Callable[[int], None] = lambda _: None,
) -> RunRows:
    """Encode the rows of a run, or open those that an equal run has left.

    Raises:
        DataError: Rows are over-long or cannot be proved.
    """
    model, summary = config.model, examples.summary
    vocabulary = hashlib.sha256(tokenizer.hf.backend_tokenizer.to_str().encode()).hexdigest()
    key_parts = [
        summary["train_file"]["sha256"],
        summary["test_file"] and summary["test_file"]["sha256"],
        summary.get("generated", {}).get("sha256"),
        vocabulary,
        tokenizer.bos_id,
        tokenizer.eos_id,
        model.prompt_format,
        template_hash(model.prompt_format, tokenizer.chat),
        model.max_length_tokens,
        # Files count by their hashes, wherever they lie.
        {k: str(v) for k, v in vars(config.data).items() if k not in ("train", "test")},
        config.eval.sample,
        examples.retriever and examples.retriever.key(),
    ]
    key, folder = key_of(key_parts), cache_folder() / "rows"

    def encode(name: str, chosen: Sequence[Example], report: Callable[[int], None]) -> RowFile:
        return encode_examples(
            chosen,
            tokenizer,
            folder / f"{key}-{name}",
            max_length_tokens=model.max_length_tokens,
            over_long=config.data.over_long,
            on_progress=report,
        )

    train = encode("train", examples.train, on_progress)
    validation = None
    if examples.validation:
        validation = encode("validation", examples.validation, lambda _: None)
    return RunRows(train=train, validation=validation)
