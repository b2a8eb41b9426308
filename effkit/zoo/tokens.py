"""The shipped byte-level BPE: 1,024 tokens, trained on the standard library's training modules."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from functools import cache
from itertools import islice
from pathlib import Path

import torch
from jaxtyping import Int
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from effkit.core.paths import cache_dir, data_dir, write_atomically

END = "<|end|>"  # between files


def train_tokenizer(texts: Iterable[str], *, vocab_size: int = 1024) -> Tokenizer:
    """A byte-level BPE (Sennrich et al. 2015, arXiv:1508.07909), by the tokenizers package."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END], initial_alphabet=sorted(alphabet), show_progress=False
    )
    made.train_from_iterator(texts, trainer)
    return made


def write_tokenizer(tokenizer: Tokenizer, path: Path) -> None:
    write_atomically(path, tokenizer.to_str().encode())


@cache
def shipped_tokenizer() -> Tokenizer:
    path = data_dir() / "tokenizer.json"
    if not path.exists():
        raise FileNotFoundError(
            f"{path} is missing: run from a checkout of effkit, or set EFFKIT_DATA to its data folder"
        )
    return Tokenizer.from_file(str(path))


def encode(tokenizer: Tokenizer, texts: Iterable[str], end: str = END) -> Int[Tensor, " tokens"]:
    """All texts as one stream, an end token after each."""
    stop = tokenizer.token_to_id(end)
    parts = (tokenizer.encode_batch(list(some), add_special_tokens=False) for some in batched(texts, 32))
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


def batched(items: Iterable[str], size: int) -> Iterator[tuple[str, ...]]:
    """Tuples of `size` items, the last one shorter (itertools has it from Python 3.12 on)."""
    rest = iter(items)
    return iter(lambda: tuple(islice(rest, size)), ())
