"""Tiny decoders whose distributions are far from uniform, and what a decoder says without any cache."""

import torch

from effkit.core.generation import Cache
from effkit.zoo.gpt import GPT


def decoder(seed: int = 0, dtype: torch.dtype = torch.float64, sharpness: float = 10.0, **numbers) -> GPT:
    torch.manual_seed(seed)
    settings = dict(vocab_size=32, d_model=16, layers=2, heads=4, kv_heads=2, d_ff=24, context=128) | numbers
    model = GPT(**settings).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(sharpness)
            else:  # norms that are not all ones, so that a lost one is noticed
                parameter.uniform_(0.5, 1.5)
    return model.to(dtype)


def text(length: int, vocab: int = 32, rows: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randint(vocab, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def chunked(model: GPT, cache: Cache, ids: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    """Logits of the whole text, fed in chunks of these sizes and the rest at once."""
    pieces, start = [], cache.length
    for size in [*sizes, ids.shape[1]]:
        end = min(start + size, ids.shape[1])
        if end > start:
            pieces.append(model(ids[:, start:end], cache))
        start = end
    return torch.cat(pieces, dim=1)


def assert_equal_logits(seen: torch.Tensor, wanted: torch.Tensor) -> None:
    """1e-9 in float64, 1e-5 of the largest logit in float32."""
    limit = 1e-9 if wanted.dtype == torch.float64 else 1e-5 * wanted.abs().max().item()
    assert (seen - wanted).abs().max().item() <= limit
