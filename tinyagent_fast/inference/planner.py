"""Open a planner by the name of a run, a folder or a GGUF file, and ask it for plans.

Chat, the local page, the notebook and the Python API stand on it.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Literal

from tinyagent_fast.config import (
    Config,
    EvalConfig,
    GrammarUse,
    ModelConfig,
    PromptFormat,
    Weights,
    check_threads,
    typed,
)
from tinyagent_fast.data.generation.catalogue import plan_tools
from tinyagent_fast.errors import ConfigError, ModelError, reading
from tinyagent_fast.inference.engine import Completion, Engine, EngineName, Limits, OnToken, Prompt
from tinyagent_fast.inference.second_look import doubts_left, generate_plans, known_tools
from tinyagent_fast.plans.doubts import not_asked_for
from tinyagent_fast.plans.drawing import PlanDrawing, draw_plan
from tinyagent_fast.plans.grammar import END_OF_PLAN, Plan, PlanError, parse_plan
from tinyagent_fast.plans.tools import Tool
from tinyagent_fast.prompts.builder import BuiltPrompt, PromptBuilder, prompt_builder
from tinyagent_fast.runs import Run, find_run, read_json

if TYPE_CHECKING:
    from tinyagent_fast.prompts.retrieval import ToolRetriever

_WEIGHTS: Mapping[str, Weights] = {"float32": "fp32", "float16": "fp16"}
_CONTEXT_TOKENS = 8192


@dataclass(frozen=True, kw_only=True)
class PlannedRequest:
    """A request with its plan."""

    request: str
    built: BuiltPrompt
    """What the model was asked, and where its system text comes from."""
    completion: Completion
    tools: Mapping[str, Tool] | None
    """Tools that plans may call; None stands for TinyAgent's own."""

    @property
    def text(self) -> str:
        """The plan as it came out of the second look, else as the model wrote it."""
        return self.completion.text

    @cached_property
    def plan(self) -> Plan | None:
        """The plan's steps; None if the text is no plan."""
        try:
            return parse_plan(self.text)
        except PlanError:
            return None

    @cached_property
    def drawing(self) -> PlanDrawing:
        """The plan's graph, also of a text that is no plan, with what is wrong at each call.

        That is also what is still in doubt after the second look, and what is looked up though
        nobody named it.
        """
        left = doubts_left(self.built.prompt, self.completion, self.tools)
        drawing = draw_plan(self.text, self.tools).with_problems(
            {doubt.number: f"in doubt: {doubt.why}" for doubt in left}
        )
        if self.plan is None:
            return drawing
        unsaid = not_asked_for(self.plan, known_tools(self.tools), self.request)
        return drawing.with_problems({n: f"in doubt: {why}" for n, why in unsaid.items()})

    @property
    def problems(self) -> tuple[str, ...]:
        """Everything that is wrong with the plan or in doubt, in words."""
        return self.drawing.all_problems

    def cost(self) -> str:
        """Say what it cost, such as `44 tokens in 0.9 s, prompt of 61 tokens (52 kept)`."""
        done = self.completion
        cut = "; broken off by the limit, see --max-new-tokens"
        return (
            f"{done.new_tokens} tokens in {done.seconds:.1f} s, prompt of {done.prompt_tokens} "
            f"tokens ({done.cached_tokens} kept){cut if done.stop_reason == 'length' else ''}"
        )

    def to_json(self) -> dict[str, Any]:
        """Give plain values for a script or a page."""
        done = self.completion
        return {
            "request": self.request,
            "system_text": self.built.source,
            "plan": self.text,
            "view": self.drawing.to_json(),
            "problems": list(self.problems),
            "stop_reason": done.stop_reason,
            "new_tokens": done.new_tokens,
            "prompt_tokens": done.prompt_tokens,
            "kept_tokens": done.cached_tokens,
            "share_s": round(done.seconds, 3),
        }


class _BrokenOff(Exception):
    """Raised inside an engine to end a plan whose reader has gone."""


@dataclass(eq=False)
class PlanStream:
    """One plan being written: iterate over its pieces once, then ask for the result."""

    planner: Planner
    request: str
    built: BuiltPrompt
    second_look: bool = True
    """Whether a doubtful plan is asked for once more, so that the result may not be what the pieces
    make."""
    text: str = field(default="", init=False)
    """What has been written so far."""
    result: PlannedRequest | None = field(default=None, init=False)
    """None until the last piece has been taken."""

    def __iter__(self) -> Generator[str, None, None]:
        """Write: pieces of text in order, and empty ones while the prompt is being read.

        The model starts with the first. Close the generator when stopping early: other plans wait
        for that.
        """
        planner = self.planner
        arrived: SimpleQueue[str | Completion | BaseException] = SimpleQueue()
        left = threading.Event()

        def on_token(_: int, piece: str) -> None:
            if left.is_set():
                raise _BrokenOff
            arrived.put(piece)

        def write() -> None:
            try:
                for _, completion in planner.generate(
                    [self.built.prompt], second_look=self.second_look, on_token=on_token
                ):
                    arrived.put(completion)
            except _BrokenOff:
                pass
            except BaseException as error:  # raised again where the pieces are read
                arrived.put(error)

        with planner.turn():
            writing = planner.worker.submit(write)
            try:
                while not planner.closed:
                    item = arrived.get()
                    if isinstance(item, BaseException):
                        raise item
                    if isinstance(item, Completion):
                        self.text = item.text
                        self.result = planner.planned(self.request, self.built, item)
                        return
                    self.text += item
                    yield item
            finally:
                left.set()
                writing.result()

    @property
    def drawing(self) -> PlanDrawing:
        """The graph of what has been written so far."""
        if self.result is not None:
            return self.result.drawing
        return draw_plan(self.text, self.planner.tools, finished=False)


@dataclass(eq=False)
class Planner:
    """A model with all it needs to answer requests with plans; `load` opens one."""

    engine: Engine
    """Writes the plans; it is closed with the planner."""
    prompts: PromptBuilder
    """Makes prompts of requests, and knows the tools."""
    max_new_tokens: int = EvalConfig.max_new_tokens
    """Where a plan is broken off."""
    batch: int = 1
    """Requests that `plan_batch` answers together."""
    facts: Mapping[str, str] = field(default_factory=dict)
    """What a user should know, by short names."""
    run: Run | None = None
    """The run that the model belongs to."""
    worker: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(1, "planner"), init=False
    )
    """Writes what is streamed."""
    closed: bool = field(default=False, init=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False)
    _writes_for: int | None = field(default=None, init=False)

    @property
    def tools(self) -> Mapping[str, Tool] | None:
        """Tools that plans may call; None stands for TinyAgent's own."""
        return self.prompts.tools

    def plan(self, request: str, system: str | None = None) -> PlannedRequest:
        """Answer one request; a system text for it alone may be given.

        Raises:
            ModelError: The prompt does not fit into the model's context.
        """
        return self.plan_batch([request], system)[0]

    def plan_batch(
        self, requests: Sequence[str], system: str | None = None
    ) -> list[PlannedRequest]:
        """Answer many requests as `plan` does, several of them together, and keep their order.

        Raises:
            ModelError: A prompt does not fit into the model's context.
        """
        done = dict(self.plan_each(requests, system))
        return [done[index] for index in range(len(requests))]

    @typed
    def plan_each(
        self, requests: Sequence[str], system: str | None = None
    ) -> Iterator[tuple[int, PlannedRequest]]:
        """Answer many requests as `plan_batch` does, and give each with its index when it is done.

        Other plans wait until all are taken, or the iterator is closed.
        """
        asked = [self.prompts.build(request, system) for request in requests]
        with self.turn():
            for index, completion in self.generate([built.prompt for built in asked]):
                yield index, self.planned(requests[index], asked[index], completion)

    def generate(
        self,
        prompts: Sequence[Prompt],
        stop: str = END_OF_PLAN,
        *,
        second_look: bool = True,
        on_token: OnToken | None = None,
    ) -> Iterator[tuple[int, Completion]]:
        """Let the engine write within a `turn`; doubtful plans are asked for twice if wanted."""
        write = self.engine.generate
        if second_look:
            write = partial(generate_plans, self.engine, tools=self.tools)
        limits = Limits(stop=stop, max_new_tokens=self.max_new_tokens, batch=self.batch)
        return write(prompts, limits, on_token)

    def complete(
        self, prompts: Sequence[Prompt], stop: str, on_token: OnToken | None = None
    ) -> list[Completion]:
        """Complete prompts that were made elsewhere, such as a joiner's, and give them in order.

        What `on_token` raises breaks it off.

        Raises:
            ModelError: A prompt does not fit into the model's context.
        """
        with self.turn():
            done = dict(self.generate(prompts, stop, second_look=False, on_token=on_token))
        return [done[index] for index in range(len(prompts))]

    def planned(self, request: str, built: BuiltPrompt, done: Completion) -> PlannedRequest:
        """Put a request and what was written for it together."""
        return PlannedRequest(request=request, built=built, completion=done, tools=self.tools)

    def stream(self, request: str, system: str | None = None) -> PlanStream:
        """Begin a plan whose text is taken piece by piece, otherwise as `plan` does."""
        return PlanStream(self, request, self.prompts.build(request, system))

    def close(self) -> None:
        """Free the model; a plan under way, perhaps in another thread, ends with its next piece."""
        self.closed = True
        if self._lock.acquire(timeout=5):
            self._lock.release()
        self.worker.shutdown(wait=False)
        self.engine.close()

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Wait until no other thread has plans written, since two at once would share one cache.

        Raises:
            ModelError: The planner is closed, or this thread itself is in the middle of a stream,
                and would wait for ever.
        """
        self.refuse_open_stream()
        with self._lock:
            why, fix = "it has been closed, and its model is gone", "open another one with load()"
            if self.closed:
                raise ModelError("planner", why, fix)
            self._writes_for = threading.get_ident()
            try:
                yield
            except ModelError as error:
                if self.closed:  # meanwhile, by another thread: what the engine misses is no news
                    raise ModelError("planner", why, fix) from error
                raise
            finally:
                self._writes_for = None

    def refuse_open_stream(self) -> None:
        """Refuse what would wait for ever, as this thread itself is in the middle of a stream.

        Raises:
            ModelError: It is.
        """
        if self._writes_for == threading.get_ident():
            why = "a stream is open"
            fix = "take it to its end, or close it, before the next request"
            raise ModelError("planner", why, fix)

    def __enter__(self) -> Planner:
        """Give the planner."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()


@dataclass(frozen=True)
class PlannerSource:
    """The model that a user means, and the run that it belongs to."""

    kind: Literal["adapter", "folder", "gguf"]
    path: Path
    run: Run | None

    def config(self) -> Config:
        """Read the run's config; the defaults for a model outside any run."""
        return self.run.config() if self.run else Config()

    def tools(self) -> Mapping[str, Tool] | None:
        """Find the tools that its plans may call; None stands for TinyAgent's own."""
        return plan_tools(self.run.catalogue() if self.run else None)


_ENGINES: Mapping[str, tuple[EngineName, ...]] = {
    "adapter": ("torch",),
    "folder": ("torch", "vllm"),
    "gguf": ("gguf",),
}
"""Engines that run each kind of model, that of `auto` first."""
_KINDS = {"adapter": "an adapter", "folder": "a merged folder", "gguf": "a GGUF file"}


@typed
def load(
    source: Run | str | Path | None = None,
    *,
    engine: Literal["auto", EngineName] = "auto",
    run: str | Path | None = None,
    runs: Path | str = Path("runs"),
    system: str | Path = "auto",
    max_new_tokens: int | None = None,
    threads: int | None = None,
    batch: int = 4,
    grammar: GrammarUse = "on",
) -> Planner:
    """Open a planner.

    Args:
        source: A run (its name, its folder or `latest`), an adapter's folder, a merged folder or a
            .gguf file; None is `run`, or the latest run.
        engine: `auto` takes torch for adapters and folders, and llama.cpp for a .gguf file; `vllm`
            runs a merged folder.
        run: Run whose system texts and tools are used, for a model outside any run.
        runs: Folder of all runs.
        system: `nearest` takes for each request the system text of the run's most similar test
            query, `first` that of the first one for all requests; `auto` lets the tool retriever of
            the run or model write it, takes the nearest where there is none and the test file is
            there, and no system text elsewhere; anything else is a text file.
        max_new_tokens: Tokens after which a plan is broken off; None takes the run's, or 300.
        threads: CPU threads; None leaves it to torch or llama.cpp.
        batch: Requests that `plan_batch` answers together; llama.cpp reserves memory for each.
        grammar: `on` lets the model write nothing but plans of the tools that its prompt lists,
            with the right arguments and references to earlier steps; `off` lets it write freely.

    Returns:
        The planner; close it, or use it in a `with` statement.

    Raises:
        ConfigError: There is no such run, model or system text.
        ModelError: The model cannot be loaded.
    """
    for name, value in (("max-new-tokens", max_new_tokens), ("batch", batch)):
        if value is not None and value < 1:
            raise ConfigError(f"--{name} {value}", "it must be at least 1", "give another number")
    check_threads(threads)
    path = source.path if isinstance(source, Run) else source
    found = find_source(path, run=run, runs=Path(runs))
    chosen = _engine_of(engine, found)
    config = found.config()
    retriever = _retriever(found) if system == "auto" else None
    prompts = prompt_builder(
        str(system), found.run, found.tools(), retriever, grammar=grammar == "on"
    )
    opened, runs_with = _open_engine(chosen, found, config, threads, batch)
    return Planner(
        opened,
        prompts,
        max_new_tokens=max_new_tokens or config.eval.max_new_tokens,
        batch=batch,
        facts={**_facts(found, prompts, grammar), "engine": runs_with},
        run=found.run,
    )


def _engine_of(asked: Literal["auto", EngineName], source: PlannerSource) -> EngineName:
    """Give the engine that runs a model: the one asked for, or with `auto` the best."""
    engines = _ENGINES[source.kind]
    if asked == "auto":
        return engines[0]
    if asked not in engines:
        raise ConfigError(
            f"engine {asked} with {source.path}",
            f"it is {_KINDS[source.kind]}, which runs with the engine {' or '.join(engines)}",
            "leave the engine out",
        )
    return asked


def _facts(source: PlannerSource, prompts: PromptBuilder, grammar: GrammarUse) -> dict[str, str]:
    """Say what a user should know of a planner's model and prompts."""
    facts = {"model": _shown(source.path), "system text": prompts.system.source}
    if source.run is not None and (unfinished := source.run.unfinished()) is not None:
        facts["training"] = f"run {source.run.path.name} is {unfinished}"
    if source.run is not None and (changed := source.run.changed_catalogue()) is not None:
        facts["tools"] = changed
    if (named := prompts.describe_tools()) is not None:
        facts["it names"] = f"{named}; for others: --system nearest or FILE"
    facts["grammar"] = (
        "plans call only listed tools, with valid arguments (--grammar off: written freely)"
        if grammar == "on"
        else "off"
    )
    return facts


def find_source(
    source: str | Path | None = None, *, run: str | Path | None = None, runs: Path = Path("runs")
) -> PlannerSource:
    """Find the model that is meant, and the run that it belongs to; arguments as in `load`.

    Raises:
        ConfigError: There is no such run or model, or the arguments contradict each other.
    """
    named = None if run is None else find_run(run, runs)
    if source is None:
        meant = named or find_run("latest", runs)
        return PlannerSource("adapter", meant.find_adapter("best"), meant)
    path = Path(source)
    if isinstance(source, str) and (runs / source / "config.yaml").exists():
        path = runs / source
    whole = path.resolve()
    around = (Run(folder) for folder in (whole, *whole.parents[:4]))
    own = next((run for run in around if run.config_path.exists()), None)
    if named and own and named.path != own.path:
        raise ConfigError(
            f"model {path} with run {run}",
            f"the model lies in run {own.path.name}, and comes with that one's prompts",
            "leave --run out, or name another text with --system FILE",
        )
    run_or_none = own or named
    if path.suffix == ".gguf":
        if not path.is_file():
            why = "it is no file" if path.exists() else "there is no such file"
            raise ConfigError(f"model {path}", why, "check the path")
        return PlannerSource("gguf", path, run_or_none)
    if own and own.path == whole:
        return PlannerSource("adapter", own.find_adapter("best"), own)
    if (path / "adapter_config.json").exists():
        if run_or_none is None:
            raise ConfigError(
                f"model {path}",
                "it is an adapter outside a run's folder, so its base and prompts are not known",
                "name its run with --run",
            )
        return PlannerSource("adapter", path, run_or_none)
    if (path / "config.json").exists():
        return PlannerSource("folder", path, run_or_none)
    raise ConfigError(
        f"model {path}",
        f"it is no run under {runs}/, no .gguf file, and no folder with config.yaml (a run), "
        "adapter_config.json (an adapter) or config.json (a merged model)",
        "name one of these",
    )


def _retriever(source: PlannerSource) -> ToolRetriever | None:
    """Find the tool retriever beside an exported model, or that of the run."""
    from tinyagent_fast.prompts.retrieval import load_retriever
    from tinyagent_fast.training.inputs import retriever_of_run

    for folder in source.path.resolve().parents[:2]:
        if (found := load_retriever(folder)) is not None:
            return found
    return None if source.run is None else retriever_of_run(source.run)


def _shown(path: Path) -> str:
    """Name a path from here where it lies here."""
    here = Path.cwd()
    whole = path.resolve()
    return str(whole.relative_to(here) if whole.is_relative_to(here) else path)


def _open_engine(
    name: EngineName, source: PlannerSource, config: Config, threads: int | None, batch: int
) -> tuple[Engine, str]:
    """Load the model; the second value says what runs it."""
    if name == "gguf":
        from tinyagent_fast.inference import llama_cpp

        server = llama_cpp.LlamaServer(
            llama_cpp.LlamaCppSettings(
                model=source.path,
                slots=batch,
                context_tokens_per_slot=_CONTEXT_TOKENS,
                threads=threads,
            )
        )
        said = f"llama.cpp, context of {server.context_tokens} tokens"
        return llama_cpp.LlamaCppEngine(server), said
    model = model_in_torch(source, config)
    from tinyagent_fast.models.libraries import prepare_libraries

    prepare_libraries(model)
    if name == "vllm":
        from tinyagent_fast.inference.vllm import VllmEngine
        from tinyagent_fast.prompts.loading import load_tokenizer
        from tinyagent_fast.prompts.tokens import PromptTokenizer

        tokenizer = PromptTokenizer(load_tokenizer(source.path), model.prompt_format)
        return VllmEngine(source.path, tokenizer, context_tokens=_CONTEXT_TOKENS), "vLLM"
    from transformers.utils.logging import disable_progress_bar

    from tinyagent_fast.inference.torch_engine import TorchEngine
    from tinyagent_fast.models.loading import load_for_generation

    disable_progress_bar()
    adapter = source.path if source.kind == "adapter" else None
    loaded = load_for_generation(replace(config, model=model), model.base, adapter)
    notes = "".join(f"; {note}" for note in loaded.notes)
    said = f"{loaded.backend} on {loaded.device}, {loaded.compute_dtype}{notes}"
    return TorchEngine(loaded, threads=threads), said


def model_in_torch(source: PlannerSource, config: Config) -> ModelConfig:
    """Say how an adapter's base or a merged folder is loaded.

    The backend is plain transformers, which keeps keys and values from request to request. A merged
    folder's precision and prompt format are told by what lies in and beside it.
    """
    if source.kind == "adapter":
        assert source.run is not None
        return replace(config.model, base=source.run.base_of(config), backend="transformers")
    with reading(f"{source.path}/config.json", "copy the folder again"):
        content = json.loads((source.path / "config.json").read_text(encoding="utf-8"))
        dtype = str(content.get("dtype") or content.get("torch_dtype"))
    return ModelConfig(
        base=str(source.path),
        backend="transformers",
        weights=_WEIGHTS.get(dtype, "bf16"),
        prompt_format=_prompt_format(source),
    )


def _prompt_format(source: PlannerSource) -> PromptFormat:
    record = source.path.resolve().parent / "export.json"
    if record.exists():
        known: PromptFormat = read_json(record, "prompt_format")["prompt_format"]
        return known
    if source.run is not None:
        return source.run.config().model.prompt_format
    has_template = (source.path / "chat_template.jinja").exists()
    return "chat" if has_template else "alpaca"
