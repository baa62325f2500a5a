"""Write an answer piece by piece, greedily: a model in torch, or a GGUF file in llama.cpp.

Evaluation needs whole answers to many prompts (`generation`); here one answer is wanted at once,
and the next prompt begins mostly as the last one did, so what was computed for it is kept.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException, HTTPResponse
from typing import TYPE_CHECKING, Any, Literal, Protocol

from tinyagent_fast.errors import ModelError
from tinyagent_fast.prompts.templates import render_prompt

if TYPE_CHECKING:
    from tinyagent_fast.inference.llama_cpp import LlamaServer
    from tinyagent_fast.models.loading import LoadedModel

WrittenReason = Literal["stop", "eos", "length"]

_CHUNK_TOKENS = 256
"""Prompt tokens computed between two chances to break off."""
_REQUEST_S = 3600.0
_STOP_REASONS: Mapping[str, WrittenReason] = {"word": "stop", "eos": "eos", "limit": "length"}


@dataclass(frozen=True, kw_only=True)
class Written:
    """How an answer ended, and what it cost."""

    stop_reason: WrittenReason
    new_tokens: int
    prompt_tokens: int
    kept_tokens: int
    """Tokens of the prompt that were there from the last one."""


Pieces = Generator[str, None, Written]
"""Pieces of text as they are written; an empty one says that the prompt is still being read.
Closing it breaks the answer off."""


class Writer(Protocol):
    """Whatever writes answers."""

    def write(self, system: str | None, user: str) -> Pieces:
        """Answer one prompt greedily, up to the stop string, which is no part of the text."""
        ...


class TransformersWriter:
    """A model in torch; the keys and values of the last prompt and answer are kept."""

    def __init__(self, loaded: LoadedModel, *, stop: str, max_new_tokens: int) -> None:
        """Use a loaded model.

        Args:
            loaded: In evaluation mode.
            stop: Text that ends an answer.
            max_new_tokens: Where an answer is broken off.
        """
        self.loaded = loaded
        self.stop = stop
        self.max_new_tokens = max_new_tokens
        self._seen: list[int] = []
        self._cache: Any = None

    def write(self, system: str | None, user: str) -> Pieces:
        """Answer one prompt.

        Args:
            system: System text.
            user: User text.

        Yields:
            Pieces of the answer.

        Returns:
            How it ended.

        Raises:
            ModelError: Prompt and answer do not fit into the model's context.
        """
        tokenizer = self.loaded.tokenizer
        chat = tokenizer.chat if tokenizer.prompt_format == "chat" else None
        prompt = tokenizer.encode_prompt(render_prompt(system, user, tokenizer.prompt_format, chat))
        self._refuse_too_long(len(prompt))
        kept = self._keep_common(prompt)
        try:
            token = yield from self._read(prompt[kept:])
            reason, new_tokens = yield from self._write_on(prompt, token)
        except GeneratorExit:
            raise
        except BaseException:
            # Broken off within a step, keys and values may be there for some layers only.
            self._forget()
            raise
        return Written(
            stop_reason=reason,
            new_tokens=new_tokens,
            prompt_tokens=len(prompt),
            kept_tokens=kept,
        )

    def _write_on(
        self, prompt: Sequence[int], token: int
    ) -> Generator[str, None, tuple[WrittenReason, int]]:
        tokenizer, ids, shown = self.loaded.tokenizer, list[int](), 0
        reason: WrittenReason | None = None
        text = ""
        while reason is None:
            if token == tokenizer.eos_id:
                reason = "eos"
                break
            ids.append(token)
            text, found, _ = tokenizer.decode_continuation(prompt, ids).partition(self.stop)
            if found:
                reason = "stop"
            elif len(ids) == self.max_new_tokens:
                reason = "length"
            else:
                certain = certain_length(text, self.stop)
                if certain > shown:
                    yield text[shown:certain]
                    shown = certain
                token = self._step([token])
        if text[shown:]:
            yield text[shown:]
        return reason, len(ids)

    def _read(self, ids: Sequence[int]) -> Generator[str, None, int]:
        """Compute a prompt in chunks, so that it can be broken off, and find what follows."""
        token = -1
        for start in range(0, len(ids), _CHUNK_TOKENS):
            if start:
                yield ""
            token = self._step(ids[start : start + _CHUNK_TOKENS])
        return token

    def _step(self, ids: Sequence[int]) -> int:
        import torch

        model, dtype = self.loaded.model, getattr(torch, self.loaded.compute_dtype)
        device = next(model.parameters()).device
        mixed = device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)
        with torch.no_grad(), torch.autocast("cuda", dtype=dtype) if mixed else nullcontext():
            logits_1TV = model(
                input_ids=torch.tensor([list(ids)], device=device),
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits
        self._seen += ids
        return int(logits_1TV[0, -1].argmax())

    def _keep_common(self, prompt: Sequence[int]) -> int:
        """Drop what was computed for other tokens; at least the last one is computed anew."""
        from transformers.cache_utils import DynamicCache, DynamicLayer

        kept = 0
        while kept < min(len(self._seen), len(prompt) - 1) and self._seen[kept] == prompt[kept]:
            kept += 1
        # Layers that forget, such as sliding windows, cannot be taken back to an earlier token.
        if kept and all(type(layer) is DynamicLayer for layer in self._cache.layers):
            if kept < len(self._seen):
                self._cache.crop(kept - len(self._seen))
            del self._seen[kept:]
        if not kept or self._cache.get_seq_length() != kept:
            self._forget()
            self._cache = DynamicCache(config=self.loaded.model.config)
            return 0
        return kept

    def _forget(self) -> None:
        self._seen, self._cache = [], None

    def _refuse_too_long(self, prompt_tokens: int) -> None:
        room = getattr(self.loaded.model.config, "max_position_embeddings", None)
        if room is not None and prompt_tokens + self.max_new_tokens > room:
            raise ModelError(
                f"a prompt of {prompt_tokens} tokens",
                f"with {self.max_new_tokens} tokens to write it needs more than the {room} that "
                "the model was made for",
                "shorten the request or the system text, or lower --max-new-tokens",
            )


class LlamaCppWriter:
    """A GGUF file on a running server, asked with its own chat template, as when it is served."""

    def __init__(self, server: LlamaServer, *, stop: str, max_new_tokens: int) -> None:
        """Use a running server.

        Args:
            server: It serves the file.
            stop: Text that ends an answer.
            max_new_tokens: Where an answer is broken off.
        """
        self.server = server
        self.stop = stop
        self.max_new_tokens = max_new_tokens

    def write(self, system: str | None, user: str) -> Pieces:
        """Answer one prompt.

        Args:
            system: System text.
            user: User text.

        Yields:
            Pieces of the answer.

        Returns:
            How it ended.

        Raises:
            ModelError: The server refuses the prompt, or is gone.
        """
        messages = [] if system is None else [{"role": "system", "content": system}]
        text = self.server.apply_template([*messages, {"role": "user", "content": user}])
        ids = self.server.tokenize(text, special=True, bos=True)
        body = {
            "prompt": ids,
            "n_predict": self.max_new_tokens,
            "stop": [self.stop],
            "stream": True,
            "return_progress": True,
            "temperature": 0,
            "top_k": 1,
            "samplers": ["top_k"],
            "repeat_penalty": 1.0,
            "cache_prompt": True,
        }
        host, _, port = self.server.url.removeprefix("http://").partition(":")
        with closing(HTTPConnection(host, int(port), timeout=_REQUEST_S)) as connection:
            for message in self._messages(connection, body):
                yield str(message.get("content", ""))
                if message.get("stop"):
                    return self._ending(message)
        raise self._gone("the stream ended before the answer did")

    def _ending(self, message: Mapping[str, Any]) -> Written:
        reason = _STOP_REASONS[message["stop_type"]]
        new_tokens = int(message["tokens_predicted"])
        prompt_tokens = int(message["tokens_evaluated"])
        if reason == "length" and new_tokens < self.max_new_tokens:
            raise ModelError(
                f"an answer broken off after {new_tokens} of {self.max_new_tokens} tokens",
                f"with its prompt of {prompt_tokens} tokens it fills the context of "
                f"{self.server.context_tokens} tokens",
                "shorten the request or the system text",
            )
        # llama.cpp counts EOS, which is no part of the text.
        return Written(
            stop_reason=reason,
            new_tokens=new_tokens - (reason == "eos"),
            prompt_tokens=prompt_tokens,
            kept_tokens=prompt_tokens - int(message["timings"]["prompt_n"]),
        )

    def _messages(
        self, connection: HTTPConnection, body: Mapping[str, Any]
    ) -> Iterator[dict[str, Any]]:
        """Send a request and read its events; each is one line `data: {...}`.

        Source: README of tools/server in github.com/ggml-org/llama.cpp.
        """
        try:
            headers = {"Content-Type": "application/json"}
            connection.request("POST", "/completion", json.dumps(body), headers)
            response: HTTPResponse = connection.getresponse()
            if response.status != 200:
                raise self._refused(response.read().decode(errors="replace"))
            for line in response:
                field, _, value = line.decode().strip().partition(": ")
                if field == "error":
                    raise self._refused(value)
                if field == "data":
                    yield json.loads(value)
        except (OSError, HTTPException) as error:
            raise self._gone(str(error)) from error

    def _refused(self, said: str) -> ModelError:
        return ModelError(
            f"{self.server.settings.model.name}: llama.cpp refuses the prompt",
            said,
            "shorten the request or the system text",
        )

    def _gone(self, why: str) -> ModelError:
        words = self.server.child.last_words() if self.server.child else ""
        return ModelError(
            "llama.cpp's server gave no answer", why + words, "start the command anew"
        )


def certain_length(text: str, stop: str) -> int:
    """Count the characters that can be shown: no part of a stop string, no part of a character.

    Args:
        text: An answer so far, without the stop string.
        stop: The stop string.

    Returns:
        How many characters from the start are certain.
    """
    text = text.rstrip("\ufffd")
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return len(text) - length
    return len(text)
