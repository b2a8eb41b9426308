"""Jacobi and lookahead decoding: exact by enumeration, greedy text identical, guesses as by the definition, the paper's mask."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import effkit
from effkit.caching import Fused, Paged, Preallocated, Recompute
from effkit.core.generation import Sampler, ancestry, generate
from effkit.core.recipe import from_json, to_json
from effkit.core.technique import Identity
from effkit.speculative import jacobi
from effkit.speculative.jacobi import Jacobi, Lookahead, Refined, Window
from effkit.speculative.law import statistics
from effkit.speculative.speculate import Seen, speculate
from tests.caching.decoders import decoder, text
from tests.speculative.cycles import cyclic, learned
from tests.speculative.worlds import Position, enumerated, joint, largest_gap

GREEDY = Sampler(temperature=0.0)
SAMPLERS = {"plain": Sampler(), "cold": Sampler(temperature=0.4), "top-k": Sampler(top_k=2), "nucleus": Sampler(temperature=1.3, top_p=0.8)}
CACHES = {"concatenating": Identity(), "preallocated": Preallocated(), "none": Recompute(), "fused": Fused(), "paged": Paged(page_size=4)}
KINDS = {"jacobi": Jacobi(2), "lookahead": Lookahead(window=2, ngram=3, guesses=2), "pairs": Lookahead(window=3, ngram=2, guesses=1)}


def tiny(seed: int):
    return decoder(seed, vocab_size=3, layers=1, heads=2, kv_heads=1, d_model=8, d_ff=8)


# exact


def gap(technique, sampler=SAMPLERS["plain"], new=3, stop=None) -> float:
    model, ids = technique(tiny(0)), text(3, vocab=3)

    def program() -> tuple:
        return tuple(model.generate(ids, new, sampler=sampler, stop=stop)[0, 3:].tolist())

    outcome = enumerated(program)
    assert sum(outcome.values()) == pytest.approx(1, abs=1e-9)
    return largest_gap(outcome, joint(model, ids, new, sampler, stop))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_joint_distribution_is_the_target_s_by_enumeration(kind, sampler):
    assert gap(KINDS[kind], SAMPLERS[sampler], new=2 if sampler == "plain" else 3) < 1e-9


@pytest.mark.parametrize("kind", KINDS)
def test_a_stop_token_inside_a_block_ends_the_text(kind):
    assert gap(KINDS[kind], SAMPLERS["top-k"], stop=1) < 1e-9


shapes = st.one_of(
    st.builds(Jacobi, st.integers(1, 8)),
    st.builds(Lookahead, window=st.integers(1, 6), ngram=st.integers(2, 5), guesses=st.integers(1, 4)),
)


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(data=st.data(), technique=shapes, dtype=st.sampled_from([torch.float64, torch.float32]), cache=st.sampled_from(list(CACHES)))
def test_greedy_text_is_token_for_token_the_target_s(data, technique, dtype, cache):
    model = CACHES[cache](decoder(0, dtype))
    ids, new = text(data.draw(st.integers(1, 5))), data.draw(st.integers(0, 30))
    stop = data.draw(st.sampled_from([None, *generate(model, ids, new, sampler=GREEDY)[0].tolist()]))
    made = technique(model).generate(ids, new, sampler=GREEDY, stop=stop)
    assert torch.equal(made, generate(model, ids, new, sampler=GREEDY, stop=stop))


@pytest.mark.slow
@pytest.mark.parametrize("gamma", range(1, 9))
@pytest.mark.parametrize("technique", [Jacobi(), Lookahead()], ids=["jacobi", "lookahead"])
def test_for_every_gamma_over_fused_blocks_in_bfloat16(technique, gamma):
    """Where the text goes round a cycle, much of what is proposed is right."""
    model, ids = Fused()(learned(torch.bfloat16)), cyclic(12)[None]
    made = technique(model)
    steps = list(made.decoding.passes(made, ids, 40, sampler=GREEDY, gamma=gamma))
    assert torch.equal(torch.cat([s.tokens for s in steps]), generate(model, ids, 40, sampler=GREEDY)[0, 12:])
    if isinstance(technique, Lookahead) and gamma > 2:  # the last level lies two places on
        assert max(step.accepted for step in steps) >= min(3, gamma - 1)


@pytest.mark.parametrize("technique", [Jacobi(), Lookahead(), Lookahead(window=9, ngram=6)], ids=repr)
def test_nothing_is_fed_beyond_the_end_of_the_context(technique):
    model, ids, seen = technique(decoder(context=24)), text(4), []
    model.kv.new = lambda m, capacity: Watched(m.rope, seen)
    assert torch.equal(model.generate(ids, 20, sampler=GREEDY), generate(decoder(context=24), ids, 20, sampler=GREEDY))
    assert max(seen) == 22, "the last token is written, never read"


class Watched(effkit.core.generation.ConcatCache):
    def __init__(self, rope, seen):
        super().__init__(rope)
        self.seen = seen

    def advance(self, n, parents=None, **where):
        positions = super().advance(n, parents, **where)
        self.seen += positions.tolist()
        return positions


# Jacobi, by the definition


@torch.no_grad()
def iterated(model, ids, new, gamma) -> list[int]:
    """Jacobi's iteration with the whole text anew for each pass: how many tokens each of them settles."""
    end, guess, given = ids.shape[1] + new, [], []
    while ids.shape[1] < end:
        width = min(gamma, end - ids.shape[1] - 1)
        guess = (guess + [int(ids[0, -1])] * width)[:width]
        fed = torch.cat((ids, torch.tensor([guess], dtype=torch.long)), 1)
        choices = model(fed)[0].argmax(-1)[ids.shape[1] - 1 :].tolist()
        right = 0
        while right < width and guess[right] == choices[right]:
            right += 1
        ids, guess = torch.cat((ids, torch.tensor([choices[: right + 1]])), 1), choices[right + 1 :]
        given.append(right + 1)
    return given


class Lagged(nn.Module):
    """A decoder whose next token follows from the one `lag` places back: the places between are independent."""

    context = 256

    def __init__(self, lag: int, vocab: int = 16):
        super().__init__()
        self.lag, self.after = lag, torch.randperm(vocab, generator=torch.Generator().manual_seed(3))

    def forward(self, ids, cache=None):
        start = 0 if cache is None else cache.length
        text = ids[0] if cache is None else torch.cat((cache.text[:start], ids[0]))
        if cache is not None:
            cache.text, cache.length = text, len(text)
        back = (torch.arange(start, len(text)) - self.lag + 1).clamp(min=0)
        return nn.functional.one_hot(self.after[text[back]], len(self.after)).double()[None]

    def new_cache(self, *, capacity):
        cache = Position()
        cache.text = torch.zeros(0, dtype=torch.long)
        return cache


def passes_are_jacobi_s(lag=3, gamma=5):
    for model, ids in ((Lagged(lag), text(6, vocab=16)), (decoder(1, sharpness=3.0), text(6))):
        steps = list(speculate(model, Refined(), ids, 40, gamma=gamma, sampler=GREEDY))
        assert [len(step.tokens) for step in steps] == iterated(model, ids, 40, gamma)
        assert torch.equal(torch.cat([step.tokens for step in steps]), generate(model, ids, 40, sampler=GREEDY)[0, 6:])


def test_passes_settle_as_many_tokens_as_jacobi_s_iteration():
    passes_are_jacobi_s()


@pytest.mark.parametrize("lag", [1, 2, 3, 5])
def test_as_many_tokens_a_pass_as_places_are_independent_of_each_other(lag):
    """The first pass has nothing to go by, and the last is cut off by the end of the text."""
    steps = list(speculate(Lagged(lag), Refined(), text(6, vocab=16), 51, gamma=8, sampler=GREEDY))
    assert {len(step.tokens) for step in steps[1:-1]} == {lag}


PLANTED = {
    "choices of the places before": lambda self, seen: setattr(self, "choices", seen.logits[seen.ids.shape[1] - self.end - 1 :].argmax(-1)),
    "choices that were never taken along": lambda self, seen: setattr(self, "choices", seen.logits.argmax(-1)),
    "no choices": lambda self, seen: None,
}


@pytest.mark.parametrize("bug", PLANTED.values(), ids=PLANTED.keys())
def test_a_guess_at_the_wrong_places_is_noticed(monkeypatch, bug):
    monkeypatch.setattr(Refined, "observe", lambda self, seen: bug(self, seen) if len(seen.logits) else None)
    with pytest.raises(AssertionError):
        passes_are_jacobi_s()


@pytest.mark.slow
@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 20), gamma=st.integers(1, 8))
def test_a_block_is_solved_after_as_many_passes_as_it_has_places(seed, gamma):
    """Every pass settles a token at least: never more passes than one by one."""
    model = Jacobi(gamma)(decoder(seed, sharpness=3.0))
    steps = list(model.decoding.passes(model, text(4, seed=seed), 12, sampler=GREEDY))
    assert len(steps) <= 12 and all(len(step.tokens) >= 1 for step in steps)
    assert sum(len(step.tokens) for step in steps) == 12


# lookahead


def window_of(levels, guesses=2) -> Window:
    made = Window(len(levels[0]), len(levels) + 1, guesses)
    made.levels = [list(level) for level in levels]
    return made


PAPER = [[0, 1, 2, 3, 4], [11, 12, 13, 14, 15], [22, 23, 24, 25, 26]]  # W = 5, N = 4: tens say the level, ones the place


def test_the_mask_is_the_paper_s():
    """Figure 2 of the paper: a token sees its own column at the levels before, level 0 up to there, and nothing else."""
    proposal = window_of(PAPER)(torch.tensor([[7, 0]]), 9, GREEDY, None)
    tokens, ancestors = proposal.tokens.tolist(), ancestry(proposal.parents)
    sees = {token: {t for t, seen in zip(tokens, row.tolist(), strict=True) if seen} for token, row in zip(tokens, ancestors, strict=True)}
    assert sees[26] == {26, 15, 4, 3, 2, 1}  # the last-step token of place 6 follows 5, 4, and the line before them
    for column in range(5):
        line = set(range(1, column + 1))
        assert sees[11 + column] == {11 + column} | line and sees[22 + column] == {22 + column, 11 + column} | line
    depth = {token: int(row.sum()) for token, row in zip(tokens, ancestors, strict=True)}
    assert all(depth[token] == token % 10 for token in tokens), "each stands where it is guessed to be"


def seen_after(window: Window, ids: torch.Tensor, chosen: dict[int, int], vocab: int = 64) -> Seen:
    """A pass in which behind the node with token t the target chooses chosen[t], or t + 1; behind the text's end 63."""
    proposal = window(ids, 9, GREEDY, None)
    behind = [63, *(chosen.get(t, t + 1) for t in proposal.tokens.tolist())]
    logits = nn.functional.one_hot(torch.tensor(behind), vocab).double()
    return Seen(torch.cat((ids, torch.tensor([[63]])), 1), 0, torch.arange(ids.shape[1]), logits, None)


def test_n_grams_and_the_next_levels_by_hand():
    window = window_of(PAPER)
    window.observe(seen_after(window, torch.tensor([[7, 0]]), {22: 40, 26: 50}))
    assert {first: list(rest) for first, rest in window.pool.items() if rest} == {
        0: [(11, 22, 40)], 1: [(12, 23, 24)], 2: [(13, 24, 25)], 3: [(14, 25, 26)], 4: [(15, 26, 50)]}  # fmt: skip
    assert window.levels == [PAPER[1], PAPER[2], [40, 24, 25, 26, 50]]
    proposal = window(torch.tensor([[7, 0, 1]]), 9, GREEDY, None)
    assert proposal.tokens.tolist()[:3] == [12, 23, 24] and proposal.parents.tolist()[:3] == [-1, 0, 1], "the n-gram that begins with 1"
    assert window.levels[0] == [1, *PAPER[1][1:]], "column 0 is the text's own"


def test_the_pool_keeps_the_latest_of_each_first_token():
    window = window_of(PAPER, guesses=2)
    for rest in ((1, 1), (2, 2), (1, 1), (3, 3)):
        window.learn(9, rest)
    assert list(window.pool[9]) == [(1, 1), (3, 3)]
    proposal = window(torch.tensor([[9]]), 9, GREEDY, None)
    assert proposal.tokens.tolist()[:4] == [3, 3, 1, 1], "the latest is tried first"


def test_what_begins_alike_is_fed_once():
    window = window_of([[0, 5], [6, 7]], guesses=3)
    for rest in ((5, 8), (5, 9)):
        window.learn(0, rest)
    proposal = window(torch.tensor([[0]]), 9, GREEDY, None)
    pairs = list(zip(proposal.parents.tolist(), proposal.tokens.tolist(), strict=True))
    assert pairs == [(-1, 5), (0, 9), (0, 8), (-1, 6), (0, 7)]


@settings(max_examples=40, deadline=None)
@given(window=st.integers(1, 6), ngram=st.integers(2, 5), guesses=st.integers(0, 4), most=st.integers(0, 9), seed=st.integers(0, 9))
def test_no_node_lies_deeper_than_allowed_and_siblings_differ(window, ngram, guesses, most, seed):
    made, rng = Window(window, ngram, guesses), torch.Generator().manual_seed(seed)
    for _ in range(60):
        made.learn(int(torch.randint(3, (), generator=rng)), tuple(torch.randint(3, (ngram - 1,), generator=rng).tolist()))
    proposal = made(text(5, vocab=3, seed=seed), most, GREEDY, None)
    parents = torch.arange(len(proposal.tokens)) - 1 if proposal.parents is None else proposal.parents
    assert len(proposal.tokens) <= (window + guesses) * (ngram - 1)
    assert len(set(zip(parents.tolist(), proposal.tokens.tolist(), strict=True))) == len(proposal.tokens)
    assert not len(parents) or int(ancestry(parents).sum(1).max()) <= most
    assert (len(proposal.tokens) == 0) == (most == 0 or (window == 1 and ngram == 2 and not made.pool[int(text(5, vocab=3, seed=seed)[0, -1])]))


def tokens_a_pass(technique, new=60) -> float:
    """On a text that goes round and round, so that what was guessed comes again."""
    model, ids = technique(learned()), cyclic(20)[None]
    return statistics(model.decoding.passes(model, ids, new, sampler=GREEDY)).tokens_per_pass


def lookahead_pays():
    assert tokens_a_pass(Jacobi()) < 1.5
    assert tokens_a_pass(Lookahead()) > 2.2 and tokens_a_pass(Lookahead(ngram=6)) > tokens_a_pass(Lookahead(ngram=3))


@pytest.mark.slow
def test_n_grams_that_were_guessed_give_more_tokens_a_pass_than_guesses_at_their_places():
    lookahead_pays()


@pytest.mark.parametrize("bug", [
    lambda self, seen: None,  # nothing is learned
    lambda self, seen: setattr(self, "columns", [c - 1 for c in self.columns]) or observe(self, seen),  # choices behind other nodes
], ids=["no n-grams", "n-grams of other columns"])  # fmt: skip
def test_a_window_that_learns_something_else_is_noticed(monkeypatch, bug):
    monkeypatch.setattr(Window, "observe", bug)
    with pytest.raises((AssertionError, IndexError)):
        test_n_grams_and_the_next_levels_by_hand()


observe = Window.observe


def test_an_n_gram_one_place_off_is_noticed(monkeypatch):
    right = Window.learn
    monkeypatch.setattr(Window, "learn", lambda self, first, rest: right(self, rest[0], (first, *rest[1:])))
    with pytest.raises(AssertionError):
        lookahead_pays()


# as techniques


@pytest.mark.parametrize("technique", [Jacobi(gamma=3), Lookahead(window=4, ngram=3, guesses=2)], ids=repr)
def test_the_file_opens_without_the_recipe_which_round_trips(technique, tmp_path):
    model, ids = decoder(), text(6)
    result = technique(model)
    effkit.save(result, tmp_path / "model.safetensors")
    opened = effkit.load(tmp_path / "model.safetensors")
    assert type(opened.decoding) is type(result.decoding) and technique.claim(opened) == technique.claim(result)
    seen, wanted = (statistics(m.decoding.passes(m, ids, 30, sampler=GREEDY)) for m in (opened, result))
    assert seen == wanted and from_json(to_json(technique), effkit.techniques()) == technique
    assert torch.equal(result.generate(text(6, rows=3), 20, sampler=GREEDY), model.generate(text(6, rows=3), 20, sampler=GREEDY))


def test_a_pass_is_fed_no_more_than_the_claim_says():
    model, fed = Lookahead()(learned()), []
    model.embedding.register_forward_hook(lambda module, inputs, output: fed.append(inputs[0].shape[1]))
    model.generate(cyclic(20)[None], 60, sampler=GREEDY)
    assert max(fed[1:]) <= Lookahead().claim(model).value == 30 and max(fed[1:]) > 15


REFUSED = {
    "gamma must be a whole number, at least 1, got 0": lambda: Jacobi(gamma=0),
    "window must be a whole number from 1 to 64, got 0": lambda: Lookahead(window=0),
    "ngram must be a whole number from 2 to 16, got 1: the first token is the text's own": lambda: Lookahead(ngram=1),
    "guesses must be a whole number from 1 to 64, got 0": lambda: Lookahead(guesses=0),
    "Jacobi needs a decoder": lambda: Jacobi()(nn.Linear(2, 2)),
}


@pytest.mark.parametrize("message, made", REFUSED.items(), ids=REFUSED.keys())
def test_bad_settings_are_refused(message, made):
    with pytest.raises(ValueError, match=message):
        made()


def test_trees_come_from_one_place():
    """A path twice is one path, in the order of its first mention."""
    tree = jacobi.Tree()
    assert [tree.add(-1, 5), tree.add(-1, 6), tree.add(-1, 5), tree.add(0, 5)] == [0, 1, 0, 2]
