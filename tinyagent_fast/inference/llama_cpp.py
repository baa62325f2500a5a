"""Run a GGUF file through llama.cpp's own server, so that what is measured is what is served.

Export gates and evaluation start a server here; `generation.engines` writes plans with it. The
server runs in a child process (`generation.llama_child`).
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tinyagent_fast.errors import ModelError
from tinyagent_fast.inference.decoding import Completion
from tinyagent_fast.inference.engine import StopReason
from tinyagent_fast.inference.llama_child import Child, LlamaCppSettings

if TYPE_CHECKING:
    import numpy as np

__all__ = ["ChatAnswer", "LlamaCppSettings", "LlamaServer", "llama_server"]

_STOP_REASONS: Mapping[str, StopReason] = {"word": "stop", "eos": "eos", "limit": "length"}
_REQUEST_S = 3600.0
_GREEDY: Mapping[str, Any] = {
    "temperature": 0,
    "top_k": 1,
    "samplers": ["top_k"],
    "repeat_penalty": 1.0,
    "seed": 0,
    "cache_prompt": True,
}


@dataclass(frozen=True)
class ChatAnswer:
    """A completion, and how many tokens the prompt had after the file's template and BOS."""

    completion: Completion
    prompt_tokens: int


class LlamaServer:
    """A running server; all methods may be called from several threads.

    Text of users can write special tokens: llama.cpp parses them in every prompt that it gets as
    text, and neither a setting nor a request turns that off. `</s>` in a query ends up as EOS
    there, as it does wherever the file is served; prompts that must not be read so go through
    `tokenize` (which does not) and `complete_ids`.
    """

    def __init__(self, url: str, settings: LlamaCppSettings, child: Child | None = None) -> None:
        """Connect to a server; `llama_server` does this.

        Args:
            url: Its address on this machine, `http://127.0.0.1:PORT`.
            settings: What it was started with.
            child: Its process, asked when a request fails.
        """
        self.url = url
        self.settings = settings
        self.child = child
        self._host, _, port = url.removeprefix("http://").partition(":")
        self._port = int(port)
        models = self.request("GET", "/v1/models")
        self.vocab_size = int(models["data"][0]["meta"]["n_vocab"])
        """Tokens of the vocabulary, unused ones included."""
        properties = self.request("GET", "/props")
        self.chat_template = str(properties["chat_template"])
        """The template in the file, or llama.cpp's default where it has none."""
        self.context_tokens = int(properties["default_generation_settings"]["n_ctx"])
        """Room of one slot; llama.cpp allows no more than the model was made for."""
        self._letter_id = self.tokenize("a")[-1]

    def request(self, method: Literal["GET", "POST"], path: str, body: Any = None) -> Any:
        """Ask the server.

        Args:
            method: HTTP method.
            path: Endpoint, such as `/tokenize`.
            body: What is sent, as JSON.

        Returns:
            The answer, from JSON.

        Raises:
            ModelError: The server refuses the request, or it is gone.

        Source: README of tools/server in github.com/ggml-org/llama.cpp.
        """
        connection = HTTPConnection(self._host, self._port, timeout=_REQUEST_S)
        try:
            payload = None if body is None else json.dumps(body)
            connection.request(method, path, payload, {"Content-Type": "application/json"})
            response = connection.getresponse()
            status, content = response.status, response.read()
        except (OSError, HTTPException) as error:
            reason = self.child.last_words() if self.child else ""
            raise ModelError(
                f"llama.cpp's server gave no answer to {path}",
                f"{error}{reason}",
                "run the command again; with less memory at hand, take fewer slots",
            ) from error
        finally:
            connection.close()
        if status != 200:
            raise _refused(path, content, self.settings)
        return json.loads(content)

    def tokenize(self, text: str, *, special: bool = False, bos: bool = False) -> list[int]:
        """Encode text with the vocabulary in the file.

        Args:
            text: Any text.
            special: Whether special tokens are read from the text, as the server does in prompts.
            bos: Whether BOS is put in front, where the file asks for one.

        Returns:
            Token ids.
        """
        body = {"content": text, "parse_special": special, "add_special": bos}
        ids: list[int] = self.request("POST", "/tokenize", body)["tokens"]
        return ids

    def detokenize(self, ids: Sequence[int]) -> str:
        """Decode ids with special tokens shown.

        Args:
            ids: Token ids.

        Returns:
            Their text.
        """
        return str(self.request("POST", "/detokenize", {"tokens": list(ids)})["content"])

    def apply_template(self, messages: Sequence[Mapping[str, str]]) -> str:
        """Render messages with the template in the file, as `chat` does.

        Args:
            messages: Each with `role` and `content`.

        Returns:
            The prompt without BOS, which llama.cpp adds as an id.
        """
        body = {"messages": [dict(message) for message in messages]}
        return str(self.request("POST", "/apply-template", body)["prompt"])

    def chat(
        self,
        messages: Sequence[Mapping[str, str]],
        *,
        max_new_tokens: int,
        stop: str | None,
        grammar: str | None = None,
    ) -> ChatAnswer:
        """Answer messages greedily through POST /v1/chat/completions, as any client would.

        Args:
            messages: Each with `role` and `content`.
            max_new_tokens: Where the answer is broken off.
            stop: Text that ends it.
            grammar: GBNF that it has to follow.

        Returns:
            The answer, white space around it kept.

        Raises:
            ModelError: The prompt does not fit, or the answer ran out of room.
        """
        # `verbose` adds the raw text and why it ended; the standard fields trim the first and
        # call a stop string and EOS the same.
        body = {"messages": [dict(message) for message in messages], "verbose": True}
        body |= self._sampling(max_new_tokens, stop, grammar)
        raw = self.request("POST", "/v1/chat/completions", body)["__verbose"]
        return ChatAnswer(self._completion(raw, max_new_tokens), int(raw["tokens_evaluated"]))

    def complete_ids(
        self,
        ids: Sequence[int],
        *,
        max_new_tokens: int,
        stop: str | None = None,
        grammar: str | None = None,
    ) -> Completion:
        """Complete token ids greedily; no template, no BOS, no special tokens from text.

        Args:
            ids: The prompt, with BOS if it needs one.
            max_new_tokens: Where the completion is broken off.
            stop: Text that ends it.
            grammar: GBNF that it has to follow.

        Returns:
            The completion.

        Raises:
            ModelError: The prompt does not fit, or the completion ran out of room.
        """
        body = {"prompt": list(ids), **self._sampling(max_new_tokens, stop, grammar)}
        return self._completion(self.request("POST", "/completion", body), max_new_tokens)

    def next_logprobs(self, ids: Sequence[int]) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Measure how probable each token of the vocabulary is after some ids.

        Each call goes to the same slot, so a prompt that extends the last one costs only the
        tokens that it adds.

        Args:
            ids: What stands before, at least one token.

        Returns:
            Natural logarithms of the probabilities, by token id, whatever the sampling; minus
            infinity where the probability is zero in float32.

        Raises:
            ModelError: The ids do not fit.
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

    def _completion(self, raw: Mapping[str, Any], max_new_tokens: int) -> Completion:
        reason = _STOP_REASONS[raw["stop_type"]]
        new_tokens = int(raw["tokens_predicted"])
        if reason == "length" and new_tokens < max_new_tokens:
            raise ModelError(
                f"an answer broken off after {new_tokens} of {max_new_tokens} tokens",
                f"with its prompt of {raw['tokens_evaluated']} tokens it fills the context of "
                f"{self.context_tokens} tokens",
                "give each slot more context, up to what the model was made for",
            )
        # EOS is sampled and counted by llama.cpp, but is no part of the text.
        return Completion(str(raw["content"]), reason, new_tokens - (reason == "eos"))


def _refused(path: str, content: bytes, settings: LlamaCppSettings) -> ModelError:
    """Turn an error of the server into one that says what to do."""
    message, kind = content.decode(errors="replace"), ""
    with suppress(ValueError, KeyError, TypeError):
        error = json.loads(content)["error"]
        message, kind = str(error["message"]), str(error["type"])
    fix = "correct what is sent"
    if kind == "exceed_context_size_error":
        fix = (
            "shorten the prompt, or give each slot more context, up to what the model was made for"
        )
    return ModelError(f"{settings.model.name}: llama.cpp refuses a request to {path}", message, fix)


@contextmanager
def llama_server(settings: LlamaCppSettings) -> Iterator[LlamaServer]:
    """Serve a GGUF file on a free port of this machine for as long as the block runs.

    Args:
        settings: The file and how it is served.

    Yields:
        The server; it is gone after the block, also after an exception.

    Raises:
        ModelError: The file is missing or is no GGUF, llama.cpp cannot load it, or xllamacpp is
            not installed.
    """
    _check_file(settings.model)
    with tempfile.TemporaryFile() as log:
        child = Child(settings, log)
        try:
            yield LlamaServer(child.wait_for_url(), settings, child)
        finally:
            child.stop()


def _check_file(path: Path) -> None:
    if not path.is_file():
        raise ModelError(f"model {path}", "it is no file", "name a .gguf file")
    with path.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            raise ModelError(
                f"model {path}", "it does not begin as a GGUF file does", "name a .gguf file"
            )
