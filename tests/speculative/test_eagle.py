"""EAGLE-style drafts: what is proposed is what the head says without any cache; the text stays the target's, by enumeration
and token for token; the head learns, and the target does not."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import effkit
from effkit.caching import Fused, Paged, Preallocated, Recompute
from effkit.core import generation
from effkit.core.generation import Sampler, generate
from effkit.core.recipe import from_json, to_json
from effkit.core.task import Task
from effkit.core.technique import Identity
from effkit.core.training import Schedule
from effkit.speculative import EarlyExit, Speculative, eagle, tree, verify
from effkit.speculative.eagle import Drafter, Eagle, EagleHead, eagle_loss, fresh_head, on_texts
from effkit.speculative.heads import train_beside
from effkit.speculative.law import statistics
from effkit.speculative.verify import Proposal
from effkit.zoo.data import Windows
from effkit.zoo.fetch import where
from tests.caching.decoders import decoder, text
from tests.speculative.cycles import cyclic, learned, windows
from tests.speculative.worlds import enumerated, joint, largest_gap
from tests.subjects import mlp

GREEDY = Sampler(temperature=0.0)
SAMPLERS = {"plain": Sampler(), "cold": Sampler(temperature=0.4), "top-k": Sampler(top_k=2), "nucleus": Sampler(temperature=1.3, top_p=0.8)}
CACHES = {"concatenating": Identity(), "preallocated": Preallocated(), "none": Recompute(), "fused": Fused(), "paged": Paged(page_size=4)}
TREE = dict(gamma=3, branching=(3, 2, 1))


def tiny(seed: int):
    return decoder(seed, vocab_size=3, layers=1, heads=2, kv_heads=1, d_model=8, d_ff=8)


def scattered(model, seed: int = 0, frequent: int | None = None, **settings):
    """With a head that was never trained and points anywhere."""
    task = Task(train=Windows(text(400, model.config.vocab_size)[0], length=16))
    made = Eagle(steps=0, frequent=frequent, **settings)(model, task)
    torch.manual_seed(seed)
    for parameter in made.decoding.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.7)
    return made


# what is proposed


@torch.no_grad()
def foretold(model, ids, most) -> torch.Tensor:
    """The line that follows by the definition: state by state, no cache, the text anew for every token."""
    head, states, tokens = model.decoding.head, model.features(ids[:, :-1]), ids[:, 1:]
    for _ in range(most):
        state = head(model, tokens, states)[:, -1:]
        logits = model.logits(state)[0, -1]
        if head.tokens is not None:
            logits = torch.full_like(logits, -torch.inf).index_copy(0, head.tokens, logits[head.tokens])
        tokens = torch.cat((tokens, logits.argmax()[None, None]), 1)
        states = torch.cat((states, state), 1)
    return tokens[0, ids.shape[1] - 1 :]


def proposals_are_foretold(model, new=20) -> None:
    right, seen = Drafter.__call__, []

    def checked(self, ids, most, sampler, rng):
        proposal = right(self, ids, most, sampler, rng)
        if len(proposal.tokens):
            first = [0]  # each node's first child, down from the root: the line of best tokens
            while proposal.parents is not None and (proposal.parents == first[-1]).any():
                first.append(int((proposal.parents == first[-1]).nonzero()[0, 0]))
            line = proposal.tokens if proposal.parents is None else proposal.tokens[first]
            assert torch.equal(line, foretold(model, ids, len(line)))
            seen.append(len(line))
        return proposal

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Drafter, "__call__", checked)
        model.generate(text(4, model.config.vocab_size), new, sampler=GREEDY)
    assert len(seen) >= new / 5 and max(seen) == model.decoding.gamma


@pytest.mark.slow
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("how", [dict(gamma=4), TREE, dict(gamma=3, frequent=9)], ids=["line", "tree", "frequent"])
def test_proposals_are_those_of_the_head_without_any_cache(cache, how):
    """Of a head that is mostly wrong, and of one that is mostly right."""
    proposals_are_foretold(scattered(CACHES[cache](decoder()), **how))
    if "frequent" not in how:
        proposals_are_foretold(skilled(torch.float64, cache, **how))


def skilled(dtype=torch.float32, cache="concatenating", gamma=4, branching=None):
    return eagle.drafting(CACHES[cache](learned(dtype)), trained_head(dtype), gamma, branching)


def trained_head(dtype, made=[]) -> EagleHead:  # noqa: B006  (once is enough)
    made += [] if made else [Eagle(lr=1e-2, steps=40)(learned(), windows()).decoding.head]
    return copy.deepcopy(made[0]).to(dtype)


@torch.no_grad()
def test_every_node_of_a_tree_has_the_likeliest_tokens_behind_its_own_branch():
    model, ids = scattered(decoder(), **TREE), text(7)
    drafter = model.decoding.proposer(model, 20)
    drafter.observe(seen_of(model, ids))
    proposal = drafter(ids, 3, GREEDY, None)
    assert len(proposal.tokens) == 3 + 6 + 6
    for node in range(9):  # those of the first two levels
        branch, up = [], node
        while up >= 0:
            branch, up = [int(proposal.tokens[up]), *branch], int(proposal.parents[up])
        tokens, states = torch.cat((ids[:, 1:], torch.tensor([branch])), 1), model.features(ids[:, :-1])
        for _ in range(len(branch)):
            states = torch.cat((states, model.decoding.head(model, tokens[:, : states.shape[1]], states)[:, -1:]), 1)
        ahead = model.decoding.head(model, tokens, states)
        assert torch.allclose(drafter.ahead[node + 1], ahead[0, -1])
        logits, children = model.logits(ahead)[0, -1], proposal.tokens[proposal.parents == node]
        assert torch.equal(children, logits.topk(len(children)).indices)


def seen_of(model, ids):
    from effkit.speculative.speculate import Seen

    features = model.features(ids[:, :-1])[0]
    return Seen(ids, 0, torch.arange(len(features)), features[:0], features)


def shifted(self, ids, tokens, parents, last):
    """Each state beside its own token, not the next one."""
    return right_behind(self, torch.cat((ids[:, :1], ids[:, :-1]), 1), tokens, parents, last)


right_behind = Drafter.behind
PLANTED = {
    "states beside their own token": ("behind", shifted),
    "a rollback that forgets nothing": ("committed", property(lambda self: 10**6, lambda self, value: None)),
    "states of rejected tokens": ("observe", lambda self, seen: setattr(self, "states", fed_so_far(self, seen)[: seen.ids.shape[1] - 1])),
}


def fed_so_far(self, seen):
    return seen.features if self.states is None else torch.cat((self.states, seen.features))


@pytest.mark.slow
@pytest.mark.parametrize("name, bug", PLANTED.values(), ids=PLANTED.keys())
def test_a_planted_bug_is_seen_in_what_is_proposed(monkeypatch, name, bug):
    monkeypatch.setattr(Drafter, name, bug, raising=False)
    with pytest.raises((AssertionError, RuntimeError)):
        proposals_are_foretold(scattered(decoder(), gamma=4))
        proposals_are_foretold(skilled(torch.float64, **TREE))


def test_siblings_that_see_each_other_are_caught(monkeypatch):
    right = generation.visible
    leaky = lambda positions, held, tree=None: right(positions, held, None if tree is None else torch.ones_like(tree).tril())  # noqa: E731
    monkeypatch.setattr(generation, "visible", leaky)
    with pytest.raises(AssertionError):
        test_every_node_of_a_tree_has_the_likeliest_tokens_behind_its_own_branch()


# exact


def gap(sampler=SAMPLERS["plain"], new=3, stop=None, **settings) -> float:
    model, ids = scattered(tiny(0), **{"gamma": 2, **settings}), text(3, vocab=3)

    def program() -> tuple:
        return tuple(model.generate(ids, new, sampler=sampler, stop=stop)[0, 3:].tolist())

    with pytest.MonkeyPatch.context() as patch:
        # row by row by verify's, which `enumerated` makes take each outcome
        patch.setattr(tree, "sample", lambda p, rng: torch.cat([verify.sample(row[None], rng) for row in p]))
        outcome = enumerated(program)
    assert sum(outcome.values()) == pytest.approx(1, abs=1e-9)
    return largest_gap(outcome, joint(model, ids, new, sampler, stop))


@pytest.mark.slow
@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS.keys())
@pytest.mark.parametrize("how", [{}, dict(frequent=2), dict(branching=(2, 1)), dict(branching=(2, 1), frequent=2)], ids=["line", "frequent", "tree", "both"])
def test_joint_distribution_is_the_target_s_by_enumeration(sampler, how):
    assert gap(sampler, **how) < 1e-9


@pytest.mark.parametrize("gamma, new", [(1, 1), (1, 3), (2, 2), (3, 3), (5, 2)])
def test_for_every_gamma_and_length(gamma, new):
    assert gap(SAMPLERS["plain" if new < 3 else "top-k"], new, gamma=gamma) < 1e-9


@pytest.mark.slow
def test_a_stop_token_inside_a_block_ends_the_text():
    assert gap(gamma=3, stop=1) < 1e-9 and gap(branching=(2, 1), stop=1) < 1e-9


def test_a_tree_with_every_token_is_exact():
    assert gap(SAMPLERS["top-k"], branching=(3, 2), new=2) < 1e-9


def test_children_drawn_with_putting_back_are_refused(monkeypatch):
    putting_back = lambda q, width, rng: torch.stack([tree.sample(q, rng) for _ in range(width)], 1)  # noqa: E731
    monkeypatch.setattr(tree, "several", putting_back)
    assert gap(branching=(2, 1), new=2) > 0.01


DISTRIBUTIONS = {
    "what it was drawn from, squared": lambda q: q.square() / q.square().sum(-1, keepdim=True),
    "another token's": lambda q: q.roll(1, -1),
}


@pytest.mark.slow
@pytest.mark.parametrize("bug", DISTRIBUTIONS.values(), ids=DISTRIBUTIONS.keys())
def test_a_distribution_that_is_not_the_one_drawn_from_is_refused(monkeypatch, bug):
    right = Drafter.__call__

    def wrong(self, *settings):
        made = right(self, *settings)
        return made if made.q is None else Proposal(made.tokens, bug(made.q))

    monkeypatch.setattr(Drafter, "__call__", wrong)
    assert gap(frequent=2) > 0.01


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(data=st.data(), dtype=st.sampled_from([torch.float64, torch.float32]), cache=st.sampled_from(list(CACHES)))
def test_greedy_text_is_token_for_token_the_target_s(data, dtype, cache):
    branching = data.draw(st.none() | st.lists(st.integers(1, 2), min_size=1, max_size=5).map(tuple))
    gamma = data.draw(st.integers(1, 8)) if branching is None else len(branching)
    how = dict(gamma=gamma, branching=branching, frequent=data.draw(st.sampled_from([None, 12])))
    model = scattered(CACHES[cache](decoder(0, dtype)), data.draw(st.integers(0, 99)), **how)
    ids, new = text(data.draw(st.integers(1, 5))), data.draw(st.integers(0, 14))
    wanted = generate(model, ids, new, sampler=GREEDY)
    stop = data.draw(st.sampled_from([None, *wanted[0].tolist()]))
    assert torch.equal(model.generate(ids, new, sampler=GREEDY, stop=stop), generate(model, ids, new, sampler=GREEDY, stop=stop))


@pytest.mark.parametrize("gamma", range(1, 9))
@pytest.mark.parametrize("cache", CACHES)
def test_a_head_that_is_mostly_right_changes_nothing_but_the_number_of_passes(gamma, cache):
    model = skilled(torch.bfloat16 if cache == "fused" else torch.float32, cache, gamma)
    for new, stop in ((23, None), (40, int(cyclic(9)[-1]))):
        steps = list(model.decoding.passes(model, cyclic(5)[None], new, sampler=GREEDY, stop=stop))
        wanted = generate(model, cyclic(5)[None], new, sampler=GREEDY, stop=stop)
        assert torch.equal(torch.cat([step.tokens for step in steps]), wanted[0, 5:])
        if stop is None:
            assert max(step.accepted for step in steps) == gamma


# training


def tokens_a_pass(steps: int, sampler=GREEDY, **settings) -> float:
    result = Eagle(lr=1e-2, steps=steps, **settings)(learned(), windows())
    rng = torch.Generator().manual_seed(0)
    return statistics(result.decoding.passes(result, cyclic(60)[None], 60, sampler=sampler, rng=rng)).tokens_per_pass


def training_helps() -> None:
    """Also where leaps are drawn, which only the token's own embedding tells."""
    assert tokens_a_pass(0) < 1.5 and tokens_a_pass(40) > 3.5 and tokens_a_pass(40, Sampler()) > 3


@pytest.mark.slow
def test_a_trained_head_gives_more_tokens_a_pass():
    training_helps()
    assert tokens_a_pass(40, frequent=14) > 2.5


@pytest.mark.slow
def test_it_knows_which_token_was_drawn():
    """Where leaps are drawn, heads on the last state cannot know them; the block reads them."""
    from effkit.speculative.heads import Medusa

    result, rng = Medusa(heads=4, branching=(1, 1, 1, 1), lr=1e-2, steps=80)(learned(), windows()), torch.Generator().manual_seed(0)
    heads = statistics(result.decoding.passes(result, cyclic(60)[None], 60, sampler=Sampler(), rng=rng)).tokens_per_pass
    assert tokens_a_pass(40, Sampler()) > 1.3 * heads


@pytest.mark.slow
def test_training_against_the_text_moved_by_one_is_caught(monkeypatch):
    def late(target, head, ids, states):
        return eagle_loss(target, head, ids.roll(1, 1), states)

    monkeypatch.setattr(eagle, "eagle_loss", late)
    with pytest.raises(AssertionError):
        training_helps()


def test_the_loss_by_hand():
    """A head that predicts the true states leaves WEIGHT times the entropy of the target; one off by 1/2 everywhere adds
    (1/2)^2 / 2."""
    model, ids = decoder(), text(6, rows=2)
    states = model.features(ids)

    class Sure(EagleHead):
        off = 0.0

        def forward(self, target, tokens, before, *_):
            assert torch.equal(tokens, ids[:, 1:]) and torch.equal(before, states[:, :-1])
            return states[:, 1:] + self.off

    head = Sure(**model.numbers())
    p = model.logits(states[:, 1:]).float().softmax(-1)
    entropy = -(p * p.clamp(min=1e-30).log()).sum(-1).mean()
    assert eagle_loss(model, head, ids, states).item() == pytest.approx(0.1 * entropy.item(), rel=1e-4)
    head.off = 0.5
    q = model.logits(states[:, 1:] + 0.5).float().log_softmax(-1)
    assert eagle_loss(model, head, ids, states).item() == pytest.approx(0.125 - 0.1 * (p * q).sum(-1).mean().item(), rel=1e-4)


@pytest.mark.parametrize("frequent", [None, 9])
def test_the_target_is_untouched(frequent):
    model = learned()
    model.blocks[0].ff.up.weight.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    result = Eagle(steps=3, frequent=frequent)(model, windows())
    for m in (model, result):
        assert all(torch.equal(m.state_dict()[name], value) for name, value in before.items())
        assert all(p.grad is None for p in m.parameters())
        assert m.embedding.weight.requires_grad and not m.blocks[0].ff.up.weight.requires_grad
    assert all(p.requires_grad for p in result.decoding.parameters())


def test_the_same_seed_gives_the_same_head():
    same, again, other = (Eagle(steps=2, seed=seed)(learned(), windows()).decoding.state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(same[name], again[name]) for name in same)
    assert not torch.equal(same["head.fuse.weight"], other["head.fuse.weight"])


def test_an_interrupted_training_goes_on_to_the_same_head(tmp_path):
    def head(stops_at=None):
        model = learned()
        made, schedule = fresh_head(model, None, frequent=None, seed=0), Schedule(6, 1e-2)

        def stop(done):
            if done == stops_at:
                raise KeyboardInterrupt

        train_beside(model, made, windows(), schedule, on_texts(model), seed=0, resume=tmp_path / "state", after_step=stop)
        return made

    with pytest.raises(KeyboardInterrupt):
        head(stops_at=3)
    resumed = head()
    (tmp_path / "state").unlink()
    assert all(torch.equal(a, b) for a, b in zip(resumed.parameters(), head().parameters(), strict=True))


def test_it_chooses_from_the_tokens_that_were_most_frequent():
    ids = torch.tensor([[5, 5, 5, 2, 2, 9, 9, 9, 9, 1]])
    head = fresh_head(decoder(), [(ids, None)], frequent=3, seed=0)
    assert head.tokens.tolist() == [2, 5, 9]


# files, sizes, refusals


@pytest.mark.slow
def test_the_file_holds_the_head(tmp_path, monkeypatch):
    model, ids = learned(torch.bfloat16), cyclic(8)[None]
    technique = Eagle(gamma=2, branching=(2, 1), frequent=10, steps=5, lr=1e-2)
    result = technique(model, windows())
    assert {p.dtype for p in result.decoding.parameters()} == {torch.bfloat16}
    effkit.save(result, tmp_path / "model.safetensors")
    opened = effkit.load(tmp_path / "model.safetensors")
    assert opened.decoding.head.config == result.decoding.head.config and opened.decoding.branching == (2, 1)
    assert technique.claim(opened) == technique.claim(result)
    wanted = [step.tokens.tolist() for step in result.decoding.passes(result, ids, 20, sampler=GREEDY)]
    assert [step.tokens.tolist() for step in opened.decoding.passes(opened, ids, 20, sampler=GREEDY)] == wanted
    # the head alone, as it is shipped
    effkit.save(result.decoding.head, tmp_path / "a-head.safetensors")
    monkeypatch.setenv("EFFKIT_DATA", str(tmp_path))
    shipped = Eagle(gamma=2, branching=(2, 1), head="a-head")(model)
    assert [step.tokens.tolist() for step in shipped.decoding.passes(shipped, ids, 20, sampler=GREEDY)] == wanted
    for other, wanted in ((decoder(), "16, 32"), (decoder(d_model=32), "32, 32")):
        with pytest.raises(ValueError, match=rf"head 'a-head' must predict .* of \({wanted}\), got \(32, 16\): leave `head` empty"):
            Eagle(head="a-head")(other)
    with pytest.raises(ValueError, match=r"must predict .* of \(32, 16\), got GPT"):
        Eagle(head="model")(model)
    for learning in (dict(frequent=10), dict(steps=5), dict(seed=1, lr=1e-2)):
        with pytest.raises(ValueError, match=f"{' and '.join(sorted(learning))} would change nothing about head='a-head', which has learned"):
            Eagle(head="a-head", **learning)
    with pytest.raises(FileNotFoundError, match="there is no file .*nothing.safetensors"):
        Eagle(head="nothing")(model)


def test_smollm2_s_head_takes_less_than_ten_megabytes_in_bfloat16():
    """2 d^2 + attention 2 d^2 + 2 d * 192 + feed-forward 3 d * 1536 + two norms, with d = 576."""
    numbers = dict(vocab_size=49_152, d_model=576, layers=30, heads=9, kv_heads=3, d_ff=1536)
    with torch.device("meta"):
        head = EagleHead(**numbers)
    held = sum(p.numel() for p in head.parameters())
    assert held == 2 * 576**2 + 2 * 576**2 + 2 * 576 * 192 + 3 * 576 * 1536 + 2 * 576 == 4_203_648
    assert 2 * held < 10e6


def test_its_claim_is_what_the_head_weighs():
    model = decoder()
    head = sum(p.numel() for p in scattered(model).decoding.parameters())
    assert Eagle().claim(scattered(model)).value == pytest.approx(head / sum(p.numel() for p in model.parameters()))


@pytest.mark.parametrize("first", [Eagle(steps=0), Speculative(EarlyExit(0.5))], ids=repr)
def test_what_drafted_before_is_replaced(first):
    twice = Eagle(steps=0, gamma=2)(first(decoder()))
    assert twice.decoding.gamma == 2 and sum(p.numel() for p in twice.parameters()) == sum(p.numel() for p in Eagle(steps=0)(decoder()).parameters())


def test_recipes_round_trip():
    technique = Eagle(gamma=2, branching=(5, 2), frequent=7, steps=3)
    assert from_json(to_json(technique), effkit.techniques()) == technique


REFUSED = {
    "gamma must be a whole number, at least 1, got 0": lambda: Eagle(gamma=0),
    r"branching must be 4 whole numbers, at least 1, got \(3, 2\): write branching=\(2, 2, 2, 2\)": lambda: Eagle(branching=(3, 2)),
    "asks for 40 guesses at a place, and there are 32 tokens to choose from: ask for fewer": lambda: Eagle(gamma=1, branching=(40,), steps=0)(decoder()),
    "asks for 5 guesses at a place, and there are 4 tokens": lambda: Eagle(gamma=1, branching=(5,), frequent=4)(decoder(), windows()),
    "frequent must be at most 32, the vocabulary, got 33": lambda: Eagle(frequent=33)(decoder(), windows()),
    "Eagle looks 1 tokens ahead, and task.train has windows of 1: give it longer ones": lambda: Eagle()(decoder(), windows(1)),
    "Eagle reads task.train, which this task lacks": lambda: Eagle()(decoder()),
    "Eagle needs a decoder": lambda: Eagle()(mlp()),
}


@pytest.mark.parametrize("said, call", REFUSED.items(), ids=range(len(REFUSED)))
def test_what_cannot_work_is_refused_with_the_way_out(said, call):
    with pytest.raises(ValueError, match=said):
        call()


@pytest.mark.slow
@pytest.mark.real
def test_smollm2_writes_the_same_with_a_head_of_its_widths():
    if where("smollm2") is None:
        pytest.skip("smollm2 is not here: effkit fetch smollm2")
    model, _ = effkit.zoo.load("smollm2", torch.bfloat16)
    ids = torch.tensor([effkit.zoo.tokenizer("smollm2").encode("Once upon a time").ids])
    result = Eagle(steps=1, frequent=1000)(Fused()(model), Task(train=Windows(text(40, 49_152)[0], length=16, size=1)))
    assert sum(p.nbytes for p in result.decoding.parameters()) < 10e6
    assert torch.equal(result.generate(ids, 12, sampler=GREEDY), generate(result, ids, 12, sampler=GREEDY))
