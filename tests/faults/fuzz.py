"""Feeds damaged and hostile inputs to everything that reads what users, files and models give.

    python tests/faults/fuzz.py --inputs 100000

Each reader has seeds that it takes, which are changed at random, and bombs: one hostile text again
and again, up to a megabyte. Nothing may come out but the reader's own errors; what is taken must be
what an independent reading of the same input says; time grows with the size and no faster.
"""

from __future__ import annotations

import argparse
import ast
import faulthandler
import io
import json
import math
import multiprocessing
import resource
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import hypothesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tinyagent_fast.config import Config, check_config, dump_config, parse_config
from tinyagent_fast.data.generation.catalogue import load_catalogue
from tinyagent_fast.data.generation.dataset import GenerationSpec, generate_dataset
from tinyagent_fast.data.reading import ReadReport, read_entries
from tinyagent_fast.errors import ConfigError, DataError, ModelError, UserError
from tinyagent_fast.evaluation.predictions import PredictionFile
from tinyagent_fast.evaluation.scoring import score_pair
from tinyagent_fast.plans.drawing import draw_plan
from tinyagent_fast.plans.grammar import (
    PLAN_ERRORS,
    PlanError,
    parse_joiner,
    parse_plan,
    read_plan,
    render_plan,
)
from tinyagent_fast.plans.graph import DagError, plan_dag
from tinyagent_fast.plans.tools import JOIN
from tinyagent_fast.prompts import system_text
from tinyagent_fast.prompts.templates import RenderedExample
from tinyagent_fast.runs import Run, find_run, refuse_taken_name

# fmt: off
HOSTILE = (
    *("\0", "\x01", "\x1b[2J", "\x7f", "\x85", "\u2028", "\u202e", "\u2066", "\ufeff", "\ufffe"),
    *("\ud800", "\udfff", "\U0010ffff", "e\u0301", "\u0660", "\r", "\r\n", "\t", "\\", "\\u0000"),
    *("\\ud800", "\\N{BULLET}", "'", '"', '"""', "`", "(", ")", "[", "]", "{", "}", "[[", "[]"),
    *(",", ":", ";", ".", "-", "+", "*", "**", "&a ", "*a", "<<: *a", "!!python/name:os.system "),
    *("!x ", "!!binary ", "!!set ", "? ", "- ", "| ", "> ", "%YAML 9.9\n", "---\n", "...\n", "# "),
    *("=", "~", "null", "true", "NaN", "Infinity", "-0", "1e999", "1e-999", "0x" + "f" * 40),
    *("9" * 5000, "1:1:1", "0o9", "2024-99-99", "$1", "$0", "${2}", "$" + "9" * 5000, "$-1"),
    *("1. ", "0. ", "join()", "Thought: ", "Action: ", "Finish(", "Replan", "<END_OF_PLAN>"),
    *("<END_OF_RESPONSE>", "</s>", "<s>", "<unk>", "<|im_end|>", "### Response:\n", "{{ 7*7 }}"),
    *("{% for x in y %}", "__import__('os')", "lambda: 0", "f'{x}'", "b'x'", "x for x in y"),
    *("1 if 1 else 2", "not ", "a.b", "None", "...", "1j", "../../etc/passwd", "/etc/passwd", ".."),
    *("a/b", "C:\\x", "con", ".hidden", "~root", "-rf", '"key": 1, "key": 2', '{"a":' * 60),
    *("[" * 300, "(" * 300, "-" * 300, "a." * 300, "x" * 300),
)
# fmt: on
"""What readers have stumbled over."""


def _changed(seed: str, changes: Sequence[tuple[int, int, int, str]]) -> str:
    for kind, at, other, piece in changes:
        start, end = sorted((at % (len(seed) + 1), other % (len(seed) + 1)))
        if kind == 0:  # put in
            seed = seed[:start] + piece + seed[start:]
        elif kind == 1:  # put in another's place
            seed = seed[:start] + piece + seed[start + len(piece) :]
        elif kind == 2:  # take out
            seed = seed[:start] + seed[end:]
        elif kind == 3:  # once more
            seed = seed[:end] + seed[start:end] + seed[end:]
        else:  # cut off
            seed = seed[:end]
    return seed[:20_000]


def changed(seeds: Sequence[str]) -> st.SearchStrategy[str]:
    """Give seeds with a few changes, and sometimes any text at all."""
    place = st.integers(0, 2**16)
    pieces = (*HOSTILE, *ascii_lowercase * 3)  # with letters alone, much is still taken
    change = st.tuples(st.integers(0, 4), place, place, st.sampled_from(pieces))
    some = st.builds(_changed, st.sampled_from(seeds), st.lists(change, max_size=5))
    return (
        some | some | some | st.text(max_size=200) | st.lists(st.sampled_from(HOSTILE)).map("".join)
    )


def _bytes_changed(seed: bytes, changes: Sequence[tuple[int, int, bytes]]) -> bytes:
    for kind, at, piece in changes:
        start = at % (len(seed) + 1)
        if kind == 0:
            seed = seed[:start] + piece + seed[start:]
        elif kind == 1:
            seed = seed[:start] + piece + seed[start + len(piece) :]
        else:
            seed = seed[:start]
    return seed


def changed_bytes(seeds: Sequence[bytes]) -> st.SearchStrategy[bytes]:
    """Give seeds with a few bytes changed, numbers of all sizes among them."""
    numbers = [n.to_bytes(8, "little") for n in (0, 1, 2**31, 2**32 - 1, 2**62, 2**63, 2**64 - 1)]
    numbers += [n.to_bytes(4, "little") for n in range(16)]
    piece = st.sampled_from([*numbers, *(h.encode("utf-8", "replace") for h in HOSTILE)])
    piece = piece | st.binary(min_size=1, max_size=8)
    change = st.tuples(st.integers(0, 2), st.integers(0, 2**16), piece)
    some = st.builds(_bytes_changed, st.sampled_from(seeds), st.lists(change, max_size=4))
    return some | some | some | st.binary(max_size=100)


@cache
def folder() -> Path:
    """Give a folder for the files that are read."""
    return Path(tempfile.mkdtemp(prefix="fuzz-"))


def file_of(content: str | bytes, name: str) -> Path:
    """Write a file; half a surrogate pair is written as the bytes that it would have."""
    path = folder() / name
    path.write_bytes(
        content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass")
    )
    return path


@cache
def generated() -> list[str]:
    """Give generated entries as JSON texts, `"key": {...}`."""
    spec = GenerationSpec(train_entries=6, test_entries=0, seed=5)
    files = generate_dataset(spec, folder() / "generated")
    entries = json.loads(files.train.read_text(encoding="utf-8"))
    return [json.dumps({key: entry})[1:-1] for key, entry in entries.items()]


def plans() -> list[str]:
    entries = [json.loads("{" + text + "}").popitem()[1] for text in generated()]
    return [point["raw_output"] for entry in entries for point in entry["output"]]


PLANS = (
    '1. get_email_address("Sid")\nThought: now the event\n2. create_calendar_event("M", '
    '"2030-01-02 10:00:00", \'e\', "", ["$1"], "", None)  # why (not)\n3. join()<END_OF_PLAN>',
    '1. f({"a": (1, -2.5e3, [True, ()])}, "\\u00e9 \\"x\\" $1 ${2}")\n2. g("$1", ["$1"])\n'
    "3. join()",
    "",
)


_MOST_GROWTH = 24
"""Of time where the size grows eightfold: twice as much would be its square, nearly."""

# --- what each reader must hold; the name of a check is that of its reader


def plan(text: str) -> bool:
    found = None
    try:
        found = parse_plan(text)
    except PlanError as error:
        assert error.code in PLAN_ERRORS
    reading = read_plan(text)
    assert (found is None) == bool(reading.problems)
    draw_plan(text).to_text()
    if found is None:
        return False
    numbers = [step.number for step in found.steps]
    assert len(set(numbers)) == len(numbers)
    assert all(0 < n < 10**9 for n in numbers)
    assert [step.tool == JOIN for step in found.steps] == [False] * (len(numbers) - 1) + [True]
    assert parse_plan(render_plan(found)) == found
    for step in found.steps:
        assert step.raw_arguments in text
        said = ast.literal_eval(f"[{step.raw_arguments}\n]")
        assert repr(said) == repr(list(step.arguments))
        assert _plain(said), "a value that no tool can take"
    with suppress(DagError):
        plan_dag(found)
    return True


def _plain(value: object) -> bool:
    if isinstance(value, dict):
        return _plain([*value, *value.values()])
    if isinstance(value, list | tuple):
        return all(map(_plain, value))
    if isinstance(value, float):
        return math.isfinite(value)
    return value is None or (isinstance(value, str | int) and not isinstance(value, bytes))


def score(text: str) -> bool:
    for label, prediction in ((PLANS[0], text), (text, PLANS[0]), (text, text)):
        found = score_pair(label, prediction)
        assert not (found.success and found.failure)
    # A plan is as good as itself, where it is one at all.
    assert found.success_dag or found.bad_label or found.label_problems
    return found.success_dag


def joiner(text: str) -> bool:
    answer = parse_joiner(text)
    assert (answer.action is None) == ("Action:" not in text)
    assert answer.action in ("Finish", "Replan", None)
    assert answer.message in text
    assert answer.thought in text
    return answer.action is not None


def dataset(text: str | bytes) -> bool:
    path, reports = file_of(text, "data.json"), []
    taken = {}
    for policy in ("skip", "error"):
        reports.clear()
        try:
            entries = list(read_entries(path, on_bad_entry=policy, on_report=reports.append))
        except DataError as error:
            str(error).encode()
            continue
        taken = {entry.key: entry for entry in entries}
        _hold_against_json(path.read_bytes(), reports[0], taken)
    return bool(taken)


def _hold_against_json(content: bytes, report: ReadReport, taken: Mapping[str, Any]) -> None:
    """Python's own JSON must read the same entries, and the texts of each must be texts."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        return {n: v for n, v in pairs} | ({"(twice)": 1} if len(set(names)) < len(names) else {})

    lines = content.decode().split("\n") if report.json_lines else [content.decode()]
    found: dict[str, Any] = {}
    for number, line in enumerate(lines, start=1):
        with suppress(ValueError):
            value = json.loads(line, object_pairs_hook=once)
            if report.json_lines and ("key" in value or isinstance(value.get("input"), str)):
                value = {value.get("key", f"line {number}"): value}
            found |= {key: entry for key, entry in value.items() if key not in found}
    for key, entry in taken.items():
        said = found[key]
        assert "(twice)" not in json.dumps(said), "a key that is given twice"
        assert entry.query == said["input"]
        assert [e.output for e in entry.examples] == [p["raw_output"] for p in said["output"]]
        for example in entry.examples:
            for part in (
                example.key,
                example.query,
                example.system or "",
                example.user,
                example.output,
            ):
                part.encode()


def config(text: str) -> bool:
    try:
        found = parse_config(text)
    except ConfigError as error:
        assert len(str(error)) < 10 * len(text) + 20_000
        return False
    assert parse_config(dump_config(found)) == found
    with suppress(ConfigError):
        check_config(found)
        return True
    return False


def catalogue(text: str) -> bool:
    path = file_of(text, "tools.yaml")
    try:
        load_catalogue(path)
    except DataError:
        return False
    spec = GenerationSpec(train_entries=2, test_entries=0, max_calls=3, catalogue=path)
    with suppress(UserError):  # too few different requests can be made
        files = generate_dataset(spec, folder() / "of-tools")
        entries = list(read_entries(files.train, on_bad_entry="error"))
        assert len(entries) == 2
    return True


def prompt(text: str) -> bool:
    parts = system_text.parse(text)
    assert system_text.render(parts) == text
    assert system_text.render(parts.restricted(parts.tools)).startswith(parts.preamble[0])
    with suppress(UnicodeEncodeError):  # a text that no tokenizer is ever given
        text.encode()
        _tokens(text)
    return len(parts.tools) > 0


@cache
def _tokenizer() -> Any:
    from tinyagent_fast.models.nano import train_bpe_tokenizer
    from tinyagent_fast.prompts.tokens import PromptTokenizer

    return PromptTokenizer(train_bpe_tokenizer(plans(), 400))


def _tokens(text: str) -> None:
    tokenizer, other = _tokenizer(), text[::-1]
    if not other:
        return
    (row,) = tokenizer.encode_rows([("k", RenderedExample(text, other))])
    supervised = row.input_ids[row.prompt_tokens :]
    assert row.input_ids.count(tokenizer.eos_id) == 1 and supervised[-1] == tokenizer.eos_id
    assert row.input_ids.count(tokenizer.bos_id) == 1 and row.input_ids[0] == tokenizer.bos_id
    assert tokenizer.decode(row.input_ids[1:-1]) == text + other


def files(text: str) -> bool:
    """Read what else users write: requests, pairs, predictions, histories, names of runs."""
    from tinyagent_fast.chat.requests import read_requests
    from tinyagent_fast.cli import main

    path, taken = file_of(text, "list.json"), 0
    with suppress(DataError):
        taken += len(read_requests(path))
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()) as said:
        code = main(["score", "--pairs", str(path)])
    assert code in (0, 2), said.getvalue()
    with suppress(DataError):
        taken += len(PredictionFile(folder(), "list.json").read())
    file_of(text, "history.jsonl")
    with suppress(ConfigError):
        taken += len(Run(folder()).history())
    return taken > 0 or code == 0


def name(text: str) -> bool:
    runs, taken = folder() / "runs", False
    with suppress(ConfigError):
        refuse_taken_name(replace(Config(), name=text, runs=runs))
        taken = True
        assert (runs / text).resolve().parent == runs.resolve()
        assert text not in (".", "..", "latest") and not text.startswith(".")
    with suppress(ConfigError):
        find_run(text, runs)
    return taken


def gguf(content: bytes) -> bool:
    from tinyagent_fast.models.gguf_base import base_from_gguf, gguf_shape

    path = file_of(content, "model.gguf")
    with suppress(ModelError):
        shape = gguf_shape(path)
        assert shape.layers < 10_000
        base_from_gguf(path, folder() / "base")
        return True
    return False


def safetensors(content: bytes) -> bool:
    from tinyagent_fast.export.checkpoints import open_checkpoint, read_rows, stored_tensors

    home = folder() / "weights"
    home.mkdir(exist_ok=True)
    head, _, rest = content.partition(b"|||")
    config, _, weights = rest.partition(b"|||")
    for name, part in (
        ("model.safetensors.index.json", head),
        ("config.json", config),
        ("model.safetensors", weights),
    ):
        (home / name).write_bytes(part)
    if not head:
        (home / "model.safetensors.index.json").unlink()
    with suppress(ModelError):
        for tensor in stored_tensors(home / "model.safetensors").values():
            assert tensor.offset_bytes + tensor.size_bytes <= len(weights)
            if tensor.shape and tensor.rows:
                read_rows(tensor, 0, 1)
    with suppress(ModelError):
        found = open_checkpoint(home)
        assert all(tensor.path.parent == home for tensor in found.tensors.values())
        return True
    return False


# --- seeds


def _gguf_seed() -> bytes:
    from gguf import GGUFWriter

    from tinyagent_fast.models.families import FAMILIES, ModelShape

    shape = ModelShape(
        hidden=32, intermediate=32, layers=1, heads=2, kv_heads=1, head_dim=16, vocab=8, tied=False
    )
    import numpy as np

    path = folder() / "seed.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.intermediate)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(
        [b"<unk>", b"<s>", b"</s>", b"<0x0A>", b"a", b"b", b"ab", "\u2581".encode()]
    )
    writer.add_token_scores([0.0, 0.0, 0.0, 0.0, -1.0, -2.0, -3.0, -4.0])
    writer.add_token_types([2, 3, 3, 6, 1, 1, 1, 1])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for one in next(f for f in FAMILIES.values() if f.name == "Llama").tensors(shape):
        writer.add_tensor(one.gguf, np.zeros(one.shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def _safetensors_seeds() -> list[bytes]:
    header = {
        "__metadata__": {"format": "pt"},
        "w": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
        "v": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
    }
    text = json.dumps(header).encode()
    weights = struct.pack("<Q", len(text)) + text + bytes(32)
    index = json.dumps(
        {"weight_map": {"w": "model.safetensors", "v": "model.safetensors"}}
    ).encode()
    config = b'{"model_type": "llama", "quantization_config": null}'
    tricks = index.replace(b'"model.safetensors", ', b'"../weights/model.safetensors", ')
    good = [[b"", config], [index, config]]
    parts = (*good, *good, [index, config], [tricks, config], [b"[]", b"[]"], [b"{}", b"{}"])
    return [b"|||".join([*two, weights]) for two in parts]


def _yaml_bomb() -> str:
    letters = "abcdefghij"
    lines = [f"{b}: &{b} [{', '.join(['*' + a] * 9)}]" for a, b in pairwise(letters)]
    return "\n".join(["a: &a [x, x, x, x, x, x, x, x, x]", *lines])


CONFIGS = (
    dump_config(Config()),
    "train: {learning_rate: 2e-4, batch: auto, epochs: 3}\nmodel: {gradient_checkpointing: on}\n",
    "name: &n x\nruns: *n\ndata: {train: a.json, test: b.json, limit_entries: 7}",
    _yaml_bomb(),
    "train: &t {batch: 1}\n<<: *t\nlora: *t",
    "train: &t\n  batch: *t",
)
CATALOGUES = (
    """\
name: lamps
tools:
  - name: switch
    description: Turns a lamp on or off.
    returns: state
    mention: the state of {lamp}
    phrases: ["turn (on|off) {lamp}", "[now] switch {lamp}", "<lamp> is dark: switch {lamp}"]
    parameters: [{name: lamp, type: str, value: lamp}]
  - name: dim
    phrases: ["dim {lamp} to {level}", "dim lamp to {level}"]
    parameters:
      - {name: lamp, type: str, value: lamp, from: state, default: desk, nullable: true}
      - {name: level, type: int, value: level}
values: {lamp: [desk, hall, moon], level: [1, 2, 3]}
""",
)
LISTS = (
    json.dumps(
        [{"label": PLANS[0], "prediction": PLANS[1]}, {"request": "Call Ann", "label": None}]
    ),
    '{"label": "1. join()", "plan": "1. join()"}\n{"label": "", "prediction": ""}\n',
    json.dumps(["Call Ann", {"request": "Text Bob"}]),
    '{"key": "k/0", "query": "q", "label": "1. join()", "prediction": "1. join()", '
    '"stop_reason": "stop", "new_tokens": 3, "seconds": 0.1}\n',
    '{"event": "step", "step": 1, "loss": NaN}\n{"event": "evaluation"}\n',
)
JOINERS = (
    "Thought: all went well\nAction: Finish(I have sent it (twice).)<END_OF_RESPONSE>",
    "Thought: no such person\nAction: Replan\nAction: Finish",
)


def system_texts() -> list[str]:
    entries = [json.loads("{" + text + "}").popitem()[1] for text in generated()]
    texts = [ast.literal_eval(e["output"][0]["raw_input"])[0]["content"] for e in entries]
    listed = (
        "1. f(a: str) -> str:\n - does f\n2. g() -> list[str]\n\nUse f.\nQuestion: x\n1. f()\n###\n"
    )
    return [*texts[:2], f"You have 2 tools.\n{listed}", "tools: a, b, c"]


def datasets() -> list[str]:
    first, second, *_ = generated()
    entry = json.loads("{" + first + "}").popitem()[1]
    lines = [json.dumps({"key": f"k{n}", **entry}) for n in range(2)]
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}]
    point = {**entry["output"][0], "raw_input": messages, "parsed_output": []}
    small = {"k": {"input": "q", "output": [point], "closest_5_queries": []}}
    return [f"{{{first}, {second}}}", "\n".join(lines), json.dumps(small), "{" + first + "}"]


# --- bombs


def repeated(before: str, piece: str, after: str = "") -> Callable[[int], str]:
    """Make texts of any size of one piece."""
    return lambda size: before + piece * (size // max(1, len(piece))) + after


def numbered(line: str) -> Callable[[int], str]:
    """Make plans of any size; a line may name its number, the one before and the one after."""

    def make(size: int) -> str:
        count = size // (len(line) + 5)
        lines = [line.format(n=n, before=max(1, n - 1), after=n + 1) for n in range(1, count)]
        return "\n".join([*lines, f"{count}. join()"])

    return make


_LONG_PLANS = {
    line: numbered(line)
    for line in (
        "{n}. open_note()",
        '{n}. open_note("${before}")',
        '{n}. open_note("${after}")',
        '{n}. open_note("$1")',
        '{n}. open_note(["${before}", "$1", "${before}"])',
        "Thought: {n}\n{n}. open_note({n})",
    )
}


def _entry_with(field: str, piece: str, start: str = "") -> Callable[[int], str]:
    return _entry_of(repeated(start, piece), field)


def _entry_of(texts: Callable[[int], str], field: str = "raw_output") -> Callable[[int], str]:
    def make(size: int) -> str:
        text = texts(size)
        point = {"type": "plan", "raw_input": "U", "raw_output": "1. join()", "id": "i", "index": 0}
        point["parsed_output"] = [{"tool_name": "join", "tool_args": []}]
        entry = {"input": "q", "output": [point]}
        (entry if field == "input" else point)[field] = text
        return json.dumps({"k": entry})

    return make


# fmt: off
_PIECES = (
    *("1. a(", "1. a()\n", "Thought: ", "Thought: \n", "a.", "[", "[]", "(", "-", "not ", "'"),
    *("9", "0x", "{1:", "\\", "\n", "\0", "\u202e", "Action: (", "1. ", " ", "$1 ", ")", '"'),
    *("1. a(1)", "1. a(1)\n", "$1"),
)
_YAML = (
    *("- ", "? ", "[", "{a: ", "a: ", "&a ", "- x\n", "- [a]\n", "'", '"', "\\", "#", "1:", "\n"),
    *("\0", "| ", "a:\n ", "x", "- 9\n", "<<: ", "*a ", "!x ", '- "a\n', "%a ", "\u202e", "---\n"),
)
_JSON = (
    *("[", "[[],", '{"a":', '["]",', "9", '"a",', "\\u0000", "\\", "[]", "{}", ",", " ", '"'),
    *("\n", "\0"),
)
# fmt: on


@dataclass(frozen=True, kw_only=True)
class Reader:
    """Something that reads, its inputs, and its part of them."""

    check: Callable[[Any], bool]
    """Says whether an input was taken."""
    inputs: Callable[[], st.SearchStrategy[Any]]
    bombs: Callable[[], Mapping[str, Callable[[int], Any]]]
    share: float

    @property
    def name(self) -> str:
        return self.check.__name__


def _texts(pieces: Sequence[str], *starts: str) -> Callable[[], dict[str, Callable[[int], str]]]:
    return lambda: {f"{s!r} + {p!r}*": repeated(s, p) for s in ("", *starts) for p in pieces}


def _dataset_bombs() -> dict[str, Callable[[int], str]]:
    bombs = {f"raw {p!r}": repeated('{"k": ', p) for p in _JSON}
    bombs |= {f"lines {p!r}": repeated('{"input": "a", "output": []}\n{"k": ', p) for p in _JSON}
    for field, start in (("raw_output", ""), ("raw_output", "1. a("), ("raw_input", "[{")):
        bombs |= {f"{field} {start}{p!r}": _entry_with(field, p, start) for p in _PIECES}
    bombs |= {f"input {p!r}": _entry_with("input", p) for p in _PIECES}
    return bombs | {f"raw_output {n}": _entry_of(make) for n, make in _LONG_PLANS.items()}


def _catalogue_with(piece: str) -> Callable[[int], str]:
    """Put a phrase of many pieces into a catalogue."""
    before, _, after = CATALOGUES[0].partition("dim {lamp}")
    return repeated(before + "dim {lamp}", piece, after)


def _bytes_bombs(seed: bytes) -> dict[str, Callable[[int], bytes]]:
    pieces = (b"\0", b"\xff", b"\x01\0\0\0\0\0\0\0", b'{"a":', b"[", b'"a":0,', b"\x09\0\0\0")
    ends = (len(seed), 8, 24)
    return {
        f"{at} + {p!r}*": (lambda size, at=at, p=p: seed[:at] + p * (size // len(p)))
        for at in ends
        for p in pieces
    }


def _shared(make: Callable[[], Sequence[str]]) -> Callable[[], st.SearchStrategy[str]]:
    return lambda: changed(make())


READERS = (
    Reader(
        check=plan,
        inputs=_shared(lambda: [*plans(), *PLANS]),
        bombs=lambda: _texts(_PIECES, "1. a(")() | _LONG_PLANS,
        share=0.2,
    ),
    Reader(
        check=score,
        inputs=_shared(lambda: [*plans(), *PLANS]),
        bombs=lambda: _texts(_PIECES, "1. a(")() | _LONG_PLANS,
        share=0.1,
    ),
    Reader(check=joiner, inputs=_shared(lambda: JOINERS), bombs=_texts(_PIECES), share=0.1),
    Reader(check=dataset, inputs=_shared(datasets), bombs=_dataset_bombs, share=0.15),
    Reader(
        check=config,
        inputs=_shared(lambda: CONFIGS),
        bombs=_texts(_YAML, "name: ", "train: "),
        share=0.1,
    ),
    Reader(
        check=catalogue,
        inputs=_shared(lambda: CATALOGUES),
        bombs=lambda: {
            **_texts(_YAML, "tools: ")(),
            **{f"phrase {p!r}": _catalogue_with(p) for p in ("(", "[", "(a|", "{", "<", "]")},
        },
        share=0.1,
    ),
    Reader(
        check=prompt,
        inputs=_shared(system_texts),
        bombs=_texts(
            [*_PIECES, "1. a() -> b\n", ", a", "Question: ", "###\n", "a_b "], "1. a() -> b\n\n"
        ),
        share=0.1,
    ),
    Reader(
        check=files, inputs=_shared(lambda: LISTS), bombs=_texts(_JSON, '[{"label": '), share=0.05
    ),
    Reader(
        check=name,
        inputs=_shared(lambda: ("a", "..", "latest", "a/../../b")),
        bombs=_texts(["a", "../", "\0", "."]),
        share=0.03,
    ),
    Reader(
        check=gguf,
        inputs=lambda: changed_bytes([_gguf_seed()[:6000], _gguf_seed()]),
        bombs=lambda: _bytes_bombs(_gguf_seed()),
        share=0.03,
    ),
    Reader(
        check=safetensors,
        inputs=lambda: changed_bytes(_safetensors_seeds()),
        bombs=lambda: _bytes_bombs(_safetensors_seeds()[0]),
        share=0.04,
    ),
)


def fuzz(reader: Reader, inputs: int, seed: int = 0) -> tuple[int, int]:
    """Give a reader so many inputs; count them, and those that it took.

    Raises:
        AssertionError: One of them did what it must not; hypothesis shows the smallest.
    """
    count = taken = 0

    @settings(
        max_examples=inputs,
        deadline=None,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
    )
    @hypothesis.seed(seed)
    @given(reader.inputs())
    def check(value: Any) -> None:
        nonlocal count, taken
        count += 1
        started = time.process_time()
        taken += reader.check(value)
        took_s = time.process_time() - started
        assert took_s < 5, f"{took_s:.1f} s for an input of {len(value):,}"

    check()
    return count, taken


def explode(reader: Reader, largest: int) -> Iterator[tuple[str, float, float]]:
    """Let a reader's bombs grow eightfold, and give the CPU seconds of both sizes of each.

    Raises:
        AssertionError: Time grows faster than size.
    """
    for name, make in reader.bombs().items():
        for _ in range(3):  # on a busy machine one measurement says little
            small, large = (_cpu_s(reader, make(size)) for size in (largest // 8, largest))
            if large < _MOST_GROWTH * max(small, 0.02):
                break
        else:
            raise AssertionError(
                f"{reader.name} {name}: {small:.2f} s for {largest // 8:,} characters, "
                f"{large:.2f} s for {largest:,}"
            )
        yield name, small, large


def _cpu_s(reader: Reader, value: Any) -> float:
    started = time.process_time()
    reader.check(value)
    return time.process_time() - started


def _work(at: int, inputs: int, seed: int, largest: int, found: Any) -> None:
    faulthandler.enable()
    resource.setrlimit(resource.RLIMIT_AS, (12 << 30, 12 << 30))
    reader = READERS[at]
    started = time.monotonic()
    counts = fuzz(reader, inputs, seed)
    fuzz_s = time.monotonic() - started
    slowest, bombs = ("", 0.0), 0
    for name, _, large in explode(reader, largest):
        bombs += 1
        slowest = max(slowest, (name, large), key=lambda one: one[1])
    found.put((*counts, fuzz_s, bombs, slowest))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--largest", type=int, default=1 << 20, help="characters of the bombs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="one reader")
    flags = parser.parse_args(arguments)
    names = [reader.name for reader in READERS]
    print("| reader | inputs | taken | seconds | bombs | slowest of them, CPU s |")
    print("|---|---|---|---|---|---|")
    failed, total = [], 0
    context = multiprocessing.get_context("spawn")
    for at, reader in enumerate(READERS):
        if flags.only not in (None, reader.name):
            continue
        wanted, found = math.ceil(flags.inputs * reader.share), context.Queue()
        args = (at, wanted, flags.seed, flags.largest, found)
        process = context.Process(target=_work, args=args)
        process.start()
        process.join()
        if process.exitcode:
            failed.append(f"{reader.name}: exit code {process.exitcode}")
            continue
        count, taken, fuzz_s, bombs, (slow, slow_s) = found.get()
        figures = f"{count:,} | {taken:,} | {fuzz_s:.0f} | {bombs} | {slow_s:.2f} ({slow})"
        total += count
        print(f"| {reader.name} | {figures} |", flush=True)
    print(f"\n{total:,} inputs to {len(names)} readers, {len(failed)} failed")
    print("\n".join(failed))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
