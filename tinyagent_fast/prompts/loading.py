"""Load tokenizers so that their ids equal SentencePiece's and llama.cpp's.

transformers 5 replaces the normaliser of Llama tokenizers when they are loaded by their class, so
that a model would be trained on other ids than it is served with. Here tokenizer.json is taken as
it is; a tokenizer.model alone is turned into an equal fast tokenizer; `check_tokenizer` compares.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from tinyagent_fast.errors import ModelError

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

_SPECIAL_TOKENS = ("<unk>", "<s>", "</s>")
_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json")


def resolve_tokenizer_folder(base: str, revision: str | None = None) -> Path:
    """Find the folder with a model's tokenizer files, as `hub_folder` finds files."""
    return hub_folder("tokenizer of", base, revision, [*_FILES, "chat_template.jinja"])


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

    Returns:
        A local folder.

    Raises:
        ModelError: There is no such folder and the hub does not give the files.
    """
    if Path(base).is_dir():
        return Path(base)
    from huggingface_hub import snapshot_download
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
        raise ModelError(
            f"{what} {base!r}",
            f"it is no local folder, and the hub did not give it: {error}",
            "check the name and the network, or put the model into a folder and name that",
        ) from error


def load_tokenizer(folder: Path) -> Any:
    """Load a fast tokenizer without letting its class change the ids.

    Args:
        folder: Holds tokenizer.json or tokenizer.model.

    Returns:
        A transformers fast tokenizer with EOS, and a pad token out of its own vocabulary.

    Raises:
        ModelError: No tokenizer file, no EOS, or ids that differ from the file's own.
    """
    from transformers import PreTrainedTokenizerFast

    if (folder / "tokenizer.json").exists():
        tokenizer = PreTrainedTokenizerFast.from_pretrained(str(folder))
    elif (folder / "tokenizer.model").exists():
        tokenizer = tokenizer_from_sentencepiece(folder / "tokenizer.model")
    else:
        raise ModelError(
            f"folder {folder}",
            "it holds neither tokenizer.json nor tokenizer.model",
            "copy the base model's tokenizer files into it",
        )
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


def tokenizer_from_sentencepiece(path: Path) -> Any:
    """Build a transformers fast tokenizer with the ids of a SentencePiece model with byte fallback.

    Raises:
        ModelError: The file is no SentencePiece BPE model without text normalisation.
    """
    from sentencepiece import sentencepiece_model_pb2 as protobuf
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
    from transformers import PreTrainedTokenizerFast

    proto = protobuf.ModelProto()
    try:
        proto.ParseFromString(path.read_bytes())
    except Exception as error:  # protobuf's DecodeError differs between its implementations
        raise ModelError(
            f"{path}", f"it is no SentencePiece model: {error}", "copy the file again"
        ) from error
    vocab = {piece.piece: index for index, piece in enumerate(proto.pieces)}
    fault = None
    if proto.trainer_spec.model_type != 2 or proto.normalizer_spec.name != "identity":
        fault = "it is no BPE model, or it normalises text, so its ids cannot be reproduced"
    elif absent := [token for token in _SPECIAL_TOKENS if token not in vocab]:
        fault = f"it has no {', '.join(absent)}, which Llama's models begin, end or pad with"
    if fault:
        fix = "use a base model with a Llama tokenizer or with tokenizer.json"
        raise ModelError(f"{path}", fault, fix)
    merges = _merges([(p.piece, p.score) for p in proto.pieces if p.type == 1], vocab)
    core = Tokenizer(
        models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    core.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    core.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    core.add_special_tokens(
        [AddedToken(t, special=True, normalized=False) for t in _SPECIAL_TOKENS]
    )
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", vocab["<s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


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
    """Compare a loaded tokenizer's ids with those of the file it came from.

    Args:
        tokenizer: A transformers fast tokenizer.
        folder: Where tokenizer.model or tokenizer.json lies; the former is the better witness.

    Raises:
        ModelError: Ids differ on one of `HARD_STRINGS`.

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
        encode = _encoder(Tokenizer.from_file(str(folder / source)))
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


def _encoder(core: Any) -> Callable[[str], list[int]]:
    return lambda text: list(core.encode(text, add_special_tokens=False).ids)
