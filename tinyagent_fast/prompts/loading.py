"""Load tokenizers so that their ids equal SentencePiece's and llama.cpp's.

transformers 5 replaces the normaliser of Llama tokenizers when they are loaded by their class, so
that a model would be trained on other ids than it is served with. Here tokenizer.json is taken as
it is; a tokenizer.model alone is turned into an equal fast tokenizer; `check_tokenizer` compares.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from tinyagent_fast.errors import ModelError, reading

HARD_STRINGS = (
    "",
    " ",
    "  two  spaces ",
    "\n",
    "\n\n",
    " \n ",
    "\ttab",
    "Hello",
    " Hello",
    '1. get_email_address("Sid")\n2. join()',
    '["$1", "$2"], "Link: $3", None)',
    "### Response:\n1. ",
    "Apéro à 18 h, naïve café",
    "日本語 と 한국어",
    "👩‍💻 🚀",
    "x" * 60,
    "3.14159 1000000 -5",
    "don't 'quote' \"quote\" `tick`",
    "<END_OF_PLAN>",
    "trailing space ",
    "line\r\nline",
)
"""Strings on which tokenizers are known to differ; compared at every training start."""

_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_FILES = ("tokenizer.json", "tokenizer.model", *_SETTINGS, "chat_template.jinja")
_TEMPLATES = "additional_chat_templates"
_POINTER = b"version https://git-lfs.github.com/spec/"
_POINTER_BYTES = 1024
"""A pointer is always smaller than that."""
_MODEL_SUFFIXES = (".json", ".model", ".safetensors", ".jinja")
_CONTROL_PIECES = (2, 3)
"""Types of SentencePiece's pieces that never come out of text: unknown and control."""
_USER_DEFINED = 4


def resolve_tokenizer_folder(base: str, revision: str | None = None) -> Path:
    """Find the folder with a model's tokenizer files, as `hub_folder` finds files."""
    return hub_folder("tokenizer of", base, revision, [*_FILES, f"{_TEMPLATES}/*.jinja"])


def hub_folder(
    what: str,
    base: str,
    revision: str | None,
    patterns: Sequence[str],
    *,
    cached_first: bool = False,
) -> Path:
    """Find a model's files: in a local folder, in the hub's cache, or by downloading them.

    Args:
        what: What is looked for, to begin a message with.
        base: A local folder, or a model's name on the hub.
        revision: Revision on the hub.
        patterns: Names of the files.
        cached_first: Take what is cached without asking the hub for anything newer.

    Raises:
        ModelError: There is no such folder and the hub does not give the files, or files of the
            folder are only pointers.
    """
    if Path(base).is_dir():
        refuse_pointers(Path(base))
        return Path(base)
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    def fetch(local_only: bool) -> Path:
        wanted = list(patterns)
        return Path(
            snapshot_download(
                base, revision=revision, allow_patterns=wanted, local_files_only=local_only
            )
        )

    try:
        if cached_first:
            with suppress(LocalEntryNotFoundError):
                return fetch(local_only=True)
        return fetch(local_only=False)
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        why, check = f"the hub did not give it: {error}", "check the name and the network"
        if constants.is_offline_mode():
            why = "HF_HUB_OFFLINE is set, and the hub's cache does not have it"
            check = "check the name, unset HF_HUB_OFFLINE"
        raise ModelError(
            f"{what} {base!r}",
            f"it is no local folder, and {why}",
            f"{check}, or put the model into a folder and name that",
        ) from error


def refuse_pointers(folder: Path) -> None:
    """Refuse a folder that git has cloned without git-lfs: large files are notes of 130 bytes."""
    small = [path for path in sorted(folder.iterdir()) if path.suffix in _MODEL_SUFFIXES]
    small = [path for path in small if path.is_file() and path.stat().st_size < _POINTER_BYTES]
    if pointers := [path.name for path in small if path.read_bytes().startswith(_POINTER)]:
        raise ModelError(
            f"folder {folder}",
            f"{', '.join(pointers)}: only pointers of Git LFS, not the files themselves",
            "run `git lfs pull` in it, or download the model again",
        )


def refuse_pickles(folder: Path) -> None:
    """Refuse a folder whose only weights can run code when they are read."""
    if any(folder.glob("*.safetensors*")):
        return
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth"))
    if pickles:
        raise ModelError(
            f"model in {folder}",
            f"its weights are {pickles[0]}, a format that can run code when it is read",
            "load it with transformers, where you trust it, and save it again: that writes "
            "model.safetensors",
        )


def load_tokenizer(folder: Path) -> Any:
    """Load a transformers fast tokenizer without letting its class change the ids.

    It has EOS, and a pad token out of its own vocabulary. Truncation and padding that a
    tokenizer.json switches on are off (`switched_off` names them).

    Raises:
        ModelError: No tokenizer file, a damaged one, no EOS, or other ids than the files have.
    """
    with reading(f"tokenizer in {folder}", "copy or download its files again"):
        tokenizer = _from_files(folder)
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"tokenizer in {folder}",
            "it has no EOS token, so a model could never learn to stop",
            "set eos_token in tokenizer_config.json",
        )
    if tokenizer.pad_token_id is None:
        # Never a new token: the vocabulary must keep its size, and padding is masked anyway.
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    check_tokenizer(tokenizer, folder)
    return tokenizer


def switched_off(folder: Path) -> tuple[str, ...]:
    """Name what a folder's tokenizer.json switches on and `load_tokenizer` switches off."""
    content = _json_object(folder / "tokenizer.json")
    return tuple(name for name in ("truncation", "padding") if content.get(name))


def _from_files(folder: Path) -> Any:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    if (folder / "tokenizer.json").exists():
        if not switched_off(folder):
            return PreTrainedTokenizerFast.from_pretrained(str(folder))
        core = Tokenizer.from_file(str(folder / "tokenizer.json"))
        core.no_truncation()
        core.no_padding()
        return _with_settings(core, folder)
    if (folder / "tokenizer.model").exists():
        return tokenizer_from_sentencepiece(folder / "tokenizer.model")
    raise ModelError(
        f"folder {folder}",
        "it holds neither tokenizer.json nor tokenizer.model",
        "copy the base model's tokenizer files into it",
    )


def _with_settings(core: Any, folder: Path, **defaults: str) -> Any:
    """Let transformers read a folder's settings, added tokens and templates to a tokenizer.

    Args:
        core: A `tokenizers.Tokenizer`, taken instead of the folder's own.
        folder: Its other files count.
        defaults: Special tokens by name, for those that the folder names none for.
    """
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerFast

    settings = _settings_of(folder)
    named = _special_texts(settings)
    there = {token.content for token in core.get_added_tokens_decoder().values()}
    for text, token in _declared_tokens(folder).items():
        if text not in there:
            bounds = {key: bool(token.get(key)) for key in ("lstrip", "rstrip", "single_word")}
            special = bool(token.get("special")) or text in named
            # Normalised, it would be sought with the space that is put before text.
            core.add_tokens([AddedToken(text, special=special, normalized=False, **bounds)])
    settings.pop("added_tokens_decoder", None)
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        core.save(str(place / "tokenizer.json"))
        (place / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
        if (folder / "chat_template.jinja").exists():
            shutil.copyfile(folder / "chat_template.jinja", place / "chat_template.jinja")
        if (folder / _TEMPLATES).is_dir():
            shutil.copytree(folder / _TEMPLATES, place / _TEMPLATES)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(name)
    tokenizer.name_or_path = str(folder)
    for role, default in defaults.items():
        if getattr(tokenizer, role) is None:
            setattr(tokenizer, role, default)
    return tokenizer


def _settings_of(folder: Path) -> dict[str, Any]:
    """Read a folder's tokenizer settings, as transformers puts its two files together."""
    settings = _json_object(folder / "tokenizer_config.json")
    if "added_tokens_decoder" in settings:
        return settings
    return settings | _json_object(folder / "special_tokens_map.json")


def _json_object(path: Path) -> dict[str, Any]:
    return read_model_json(path) if path.exists() else {}


def read_model_json(path: Path) -> dict[str, Any]:
    """Read a file of a model folder that holds one JSON object.

    Raises:
        ModelError: No such file, or it holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        fix = "name a model folder as transformers saves it"
        raise ModelError(f"folder {path.parent}", f"it has no {path.name}", fix) from error
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}", f"it is no JSON: {error}", "copy the file again") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path}", "it holds no JSON object", "copy the file again")
    return value


def _declared_tokens(folder: Path) -> dict[str, dict[str, Any]]:
    """List by text, with ids, the added tokens that a folder's settings name, ordered by id."""
    found: dict[str, dict[str, Any]] = {}
    with reading(f"the added tokens in {folder}", "copy or download its files again"):
        for text, index in _json_object(folder / "added_tokens.json").items():
            found[text] = {"id": int(index)}
        settings = _json_object(folder / "tokenizer_config.json")
        for index, token in settings.get("added_tokens_decoder", {}).items():
            found[token["content"]] = {**token, "id": int(index)}
    return dict(sorted(found.items(), key=lambda item: int(item[1]["id"])))


def tokenizer_from_sentencepiece(path: Path) -> Any:
    """Build a transformers fast tokenizer with the ids of a SentencePiece model with byte fallback.

    Special and added tokens and the chat template are those of the settings that lie beside it; the
    model's own special tokens stand in where these say nothing.

    Raises:
        ModelError: The file is no SentencePiece BPE model without text normalisation.
    """
    from sentencepiece import sentencepiece_model_pb2 as protobuf
    from tokenizers import processors

    proto = protobuf.ModelProto()
    try:
        proto.ParseFromString(path.read_bytes())
    except Exception as error:  # protobuf's DecodeError differs between its implementations
        raise ModelError(
            f"{path}", f"it is no SentencePiece model: {error}", "copy the file again"
        ) from error
    pieces = [(piece.piece, piece.score, piece.type) for piece in proto.pieces]
    spec = proto.trainer_spec
    fault = None
    if spec.model_type != 2 or proto.normalizer_spec.name != "identity":
        fault = "it is no BPE model, or it normalises text, so its ids cannot be reproduced"
    elif own := [text for text, _, kind in pieces if kind == _USER_DEFINED]:
        fault = f"text with its own pieces ({own[0]!r}) would get other ids than tokenizer.model's"
    if fault:
        fix = "use a base model with a Llama tokenizer or with tokenizer.json"
        raise ModelError(f"{path}", fault, fix)
    control = [text for text, _, kind in pieces if kind in _CONTROL_PIECES]
    defaults = {
        name: piece
        for name, piece, index in (
            ("unk_token", spec.unk_piece, spec.unk_id),
            ("bos_token", spec.bos_piece, spec.bos_id),
            ("eos_token", spec.eos_piece, spec.eos_id),
        )
        if index >= 0
    }
    core = sentencepiece_bpe(pieces, unk=defaults.get("unk_token"), added=control)
    if bos := defaults.get("bos_token"):
        core.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A",
            pair=f"{bos} $A {bos} $B",
            special_tokens=[(bos, core.token_to_id(bos))],
        )
    return _with_settings(core, path.parent, **defaults)


def _special_texts(settings: Mapping[str, Any]) -> set[str]:
    """List the texts of the tokens that settings give a role or call special."""
    values = [value for name, value in settings.items() if name.endswith("_token")]
    for name in ("additional_special_tokens", "extra_special_tokens"):
        more = settings.get(name) or []
        values += more.values() if isinstance(more, dict) else more
    contents = [value.get("content") if isinstance(value, dict) else value for value in values]
    return {content for content in contents if isinstance(content, str)}


def sentencepiece_bpe(
    pieces: Sequence[tuple[str, float, int]],
    *,
    unk: str | None,
    added: Sequence[str],
    space_prefix: bool = True,
) -> Any:
    """Build the `tokenizers.Tokenizer` of SentencePiece's BPE with byte fallback, from its pieces.

    Args:
        pieces: Text, score and type of each, by id; ordinary ones have type 1.
        unk: Stands for what has no piece.
        added: Special tokens, which are looked for before text is cut.
        space_prefix: Whether a space is put before text.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    vocab = {text: index for index, (text, _, _) in enumerate(pieces)}
    merges = _merges([(text, score) for text, score, kind in pieces if kind == 1], vocab)
    core = Tokenizer(models.BPE(vocab, merges, unk_token=unk, fuse_unk=True, byte_fallback=True))
    to_space = [normalizers.Replace(" ", "▁")]
    prepend = [normalizers.Prepend("▁")] if space_prefix else []
    core.normalizer = normalizers.Sequence([*prepend, *to_space])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    core.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if space_prefix else steps)
    core.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in added])
    return core


def _merges(pieces: list[tuple[str, float]], vocab: dict[str, int]) -> list[tuple[str, str]]:
    """List every split of a piece into two pieces, best score first, as SentencePiece merges.

    transformers' `generate_merges` puts pieces of equal score in another order.
    """
    scored = []
    for piece, score in pieces:
        splits = [
            (piece[:cut], piece[cut:])
            for cut in range(1, len(piece))
            if piece[:cut] in vocab and piece[cut:] in vocab
        ]
        splits.sort(key=lambda split: (vocab[split[0]], vocab[split[1]]))
        scored += [(-score, index, split) for index, split in enumerate(splits)]
    scored.sort(key=lambda item: item[0])
    return [split for _, _, split in scored]


def check_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Compare a loaded tokenizer with the files it came from: ids, special and added tokens.

    Where both lie there, tokenizer.model is a better witness than tokenizer.json.

    Raises:
        ModelError: Ids differ on one of `HARD_STRINGS`, or a special or added token has another id.

    Source: huggingface/transformers#45488 (ids changed by the tokenizer's class).
    """
    from tokenizers import Tokenizer

    encode: Callable[[str], list[int]]
    if (folder / "tokenizer.model").exists():
        from sentencepiece import SentencePieceProcessor

        source = "tokenizer.model"
        encode = SentencePieceProcessor(model_file=str(folder / source)).encode
    else:
        source = "tokenizer.json"
        core = Tokenizer.from_file(str(folder / source))
        core.no_truncation()
        core.no_padding()
        encode = _encoder(core)
    loaded = _encoder(tokenizer.backend_tokenizer)
    different = [text for text in HARD_STRINGS if loaded(text) != list(encode(text))]
    if different:
        raise ModelError(
            f"tokenizer in {folder}",
            f"as loaded it gives other ids than {source} on {len(different)} of "
            f"{len(HARD_STRINGS)} test strings, the first {different[0]!r}: a model trained so "
            "would be served with other ids by llama.cpp",
            "use the transformers version of the requirements file, or remove the damaged "
            "tokenizer.json so that it is rebuilt from tokenizer.model",
        )
    wanted: dict[str, tuple[str, int]] = {}
    if not (folder / "tokenizer.json").exists() and (folder / "config.json").exists():
        wanted |= _tokens_of_transformers(folder)
    for text, token in _declared_tokens(folder).items():
        wanted[f"the added token {text}"] = (text, token["id"])
    for name, (text, index) in wanted.items():
        if (found := tokenizer.convert_tokens_to_ids(text)) != index:
            raise ModelError(
                f"tokenizer in {folder}",
                f"{name} {text!r} should have the id {index}, and as loaded it has {found}",
                "name a folder whose tokenizer files belong together",
            )
        if (role := getattr(tokenizer, name, text)) != text:
            raise ModelError(
                f"tokenizer in {folder}",
                f"transformers takes {text!r} as {name}, and as loaded it is {role!r}",
                "name the token in tokenizer_config.json",
            )


def _tokens_of_transformers(folder: Path) -> dict[str, tuple[str, int]]:
    """List special and added tokens as transformers' own tokenizer of a folder has them."""
    from transformers import AutoTokenizer

    with reading(f"tokenizer in {folder}", "name a base whose tokenizer transformers can load"):
        own = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    tokens = {f"the added token {text}": (text, at) for text, at in own.get_added_vocab().items()}
    for name in ("bos_token", "eos_token", "unk_token"):
        if (text := getattr(own, name)) is not None:
            tokens[name] = (text, own.convert_tokens_to_ids(text))
    return tokens


def _encoder(core: Any) -> Callable[[str], list[int]]:
    return lambda text: list(core.encode(text, add_special_tokens=False).ids)
