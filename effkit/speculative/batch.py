"""Several texts in one pass, each of which accepts as many tokens as it will.

Problem   A server writes many texts at once. How much is speculation worth to it?
Idea      The draft proposes gamma tokens for every text, the target judges all of them in one pass, and each text takes
          back what was rejected of it: texts grow at their own speed, so that rows of the caches differ in length. Nothing
          waits until the end, which comes with the slowest text.
Exact     Rows do not see each other, and each is judged by itself (verify.py). Fused blocks (chapter 07) sum up each row as if it
          were alone, also where rows differ in length, while every pass, that over the padded prompts included, is short enough for them.
Limit     b texts and gamma proposals make a pass over b (gamma + 1) tokens. Reading the weights costs the same for one token
          and for many, until arithmetic costs more than reading: from some batch size on, what is rejected is paid for.
Left out  A text that has ended keeps its row, as in `generate` (chapter 07 fills it with the next request); a gamma of each
          text's own; trees, which a cache branches for all rows alike.
Source    Qian et al. 2024, arXiv:2404.15778 (rows of unequal length); Liu et al. 2024, arXiv:2406.14066 (where it loses).
"""

from collections.abc import Collection, Iterator, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from effkit.core.checks import require_int
from effkit.core.generation import Cache, Sampler, check_prompt, read_prompt, stop_tensor
from effkit.speculative.draft import check_draft
from effkit.speculative.law import Pass
from effkit.speculative.speculate import PLAIN, drawn, upto_stop
from effkit.speculative.verify import Proposal, judge

Texts = Sequence[Int[Tensor, " n"]]


def speculative_batch(
    target: nn.Module,
    draft: nn.Module,
    prompts: Texts | Int[Tensor, "b n"],
    max_new_tokens: int,
    *,
    gamma: int = 4,
    sampler: Sampler = PLAIN,
    stop: int | Collection[int] | None = None,
    rng: torch.Generator | None = None,
) -> list[Int[Tensor, " m"]]:
    """Each prompt with its continuation, up to its own stop token; distributed as if each were written alone.

    Raises ValueError for gamma < 1, an empty prompt, a draft of another vocabulary or of too short a context, and for
    caches that do not hold rows of unequal length.
    """
    texts = list(prompts)
    for given in batch_passes(target, draft, prompts, max_new_tokens, gamma=gamma, sampler=sampler, stop=stop, rng=rng):
        for row, step in given.items():
            texts[row] = torch.cat((texts[row], step.tokens))
    return texts


@torch.no_grad()
def batch_passes(
    target: nn.Module, draft: nn.Module, prompts: Texts | Int[Tensor, "b n"], max_new_tokens: int, *, gamma: int = 4,
    sampler: Sampler = PLAIN, stop: int | Collection[int] | None = None, rng: torch.Generator | None = None,
) -> Iterator[dict[int, Pass]]:  # fmt: skip
    """What each pass gave to each text that was still being written, by its row."""
    check_batch(target, draft, prompts, max_new_tokens, gamma)
    texts, ends = list(prompts), [len(text) + max_new_tokens for text in prompts]
    stops = stop_tensor(stop, texts[0].device)
    contexts: list[int] = [m.context for m in (target, draft) if hasattr(m, "context")]  # type: ignore[misc]
    theirs, ours = (begun(model, texts, max(ends) + gamma) for model in (draft, target))
    writing = [row for row in range(len(texts)) if max_new_tokens]
    while writing:
        left, longest = {row: ends[row] - len(texts[row]) for row in writing}, max(len(texts[row]) for row in writing)
        most = min(gamma, max(left.values()) - 1, *(context - longest for context in contexts))
        shown = [text[:longest] for text in texts]  # what has ended is dragged along, no further than the others are
        tokens, q = proposals(draft, shown, most, theirs, sampler, rng)
        logits, given = read(target, shown, 1, tokens, ours), {}
        for row in writing:
            n = min(most, left[row] - 1)
            branch, new = judge(Proposal(tokens[row, :n], None if q is None else q[row, :n]), logits[row, : n + 1], sampler, rng)
            given[row] = Pass(n, len(branch), upto_stop(new, stops))
            texts[row] = torch.cat((texts[row], given[row].tokens))
        yield given
        writing = [row for row in writing if len(texts[row]) < ends[row] and not torch.isin(texts[row][-1], stops)]


def proposals(
    draft: nn.Module, texts: Texts, most: int, cache: Cache, sampler: Sampler, rng: torch.Generator | None
) -> tuple[Int[Tensor, "b g"], Float[Tensor, "b g vocab"] | None]:
    """What the draft writes behind each text, and what it was drawn from."""
    tail = min(2, *map(len, texts))  # where all was accepted, the last proposal was not read; where not, it is read again
    after = lambda new: draft(new[:, -1:], cache) if new.shape[1] else read(draft, texts, tail, new, cache)  # noqa: E731
    return drawn(after, torch.stack([text[:0] for text in texts]), most, sampler, rng)


def read(
    model: nn.Module, texts: Texts, tail: int, tokens: Int[Tensor, "b g"], cache: Cache
) -> Float[Tensor, "b tail+g vocab"]:
    """One pass over the last tokens of each text, so many, and those proposed behind it; the cache holds what is before."""
    cache.truncate(tokens.new_tensor([len(text) - tail for text in texts]))
    return model(torch.cat((torch.stack([text[-tail:] for text in texts]), tokens), dim=1), cache)


def begun(model: nn.Module, texts: Texts, capacity: int) -> Cache:
    """A cache that has read every prompt but for its last token; what shorter ones were padded with is taken back by `read`."""
    cache = model.new_cache(capacity=capacity)  # type: ignore[operator]
    read_prompt(model, pad_sequence(list(texts), batch_first=True), cache)
    return cache


def check_batch(target: nn.Module, draft: nn.Module, prompts: Texts | Tensor, max_new_tokens: int, gamma: int) -> None:
    require_int("gamma", gamma, 1, hint="it is how many tokens are proposed at a time; for none, decode plainly")
    if len(prompts) == 0:
        raise ValueError("prompts must be at least one text, got none: give token ids, (b, n) or a list of texts")
    for row, text in enumerate(prompts):
        try:
            check_prompt(target, text[None], max_new_tokens)
        except ValueError as error:
            raise ValueError(f"prompt {row} (counted from 0): {error}") from error
    check_draft(target, draft, max(map(len, prompts)) + max_new_tokens)
    for who, model in {"target": target, "draft": draft}.items():
        check_rows(who, model, prompts[0].device)


def check_rows(who: str, model: nn.Module, device: torch.device) -> None:
    """Raises ValueError, before anything is written, where the model's caches do not hold rows of unequal length."""
    cache = model.new_cache(capacity=2)  # type: ignore[operator]
    model(torch.zeros(2, 2, dtype=torch.long, device=device), cache)
    try:
        cache.truncate(torch.tensor([1, 2], device=device))
        why = "it keeps nothing" if cache.lengths is None else ""
    except ValueError as error:
        why = str(error)
    if why:
        how = f"give it one that does, such as Preallocated()(model), or write text by text with speculative_generate ({why})"
        raise ValueError(f"the {who}'s {type(cache).__name__} does not hold rows of unequal length: {how}")
