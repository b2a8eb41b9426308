"""What is asked of a draft, and what it costs.

Problem   A draft must choose from the target's vocabulary, and it takes memory beside the target.
Idea      Refuse another vocabulary before a token is drawn. What a draft that was made from the target has left
          unchanged, embeddings and norms say, is shared with it: held once, and written to a file once.
Left out  Whether two vocabularies of one size mean the same tokens: numbers cannot tell.
"""

import torch
from torch import Tensor, nn


def check_draft(target: nn.Module, draft: nn.Module, tokens: int) -> None:
    """Raises ValueError unless both are decoders over one vocabulary and the draft reads as many tokens."""
    for who, model in {"target": target, "draft": draft}.items():
        if not hasattr(model, "new_cache"):
            how = "take a model that generates, such as effkit.zoo.load('gpt-small')"
            raise ValueError(f"the {who} must be a decoder, got {type(model).__name__}, which generates nothing: {how}")
    theirs, ours = vocabulary(draft), vocabulary(target)
    if theirs != ours:
        how = "p and q must speak of the same tokens, so take a draft with the target's tokenizer"
        raise ValueError(f"the draft has a vocabulary of {theirs} tokens and the target one of {ours}: {how}")
    context = getattr(draft, "context", None)
    if context is not None and tokens > context:
        how = "ask for fewer, or take a draft of a longer context"
        raise ValueError(f"the draft reads at most {context} tokens and this text may have {tokens}: {how}")


@torch.no_grad()
def vocabulary(decoder: nn.Module) -> int:
    """How many tokens a decoder chooses from; one that does not say is asked with a pass over token 0."""
    config = getattr(decoder, "config", None)
    if hasattr(config, "vocab_size"):
        return config.vocab_size  # type: ignore[union-attr]
    device = next((p.device for p in decoder.parameters()), None)
    return decoder(torch.zeros(1, 1, dtype=torch.long, device=device), decoder.new_cache(capacity=1)).shape[-1]  # type: ignore[operator]


def share(draft: nn.Module, target: nn.Module) -> None:
    """What the draft has unchanged becomes the target's own tensor: held once, and written to a file once. A matrix may
    have moved, as in a block that follows one that was left out."""
    theirs = dict(target.named_parameters(remove_duplicate=False))
    for path, module in draft.named_modules():
        for name, mine in module._parameters.items():
            if mine is not None:
                here = theirs.get(f"{path}.{name}" if path else name)
                anywhere = theirs.values() if mine.dim() > 1 else ()  # vectors may be alike without being the same
                module._parameters[name] = next((twin for twin in (here, *anywhere) if twin is not None and _same(mine, twin)), mine)


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.requires_grad == b.requires_grad and torch.equal(a, b)


def tensor_bytes(model: nn.Module, without: nn.Module | None = None) -> int:
    """Bytes of the model's tensors, each once, less those that occur only in `without`."""
    inside = set(map(id, without.modules())) if without is not None else set()
    outside = [m for m in model.modules() if id(m) not in inside]
    tensors = {id(t): t for m in outside for t in (*m._parameters.values(), *m._buffers.values()) if t is not None}
    return sum(t.numel() * t.element_size() for t in tensors.values())
