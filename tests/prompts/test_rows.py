"""Row files: nothing is cut, what is left out is counted, and a file is whole or not there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tinyagent_fast.data.schema import Example
from tinyagent_fast.errors import DataError
from tinyagent_fast.prompts.loading import load_tokenizer
from tinyagent_fast.prompts.rows import CHUNK_ROWS, RowFile, encode_examples
from tinyagent_fast.prompts.tokens import PromptTokenizer


def make_examples(count: int, long: Sequence[int] = ()) -> list[Example]:
    return [
        Example(
            key=f"k{at}/0",
            entry_key=f"k{at}",
            kind="plan",
            query=f"note {at}",
            system="tools",
            user=f"Question: note {at}" + " again" * (300 if at in long else 0),
            output=f'1. create_note("note {at}", "", "")\n2. join()',
        )
        for at in range(count)
    ]


@pytest.fixture(scope="module")
def tokenizer(tiny_base: Path) -> PromptTokenizer:
    return PromptTokenizer(load_tokenizer(tiny_base))


def tokens_of(tokenizer: PromptTokenizer, example: Example) -> int:
    (row,) = tokenizer.training_rows([example])
    return len(row.input_ids)


def files_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("count", [1, 5, 256, 300])
def test_a_row_file_holds_every_row_in_order_with_its_statistics(
    count: int, tokenizer: PromptTokenizer, tmp_path: Path
) -> None:
    examples = make_examples(count)
    done: list[int] = []
    file = encode_examples(
        examples, tokenizer, tmp_path / "r", max_length_tokens=512, on_progress=done.append
    )
    dataset = file.dataset()
    expected = tokenizer.training_rows(examples)
    assert dataset["key"][:] == [e.key for e in examples]
    assert dataset["input_ids"][:] == [row.input_ids for row in expected]
    assert dataset["labels"][:] == [row.labels for row in expected]
    lengths = [len(row.input_ids) for row in expected]
    assert dataset["length"][:] == lengths
    statistics = file.statistics
    assert (statistics.rows, statistics.tokens) == (count, sum(lengths))
    assert statistics.longest_tokens == max(lengths)
    assert statistics.supervised_tokens == sum(row.supervised_tokens for row in expected)
    assert statistics.mean_tokens == pytest.approx(sum(lengths) / count)
    assert 0 < statistics.supervised_share < 1
    assert statistics.dropped == ()
    assert done[-1] == count


def test_over_long_rows_are_an_error_that_counts_and_lists_them(
    tokenizer: PromptTokenizer, tmp_path: Path
) -> None:
    examples = make_examples(30, long=range(3, 28))
    tokens = tokens_of(tokenizer, examples[3])
    with pytest.raises(DataError) as caught:
        encode_examples(examples, tokenizer, tmp_path / "r", max_length_tokens=200)
    text = str(caught.value)
    assert "25 of 30 rows have more than 200 tokens" in text
    assert f"k3/0 ({tokens})" in text
    assert "and 5 more" in text
    assert f"--model.max-length-tokens to {max(tokens, tokens_of(tokenizer, examples[27]))}" in text
    assert "--data.over-long drop" in text
    assert files_in(tmp_path) == []


def test_dropped_rows_are_counted_and_listed_and_the_others_are_whole(
    tokenizer: PromptTokenizer, tmp_path: Path
) -> None:
    examples = make_examples(6, long=[1, 4])
    file = encode_examples(
        examples, tokenizer, tmp_path / "r", max_length_tokens=200, over_long="drop"
    )
    assert [key for key, _ in file.statistics.dropped] == ["k1/0", "k4/0"]
    assert file.statistics.dropped[0][1] == tokens_of(tokenizer, examples[1])
    assert file.statistics.rows == 4
    for row in file.dataset():
        assert row["input_ids"][-1] == tokenizer.eos_id
        assert len(row["input_ids"]) == row["length"] <= 200


def test_a_row_of_just_the_limit_is_kept(tokenizer: PromptTokenizer, tmp_path: Path) -> None:
    examples = make_examples(1)
    limit = tokens_of(tokenizer, examples[0])
    file = encode_examples(examples, tokenizer, tmp_path / "a", max_length_tokens=limit)
    assert file.statistics.longest_tokens == limit
    with pytest.raises(DataError, match="1 of 1 rows"):
        encode_examples(examples, tokenizer, tmp_path / "b", max_length_tokens=limit - 1)


def test_dropping_every_row_is_an_error(tokenizer: PromptTokenizer, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no row is left of 3[\s\S]*more than 5 tokens"):
        encode_examples(
            make_examples(3),
            tokenizer,
            tmp_path / "r",
            max_length_tokens=5,
            over_long="drop",
        )
    assert files_in(tmp_path) == []


def test_no_examples_are_an_error(tokenizer: PromptTokenizer, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no examples of the points"):
        encode_examples([], tokenizer, tmp_path / "r", max_length_tokens=512)


def test_a_second_call_opens_the_file_and_encodes_nothing(
    tokenizer: PromptTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def encode() -> RowFile:
        return encode_examples(
            make_examples(4, long=[2]),
            tokenizer,
            tmp_path / "r",
            max_length_tokens=200,
            over_long="drop",
        )

    first = encode()
    monkeypatch.setattr(PromptTokenizer, "encode_rows", lambda *_: pytest.fail("encoded again"))
    second = encode()
    assert second == first
    assert second.dataset()["key"][:] == ["k0/0", "k1/0", "k3/0"]


class Stop(BaseException):
    """Stands for a kill that no code catches."""


def stop_in(monkeypatch: pytest.MonkeyPatch, owner: object, name: str, call: int) -> None:
    original: Callable[..., object] = getattr(owner, name)
    calls = 0

    def stopping(*arguments: object, **keywords: object) -> object:
        nonlocal calls
        calls += 1
        if calls == call:
            raise Stop
        return original(*arguments, **keywords)

    monkeypatch.setattr(owner, name, stopping)


def test_a_stop_while_encoding_leaves_no_file(
    tokenizer: PromptTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    examples = make_examples(600)
    with monkeypatch.context() as patch:
        stop_in(patch, PromptTokenizer, "encode_rows", 3)
        with pytest.raises(Stop):
            encode_examples(examples, tokenizer, tmp_path / "r", max_length_tokens=512)
    assert files_in(tmp_path) == []
    file = encode_examples(examples, tokenizer, tmp_path / "r", max_length_tokens=512)
    assert file.statistics.rows == 600


def test_a_row_that_cannot_be_proved_stops_the_file(spm_folder: Path, tmp_path: Path) -> None:
    from dataclasses import replace

    examples = make_examples(3)
    examples[1] = replace(examples[1], output='1. create_note("\u2581", "", "")\n2. join()')
    with pytest.raises(DataError, match="row k1/0"):
        encode_examples(
            examples,
            PromptTokenizer(load_tokenizer(spm_folder)),
            tmp_path / "r",
            max_length_tokens=512,
        )
    assert files_in(tmp_path) == []


def test_rows_are_encoded_in_chunks_so_memory_stays_bounded(
    tokenizer: PromptTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    original = PromptTokenizer.encode_rows
    monkeypatch.setattr(
        PromptTokenizer,
        "encode_rows",
        lambda self, texts: (sizes.append(len(texts)), original(self, texts))[1],
    )
    encode_examples(make_examples(600), tokenizer, tmp_path / "r", max_length_tokens=512)
    assert max(sizes) <= CHUNK_ROWS
    assert sum(sizes) == 600
