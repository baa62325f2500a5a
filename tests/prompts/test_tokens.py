"""Rows: prompt ids are an exact prefix, labels are exactly the completion, and one BOS."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyagent_fast.config import PromptFormat
from tinyagent_fast.errors import DataError, ModelError
from tinyagent_fast.plans.grammar import END_OF_PLAN
from tinyagent_fast.prompts.loading import load_tokenizer
from tinyagent_fast.prompts.templates import RenderedExample, render_prompt
from tinyagent_fast.prompts.tokens import (
    IGNORED,
    EncodedRow,
    PromptTokenizer,
)

SPACE_MARK = "\u2581"
"""SentencePiece writes a space so; typed by a user it would come back as a space."""

CHARACTERS = st.characters(exclude_categories=["Cs"], exclude_characters=SPACE_MARK)
ANY_TEXT = st.text(CHARACTERS, max_size=30)
# Much of what plans and prompts are made of, so that merges happen; special tokens typed by users.
PIECES = [
    "1. ",
    "\n",
    " ",
    "join()",
    "</s>",
    "<s>",
    "<unk>",
    "$1",
    '"',
    "(",
    "create_note",
    "\u00e9",
]
NEAR_TEXT = st.lists(st.sampled_from([*PIECES, "\U0001f680", "### ", "<0x0A>", "x"])).map("".join)
TEXT = ANY_TEXT | NEAR_TEXT
FORMATS = st.sampled_from(["alpaca", "flat"])
KINDS = ["byte-level", "sentencepiece"]

Make = Callable[[str], PromptTokenizer]


@pytest.fixture(scope="module")
def tokenizers(tiny_base: Path, spm_folder: Path) -> dict[str, Any]:
    return {"byte-level": load_tokenizer(tiny_base), "sentencepiece": load_tokenizer(spm_folder)}


@pytest.fixture(scope="module", params=KINDS)
def make(request: pytest.FixtureRequest, tokenizers: dict[str, Any]) -> Make:
    wrapped = {f: PromptTokenizer(tokenizers[request.param], f) for f in ("alpaca", "flat")}  # type: ignore[arg-type]
    return wrapped.__getitem__


def encode_row(tokenizer: PromptTokenizer, key: str, example: RenderedExample) -> EncodedRow:
    (row,) = tokenizer.encode_rows([(key, example)])
    return row


def rendered(system: str, user: str, output: str, prompt_format: PromptFormat) -> RenderedExample:
    return RenderedExample(render_prompt(system, user, prompt_format), output + END_OF_PLAN)


@settings(max_examples=200, deadline=None)
@given(system=TEXT, user=TEXT, output=TEXT, prompt_format=FORMATS)
def test_a_row_is_bos_prompt_completion_eos(
    make: Make, system: str, user: str, output: str, prompt_format: PromptFormat
) -> None:
    tokenizer = make(prompt_format)
    example = rendered(system, user, output, prompt_format)
    row = encode_row(tokenizer, "k", example)
    prompt = tokenizer.encode_prompts([example.prompt])[0]
    supervised = row.labels[len(prompt) :]
    assert row.input_ids[: len(prompt)] == prompt
    assert row.labels[: len(prompt)] == [IGNORED] * len(prompt)
    assert supervised == row.input_ids[len(prompt) :]
    assert supervised[-1] == tokenizer.eos_id
    assert tokenizer.decode_continuation(prompt, supervised[:-1]) == example.completion
    assert row.supervised_tokens == len(supervised)


@settings(max_examples=200, deadline=None)
@given(system=TEXT, user=TEXT, output=TEXT, prompt_format=FORMATS)
def test_a_row_has_one_bos_one_eos_and_no_other_special_token(
    make: Make, system: str, user: str, output: str, prompt_format: PromptFormat
) -> None:
    tokenizer = make(prompt_format)
    row = encode_row(tokenizer, "k", rendered(system, user, output, prompt_format))
    assert row.input_ids[0] == tokenizer.bos_id
    assert row.input_ids.count(tokenizer.bos_id) == 1  # type: ignore[arg-type]
    assert row.input_ids.count(tokenizer.eos_id) == 1
    assert tokenizer.hf.unk_token_id not in row.input_ids
    assert max(row.input_ids) < len(tokenizer.hf)


@settings(max_examples=100, deadline=None)
@given(system=TEXT, user=TEXT, prompt_format=FORMATS)
def test_the_prompt_reads_back_as_it_was_written(
    make: Make, system: str, user: str, prompt_format: PromptFormat
) -> None:
    tokenizer = make(prompt_format)
    prompt = render_prompt(system, user, prompt_format)
    ids = tokenizer.encode_prompts([prompt])[0][1:]
    assert tokenizer.decode(ids) == prompt


@settings(max_examples=200, deadline=None)
@given(system=TEXT, user=TEXT, rest=TEXT, first=st.sampled_from(["1. ", "Thought: ", "Action"]))
def test_encoding_prompt_and_completion_together_gives_the_same_ids(
    make: Make, system: str, user: str, rest: str, first: str
) -> None:
    tokenizer = make("alpaca")
    example = rendered(system, user, first + rest, "alpaca")
    row = encode_row(tokenizer, "k", example)
    assert row.input_ids[1:-1] == tokenizer.encode_text(example.prompt + example.completion)


@settings(max_examples=100, deadline=None)
@given(texts=st.lists(TEXT, max_size=6))
def test_encoding_many_texts_equals_encoding_each(make: Make, texts: list[str]) -> None:
    tokenizer = make("alpaca")
    assert tokenizer.encode_texts(texts) == [tokenizer.encode_text(text) for text in texts]
    assert tokenizer.encode_prompts(texts) == [
        tokenizer.encode_prompts([text])[0] for text in texts
    ]


@settings(max_examples=200, deadline=None)
@given(left=TEXT, right=TEXT)
def test_a_continuation_reads_back_after_any_prompt(make: Make, left: str, right: str) -> None:
    tokenizer = make("flat")
    prompt = tokenizer.encode_prompts([left])[0]
    ids = tokenizer.encode_continuation(right)
    assert tokenizer.decode_continuation(prompt, ids) == right


@pytest.mark.parametrize("special", ["</s>", "<s>", "<unk>"])
@pytest.mark.parametrize("prompt_format", ["alpaca", "flat"])
def test_a_special_token_typed_by_a_user_is_plain_characters(
    make: Make, special: str, prompt_format: PromptFormat
) -> None:
    tokenizer = make(prompt_format)
    clean = encode_row(tokenizer, "k", rendered("s", "a b", "1. join()", prompt_format))
    typed = encode_row(
        tokenizer, "k", rendered("s", f"a {special} b", f'1. note("{special}")', prompt_format)
    )
    specials = {tokenizer.bos_id, tokenizer.eos_id, tokenizer.hf.unk_token_id}
    assert [i for i in typed.input_ids if i in specials] == [
        i for i in clean.input_ids if i in specials
    ]


def test_wrapping_and_encoding_add_no_token_to_the_vocabulary(make: Make) -> None:
    tokenizer = make("alpaca")
    before = len(tokenizer.hf), tokenizer.hf.get_vocab()
    encode_row(tokenizer, "k", rendered("s", "<END_OF_PLAN> </s>", "1. join()", "alpaca"))
    assert (len(tokenizer.hf), tokenizer.hf.get_vocab()) == before
    assert "<END_OF_PLAN>" not in before[1]


def test_an_empty_completion_is_an_error_because_nothing_would_be_supervised(make: Make) -> None:
    with pytest.raises(DataError, match=r"row k/0.*empty[\s\S]*0/0"):
        encode_row(make("alpaca"), "k/0", RenderedExample("prompt", ""))


@settings(max_examples=50, deadline=None)
@given(before=ANY_TEXT, after=ANY_TEXT)
def test_a_character_that_sentencepiece_cannot_give_back_is_an_error(
    tokenizers: dict[str, Any], before: str, after: str
) -> None:
    tokenizer = PromptTokenizer(tokenizers["sentencepiece"])
    with pytest.raises(DataError, match="cannot give back"):
        encode_row(tokenizer, "k", RenderedExample("p\n", before + SPACE_MARK + after))


def test_the_same_character_is_kept_by_a_byte_level_tokenizer(tokenizers: dict[str, Any]) -> None:
    tokenizer = PromptTokenizer(tokenizers["byte-level"])
    row = encode_row(tokenizer, "k", RenderedExample("p\n", f"1. a({SPACE_MARK})"))
    assert tokenizer.decode(row.labels[row.prompt_tokens : -1]) == f"1. a({SPACE_MARK})"


def test_a_vocabulary_without_all_bytes_is_an_error_for_what_it_lacks() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, "a": 3, "b": 4}
    core = Tokenizer(models.BPE(vocab, [], unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    hf = PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    hf.pad_token = "<unk>"
    tokenizer = PromptTokenizer(hf)
    with pytest.raises(DataError, match="decode to"):
        encode_row(tokenizer, "k", RenderedExample("a", "abc"))


def good_row(tokenizer: PromptTokenizer) -> tuple[EncodedRow, list[int], str]:
    example = rendered("s", "u", "1. join()", "alpaca")
    return (
        encode_row(tokenizer, "k", example),
        tokenizer.encode_prompts([example.prompt])[0],
        example.completion,
    )


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda r, n: replace(r, input_ids=[5, *r.input_ids[1:]]), "no prefix"),
        (lambda r, n: replace(r, labels=[*r.labels[: n - 1], 7, *r.labels[n:]]), "prompt token"),
        (lambda r, n: replace(r, labels=[*r.labels[:-1], IGNORED]), "labels differ"),
        (lambda r, n: replace(r, labels=r.labels[:n], input_ids=r.input_ids[:n]), "labels differ"),
        (
            lambda r, n: replace(r, labels=r.labels[:-1], input_ids=r.input_ids[:-1]),
            "last supervised token is not EOS",
        ),
        (
            lambda r, n: replace(
                r,
                labels=[*r.labels[:n], *r.labels[n + 1 :]],
                input_ids=[*r.input_ids[:n], *r.input_ids[n + 1 :]],
            ),
            "labels decode to",
        ),
    ],
    ids=["prompt id", "prompt label", "masked EOS", "no label", "cut EOS", "lost first token"],
)
def test_the_proof_finds_each_way_in_which_a_row_can_be_wrong(
    make: Make, spoil: Callable[[EncodedRow, int], EncodedRow], reason: str
) -> None:
    tokenizer = make("alpaca")
    row, prompt, completion = good_row(tokenizer)
    tokenizer.prove_row(row, prompt, completion)
    with pytest.raises(DataError, match=reason):
        tokenizer.prove_row(spoil(row, len(prompt)), prompt, completion)


def chat_tokenizer(hf: Any, template: str) -> PromptTokenizer:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    copy = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(hf.backend_tokenizer.to_str()),
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<unk>",
    )
    copy.chat_template = template
    return PromptTokenizer(copy, "chat")


TURNS = "{% for m in messages %}[{{ m.role }}]{{ m.content }}</s>{% endfor %}[assistant]"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bos", ["", "{{ bos_token }}"])
def test_chat_prompts_have_one_bos_and_the_templates_special_tokens(
    kind: str, bos: str, tokenizers: dict[str, Any]
) -> None:
    tokenizer = chat_tokenizer(tokenizers[kind], bos + TURNS)
    example = RenderedExample(
        render_prompt("sys", "hello", "chat", tokenizer.chat), "1. join()<END_OF_PLAN>"
    )
    row = encode_row(tokenizer, "k", example)
    assert row.input_ids.count(tokenizer.bos_id) == 1  # type: ignore[arg-type]
    assert row.input_ids.count(tokenizer.eos_id) == 3  # two turns and the completion
    # After a special token SentencePiece's own rule and llama.cpp put a space; the text has none.
    seen = tokenizer.decode(row.input_ids[1 : row.prompt_tokens])
    assert seen.replace(" ", "") == example.prompt


def test_a_chat_template_may_begin_every_turn_with_bos(tokenizers: dict[str, Any]) -> None:
    turns = "{% for m in messages %}<s>{{ m.role }} {{ m.content }}</s>{% endfor %}<s>assistant "
    tokenizer = chat_tokenizer(tokenizers["byte-level"], turns)
    prompt = render_prompt("sys", "hello", "chat", tokenizer.chat)
    assert prompt == "system sys</s><s>user hello</s><s>assistant "
    ids = tokenizer.encode_prompts([prompt])[0]
    assert ids == tokenizer.hf.encode("<s>" + prompt, add_special_tokens=False)
    assert ids.count(tokenizer.bos_id) == 3  # type: ignore[arg-type]


@pytest.mark.parametrize("begin", ["\n{{ bos_token }}", "{{ bos_token }}<s>", "[x]<s>"])
def test_a_chat_template_with_two_beginnings_is_refused(
    begin: str, tokenizers: dict[str, Any]
) -> None:
    with pytest.raises(ModelError, match="BOS"):
        chat_tokenizer(tokenizers["byte-level"], begin + TURNS)


def test_a_tokenizer_without_a_chat_template_says_so(make: Make) -> None:
    assert make("alpaca").chat is None


def test_a_tokenizer_without_bos_makes_rows_without_one(tokenizers: dict[str, Any]) -> None:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    core = tokenizers["byte-level"].backend_tokenizer.to_str()
    hf = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(core), eos_token="</s>", pad_token="<unk>"
    )
    row = encode_row(PromptTokenizer(hf), "k", RenderedExample("a prompt", "1. join()"))
    assert PromptTokenizer(hf).bos_id is None
    assert hf.convert_tokens_to_ids("<s>") not in row.input_ids


def test_real_rows_are_proved_and_begin_alike(real_data: Path) -> None:
    import json

    from tinyagent_fast.data.schema import Entry, entry_from_json
    from tinyagent_fast.prompts.loading import tokenizer_from_sentencepiece

    raw = json.loads((real_data / "training_data.json").read_text(encoding="utf-8"))
    entries = [entry_from_json(key, value) for key, value in list(raw.items())[:100]]
    examples = [e for entry in entries if isinstance(entry, Entry) for e in entry.examples]
    hf = tokenizer_from_sentencepiece(real_data / "llama_tokenizer.model")
    hf.pad_token = hf.unk_token
    tokenizer = PromptTokenizer(hf)
    rows = tokenizer.training_rows(examples)
    plans = [r.input_ids for r, e in zip(rows, examples, strict=True) if e.kind == "plan"]
    assert len(plans) == 100
    assert all(ids[:1000] == plans[0][:1000] for ids in plans)
