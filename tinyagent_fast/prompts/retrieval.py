"""Tool retrieval: which tools a request may need, and the system text that lists just these.

A scorer gives each query a probability for each tool, learned from training queries and the tools
that their plans call: linear classifiers over TF-IDF of words and character n-grams, which train in
seconds on a CPU, or a fine-tuned encoder. scikit-learn is imported when a retriever is trained or
asked, torch only for an encoder; files are JSON, npz and safetensors, without pickle.
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
import re
import shutil
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, overload
from zipfile import BadZipFile

from tinyagent_fast.data.cache import cache_folder
from tinyagent_fast.data.schema import Example, called_tools
from tinyagent_fast.data.splits import normalise_query
from tinyagent_fast.errors import DataError
from tinyagent_fast.models.encoder import Encoder, EncoderTraining, encoder_folder, train_encoder
from tinyagent_fast.plans.tools import JOIN, TINYAGENT
from tinyagent_fast.prompts.system_text import SystemText, parse, render, united
from tinyagent_fast.runs import (
    key_of,
    replace_folder,
    sha256_of,
    unfinished_folder,
    whole_file,
    why_not_whole,
    write_checksums,
    write_text,
)

if TYPE_CHECKING:
    import numpy as np

RETRIEVER = "retriever.json"
"""Its file in a run's folder and beside an exported model; the weights lie beside it."""

_WEIGHTS = "retriever.npz"
_ENCODER = "retriever-encoder"
_UNSEEN = "unseen.npy"
_log = logging.getLogger(__name__)
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


@dataclass(frozen=True)
class Tfidf:
    """Vectors of queries: TF-IDF of words with pairs of words, and of character n-grams."""

    terms: tuple[tuple[str, ...], tuple[str, ...]]
    idf: np.ndarray

    def vectors(self, queries: Sequence[str]) -> Any:
        """Give a sparse matrix, [queries, terms]."""
        return self._vectorizer.transform(queries)

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


@dataclass(frozen=True)
class LinearScorer:
    """One logistic regression a tool."""

    tfidf: Tfidf
    weights: np.ndarray
    """[terms, tools]"""
    bias: np.ndarray

    def probabilities(self, queries: Sequence[str]) -> np.ndarray:
        """Give [queries, tools]."""
        import numpy as np

        scores = self.tfidf.vectors(queries) @ self.weights + self.bias
        shares: np.ndarray = 1 / (1 + np.exp(-scores))
        return shares


@dataclass(frozen=True, kw_only=True)
class ToolRetriever:
    """Chooses tools by the request, and writes the system text with them."""

    tools: tuple[str, ...]
    threshold: float
    """Tools of at least this probability are retrieved."""
    scorer: LinearScorer | Encoder
    """Gives each query a probability for each tool."""
    tfidf: Tfidf
    """By it requests are alike, whatever scores the tools."""
    system: SystemText | None
    """With all tools; None if the training prompts list none."""
    solved: tuple[tuple[str, str], ...]
    """Queries with their plans, for examples in prompts."""
    examples: int
    """Examples in a prompt."""
    figures: RetrievalFigures
    """On training queries, each judged by classifiers that were trained on others."""

    def retrieve(self, query: str) -> tuple[str, ...]:
        """Choose at least one tool for a query; they are in the order of `tools`."""
        return self.retrieve_all([query])[0]

    def retrieve_all(self, queries: Sequence[str]) -> list[tuple[str, ...]]:
        """Choose the tools of many queries, as `retrieve` does of each."""
        return _chosen(self.tools, self.scorer.probabilities(queries), self.threshold)

    def system_text(
        self, query: str, tools: Iterable[str], own: SystemText | None = None
    ) -> SystemText:
        """Write the system text that lists some tools, with examples that call no others.

        Args:
            query: The request; the examples are the ones most like it, itself left out.
            tools: The tools to list; those that no training prompt lists are left out.
            own: A text of the same build whose date and other lines without tools are taken.
        """
        assert self.system is not None, "the caller has looked"
        text = self.system if own is None else self.system.with_own_lines(own)
        listed = set(tools) & set(text.tools)
        if self.examples:
            text = text.with_examples(self._most_similar(query, listed))
        return text.restricted(listed)

    def rewritten(self, example: Example, tools: Iterable[str]) -> Example:
        """Let an example's prompt list other tools; only plans with a tool list are changed."""
        own = parse(example.system or "", self.tools)
        if self.system is None or not own.tools or example.kind != "plan":
            return example
        return replace(example, system=render(self.system_text(example.query, tools, own)))

    def rewrite(self, examples: Sequence[Example]) -> RewrittenExamples:
        """Let the prompts of plans list the tools that are retrieved for their queries."""
        queries = [example.query for example in examples]
        return RewrittenExamples(examples, self, self.retrieve_all(queries) if queries else [])

    def facts(self) -> dict[str, Any]:
        """Give what tells it from others: threshold and figures, and the weights of an encoder."""
        return {"threshold": self.threshold, **asdict(self.figures), **self._encoder()}

    def scored_by(self) -> str:
        """Say what scores the tools."""
        if isinstance(self.scorer, Encoder):
            size_bytes = sum(path.stat().st_size for path in self.scorer.folder.iterdir())
            return f"an encoder of {size_bytes / 2**20:,.1f} MiB"
        return "TF-IDF and linear classifiers"

    def save(self, folder: Path) -> list[Path]:
        """Write its files into a folder, two and the folder of an encoder; give their paths."""
        import numpy as np

        path, weights = folder / RETRIEVER, folder / _WEIGHTS
        arrays, encoder = {"idf": self.tfidf.idf}, []
        if isinstance(self.scorer, LinearScorer):
            arrays |= {"weights": self.scorer.weights, "bias": self.scorer.bias}
        else:
            encoder = self.scorer.save(folder / _ENCODER)
        with whole_file(weights) as part, part.open("wb") as stream:
            np.savez_compressed(stream, allow_pickle=False, **arrays)
        write_text(path, json.dumps(self._plain(), ensure_ascii=False) + "\n")
        return [path, weights, *encoder]

    def key(self) -> str:
        """Name all that decides the prompts that it makes, for caches of rows."""
        return hashlib.sha256(json.dumps(self._plain()).encode()).hexdigest()

    def _plain(self) -> dict[str, Any]:
        return {
            "tools": self.tools,
            "threshold": self.threshold,
            "figures": asdict(self.figures),
            "system": asdict(self.system) if self.system else None,
            "examples": self.examples,
            "solved": self.solved,
            "terms": self.tfidf.terms,
            **self._encoder(),
        }

    def _encoder(self) -> dict[str, str]:
        return {"encoder": self.scorer.sha256} if isinstance(self.scorer, Encoder) else {}

    @cached_property
    def _pool(self) -> tuple[Any, list[set[str]], list[str]]:
        queries = [query for query, _ in self.solved]
        return (
            self.tfidf.vectors(queries),
            [set(called_tools(plan)) for _, plan in self.solved],
            list(map(normalise_query, queries)),
        )

    def _most_similar(self, query: str, tools: set[str]) -> list[tuple[str, str]]:
        """Choose solved requests that call no other tools; the most similar one stands last."""
        vectors, called, normal = self._pool
        likeness = (vectors @ self.tfidf.vectors([query]).T).toarray()[:, 0]
        same = normalise_query(query)
        fitting = (at for at in likeness.argsort(kind="stable")[::-1] if tools >= called[at])
        best = [self.solved[at] for at in fitting if normal[at] != same][: self.examples]
        return best[::-1]


def load_retriever(folder: Path) -> ToolRetriever | None:
    """Read the retriever of a run's folder, or beside an exported model; None if there is none.

    Raises:
        DataError: Its files are damaged.
    """
    import numpy as np

    path = folder / RETRIEVER
    if not path.exists():
        return None
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
        words, characters = map(tuple, plain["terms"])
        scorer: LinearScorer | Encoder
        with np.load(folder / _WEIGHTS, allow_pickle=False) as arrays:
            tfidf = Tfidf((words, characters), arrays["idf"])
            if "encoder" in plain:
                scorer = Encoder(folder / _ENCODER, plain["encoder"])
            else:
                scorer = LinearScorer(tfidf, arrays["weights"], arrays["bias"])
        return ToolRetriever(
            tools=tuple(plain["tools"]),
            threshold=plain["threshold"],
            scorer=scorer,
            tfidf=tfidf,
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
    examples: Sequence[Example],
    *,
    recall: float,
    known: Iterable[str] = TINYAGENT,
    encoder: EncoderTraining | None = None,
    on_progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> tuple[ToolRetriever, list[tuple[str, ...]]]:
    """Train a retriever.

    Args:
        examples: Plans to learn from.
        recall: Wanted share of queries whose tools are all retrieved. The threshold is the highest
            that gives it on queries that the classifiers have not seen (cross-validation), at most
            0.25, and less for many plans.
        known: Tools in the order in which prompts list them.
        encoder: The encoder to fine-tune, which takes minutes; one that was trained before in the
            same way is taken from the cache. None trains linear classifiers.
        on_progress: Called with the steps of an encoder's training, done and in all.

    Returns:
        The retriever, and the tools of each example as they are retrieved for unseen queries.

    Raises:
        DataError: There are too few plans.
        ModelError: The encoder cannot be had or loaded.
    """
    import numpy as np

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
    scorer: LinearScorer | Encoder
    if encoder is None:
        scorer, unseen = _cross_validated(_fit_linear, queries, wanted)
        tfidf = Tfidf(scorer.tfidf.terms, scorer.tfidf.idf.astype(np.float32))
        weights, bias = (array.astype(np.float32) for array in (scorer.weights, scorer.bias))
        scorer = LinearScorer(tfidf, weights, bias)
    else:
        scorer, unseen = _fit_encoder(queries, wanted, tools, encoder, on_progress)
        tfidf, _ = _fit_tfidf(queries)
    least = np.where(wanted, unseen, 1.0).min(axis=1)
    low, high = _HIGHEST_THRESHOLDS
    highest = max(low, min(high, 60 / len(queries)))
    threshold = min(float(np.sort(least)[int((1 - recall) * len(queries))]), highest)
    retrieved = _chosen(tools, unseen, threshold)
    system, shown = _system_of(examples[:: max(1, len(examples) // _TEXTS)], order)
    pool = random.Random(0).sample(range(len(examples)), min(_POOL, len(examples)))
    solved = [(queries[at], _plan_alone(examples[at].output)) for at in sorted(pool)]
    retriever = ToolRetriever(
        tools=tools,
        threshold=threshold,
        scorer=scorer,
        tfidf=tfidf,
        system=system,
        solved=tuple((query, plan) for query, plan in solved if plan) if shown else (),
        examples=shown,
        figures=_figures(retrieved, called),
    )
    return retriever, retrieved


def _plan_alone(output: str) -> str:
    before, found, _ = output.partition(f"{JOIN}()")
    return before + found if found else ""


Scorer = TypeVar("Scorer", LinearScorer, Encoder)


def _cross_validated(
    fit: Callable[[Sequence[str], np.ndarray], Scorer], queries: Sequence[str], wanted: np.ndarray
) -> tuple[Scorer, np.ndarray]:
    """Train on all queries, and score each by a scorer that was trained on others."""
    import numpy as np

    unseen = np.zeros(wanted.shape)
    for train, held_out in _folds(len(queries)):
        scorer = fit([queries[at] for at in train], wanted[train])
        unseen[held_out] = scorer.probabilities([queries[at] for at in held_out])
    return fit(queries, wanted), unseen


def _folds(queries: int) -> list[tuple[np.ndarray, np.ndarray]]:
    from sklearn.model_selection import KFold

    parts = min(5, queries) if queries <= _FEW_QUERIES else 2
    return list(KFold(parts, shuffle=True, random_state=0).split(range(queries)))


def _fit_encoder(
    queries: Sequence[str],
    wanted: np.ndarray,
    tools: Sequence[str],
    training: EncoderTraining,
    on_progress: Callable[[int, int], None],
) -> tuple[Encoder, np.ndarray]:
    """Fine-tune an encoder as `_cross_validated` says, unless the cache has an equal one."""
    import numpy as np

    base = encoder_folder(training.encoder)
    files = [(path.name, sha256_of(path)) for path in sorted(base.iterdir()) if path.is_file()]
    parts = (files, asdict(replace(training, encoder="")), tools, queries, wanted.tolist())
    folder = cache_folder() / "encoders" / key_of(parts)
    found = _open_fitted(folder)
    if found is None:
        done, number = count(1), count()
        sizes = [len(queries), *(len(train) for train, _ in _folds(len(queries)))]
        total = sum(map(training.steps, sizes))
        with unfinished_folder(folder.parent, "fit") as work:

            def fit(texts: Sequence[str], labels: np.ndarray) -> Encoder:
                place = work / f"{next(number)}" / _ENCODER
                return train_encoder(
                    base,
                    texts,
                    labels,
                    tools,
                    training,
                    place,
                    lambda: on_progress(next(done), total),
                )

            scorer, unseen = _cross_validated(fit, queries, wanted)
            whole = scorer.folder.parent
            np.save(whole / _UNSEEN, unseen)
            write_checksums(whole)
            replace_folder(whole, folder)
        found = _open_fitted(folder)
    assert found is not None, "what was just written can be opened"
    return found


def _open_fitted(folder: Path) -> tuple[Encoder, np.ndarray] | None:
    """Open what `_fit_encoder` left in the cache; what is damaged is removed with a warning."""
    import numpy as np

    if not folder.exists():
        return None
    if (why := why_not_whole(folder)) is not None:
        _log.warning("%s: the cache is damaged (%s), the encoder is trained anew", folder, why)
        shutil.rmtree(folder)
        return None
    return Encoder.in_folder(folder / _ENCODER), np.load(folder / _UNSEEN, allow_pickle=False)


def _fit_tfidf(queries: Sequence[str]) -> tuple[Tfidf, Any]:
    import numpy as np

    union = _union(*_vectorizers())
    features = union.fit_transform(queries)
    (_, words), (_, characters) = union.transformer_list
    terms = [tuple(map(str, one.get_feature_names_out())) for one in (words, characters)]
    return Tfidf((terms[0], terms[1]), np.concatenate([words.idf_, characters.idf_])), features


def _fit_linear(queries: Sequence[str], wanted: np.ndarray) -> LinearScorer:
    """Train one logistic regression a tool; a tool that all or none call gets a constant."""
    import numpy as np
    from sklearn.linear_model import LogisticRegression

    tfidf, features = _fit_tfidf(queries)
    weights, bias = np.zeros((features.shape[1], wanted.shape[1])), np.zeros(wanted.shape[1])
    for tool, labels in enumerate(wanted.T):
        if labels.all() or not labels.any():
            bias[tool] = 20.0 if labels.all() else -20.0
            continue
        model = LogisticRegression(C=3.0, solver="liblinear", random_state=0)
        model.fit(features, labels)
        weights[:, tool], bias[tool] = model.coef_[0], model.intercept_[0]
    return LinearScorer(tfidf, weights, bias)


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

    def figures(self) -> RetrievalFigures:
        """Measure the retriever on these plans, which it was not trained on."""
        return _figures(self.tools, [called_tools(example.output) for example in self.examples])

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
