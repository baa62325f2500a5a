"""Tool retrieval: which tools a request may need, and the system text that lists just these.

A linear classifier for each tool over TF-IDF of words and character n-grams, learned from training
queries and the tools that their plans call. It trains in seconds on a CPU; scikit-learn is imported
when a retriever is trained or asked, and files are JSON and npz without pickle.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload
from zipfile import BadZipFile

from tinyagent_fast.data.schema import Example, plan_steps
from tinyagent_fast.data.splits import normalise_query
from tinyagent_fast.errors import DataError
from tinyagent_fast.plans.tools import JOIN, TINYAGENT
from tinyagent_fast.prompts.system_text import SystemText, parse, render, united
from tinyagent_fast.runs import write_text

if TYPE_CHECKING:
    import numpy as np

RETRIEVER = "retriever.json"
"""Its file in a run's folder and beside an exported model; the weights lie in an npz beside it."""

_WEIGHTS = "retriever.npz"
_POOL = 1500
"""Solved requests that are kept as examples for prompts."""
_TEXTS = 500
_MOST_TERMS = 30_000
_FEW_QUERIES = 5000
_HIGHEST_THRESHOLDS = (0.03, 0.25)
"""Generated queries give almost every share above it, and what people type is less like them: on
published queries 0.03 finds all tools for 94 % with 9 tools a query, 0.25 for 70 % with 4.6. Few
training queries give no shares as low as that, so there the threshold may be higher."""
_QUOTED = re.compile(r'"([^"]*)"|“([^”]*)”')
_ENDING = re.compile(r"\.(\w{2,4})\b")
_ADDRESS = re.compile(r"\S+@\S+\w")
_TELEPHONE = re.compile(r"\+?\d[\d\-() ]{6,}\d")
_NUMBER = re.compile(r"\d+(?::\d+)?")


@dataclass(frozen=True, kw_only=True)
class RetrievalFigures:
    """How well tools are retrieved."""

    queries: int
    whole: float
    """Share of queries whose plan calls retrieved tools only."""
    retrieved: float
    """Mean number of retrieved tools."""
    called: float
    """Mean number of tools that the plans call; no retriever finds all with fewer."""

    def sentence(self) -> str:
        """Say it in one line."""
        return (
            f"all tools retrieved for {100 * self.whole:.1f} % of {self.queries:,} queries, "
            f"{self.retrieved:.2f} tools a query (their plans call {self.called:.2f})"
        )


@dataclass(frozen=True, kw_only=True)
class ToolRetriever:
    """Chooses tools by the request, and writes the system text with them."""

    tools: tuple[str, ...]
    threshold: float
    """Tools of at least this probability are retrieved."""
    terms: tuple[tuple[str, ...], tuple[str, ...]]
    """Words with pairs of words, and character n-grams."""
    idf: np.ndarray
    weights: np.ndarray
    """[terms, tools]"""
    bias: np.ndarray
    system: SystemText | None
    """With all tools; None if the training prompts list none."""
    solved: tuple[tuple[str, str], ...]
    """Queries with their plans, for examples in prompts."""
    examples: int
    """Examples in a prompt."""
    figures: RetrievalFigures
    """On training queries, each judged by classifiers that were trained on others."""

    def retrieve(self, query: str) -> tuple[str, ...]:
        """Choose tools.

        Args:
            query: What the user typed.

        Returns:
            Names in the order of `tools`; at least one.
        """
        return self.retrieve_all([query])[0]

    def retrieve_all(self, queries: Sequence[str]) -> list[tuple[str, ...]]:
        """Choose the tools of many queries, as `retrieve` does of each."""
        import numpy as np

        scores = self._vectorizer.transform(queries) @ self.weights + self.bias
        return _chosen(self.tools, 1 / (1 + np.exp(-scores)), self.threshold)

    def system_text(
        self, query: str, tools: Iterable[str], own: SystemText | None = None
    ) -> SystemText:
        """Write the system text that lists some tools, with examples that call no others.

        Args:
            query: The request; the examples are the ones most like it, itself left out.
            tools: The tools to list; those that no training prompt lists are left out.
            own: A text of the same build whose date and other lines without tools are taken.

        Returns:
            The text.
        """
        assert self.system is not None, "the caller has looked"
        text = self.system if own is None else self.system.with_own_lines(own)
        listed = set(tools) & set(text.tools)
        if self.examples:
            text = text.with_examples(self._most_similar(query, listed))
        return text.restricted(listed)

    def rewritten(self, example: Example, tools: Iterable[str]) -> Example:
        """Let an example's prompt list other tools.

        Args:
            example: Any but a plan, and one without a tool list, stays as it is.
            tools: What is listed instead.

        Returns:
            The example.
        """
        own = parse(example.system or "", self.tools)
        if self.system is None or not own.tools or example.kind != "plan":
            return example
        return replace(example, system=render(self.system_text(example.query, tools, own)))

    def rewrite(self, examples: Sequence[Example]) -> RewrittenExamples:
        """Let the prompts of plans list the tools that are retrieved for their queries."""
        queries = [example.query for example in examples]
        return RewrittenExamples(examples, self, self.retrieve_all(queries) if queries else [])

    def facts(self) -> dict[str, Any]:
        """Give what tells it from others: threshold and figures."""
        return {"threshold": self.threshold, **asdict(self.figures)}

    def measure(self, examples: Sequence[Example]) -> RetrievalFigures:
        """Measure the retriever on plans that it was not trained on."""
        queries = [example.query for example in examples]
        return _figures(self.retrieve_all(queries), [called_tools(e.output) for e in examples])

    def save(self, folder: Path) -> list[Path]:
        """Write two files into a folder.

        Returns:
            Their paths.
        """
        import numpy as np

        path, weights = folder / RETRIEVER, folder / _WEIGHTS
        arrays = {"idf": self.idf, "weights": self.weights, "bias": self.bias}
        part = weights.with_name(f"{weights.name}.part")
        with part.open("wb") as stream:
            np.savez_compressed(stream, allow_pickle=False, **arrays)
        part.replace(weights)
        write_text(path, json.dumps(self._plain(), ensure_ascii=False) + "\n")
        return [path, weights]

    def key(self) -> str:
        """Name all that decides the prompts that it makes, for caches of rows."""
        return hashlib.sha256(json.dumps(self._plain()).encode()).hexdigest()

    def _plain(self) -> dict[str, Any]:
        return {
            "tools": self.tools,
            "threshold": self.threshold,
            "figures": asdict(self.figures),
            "system": self.system.to_json() if self.system else None,
            "examples": self.examples,
            "solved": self.solved,
            "terms": self.terms,
        }

    @cached_property
    def _vectorizer(self) -> Any:
        words, characters = _vectorizers()
        split = len(self.terms[0])
        for one, terms, idf in (
            (words, self.terms[0], self.idf[:split]),
            (characters, self.terms[1], self.idf[split:]),
        ):
            one.vocabulary = {term: at for at, term in enumerate(terms)}
            one.fit([""])  # takes the vocabulary
            one.idf_ = idf
        return _union(words, characters)

    @cached_property
    def _pool(self) -> tuple[Any, list[set[str]], list[str]]:
        queries = [query for query, _ in self.solved]
        return (
            self._vectorizer.transform(queries),
            [set(called_tools(plan)) for _, plan in self.solved],
            list(map(normalise_query, queries)),
        )

    def _most_similar(self, query: str, tools: set[str]) -> list[tuple[str, str]]:
        """Choose solved requests that call no other tools; the most similar one stands last."""
        vectors, called, normal = self._pool
        likeness = (vectors @ self._vectorizer.transform([query]).T).toarray()[:, 0]
        same = normalise_query(query)
        fitting = (at for at in likeness.argsort(kind="stable")[::-1] if tools >= called[at])
        best = [self.solved[at] for at in fitting if normal[at] != same][: self.examples]
        return best[::-1]


def load_retriever(folder: Path) -> ToolRetriever | None:
    """Read the retriever of a folder.

    Args:
        folder: A run's folder, or one beside an exported model.

    Returns:
        The retriever; None if the folder has none.

    Raises:
        DataError: Its files are damaged.
    """
    import numpy as np

    path = folder / RETRIEVER
    if not path.exists():
        return None
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
        with np.load(folder / _WEIGHTS, allow_pickle=False) as arrays:
            idf, weights, bias = arrays["idf"], arrays["weights"], arrays["bias"]
        words, characters = map(tuple, plain["terms"])
        return ToolRetriever(
            tools=tuple(plain["tools"]),
            threshold=plain["threshold"],
            terms=(words, characters),
            idf=idf,
            weights=weights,
            bias=bias,
            system=SystemText.from_json(plain["system"]) if plain["system"] else None,
            solved=tuple((query, plan) for query, plan in plain["solved"]),
            examples=plain["examples"],
            figures=RetrievalFigures(**plain["figures"]),
        )
    except (OSError, ValueError, KeyError, TypeError, EOFError, BadZipFile, zlib.error) as error:
        raise DataError(
            f"{path}", f"it is damaged: {error!r}", "delete it, and it is trained anew"
        ) from error


def train_retriever(
    examples: Sequence[Example], *, recall: float, known: Iterable[str] = TINYAGENT
) -> tuple[ToolRetriever, list[tuple[str, ...]]]:
    """Train a retriever.

    Args:
        examples: Plans to learn from.
        recall: Wanted share of queries whose tools are all retrieved. The threshold is the highest
            that gives it on queries that the classifiers have not seen (cross-validation), at most
            0.25, and less for many plans.
        known: Tools in the order in which prompts list them.

    Returns:
        The retriever, and the tools of each example as they are retrieved for unseen queries.

    Raises:
        DataError: There are too few plans.
    """
    import numpy as np
    from sklearn.model_selection import KFold

    if len(examples) < 2:
        raise DataError(
            f"{len(examples)} plans to train a tool retriever on",
            "its threshold is chosen on queries held out from them",
            "give a larger training file, or train with --data.prompts as-is",
        )
    queries = [example.query for example in examples]
    called = [called_tools(example.output) for example in examples]
    there = set().union(*called)
    order = [*known, *sorted(there.difference(known))]
    tools = tuple(name for name in order if name in there)
    wanted = np.array([[name in names for name in tools] for names in called])
    unseen = np.zeros(wanted.shape)
    parts = min(5, len(queries)) if len(queries) <= _FEW_QUERIES else 2
    folds = KFold(parts, shuffle=True, random_state=0)
    for train, held_out in folds.split(queries):
        vectorizer, weights, bias = _fit([queries[at] for at in train], wanted[train])
        scores = vectorizer.transform([queries[at] for at in held_out]) @ weights + bias
        unseen[held_out] = 1 / (1 + np.exp(-scores))
    least = np.where(wanted, unseen, 1.0).min(axis=1)
    low, high = _HIGHEST_THRESHOLDS
    highest = max(low, min(high, 60 / len(queries)))
    threshold = min(float(np.sort(least)[int((1 - recall) * len(queries))]), highest)
    retrieved = _chosen(tools, unseen, threshold)
    vectorizer, weights, bias = _fit(queries, wanted)
    (_, words), (_, characters) = vectorizer.transformer_list
    system, shown = _system_of(examples[:: max(1, len(examples) // _TEXTS)], order)
    pool = random.Random(0).sample(range(len(examples)), min(_POOL, len(examples)))
    solved = [(queries[at], _plan_alone(examples[at].output)) for at in sorted(pool)]
    retriever = ToolRetriever(
        tools=tools,
        threshold=threshold,
        terms=(
            tuple(map(str, words.get_feature_names_out())),
            tuple(map(str, characters.get_feature_names_out())),
        ),
        idf=np.concatenate([words.idf_, characters.idf_]).astype(np.float32),
        weights=weights.astype(np.float32),
        bias=bias.astype(np.float32),
        system=system,
        solved=tuple((query, plan) for query, plan in solved if plan) if shown else (),
        examples=shown,
        figures=_figures(retrieved, called),
    )
    return retriever, retrieved


def called_tools(plan: str) -> tuple[str, ...]:
    """List the tools that a plan calls, join left out."""
    return tuple(dict.fromkeys(s.tool for s in plan_steps(plan) if s.tool != JOIN))


def _plan_alone(output: str) -> str:
    before, found, _ = output.partition(f"{JOIN}()")
    return before + found if found else ""


def _fit(queries: Sequence[str], wanted: np.ndarray) -> tuple[Any, np.ndarray, np.ndarray]:
    """Train one logistic regression a tool; a tool that all or none call gets a constant."""
    import numpy as np
    from sklearn.linear_model import LogisticRegression

    vectorizer = _union(*_vectorizers())
    features = vectorizer.fit_transform(queries)
    weights, bias = np.zeros((features.shape[1], wanted.shape[1])), np.zeros(wanted.shape[1])
    for tool, labels in enumerate(wanted.T):
        if labels.all() or not labels.any():
            bias[tool] = 20.0 if labels.all() else -20.0
            continue
        model = LogisticRegression(C=3.0, solver="liblinear", random_state=0)
        model.fit(features, labels)
        weights[:, tool], bias[tool] = model.coef_[0], model.intercept_[0]
    return vectorizer, weights, bias


def _vectorizers() -> tuple[Any, Any]:
    from sklearn.feature_extraction.text import TfidfVectorizer

    shared: dict[str, Any] = {"preprocessor": _masked, "sublinear_tf": True}
    shared |= {"max_features": _MOST_TERMS}
    return (
        TfidfVectorizer(ngram_range=(1, 2), token_pattern=r"\w+", **shared),
        TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 5), **shared),
    )


def _union(words: Any, characters: Any) -> Any:
    from sklearn.pipeline import FeatureUnion

    return FeatureUnion([("words", words), ("characters", characters)])


def _masked(query: str) -> str:
    """Put what a query is about in the place of its own names, which tell nothing about tools."""

    def kind(match: re.Match[str]) -> str:
        ending = _ENDING.search(match[1] or match[2] or "")
        return f" qq{ending[1] if ending else ''} "

    masked = _ADDRESS.sub(" qqaddress ", _QUOTED.sub(kind, query))
    return _NUMBER.sub("0", _TELEPHONE.sub(" qqtelephone ", masked)).lower()


def _chosen(tools: Sequence[str], shares: np.ndarray, threshold: float) -> list[tuple[str, ...]]:
    best = shares.max(axis=1, keepdims=True)
    taken = (shares >= threshold) | (shares == best)
    return [tuple(t for t, is_in in zip(tools, row, strict=True) if is_in) for row in taken]


def _figures(
    retrieved: Sequence[tuple[str, ...]], called: Sequence[tuple[str, ...]]
) -> RetrievalFigures:
    count = len(called)
    whole = sum(set(got) >= set(names) for got, names in zip(retrieved, called, strict=True))
    return RetrievalFigures(
        queries=count,
        whole=whole / max(1, count),
        retrieved=sum(map(len, retrieved)) / max(1, count),
        called=sum(map(len, called)) / max(1, count),
    )


def _system_of(examples: Sequence[Example], order: Sequence[str]) -> tuple[SystemText | None, int]:
    """Unite the system texts of the most frequent build; count the examples of most of them."""
    systems = dict.fromkeys(e.system for e in examples)  # in their order, so that runs are equal
    texts = [parse(text, order) for text in systems if text is not None]
    listing = [text for text in texts if text.tools]
    if not listing:
        return None, 0
    numbered, _ = Counter(text.numbered for text in listing).most_common(1)[0]
    listing = [text for text in listing if text.numbered == numbered]
    shown, _ = Counter(len(text.examples) for text in listing).most_common(1)[0]
    return united(listing, order), shown


@dataclass(frozen=True)
class RewrittenExamples(Sequence[Example]):
    """Plans whose prompts list retrieved tools; each is rewritten when it is asked for."""

    examples: Sequence[Example]
    retriever: ToolRetriever
    tools: Sequence[tuple[str, ...]]
    """What each example's prompt lists."""

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self.examples)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> RewrittenExamples: ...
    def __getitem__(self, index: int | slice) -> Example | RewrittenExamples:
        """Return one example, or a slice of them."""
        if isinstance(index, slice):
            return replace(self, examples=self.examples[index], tools=self.tools[index])
        return self.retriever.rewritten(self.examples[index], self.tools[index])
