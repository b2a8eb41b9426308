"""The shipped byte-level BPE: 1,024 tokens, trained on the standard library's training modules."""

import hashlib
from collections.abc import Sequence
from contextlib import suppress
from functools import cache

import torch
from jaxtyping import Int
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from tokenizers import Tokenizer
from torch import Tensor

from effkit.core.paths import cache_dir, data_dir, write_atomically

END = "<|end|>"  # between files


@cache
def shipped_tokenizer() -> Tokenizer:
    path = data_dir() / "tokenizer.json"
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: run from a checkout of effkit, or set EFFKIT_DATA to its data folder")
    return Tokenizer.from_file(str(path))


def encode(tokenizer: Tokenizer, texts: Sequence[str], end: str = END) -> Int[Tensor, " tokens"]:
    """All texts as one stream, an end token after each."""
    stop = tokenizer.token_to_id(end)
    parts = (tokenizer.encode_batch(texts[i : i + 32], add_special_tokens=False) for i in range(0, len(texts), 32))
    # at once, the encodings of a library take a hundred times the bytes of its text
    return torch.tensor([token for part in parts for e in part for token in (*e.ids, stop)], dtype=torch.long)


def encode_once(tokenizer: Tokenizer, texts: Sequence[str]) -> Int[Tensor, " tokens"]:
    """`encode`, remembered in the user's cache folder under a hash of the tokenizer and the texts: the standard library
    takes seconds, and another Python has another one."""
    key = hashlib.sha256("\0".join((tokenizer.to_str(), *texts)).encode("utf-8", "surrogatepass")).hexdigest()
    path = cache_dir() / "tokens" / f"{key[:32]}.safetensors"
    with suppress(OSError, SafetensorError):  # not there yet, or not what was written
        return load_file(path)["ids"].long()
    ids = encode(tokenizer, texts)
    with suppress(OSError):  # a folder that can't be written costs the seconds again, no more
        write_atomically(path, to_bytes({"ids": ids.to(torch.int32)}))
    return ids
