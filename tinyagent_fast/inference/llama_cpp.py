"""Run a GGUF file through llama.cpp's own server, so that what is measured is what is served.

`LlamaServer` starts it in a child process (`llama_child`) and is its only client: export gates ask
it for ids and probabilities, and `LlamaCppEngine` writes plans with it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal

from tinyagent_fast.errors import ModelError
from tinyagent_fast.inference.engine import Completion, Limits, OnToken, Prompt, StopReason
from tinyagent_fast.prompts.builder import encode_prompts
from tinyagent_fast.prompts.templates import prompt_messages
from tinyagent_fast.runs import sha256_of

if TYPE_CHECKING:
    import numpy as np

    from tinyagent_fast.prompts.tokens import PromptTokenizer

_STOP_REASONS: Mapping[str, StopReason] = {"word": "stop", "eos": "eos", "limit": "length"}
_REQUEST_S = 3600.0
_INSTALL = "pip install xllamacpp (on Linux it needs the system package libgomp1 too)"
_NO_ROOM = (
    "shorten the request or the system text; a run's adapter or merged folder, which torch runs, "
    "has all the context that the model was made for"
)
_GREEDY: Mapping[str, Any] = {
    "temperature": 0,
    "top_k": 1,
    "samplers": ["top_k"],
    "repeat_penalty": 1.0,
    "seed": 0,
    "cache_prompt": True,
}


@dataclass(frozen=True, kw_only=True)
class LlamaCppSettings:
    """How a GGUF file is served.

    `slots` prompts are answered at once, each with room for `context_tokens_per_slot` tokens of
    prompt and answer; a slot keeps its last prompt's cache and evaluates only what differs. An f32
    cache (and no flash attention) is for comparisons with an f32 model: an f16 cache alone moves
    logits by 0.02. `threads` of None lets llama.cpp use all cores.
    """

    model: Path
    slots: int = 8
    context_tokens_per_slot: int = 8192
    threads: int | None = None
    cache_type: Literal["f16", "f32"] = "f16"


class LlamaServer:
    """A running server, gone when it is closed; all methods may be called from several threads.

    Text of users can write special tokens: llama.cpp parses them in every prompt that it gets as
    text, and neither a setting nor a request turns that off. `</s>` in a query ends up as EOS
    there, as it does wherever the file is served; prompts that must not be read so go through
    `tokenize` (which does not) and `complete_ids`.
    """

    def __init__(self, settings: LlamaCppSettings) -> None:
        """Serve a GGUF file on a free port of this machine.

        Raises:
            ModelError: There is no such file, llama.cpp cannot load it, or xllamacpp is not
                installed.
        """
        import httpx

        if not settings.model.is_file():
            raise ModelError(f"model {settings.model}", "it is no file", "name a .gguf file")
        self.settings = settings
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed in `close`
        self._process = _start(settings, self._log)
        # No proxy of the environment is asked for an address on this machine.
        self._http = httpx.Client(timeout=_REQUEST_S, trust_env=False)
        try:
            self.url = self._wait_for_url()
            models = self.request("GET", "/v1/models")
            self.vocab_size = int(models["data"][0]["meta"]["n_vocab"])
            """Tokens of the vocabulary, unused ones included."""
            properties = self.request("GET", "/props")
            self.context_tokens = int(properties["default_generation_settings"]["n_ctx"])
            """Room of one slot; llama.cpp allows no more than the model was made for."""
            self._letter_id = self.tokenize("a")[-1]
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the server; requests under way fail, and a second call does nothing."""
        # The end of its input is the child's sign to go.
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with suppress(BrokenPipeError):
                pipe.close()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._http.close()
        self._log.close()

    def __enter__(self) -> LlamaServer:
        """Give the server."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the server, also after an exception."""
        self.close()

    def _wait_for_url(self) -> str:
        """Wait until the model is loaded; the child then says its address."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        answer = json.loads(line) if line else {}
        if "url" in answer:
            return str(answer["url"])
        if "missing" in answer:
            raise ModelError("llama.cpp", f"it cannot be used: {answer['missing']}", _INSTALL)
        raise ModelError(
            f"model {self.settings.model}",
            f"llama.cpp cannot load it: {answer.get('error', 'the process ended')}"
            + self._last_words(),
            "name a .gguf file; export it anew if it may be cut, or was made for another llama.cpp",
        )

    def _last_words(self) -> str:
        """Quote the end of what llama.cpp has said, and the exit code if the process is gone."""
        words = ""
        with suppress(subprocess.TimeoutExpired):
            # llama.cpp writes its reasons from a thread of its own, up to the end of the process.
            words = f"; its process ended with code {self._process.wait(timeout=5)}"
        try:
            self._log.seek(0)
            said = self._log.read()[-3000:].decode(errors="replace").strip()
        except ValueError:  # the server was closed by another thread, and its log with it
            said = ""
        return words + (f"; it said: {said}" if said else "")

    def request(self, method: Literal["GET", "POST"], path: str, body: Any = None) -> Any:
        """Ask an endpoint, such as `/tokenize`; what is sent and answered is JSON.

        Raises:
            ModelError: The server refuses the request, or it is gone.

        Source: README of tools/server in github.com/ggml-org/llama.cpp.
        """
        import httpx

        try:
            response = self._http.request(method, self.url + path, json=body)
        except (httpx.HTTPError, RuntimeError) as error:  # RuntimeError: closed by another thread
            raise self._gone(path, error) from error
        if response.status_code != 200:
            raise self._refused(path, response.text)
        return response.json()

    def tokenize(self, text: str, *, special: bool = False, bos: bool = False) -> list[int]:
        """Encode text with the vocabulary in the file.

        Args:
            text: What to encode.
            special: Read special tokens from it, as the server does in prompts.
            bos: Put BOS in front, where the file asks for one.
        """
        body = {"content": text, "parse_special": special, "add_special": bos}
        ids: list[int] = self.request("POST", "/tokenize", body)["tokens"]
        return ids

    def apply_template(self, messages: Sequence[Mapping[str, str]]) -> str:
        """Render messages as `chat` does, without BOS, which llama.cpp adds as an id."""
        body = {"messages": [dict(message) for message in messages]}
        return str(self.request("POST", "/apply-template", body)["prompt"])

    def chat(
        self,
        messages: Sequence[Mapping[str, str]],
        *,
        max_new_tokens: int,
        stop: str | None,
        grammar: str | None = None,
    ) -> Completion:
        """Answer messages greedily through POST /v1/chat/completions, as any client would.

        Limits and errors are those of `complete_ids`; a message has `role` and `content`.
        """
        # `verbose` adds the raw text and why it ended; the standard fields trim the first and
        # call a stop string and EOS the same.
        body = {"messages": [dict(message) for message in messages], "verbose": True}
        body |= self._sampling(max_new_tokens, stop, grammar)
        raw = self.request("POST", "/v1/chat/completions", body)["__verbose"]
        return self._completion(raw, raw["content"], max_new_tokens)

    def complete_ids(
        self,
        ids: Sequence[int],
        *,
        max_new_tokens: int,
        stop: str | None = None,
        grammar: str | None = None,
        on_text: Callable[[str], None] | None = None,
    ) -> Completion:
        """Complete token ids greedily; no template, no BOS, no special tokens from text.

        `on_text` gets each piece of text as it is written, and empty text while the prompt is read.
        Whatever it raises ends the completion and is raised here.

        Raises:
            ModelError: The prompt does not fit, or the completion ran out of room.
        """
        body = {"prompt": list(ids), **self._sampling(max_new_tokens, stop, grammar)}
        if on_text is None:
            raw = self.request("POST", "/completion", body)
            return self._completion(raw, raw["content"], max_new_tokens)
        text = held = ""
        for message in self._events("/completion", body):
            piece = held + message.get("content", "")
            # Bytes of a character that the limit cuts; an answer in one piece leaves them out.
            whole = piece.rstrip("\ufffd")
            piece, held = whole, piece[len(whole) :]
            text += piece
            on_text(piece)
            if message.get("stop"):
                return self._completion(message, text, max_new_tokens)
        raise self._gone("/completion", "the stream ended before the answer did")

    def next_logprobs(self, ids: Sequence[int]) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Measure how probable each token of the vocabulary is after some ids.

        Each call goes to the same slot, so ids that extend the last ones cost only what they add.

        Args:
            ids: What stands before, at least one token.

        Returns:
            Natural logarithms of the probabilities, by token id, whatever the sampling; minus
            infinity where the probability is zero in float32.
        """
        import numpy as np

        body: dict[str, Any] = {"prompt": list(ids), "n_probs": self.vocab_size, "id_slot": 0}
        # The figures are from before any sampling, but they are only sent along with a token that
        # is whole text; without this, a byte of a longer character would come without them.
        body["logit_bias"] = [[self._letter_id, 1e6]]
        answer = self.request("POST", "/completion", body | self._sampling(1, None, None))
        entries = answer["completion_probabilities"][0]["top_logprobs"]
        logprobs_V = np.full(self.vocab_size, np.nan, np.float32)
        logprobs_V[[entry["id"] for entry in entries]] = [entry["logprob"] for entry in entries]
        assert not np.isnan(logprobs_V).any(), "llama.cpp gave probabilities of some tokens only"
        # llama.cpp writes the lowest float for the logarithm of zero.
        logprobs_V[logprobs_V < -1e30] = -np.inf
        return logprobs_V

    def _sampling(
        self, max_new_tokens: int, stop: str | None, grammar: str | None
    ) -> dict[str, Any]:
        body = {**_GREEDY, "n_predict": max_new_tokens, "stop": [stop] if stop else []}
        return body | ({"grammar": grammar} if grammar else {})

    def _events(self, path: str, body: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """Send a request and read its events as they come; each is one line `data: {...}`."""
        import httpx

        body = {**body, "stream": True, "return_progress": True}
        try:
            with self._http.stream("POST", self.url + path, json=body) as response:
                if response.status_code != 200:
                    raise self._refused(path, response.read().decode(errors="replace"))
                for line in response.iter_lines():
                    field, _, value = line.partition(": ")
                    if field == "error":
                        raise self._refused(path, value)
                    if field == "data":
                        yield json.loads(value)
        except (httpx.HTTPError, RuntimeError) as error:  # closed by another thread
            raise self._gone(path, error) from error

    def _completion(self, raw: Mapping[str, Any], text: str, max_new_tokens: int) -> Completion:
        reason = _STOP_REASONS[raw["stop_type"]]
        new_tokens, prompt_tokens = int(raw["tokens_predicted"]), int(raw["tokens_evaluated"])
        if reason == "length" and new_tokens < max_new_tokens:
            raise ModelError(
                f"an answer broken off after {new_tokens} of {max_new_tokens} tokens",
                f"with its prompt of {prompt_tokens} tokens it fills the context of "
                f"{self.context_tokens} tokens",
                _NO_ROOM,
            )
        return Completion(
            text=text,
            stop_reason=reason,
            # EOS is sampled and counted by llama.cpp, but is no part of the text.
            new_tokens=new_tokens - (reason == "eos"),
            prompt_tokens=prompt_tokens,
            cached_tokens=prompt_tokens - int(raw["timings"]["prompt_n"]),
        )

    def _gone(self, path: str, why: object) -> ModelError:
        return ModelError(
            f"llama.cpp's server gave no answer to {path}",
            f"{why}{self._last_words()}",
            "run the command again; with less memory at hand, take fewer slots",
        )

    def _refused(self, path: str, said: str) -> ModelError:
        """Turn an error of the server into one that says what to do."""
        message, kind = said, ""
        with suppress(ValueError, KeyError, TypeError):
            error = json.loads(said)["error"]
            message, kind = str(error["message"]), str(error["type"])
        fix = _NO_ROOM if kind == "exceed_context_size_error" else "correct what is sent"
        name = self.settings.model.name
        return ModelError(f"{name}: llama.cpp refuses a request to {path}", message, fix)


@dataclass(frozen=True)
class LlamaCppEngine:
    """A GGUF file, asked with its own chat template, as when it is served."""

    server: LlamaServer
    """A running one; it ends with the engine."""
    tokenizer: PromptTokenizer | None = None
    """That of the run, to compare prompts with training's."""

    @property
    def compute_dtype(self) -> str:
        """What keys and values are kept in; weights may have fewer bits."""
        return {"f16": "float16", "f32": "float32"}[self.server.settings.cache_type]

    def identity(self) -> Mapping[str, Any]:
        """Name the file by its content, and the llama.cpp that runs it."""
        settings = self.server.settings
        return {
            "engine": "llama.cpp",
            "xllamacpp": version("xllamacpp"),
            "model_sha256": sha256_of(settings.model),
            "cache_type": settings.cache_type,
        }

    def notes(self, prompts: Sequence[Prompt]) -> list[str]:
        """Count prompts that the file encodes otherwise than training, if a tokenizer is given."""
        if self.tokenizer is None:
            return []
        trained = encode_prompts(self.tokenizer, prompts)
        pairs = zip(prompts, trained, strict=True)
        different = [prompt for prompt, ids in pairs if self._prompt_ids(prompt) != ids]
        if not different:
            return [f"all {len(prompts)} prompts have the token ids of training"]
        return [
            f"{len(different)} of {len(prompts)} prompts have other token ids than in training, "
            f"such as {different[0].user[-60:]!r}; a query with special tokens in it can be the "
            "reason, and so can a wrong template or vocabulary in the file"
        ]

    def _prompt_ids(self, prompt: Prompt) -> list[int]:
        """Encode a prompt as the chat endpoint does."""
        text = self.server.apply_template(prompt_messages(prompt.system, prompt.user))
        return self.server.tokenize(text, special=True, bos=True)

    def generate(
        self,
        prompts: Sequence[Prompt],
        limits: Limits,
        on_token: OnToken | None = None,
    ) -> Iterator[tuple[int, Completion]]:
        """Complete prompts on the server's slots, those with the same beginning after one another.

        A batch is at most the number of slots, and `on_token` is called from each slot's thread.
        """

        def answer(index: int) -> Completion:
            prompt, stop, most = prompts[index], limits.stop, limits.max_new_tokens
            how: dict[str, Any] = {"max_new_tokens": most, "stop": stop, "grammar": prompt.grammar}
            if on_token is None:
                messages = prompt_messages(prompt.system, prompt.user)
                return self.server.chat(messages, **how)
            # The chat endpoint streams text that it has trimmed, so ids are completed here.
            return self.server.complete_ids(
                self._prompt_ids(prompt),
                on_text=lambda text: on_token(index, text),
                **how,
            )

        # A slot evaluates only what differs from its last prompt: equal beginnings are neighbours.
        order = sorted(
            range(len(prompts)), key=lambda i: (prompts[i].system or "", prompts[i].user)
        )
        pool = ThreadPoolExecutor(min(limits.batch, self.server.settings.slots))
        last = time.perf_counter()
        try:
            indices = {pool.submit(answer, index): index for index in order}
            for future in as_completed(indices):
                now = time.perf_counter()
                yield indices[future], replace(future.result(), seconds=now - last)
                last = now
        finally:
            # Requests under way are not waited for: they end with the server.
            pool.shutdown(wait=False, cancel_futures=True)

    def close(self) -> None:
        """End the server."""
        self.server.close()


def _start(settings: LlamaCppSettings, log: IO[bytes]) -> subprocess.Popen[bytes]:
    """Start the child; what llama.cpp has to say goes into the log."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tinyagent_fast.inference.llama_child"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        # Threads that wait for others must not spin: next to one busy program, two spinning
        # threads are 27 times slower than one.
        env={**os.environ, "GOMP_SPINCOUNT": "0"},
        cwd=Path(__file__).parents[2],  # else a folder of our name there would be imported
        start_new_session=True,  # Ctrl-C is for the parent, which ends the child in order
    )
    assert process.stdin is not None
    wanted = {**asdict(settings), "model": str(settings.model.resolve())}
    with suppress(BrokenPipeError):  # then it has gone already, and has said why
        process.stdin.write(json.dumps(wanted).encode() + b"\n")
        process.stdin.flush()
    return process
