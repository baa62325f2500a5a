"""Chat templates: what a server renders is what training rendered, in Jinja and in llama.cpp."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chat_templates import LINES, LLAMA, PLAIN, SMOL, THINKING
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyagent_fast.config import PromptFormat
from tinyagent_fast.errors import ModelError
from tinyagent_fast.export.chat_template import chat_template
from tinyagent_fast.prompts.templates import render_prompt

FORMATS: tuple[PromptFormat, ...] = ("alpaca", "flat")
NASTY = (
    "plain",
    "",
    " \n leading and trailing \t\n\n",
    "{{ messages }} {% if x %} {# c #} {%- endif -%} ${1}",
    """quotes ' " ''' \"\"\" and backslashes \\n \\""",
    "### Response:\n1. join()<END_OF_PLAN>",
    "caf\u00e9 \U0001f600 \u2028 \u00a0 \ufeff",
)
TEXTS = st.text(st.characters(exclude_categories=["Cs"])) | st.sampled_from(NASTY)


def messages(system: str | None, user: str) -> list[dict[str, str]]:
    first = [] if system is None else [{"role": "system", "content": system}]
    return [*first, {"role": "user", "content": user}]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """Return a byte-level tokenizer with BOS and EOS, whose template a test sets."""
    from tinyagent_fast.models.nano import train_bpe_tokenizer

    return train_bpe_tokenizer(["### Instruction: 1. get_email_address"], 300)


def render(tokenizer: Any, template: str, sent: list[dict[str, str]], **options: Any) -> Any:
    tokenizer.chat_template = template
    options = {"tokenize": False, "add_generation_prompt": True} | options
    return tokenizer.apply_chat_template(sent, **options)


@pytest.mark.parametrize("prompt_format", FORMATS)
@given(system=st.none() | TEXTS, user=TEXTS)
@settings(max_examples=150, deadline=None)
def test_jinja_renders_any_text_as_training_did(
    tokenizer: Any, prompt_format: PromptFormat, system: str | None, user: str
) -> None:
    wanted = render_prompt(system, user, prompt_format)
    template = chat_template(prompt_format, None, bos=False)
    assert render(tokenizer, template, messages(system, user)) == wanted
    template = chat_template(prompt_format, None, bos=True)
    assert render(tokenizer, template, messages(system, user)) == "<s>" + wanted


@pytest.mark.parametrize("prompt_format", FORMATS)
def test_the_folders_template_gives_the_ids_that_were_trained_on(
    tokenizer: Any, prompt_format: PromptFormat
) -> None:
    from tinyagent_fast.prompts.tokens import PromptTokenizer

    trained = PromptTokenizer(tokenizer, prompt_format)
    for system in (None, *NASTY):
        sent = messages(system, "Question: who?\n")
        ids = render(
            tokenizer,
            chat_template(prompt_format, None, bos=True),
            sent,
            tokenize=True,
            return_dict=False,
        )
        prompt = render_prompt(system, "Question: who?\n", prompt_format)
        assert ids == trained.encode_prompts([prompt])[0]
        assert ids.count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize(
    ("prompt_format", "wanted"),
    [
        (
            "alpaca",
            "\n### Instruction:\nS\n\n### Input:\nU\n\n### Response:\nA</s>"
            "\n### Instruction:\nV\n\n### Response:\n",
        ),
        ("flat", "SUA</s>V"),
    ],
)
def test_an_assistant_turn_ends_in_eos_and_the_next_turn_begins_anew(
    tokenizer: Any, prompt_format: PromptFormat, wanted: str
) -> None:
    turns = [*messages("S", "U"), {"role": "assistant", "content": "A"}, *messages(None, "V")]
    assert render(tokenizer, chat_template(prompt_format, None, bos=False), turns) == wanted


def test_without_a_generation_prompt_the_rest_of_the_conversation_is_a_continuation(
    tokenizer: Any,
) -> None:
    template = chat_template("alpaca", None, bos=True)
    asked = render(tokenizer, template, messages("S", "U"), add_generation_prompt=False)
    answered = [*messages("S", "U"), {"role": "assistant", "content": "A"}]
    whole = render(tokenizer, template, answered, add_generation_prompt=False)
    opened = render(tokenizer, template, messages("S", "U"))
    assert opened.startswith(asked)
    assert whole == opened + "A</s>"


@pytest.mark.parametrize("prompt_format", FORMATS)
@pytest.mark.parametrize(
    "sent",
    [
        [*messages(None, "U"), {"role": "system", "content": "late"}],
        [*messages("S", "U"), {"role": "tool", "content": "result"}],
    ],
    ids=["system message in the middle", "role that training does not know"],
)
def test_a_message_that_cannot_be_rendered_is_refused_not_dropped(
    tokenizer: Any, prompt_format: PromptFormat, sent: list[dict[str, str]]
) -> None:
    import jinja2

    with pytest.raises(jinja2.TemplateError, match="system"):
        render(tokenizer, chat_template(prompt_format, None, bos=True), sent)


CHATML = (
    "\n{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] }}\n{% endfor %}\n"
    "  {% if add_generation_prompt %}<|assistant|>{% endif %}\n"
)


@pytest.mark.parametrize(
    "base",
    [
        "{{ bos_token }}" + CHATML,
        "{{- bos_token -}}" + CHATML,
        "{% if true %}{{ bos_token }}{% endif %}" + CHATML,
        "<s>" + CHATML,
        CHATML,
        CHATML.strip(),
    ],
)
def test_the_bases_own_template_writes_bos_exactly_once_and_is_otherwise_unchanged(
    tokenizer: Any, base: str
) -> None:
    sent = messages("S {{ x }}", " U\n")
    own = render(tokenizer, base, sent)
    assert chat_template("chat", base, bos=False) == base
    written = render(tokenizer, chat_template("chat", base, bos=True), sent)
    assert written == "<s>" + own.removeprefix("<s>")


@pytest.fixture(scope="module", params=FORMATS)
def served(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_merged: Path
) -> Iterator[tuple[PromptFormat, Any]]:
    """Serve a tiny GGUF with the template of a format in it."""
    pytest.importorskip("xllamacpp", reason="rendering in llama.cpp needs the package xllamacpp")
    from tinyagent_fast.export.conversion import convert_to_gguf
    from tinyagent_fast.inference.llama_cpp import LlamaCppSettings, LlamaServer

    file = tmp_path_factory.mktemp("served") / "tiny.gguf"
    convert_to_gguf(
        tiny_merged,
        file,
        quant="f16",
        name="tiny",
        texts={"tokenizer.chat_template": chat_template(request.param, None, bos=False)},
    )
    with LlamaServer(
        LlamaCppSettings(model=file, slots=1, context_tokens_per_slot=2048, threads=1)
    ) as server:
        yield request.param, server


def test_llama_cpp_renders_the_template_in_the_file_as_training_did(
    served: tuple[PromptFormat, Any],
) -> None:
    prompt_format, server = served
    for system in (None, *NASTY):
        for user in NASTY:
            rendered = server.apply_template(messages(system, user))
            assert rendered == render_prompt(system, user, prompt_format)


def test_llama_cpps_chat_endpoint_evaluates_the_ids_that_were_trained_on(
    served: tuple[PromptFormat, Any], tiny_merged: Path
) -> None:
    from tinyagent_fast.prompts.loading import load_tokenizer
    from tinyagent_fast.prompts.tokens import PromptTokenizer

    prompt_format, server = served
    trained = PromptTokenizer(load_tokenizer(tiny_merged), prompt_format)
    for system in (None, *NASTY):
        sent = messages(system, "Question: who?\n")
        ids = trained.encode_prompts([render_prompt(system, "Question: who?\n", prompt_format)])[0]
        assert server.tokenize(server.apply_template(sent), bos=True) == ids
        assert server.chat(sent, max_new_tokens=1, stop=None).prompt_tokens == len(ids)


@pytest.mark.parametrize("own", [PLAIN, SMOL, LLAMA, THINKING, LINES, "{{ bos_token }}" + PLAIN])
def test_llama_cpp_and_transformers_render_a_bases_own_template_as_training_did(
    own: str, tiny_merged: Path, tmp_path: Path
) -> None:
    pytest.importorskip("xllamacpp", reason="rendering in llama.cpp needs the package xllamacpp")
    from tinyagent_fast.export.conversion import convert_to_gguf
    from tinyagent_fast.inference.llama_cpp import LlamaCppSettings, LlamaServer
    from tinyagent_fast.prompts.loading import load_tokenizer
    from tinyagent_fast.prompts.tokens import PromptTokenizer

    hf = load_tokenizer(tiny_merged)
    hf.chat_template = own
    trained = PromptTokenizer(hf, "chat")
    assert trained.chat is not None
    source, file = trained.chat.source, tmp_path / "tiny.gguf"
    texts = {"tokenizer.chat_template": chat_template("chat", source, bos=False)}
    convert_to_gguf(tiny_merged, file, quant="f16", name="tiny", texts=texts)
    plain = LlamaCppSettings(model=file, slots=1, context_tokens_per_slot=2048, threads=1)
    with LlamaServer(plain) as server:
        for system in (None, "S", " lead\n\ntwo \n", "{{ x }} {% if %}"):
            for user in ("U", "  Question: caf\u00e9?\n", "### Response:\n"):
                sent = messages(system, user)
                wanted = render_prompt(system, user, "chat", trained.chat)
                ids = trained.encode_prompts([wanted])[0]
                assert server.apply_template(sent) == wanted
                assert server.tokenize(wanted, special=True, bos=True) == ids
                folder = chat_template("chat", source, bos=True)
                assert ids == render(hf, folder, sent, tokenize=True, return_dict=False)


def test_llama_cpp_refuses_what_the_template_refuses(served: tuple[PromptFormat, Any]) -> None:
    _, server = served
    with pytest.raises(ModelError, match="only the first message can be a system message"):
        server.apply_template([*messages(None, "U"), {"role": "system", "content": "late"}])
