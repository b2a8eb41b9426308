"""Proposals that branch: exact by enumeration and by chi-square, greedy text identical, over caches that keep branches."""

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from effkit.caching import Fused, Preallocated, Recompute
from effkit.core import generation
from effkit.core.generation import Sampler, generate
from effkit.speculative import verify
from effkit.speculative.speculate import Proposer, joined, speculate
from effkit.speculative.verify import Proposal, children, follow, verify_tree, without
from tests.caching.decoders import decoder, text
from tests.speculative.worlds import enumerated, goodness, joint, largest_gap

GREEDY = Sampler(temperature=0.0)
SAMPLERS = {"plain": Sampler(), "cold": Sampler(temperature=0.4), "top-k": Sampler(top_k=2), "nucleus": Sampler(temperature=1.3, top_p=0.8)}


def tiny(seed: int):
    return decoder(seed, vocab_size=3, layers=1, heads=2, kv_heads=1, d_model=8, d_ff=8)


class Certain(Proposer):
    """A tree of fixed tokens, the same after every text."""

    def __init__(self, tokens, parents):
        self.tokens, self.parents = torch.tensor(tokens), torch.tensor(parents)

    def __call__(self, ids, most, sampler, rng):
        inside = torch.tensor([len(way) <= most for way in ways(self.parents.tolist())], dtype=torch.bool)
        return Proposal(self.tokens[inside], parents=self.parents[inside])  # deeper nodes come last


class Drawn(Proposer):
    """Two levels from a draft: `branching` children drawn without replacement, each followed by one."""

    def __init__(self, draft, branching=2):
        self.draft, self.branching = draft, branching

    def __call__(self, ids, most, sampler, rng):
        if most == 0:
            return Proposal(ids[0, :0])
        q, tokens, parents = [self.after(ids, sampler)], [], []
        left = q[0]
        for _ in range(min(self.branching, int((q[0] > 0).sum()))):
            tokens.append(int(verify.sample(left, rng)))
            parents.append(-1)
            left = without(left, tokens[-1])
        firsts = list(tokens)
        q += [self.after(torch.cat((ids, torch.tensor([[t]])), 1), sampler) for t in firsts]
        if most > 1:
            for place in range(len(firsts)):
                tokens.append(int(verify.sample(q[1 + place], rng)))
                parents.append(place)
        q += [q[0]] * (len(tokens) + 1 - len(q))  # nothing follows the leaves
        return Proposal(torch.tensor(tokens), torch.stack(q), torch.tensor(parents))

    def after(self, ids, sampler):
        with torch.no_grad():
            return sampler.probabilities(self.draft(ids)[0, -1])


def ways(parents):
    found = []
    for place, parent in enumerate(parents):
        found.append([*(found[parent] if parent >= 0 else []), place])
    return found


PROPOSERS = {
    "certain": lambda: Certain([0, 1, 2, 0, 1], [-1, -1, -1, 0, 0]),
    "certain, a sibling twice": lambda: Certain([1, 1, 2], [-1, -1, 0]),
    "drawn": lambda: Drawn(tiny(1)),
    "drawn, every token": lambda: Drawn(tiny(1), branching=3),
}


def gap(kind="drawn", new=3, sampler=SAMPLERS["plain"]):
    target, ids = tiny(0), text(3, vocab=3)

    def program() -> tuple:
        return tuple(joined(ids, speculate(target, PROPOSERS[kind](), ids, new, gamma=2, sampler=sampler))[0, 3:].tolist())

    outcome = enumerated(program)
    assert sum(outcome.values()) == pytest.approx(1, abs=1e-9)
    return largest_gap(outcome, joint(target, ids, new, sampler))


@pytest.mark.parametrize("kind", PROPOSERS)
@pytest.mark.parametrize("sampler", ["plain", "top-k"])
def test_joint_distribution_is_the_target_s_by_enumeration(kind, sampler):
    assert gap(kind, 2, SAMPLERS[sampler]) < 1e-9


def test_over_three_tokens():
    assert gap("certain", 3, SAMPLERS["nucleus"]) < 1e-9


def place(p, q, n, seed=0, branching=3) -> Counter:
    """What stands at one place when children are drawn from q and judged against p."""
    rng, found = torch.Generator().manual_seed(seed), Counter()
    for _ in range(n):
        tokens, left = [], q
        for _ in range(branching):
            tokens.append(int(verify.sample(left, rng)))
            left = without(left, tokens[-1])
        proposal = Proposal(torch.tensor(tokens), q.expand(len(tokens) + 1, -1), torch.full((branching,), -1))
        branch, last = verify.verify_tree(proposal, p.expand(branching + 1, -1), rng)
        found[(tokens[branch[0]] if branch else int(last),)] += 1
    return found


def p_value(n=3000, seed=0):
    rng = torch.Generator().manual_seed(5)
    p, q = (torch.rand(8, generator=rng, dtype=torch.float64).pow(2) for _ in range(2))
    p, q = p / p.sum(), q / q.sum()
    return goodness(place(p, q, n, seed), {(i,): float(x) for i, x in enumerate(p)}, n)


@pytest.mark.slow
def test_one_place_is_the_target_s_by_chi_square():
    assert p_value() > 1e-3


# greedy


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(data=st.data(), dtype=st.sampled_from([torch.float64, torch.float32]))
def test_greedy_text_is_token_for_token_the_target_s(data, dtype):
    model, ids = decoder(0, dtype), text(4)
    depth = data.draw(st.lists(st.integers(0, 99), min_size=1, max_size=8))
    parents = sorted(x % (i + 1) - 1 for i, x in enumerate(depth))
    own = generate(model, ids, 12, sampler=GREEDY)
    tokens = data.draw(st.lists(st.sampled_from(own[0].tolist()), min_size=len(parents), max_size=len(parents)))
    kind = data.draw(st.sampled_from([lambda m: m, Preallocated(), Recompute(), Fused()]))
    made = joined(ids, speculate(kind(model), Ladder(tokens, parents), ids, 12, gamma=8, sampler=GREEDY))
    assert torch.equal(made, own)


class Ladder(Certain):
    """However deep: what would run over the end of the text is cut off by its depth."""

    def __call__(self, ids, most, sampler, rng):
        depth = [len(way) for way in ways(self.parents.tolist())]
        kept = [i for i, d in enumerate(depth) if d <= most]
        where = {old: new for new, old in enumerate(kept)}
        parents = [where.get(int(self.parents[i]), -1) for i in kept]
        return Proposal(self.tokens[kept], parents=torch.tensor(parents, dtype=torch.long))


def test_the_right_branch_is_followed_to_its_end():
    model, ids = decoder(), text(4)
    own = generate(model, ids, 4, sampler=GREEDY)[0, 4:].tolist()
    wrong = (own[0] + 1) % 32
    tree = Certain([wrong, own[0], own[1], own[1], own[2]], [-1, -1, 0, 1, 3])
    steps = list(speculate(model, tree, ids, 4, gamma=4, sampler=GREEDY))
    assert steps[0].accepted == 3 and steps[0].tokens.tolist() == own


def test_children_and_without_by_hand():
    assert children(torch.tensor([-1, -1, 0, 2])) == [[0, 1], [2], [], [3], []]
    assert without(torch.tensor([0.5, 0.25, 0.25]), 0).tolist() == [0, 0.5, 0.5]
    alone = torch.tensor([1.0, 0.0])
    assert torch.equal(without(alone, 0), alone)
    line = Proposal(torch.tensor([3, 4]))
    for choices, branch, new in (([3, 5, 6], [0], [3, 5]), ([3, 4, 6], [0, 1], [3, 4, 6]), ([0, 4, 6], [], [0])):
        found, tokens = follow(line, torch.tensor(choices))
        assert found == branch and tokens.tolist() == new
    tree = Proposal(torch.tensor([3, 4, 5, 5]), parents=torch.tensor([-1, -1, 0, 1]))
    for choices, branch, new in (([4, 0, 5, 0, 7], [1, 3], [4, 5, 7]), ([4, 5, 3, 6, 7], [1], [4, 3]), ([6, 4, 5, 0, 0], [], [6])):
        found, tokens = follow(tree, torch.tensor(choices))
        assert found == branch and tokens.tolist() == new


def test_a_cache_that_keeps_no_branch_refuses():
    class Stubborn(generation.ConcatCache):
        move = generation.Cache.move

    model, ids = decoder(), text(4)
    model.kv.new = lambda m, capacity: Stubborn(m.rope)
    with pytest.raises(ValueError, match="Stubborn cannot keep a branch of a token tree: generate with proposals in one line"):
        list(speculate(model, PROPOSERS["certain"](), ids, 4, gamma=2))


# planted bugs


def residual_of_the_first_trial(proposal, p, rng):
    """After a second rejection the residual of p, not of what the first one left."""
    tokens, below = proposal.tokens.tolist(), children(proposal.parents)
    branch, node = [], -1
    while True:
        for child in below[node + 1]:
            q = proposal.q[node + 1]
            if verify.accepted((p[node + 1][tokens[child]] / q[tokens[child]])[None], rng):
                branch.append(child)
                break
        else:
            return branch, verify.sample(verify.residual(p[node + 1], proposal.q[node + 1]) if below[node + 1] else p[node + 1], rng)
        node = child


TREE_BUGS = {
    "each trial against p": ("verify_tree", residual_of_the_first_trial),
    "children as if drawn with replacement": ("without", lambda q, x: q),
}


@pytest.mark.slow
@pytest.mark.parametrize("name, bug", TREE_BUGS.values(), ids=TREE_BUGS.keys())
def test_chi_square_refuses(monkeypatch, name, bug):
    if name == "without":  # the children are still drawn without replacement; the judge forgets
        right = verify_tree.__globals__["without"]
        monkeypatch.setitem(verify_tree.__globals__, name, bug)
        monkeypatch.setitem(place.__globals__, "without", right)
    else:
        monkeypatch.setattr(verify, name, bug)
    assert p_value(8000) < 1e-6


right_mask = generation.visible


def leaky(positions, held, ancestors=None):
    """In a tree a token sees all that were fed before it, siblings too; positions are right."""
    return right_mask(positions, held, None if ancestors is None else torch.ones_like(ancestors).tril())


def test_siblings_that_see_each_other_are_refused(monkeypatch):
    """By what comes of every draw."""
    assert gap("drawn", 2) < 1e-9
    monkeypatch.setattr(generation, "visible", leaky)
    assert gap("drawn", 2) > 1e-3


def test_one_hot_is_what_certain_means():
    """A tree whose nodes are certain and the same tree with its one-hot distributions are judged alike."""
    p = torch.tensor([[0.2, 0.5, 0.3]] * 3, dtype=torch.float64)
    tokens, parents = torch.tensor([1, 2]), torch.tensor([-1, 0])
    certain = enumerated(lambda: tuple(map(str, verify_tree(Proposal(tokens, parents=parents), p, None))))
    q = torch.cat((F.one_hot(tokens, 3).double(), p[:1]))
    drawn = enumerated(lambda: tuple(map(str, verify_tree(Proposal(tokens, q, parents), p, None))))
    assert certain.keys() == drawn.keys() and largest_gap(certain, drawn) < 1e-12
