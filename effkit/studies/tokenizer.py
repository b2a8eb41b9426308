"""Makes data/tokenizer.json again: `python -m effkit.studies.tokenizer`. A byte-level BPE of 1,024 tokens (Sennrich et al.
2015, arXiv:1508.07909), by the tokenizers package, on the standard library's training modules."""

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from effkit.core.paths import data_dir, write_atomically
from effkit.zoo.data import stdlib_text
from effkit.zoo.tokens import END


def train_tokenizer(texts: Iterable[str], *, vocab_size: int = 1024) -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=[END], initial_alphabet=alphabet)
    made.train_from_iterator(texts, trainer)
    return made


if __name__ == "__main__":
    write_atomically(data_dir() / "tokenizer.json", train_tokenizer(stdlib_text("train")).to_str().encode())
