"""Every way to guess with every cache: greedily the same text as plain decoding by that cache, or one sentence that refuses.
In bfloat16, where a block of tokens and one token are rounded differently, texts part only where two tokens are all but tied.
Logits that are no numbers are refused by every way."""

import copy
from itertools import product

import pytest
import torch
from torch import nn

from effkit.caching import H2O, Fused, Paged, Preallocated, QuantizedKV, Recompute, SnapKV, Window
from effkit.caching.batching import serve
from effkit.caching.streams import Request
from effkit.core.generation import ConcatCache, Sampler, generate, read_prompt
from effkit.core.technique import Identity
from effkit.speculative import (
    Eagle,
    EarlyExit,
    Jacobi,
    Lookahead,
    Medusa,
    PromptLookup,
    Speculative,
    SpeculativeTree,
    speculative_generate,
)
from effkit.speculative.speculate import SpeculativeDecoding
from effkit.speculative.tree import TreeDecoding
from tests.caching.decoders import decoder, text
from tests.speculative.cycles import cyclic, learned
from tests.speculative.test_exact import adversary
from tests.speculative.worlds import enumerated, joint, largest_gap

GREEDY = Sampler(temperature=0.0)
EXACT = {"concatenated": Identity(), "recomputed": Recompute(), "preallocated": Preallocated(), "paged": Paged(page_size=3), "fused": Fused()}
#: so small that every text here is far beyond them
LOSSY = {
    "window": Window(window=8, sinks=2), "sliding": Window(window=5, sinks=0), "heavy": H2O(budget=7, recent=3),
    "prompt": SnapKV(budget=6, window=2, kernel=3), "int8": QuantizedKV(bits=8, group=8, residual=1),
    "int2": QuantizedKV(bits=2, group=8, residual=5),
}  # fmt: skip
CACHES = EXACT | LOSSY
ROUNDING = {"int8", "int2"}  # whose last bit decides what becomes of a key: in float32 a block and its tokens need not agree


def brought(model: nn.Module, draft: nn.Module, decoding: SpeculativeDecoding) -> nn.Module:
    """The decoder, guessing with any draft."""
    model = copy.deepcopy(model)
    model.decoding, decoding.draft = decoding, draft
    return model


def random_draft(model):
    return decoder(9, model.embedding.weight.dtype)


WAYS = {
    **{f"a random draft, {g}": lambda m, g=g: brought(m, random_draft(m), SpeculativeDecoding(g)) for g in range(1, 9)},
    **{f"an adversary, {g}": lambda m, g=g: brought(m, adversary(m), SpeculativeDecoding(g)) for g in range(1, 9)},
    "a tree of a random draft": lambda m: brought(m, random_draft(m), TreeDecoding((2, 2, 1))),
    "a tree of an adversary": lambda m: brought(m, adversary(m), TreeDecoding((3, 2))),
    "itself": Speculative(Identity(), gamma=3), **{f"half of it, {g}": Speculative(EarlyExit(0.5), gamma=g) for g in range(1, 9)},
    "a tree of half of it": SpeculativeTree(EarlyExit(0.5), branching=(2, 2)),
    **{f"lookup, {g}": PromptLookup(gamma=g) for g in range(1, 9)},
    "lookup in turns": PromptLookup(gamma=4, shortest=2, otherwise=Speculative(EarlyExit(0.5), gamma=3)),
    "Jacobi": Jacobi(gamma=4), "lookahead": Lookahead(window=3, ngram=3, guesses=3),
    "Medusa": Medusa(steps=0, heads=2, branching=(3, 2)), "EAGLE": Eagle(steps=0, gamma=3),
    "EAGLE, a tree": Eagle(steps=0, gamma=2, branching=(3, 2)),
}  # fmt: skip
BRANCHING = {name for name in WAYS if "tree" in name} | {"lookahead", "Medusa"}
REFUSED = {("heavy", way): "H2O cannot follow the branches of a token tree: generate with proposals in one line" for way in BRANCHING}
REFUSED |= {
    (cache, way): f"larger than the {n} that stay in full precision: take proposals in one line, or QuantizedKV"
    for cache, n in (("int8", 1), ("int2", 5)) for way in BRANCHING
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("cache", CACHES)
def test_the_same_text_or_a_sentence(cache, way):
    """After a prompt and after a single token, to the end and up to a token inside of a block."""
    for dtype, ids in product((torch.float64, torch.float32)[: 1 if cache in ROUNDING else 2], (text(11), text(1))):
        model = CACHES[cache](decoder(0, dtype))
        wanted = model.generate(ids, 30, sampler=GREEDY)
        guessing, stop = WAYS[way](model), int(wanted[0, -13])
        if (cache, way) in REFUSED and (way, len(ids[0])) != ("lookahead", 1):  # whose n-grams never branch there
            with pytest.raises(ValueError, match=REFUSED[cache, way]):
                guessing.generate(ids, 30, sampler=GREEDY)
        else:
            assert torch.equal(guessing.generate(ids, 30, sampler=GREEDY), wanted), (dtype, ids)
            assert torch.equal(guessing.generate(ids, 30, sampler=GREEDY, stop=stop), model.generate(ids, 30, sampler=GREEDY, stop=stop)), (dtype, ids)


@pytest.mark.parametrize("way", [way for way in WAYS if not way.endswith((", 2", ", 3", ", 5", ", 6", ", 7", ", 8"))])
def test_texts_beyond_the_context_and_of_unequal_length_are_refused(way):
    guessing = WAYS[way](decoder(context=64))
    with pytest.raises(ValueError, match="11 tokens and 54 new ones exceed the model's context of 64; shorten the prompt"):
        guessing.generate(text(11), 54, sampler=GREEDY)
    for ids in ([text(3)[0], text(5)[0]], torch.zeros(2, 0, dtype=torch.long)):
        with pytest.raises(ValueError, match="ids must be .batch, tokens. .*; texts of unequal length go one by one, or through speculative_batch"):
            guessing.generate(ids, 4, sampler=GREEDY)


# drawn at random


@torch.no_grad()
def one_by_one(target: nn.Module, ids: torch.Tensor, new: int, tail: tuple[int, ...] = ()) -> dict[tuple, float]:
    """The distribution over texts that are written token by token with the target's own cache."""
    cache = target.new_cache(capacity=ids.shape[1] + len(tail) + new)
    read_prompt(target, ids, cache)
    for token in (int(ids[0, -1]), *tail):
        logits = target(torch.tensor([[token]]), cache)
    p = Sampler().probabilities(logits[0, -1])
    rest = [one_by_one(target, ids, new - 1, (*tail, token)) if new > 1 else {(): 1.0} for token in range(len(p))]
    return {(token, *more): float(p[token]) * chance for token in range(len(p)) for more, chance in rest[token].items()}


@pytest.mark.slow
@pytest.mark.parametrize("cache", LOSSY)
def test_over_a_cache_that_forgets_what_is_drawn_is_what_it_would_draw_alone(cache):
    """By exact enumeration; and what it forgot does matter."""
    whole, draft = (decoder(seed, vocab_size=3, layers=1, sharpness=3.0) for seed in (0, 1))
    target, ids = LOSSY[cache](whole), text(11, vocab=3)
    made = enumerated(lambda: tuple(speculative_generate(target, draft, ids, 3, gamma=2)[0, 11:].tolist()))
    assert sum(made.values()) == pytest.approx(1, abs=1e-9)
    assert largest_gap(made, one_by_one(target, ids, 3)) < 1e-9 < 1e-6 < largest_gap(made, joint(whole, ids, 3, Sampler()))


# bfloat16


@torch.no_grad()
def parts(model: nn.Module, way: str, ids: torch.Tensor, new: int) -> bool:
    """Whether the two texts part. Where they do, the best two tokens lie no further apart than what rounding does to a
    logit there: at most as far as the whole text in one pass, one token at a time, and the exact logits are from each other."""
    plain, guessed = (m.generate(ids, new, sampler=GREEDY)[0] for m in (model, WAYS[way](model)))
    if torch.equal(plain, guessed):
        return False
    at = int((plain != guessed).nonzero()[0])
    assert at >= ids.shape[1]
    begun = plain[None, :at]
    cache = ConcatCache(model.rope)
    step = [model(token[:, None], cache) for token in begun[0].split(1)][-1][0, -1].float()
    exact = copy.deepcopy(model).double()(begun)[0, -1].float()
    off = max((step - exact).abs().max().item(), (model(begun)[0, -1].float() - exact).abs().max().item())
    best = exact.topk(2).values
    assert (best[0] - best[1]).item() <= 2 * off, f"margin {best[0] - best[1]:.4f}, rounding {off:.4f}"
    return True


@pytest.mark.slow
@pytest.mark.parametrize("way", ["an adversary, 3", "a tree of half of it", "half of it, 4", "lookup, 4", "lookahead", "Medusa", "EAGLE"])
def test_in_bfloat16_texts_part_only_where_two_tokens_are_all_but_tied(way):
    parted = [parts(decoder(seed, torch.bfloat16, sharpness=4.0), way, text(6, seed=seed), 24) for seed in range(12)]
    assert sum(parted) < 12


def test_a_text_that_parts_elsewhere_is_noticed(monkeypatch):
    """A draft whose tokens are all taken, in place of the target's."""
    from effkit.speculative import speculate

    monkeypatch.setattr(speculate, "judge", lambda proposal, logits, sampler, rng: (
        [*range(len(proposal.tokens))], torch.cat((proposal.tokens, logits[-1:].argmax(-1)))))  # fmt: skip
    with pytest.raises(AssertionError, match="margin"):
        [parts(decoder(seed, torch.bfloat16, sharpness=4.0), "an adversary, 3", text(6, seed=seed), 24) for seed in range(3)]


# logits that are no numbers


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("way", WAYS)
def test_logits_that_are_no_numbers_are_refused(way, temperature):
    guessing = WAYS[way](decoder(0, torch.float32))
    with torch.no_grad():
        guessing.norm.weight[0] = torch.nan
    with pytest.raises(ValueError, match="logits hold NaN or infinity: look for NaN or infinity in its weights"):
        guessing.generate(text(5), 8, temperature=temperature)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_plain_decoding_refuses_them_too(temperature):
    model = decoder()
    with torch.no_grad():
        model.norm.weight[0] = torch.nan
    with pytest.raises(ValueError, match="logits hold NaN"):
        model.generate(text(5), 8, temperature=temperature)
    (reply,) = serve(model, [Request([1, 2, 3], 4)], pages=8).replies
    assert reply.refused.startswith("the model's logits hold NaN for this request")


@pytest.mark.parametrize("temperature", [1.0, 1e-45])
def test_what_no_softmax_makes_chances_of_is_refused(temperature):
    logits = torch.tensor([0.0, 1.0, torch.inf if temperature == 1 else 2.0])
    with pytest.raises(ValueError, match="logits hold NaN or infinity: .*; where the temperature is next to 0, take 0"):
        Sampler(temperature=temperature).probabilities(logits)


def test_a_draft_without_numbers_changes_no_greedy_text():
    model, draft = learned(), learned()
    with torch.no_grad():
        draft.norm.weight[0] = torch.nan
    ids = cyclic(8)[None]
    assert torch.equal(brought(model, draft, SpeculativeDecoding(4)).generate(ids, 12, sampler=GREEDY), generate(model, ids, 12, sampler=GREEDY))
    with pytest.raises(ValueError, match="logits hold NaN"):
        brought(model, draft, SpeculativeDecoding(4)).generate(ids, 12)
