"""Tasks of the embedded models: classification scored by accuracy, language scored by bits per byte."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional as F

from effkit.core.task import Batch, Batches, Score, Task
from effkit.zoo.data import Split, Windows, batches


def classification(name: str, splits: dict[str, Split], *, size: int = 64) -> Task:
    """Images (n, c, h, w) and labels (n); accuracy, a fraction."""
    return Task(
        name,
        example=(splits["val"][0][:8],),
        train=batches(splits["train"], size=size, shuffle=True),
        calib=batches(splits["train"], size=size).first(512),
        val=batches(splits["val"], size=250),
        test=batches(splits["test"], size=250),
        loss=classification_loss,
        per_example=correct,
        score=Score("accuracy", "", "higher"),
    )


def classification_loss(logits: Float[Tensor, "b classes"], batch: Batch) -> Float[Tensor, ""]:
    """Mean cross-entropy in nats."""
    return F.cross_entropy(logits.float(), batch[1])


@torch.no_grad()
def correct(model: nn.Module, data: Batches) -> Float[Tensor, " n"]:
    """1 for each example classified rightly, else 0."""
    return torch.cat([(model(x).argmax(-1) == y).float() for x, y in data])


def language(
    name: str, tokenizer: Tokenizer, streams: dict[str, Int[Tensor, " tokens"]], *, length: int = 256, size: int = 16
) -> Task:
    """Windows of `length` tokens; scored in bits per byte, which does not depend on the tokenizer.

    streams   train, calib, val, test -> token ids; a missing one leaves its field empty
    """
    windows = {key: Windows(ids, length=length, size=size, shuffle=key in ("train", "calib")) for key, ids in streams.items()}
    return Task(
        name,
        example=(streams["val"][None, :64],),
        loss=language_loss,
        per_example=BitsPerByte(token_bytes(tokenizer)),  # type: ignore[arg-type]
        score=Score("bits per byte", "bit/B", "lower"),
        **windows,  # type: ignore[arg-type]
    )


def language_loss(logits: Float[Tensor, "b n vocab"], batch: Batch) -> Float[Tensor, ""]:
    """Mean cross-entropy, nats a token."""
    return F.cross_entropy(logits.flatten(0, 1).float(), batch[1].flatten())


def token_bytes(tokenizer: Tokenizer) -> Int[Tensor, " vocab"]:
    """How many bytes of text each token stands for; special tokens stand for none."""
    special = {i for i, added in tokenizer.get_added_tokens_decoder().items() if added.special}
    # in a byte-level BPE every character of a token's name is one byte
    lengths = [0 if i in special else len(tokenizer.id_to_token(i) or "") for i in range(tokenizer.get_vocab_size())]
    return torch.tensor(lengths)


@dataclass(frozen=True, eq=False)
class BitsPerByte:
    """One value a window, scaled so that their mean is all bits over all bytes: windows hold unequal bytes."""

    bytes_of: Int[Tensor, " vocab"]

    @torch.no_grad()
    def __call__(self, model: nn.Module, data: Windows) -> Float[Tensor, " windows"]:
        bits, sizes = [], []
        for ids, targets in data:
            pieces = zip(model(ids).split(128, 1), targets.split(128, 1), strict=True)  # a vocabulary in floats is large
            losses = torch.cat([F.cross_entropy(x.float().transpose(1, 2), y, reduction="none") for x, y in pieces], 1)
            bits.append(losses.sum(1) / math.log(2))
            sizes.append(self.bytes_of.to(targets.device)[targets].sum(1).float())
        return torch.cat(bits) / torch.cat(sizes).mean()
