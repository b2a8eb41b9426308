"""The shipped byte-level BPE: 1,024 tokens, trained on the standard library's training modules."""

from collections.abc import Iterable
from functools import cache
from pathlib import Path

import torch
from jaxtyping import Int
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from effkit.core.paths import data_dir, write_atomically

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
    encodings = tokenizer.encode_batch(list(texts), add_special_tokens=False)
    return torch.tensor([token for e in encodings for token in (*e.ids, stop)], dtype=torch.long)
