"""A GGUF file in llama.cpp's server: answers as when served, and gone for sure afterwards."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import pytest

from tinyagent_fast.errors import ModelError
from tinyagent_fast.inference.llama_cpp import LlamaCppSettings, LlamaServer

pytest.importorskip("xllamacpp", reason="these tests run llama.cpp: pip install xllamacpp")

CONTEXT_TOKENS = 1024
MESSAGES = [
    {"role": "system", "content": "Tools:\n1. open_note(name: str)"},
    {"role": "user", "content": 'Question: open "Plans" {now}\n'},
]
PLAN_GRAMMAR = 'root ::= "1. join()" "<END_OF_PLAN>"'
ENDLESS = 'root ::= "a" root'


def settings_for(model: Path, **changes: Any) -> LlamaCppSettings:
    plain: dict[str, Any] = {
        "slots": 2,
        "context_tokens_per_slot": CONTEXT_TOKENS,
        "threads": 1,
        "cache_type": "f32",
    }
    return LlamaCppSettings(model=model, **{**plain, **changes})


@pytest.fixture(scope="module")
def server(tiny_gguf: dict[str, Path]) -> Iterator[LlamaServer]:
    with LlamaServer(settings_for(tiny_gguf["f32"])) as running:
        yield running


@pytest.fixture(scope="module")
def tokenizer(tiny_merged: Path) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(str(tiny_merged))


def written(server: LlamaServer, ids: list[int]) -> str:
    """What llama.cpp writes for some ids, special tokens shown."""
    return str(server.request("POST", "/detokenize", {"tokens": ids})["content"])


def is_listening(url: str) -> bool:
    address = urlparse(url)
    with socket.socket() as probe:
        return probe.connect_ex((str(address.hostname), int(address.port or 0))) == 0


def test_a_plan_request_over_http_is_answered_with_the_template_in_the_file(
    server: LlamaServer, tokenizer: Any
) -> None:
    body = {
        "messages": MESSAGES,
        "max_tokens": 30,
        "temperature": 0,
        "grammar": PLAN_GRAMMAR,
        "stop": ["<END_OF_PLAN>"],
    }
    request = urllib.request.Request(
        f"{server.url}/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=60) as response:
        answer = json.load(response)
    assert answer["choices"][0]["message"]["content"] == "1. join()"
    assert answer["choices"][0]["finish_reason"] == "stop"
    rendered = "".join(f"### {m['role']}:\n{m['content']}\n" for m in MESSAGES) + "### assistant:\n"
    assert server.apply_template(MESSAGES) == rendered
    ids = [tokenizer.bos_token_id, *tokenizer(rendered, add_special_tokens=False)["input_ids"]]
    assert answer["usage"]["prompt_tokens"] == len(ids)


def test_the_server_listens_on_this_machine_alone(server: LlamaServer) -> None:
    assert server.url.startswith("http://127.0.0.1:")
    assert is_listening(server.url)


def test_a_proxy_of_the_environment_is_not_asked(
    server: LlamaServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    assert server.tokenize("a")


def test_text_becomes_the_ids_of_the_vocabulary_and_back(
    server: LlamaServer, tokenizer: Any
) -> None:
    text = 'open "Plans" {now}\n  \u00e9\u4e2d 12345'
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert server.tokenize(text) == ids
    assert server.tokenize(text, bos=True) == [tokenizer.bos_token_id, *ids]
    assert written(server, ids) == text
    assert server.vocab_size == len(tokenizer)


def test_special_tokens_are_read_from_text_only_where_that_is_asked_for(
    server: LlamaServer, tokenizer: Any
) -> None:
    eos = tokenizer.eos_token_id
    assert eos not in server.tokenize("a</s>b")
    assert server.tokenize("a</s>b", special=True).count(eos) == 1


def test_chat_gives_what_the_ids_of_its_rendered_prompt_give(server: LlamaServer) -> None:
    answer = server.chat(MESSAGES, max_new_tokens=12, stop=None)
    ids = server.tokenize(server.apply_template(MESSAGES), special=True, bos=True)
    again = server.complete_ids(ids, max_new_tokens=12)
    assert answer == replace(again, cached_tokens=answer.cached_tokens)
    assert answer.prompt_tokens == len(ids)
    assert answer.stop_reason == "length"
    assert answer.new_tokens == 12


def test_a_completion_can_be_watched_and_broken_off(server: LlamaServer) -> None:
    ids = server.tokenize("1. open_note(" * 120, bos=True)
    pieces: list[str] = []
    whole = server.complete_ids(ids, max_new_tokens=12, on_text=pieces.append)
    assert "".join(pieces) == whole.text
    assert len([piece for piece in pieces if piece]) > 6
    unwatched = server.complete_ids(ids, max_new_tokens=12)
    # Half a character at the limit is shown by one way only.
    assert unwatched.text.rstrip("\ufffd") == whole.text
    assert unwatched.cached_tokens == len(ids) - 1

    class Stop(Exception):
        pass

    def leave(_: str) -> None:
        raise Stop

    with pytest.raises(Stop):
        server.complete_ids(ids, max_new_tokens=900, grammar=ENDLESS, on_text=leave)
    assert server.complete_ids(ids, max_new_tokens=12).text == unwatched.text


def test_a_watched_completion_that_does_not_fit_is_refused(server: LlamaServer) -> None:
    with pytest.raises(ModelError, match="exceeds the available context size"):
        server.complete_ids([5] * (CONTEXT_TOKENS + 1), max_new_tokens=1, on_text=print)


def test_generation_is_greedy(server: LlamaServer) -> None:
    ids = server.tokenize("1. open_note(", bos=True)
    ours = []
    for _ in range(5):
        ours.append(int(server.next_logprobs([*ids, *ours]).argmax()))
    text = server.complete_ids(ids, max_new_tokens=5).text
    assert written(server, ours) == text
    assert server.complete_ids(ids, max_new_tokens=5).text == text


def test_a_stop_string_ends_the_text_before_itself_and_eos_is_told_from_it(
    server: LlamaServer,
) -> None:
    stopped = server.chat(MESSAGES, max_new_tokens=30, stop="<END_OF_PLAN>", grammar=PLAN_GRAMMAR)
    assert (stopped.text, stopped.stop_reason) == ("1. join()", "stop")
    ended = server.chat(MESSAGES, max_new_tokens=30, stop=None, grammar=PLAN_GRAMMAR)
    assert (ended.text, ended.stop_reason) == ("1. join()<END_OF_PLAN>", "eos")
    # The same tokens wrote both; EOS is no part of a text.
    assert ended.new_tokens == stopped.new_tokens


def test_white_space_around_an_answer_is_kept(server: LlamaServer) -> None:
    grammar = 'root ::= "  a \\n"'
    assert server.chat(MESSAGES, max_new_tokens=9, stop=None, grammar=grammar).text == "  a \n"


def test_probabilities_are_those_of_transformers_for_every_token(
    server: LlamaServer, tiny_merged: Path, tokenizer: Any
) -> None:
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_merged, dtype=torch.float32).eval()
    ids = [
        tokenizer.bos_token_id,
        *tokenizer('1. open_note("Plans")\n2. join()\n' * 4)["input_ids"],
    ]
    with torch.no_grad():
        wanted_TV = torch.log_softmax(model(torch.tensor([ids])).logits[0], -1).numpy()
    for end in (1, 2, 5, len(ids), 7):
        got_V = server.next_logprobs(ids[:end])
        assert got_V.dtype == np.float32
        assert got_V.shape == (len(tokenizer),)
        assert np.abs(got_V - wanted_TV[end - 1]).max() < 1e-3
        assert np.exp(got_V.astype(np.float64)).sum() == pytest.approx(1.0, abs=1e-4)


def test_probabilities_are_given_also_where_the_likeliest_token_is_half_a_character(
    server: LlamaServer,
) -> None:
    found = 0
    for start in range(3, 60):
        likeliest = int(server.next_logprobs([1, start]).argmax())
        found += written(server, [likeliest]) == "\ufffd"
    assert found > 0, "no case among them: choose other prompts"


def test_what_does_not_fit_the_context_is_refused_and_not_cut(server: LlamaServer) -> None:
    assert server.context_tokens == CONTEXT_TOKENS
    with pytest.raises(ModelError, match="exceeds the available context size"):
        server.complete_ids([5] * (CONTEXT_TOKENS + 1), max_new_tokens=1)
    with pytest.raises(ModelError, match=r"broken off after .* of 900 tokens"):
        server.complete_ids(
            [5] * (CONTEXT_TOKENS - 100),
            max_new_tokens=900,
            grammar=ENDLESS,
        )


def test_a_grammar_that_cannot_be_read_is_an_error(server: LlamaServer) -> None:
    with pytest.raises(ModelError, match="failed to parse grammar"):
        server.chat(MESSAGES, max_new_tokens=3, stop=None, grammar="root ::= ((")


def test_the_server_is_gone_after_the_block_also_after_an_exception(
    tiny_gguf: dict[str, Path],
) -> None:
    urls = []
    with pytest.raises(KeyboardInterrupt), LlamaServer(settings_for(tiny_gguf["f16"])) as running:
        urls.append(running.url)
        assert is_listening(running.url)
        raise KeyboardInterrupt
    assert not is_listening(urls[0])


def test_the_server_is_gone_at_once_also_while_a_request_is_under_way(
    tiny_gguf: dict[str, Path],
) -> None:
    failures: list[Exception] = []

    def ask(running: LlamaServer) -> None:
        try:
            running.complete_ids([5], max_new_tokens=4000, grammar=ENDLESS)
        except ModelError as error:
            failures.append(error)

    with LlamaServer(settings_for(tiny_gguf["f16"], context_tokens_per_slot=8192)) as running:
        thread = threading.Thread(target=ask, args=(running,))
        thread.start()
        time.sleep(0.3)
        assert thread.is_alive()
        started = time.perf_counter()
    assert time.perf_counter() - started < 4
    assert not is_listening(running.url)
    thread.join(timeout=10)
    assert "gave no answer" in str(failures[0])


def test_a_request_after_the_end_says_what_happened(tiny_gguf: dict[str, Path]) -> None:
    with LlamaServer(settings_for(tiny_gguf["f16"])) as running:
        pass
    running.close()
    with pytest.raises(ModelError, match="its process ended with code"):
        running.tokenize("a")


KILLED = """
import os, signal, sys
from pathlib import Path
from tinyagent_fast.inference.llama_cpp import LlamaCppSettings, LlamaServer
settings = LlamaCppSettings(model=Path(sys.argv[1]), slots=1, threads=1)
with LlamaServer(settings) as server:
    print(server.url, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_not_even_a_killed_program_leaves_its_server_behind(tiny_gguf: dict[str, Path]) -> None:
    words = [sys.executable, "-c", KILLED, str(tiny_gguf["f16"])]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL
    url = done.stdout.strip()
    assert url.startswith("http://")
    deadline = time.monotonic() + 10
    while is_listening(url):
        assert time.monotonic() < deadline, "the server is still there"
        time.sleep(0.05)


def test_a_server_that_dies_is_an_error_that_says_so(tiny_gguf: dict[str, Path]) -> None:
    with LlamaServer(settings_for(tiny_gguf["f16"])) as running:
        os.kill(running._process.pid, signal.SIGKILL)
        with pytest.raises(ModelError, match="its process ended with code -9"):
            for _ in range(100):
                running.tokenize("a")


def cut(folder: Path, whole: Path) -> Path:
    path = folder / "cut.gguf"
    path.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    return path


def test_a_file_that_cannot_be_run_is_named_with_llama_cpps_own_reason(
    tiny_gguf: dict[str, Path], tmp_path: Path
) -> None:
    text = tmp_path / ("a folder of a long name " * 8).strip() / "notes.gguf"
    text.parent.mkdir()
    text.write_text("no model")
    cases = {
        tmp_path / "absent.gguf": "it is no file",
        text: "expected 'GGUF'",
        cut(tmp_path, tiny_gguf["f16"]): "corrupted or incomplete",
    }
    for path, reason in cases.items():
        with pytest.raises(ModelError) as caught, LlamaServer(settings_for(path)):
            pass
        assert reason in str(caught.value)
        assert path.name in str(caught.value)


def test_without_the_package_the_error_says_how_to_install_it(
    tiny_gguf: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "xllamacpp.py").write_text("raise ImportError('libgomp.so.1: cannot open it')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(ModelError) as caught, LlamaServer(settings_for(tiny_gguf["f16"])):
        pass
    assert "libgomp.so.1: cannot open it" in str(caught.value)
    assert "pip install xllamacpp" in str(caught.value)
