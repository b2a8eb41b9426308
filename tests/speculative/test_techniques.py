"""Speculative, EarlyExit, PromptLookup and Use as techniques: what they change, what they share, what they refuse."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import effkit
from effkit import zoo
from effkit.caching import Preallocated
from effkit.core.generation import Sampler, generate
from effkit.core.recipe import from_json, to_json
from effkit.core.task import Task
from effkit.core.technique import Identity, Pipeline
from effkit.core.traits import FLOAT_WEIGHTS
from effkit.quantization import RTN
from effkit.speculative import (
    SHOWCASE,
    Eagle,
    EarlyExit,
    Jacobi,
    Lookahead,
    Medusa,
    PromptLookup,
    Speculative,
    SpeculativeTree,
    lookup,
)
from effkit.speculative.draft import share, tensor_bytes
from effkit.speculative.law import statistics
from effkit.speculative.speculate import DraftModel, speculate
from effkit.zoo.use import Use
from tests.caching.decoders import decoder, text
from tests.speculative.cycles import cyclic, learned
from tests.speculative.worlds import Table, enumerated, joint, largest_gap

GREEDY = Sampler(temperature=0.0)
TECHNIQUES = {
    "early exit": Speculative(EarlyExit(0.5)),
    "rounded": Speculative(RTN(bits=2, group_size=8), gamma=2),
    "itself": Speculative(Identity(), gamma=3),
    "cached": Speculative(Pipeline((Preallocated(), RTN(bits=3, group_size=8)))),
    "lookup": PromptLookup(),
}
every = pytest.mark.parametrize("technique", TECHNIQUES.values(), ids=TECHNIQUES.keys())


@pytest.fixture
def small_zoo(monkeypatch):
    """A zoo in which names stand for tiny decoders: what is tested is the way there."""
    known = {"gpt-small": decoder(5), "smollm2": decoder(5, vocab_size=64), "mlp": zoo.MLP((4, 3, 2))}
    monkeypatch.setattr(zoo, "load", lambda name, dtype=torch.float32: (known[name].to(dtype), Task()))


@pytest.mark.slow
@every
def test_greedy_text_stays_and_so_do_the_weights(technique):
    model, ids = decoder(), text(6, rows=3)
    result = technique(model)
    assert torch.equal(result.generate(ids, 20, sampler=GREEDY), model.generate(ids, 20, sampler=GREEDY))
    assert torch.equal(result.generate(ids, 20, temperature=0), model.generate(ids, 20, sampler=GREEDY))
    mine = {name: p for name, p in result.named_parameters(remove_duplicate=False) if not name.startswith("decoding.")}
    assert mine.keys() == dict(model.named_parameters()).keys()
    assert all(torch.equal(p, dict(model.named_parameters())[name]) for name, p in mine.items())
    assert "decoding" in str(effkit.log(result)) and "decoding" not in str(effkit.log(model))


@every
def test_rows_that_stop_early_repeat_their_stop_as_in_plain_decoding(technique):
    model, ids = decoder(), text(6, rows=3)
    free = model.generate(ids, 20, sampler=GREEDY)
    stop = [int(free[0, 8]), int(free[1, 12])]
    seen, wanted = (m.generate(ids, 20, sampler=GREEDY, stop=stop) for m in (technique(model), model))
    assert torch.equal(seen, wanted)


@every
def test_the_file_opens_without_the_recipe(technique, tmp_path):
    model, ids = decoder(), text(6)
    result = technique(model)
    effkit.save(result, tmp_path / "model.safetensors")
    opened = effkit.load(tmp_path / "model.safetensors")
    assert type(opened.decoding) is type(result.decoding) and opened.decoding.gamma == technique.gamma
    assert technique.claim(opened).value == technique.claim(result).value
    texts = [m.generate(ids, 20, rng=torch.Generator().manual_seed(3)) for m in (result, opened)]
    assert torch.equal(*texts)
    passes = [statistics(m.decoding.passes(m, ids, 20, sampler=GREEDY)) for m in (result, opened)]
    assert passes[0] == passes[1] and passes[0].tokens == 20


@every
def test_recipes_round_trip(technique):
    assert from_json(to_json(technique), effkit.techniques()) == technique


def test_what_the_draft_left_unchanged_is_held_and_written_once(tmp_path):
    model = decoder(dtype=torch.float32)
    plain, shared = (
        effkit.save(m, tmp_path / "model.safetensors") for m in (model, Speculative(EarlyExit(0.5))(model))
    )
    assert sum(p.numel() for p in Speculative(Identity())(model).parameters()) == sum(
        p.numel() for p in model.parameters()
    )
    assert shared - plain < 4000, "the header may grow; no tensor may be written twice"
    rounded = Speculative(RTN(bits=4))(model)
    assert rounded.decoding.draft.embedding.weight is rounded.embedding.weight
    assert rounded.decoding.draft.blocks[0].attention.q.dense_weight().shape == model.blocks[0].attention.q.weight.shape


def test_what_learns_is_not_shared_with_what_is_frozen():
    model, frozen = decoder(), decoder().requires_grad_(False)
    share(frozen, model)
    assert not {id(p) for p in frozen.parameters()} & {id(p) for p in model.parameters()}


def test_what_draft_and_target_share_is_counted_once():
    shared = Speculative(Identity())(decoder())
    assert tensor_bytes(shared) == tensor_bytes(decoder()) == sum(p.nbytes for p in decoder().parameters())


@pytest.mark.parametrize("gamma", [1, 3, 5])
def test_a_pass_proposes_as_many_as_it_was_told(gamma):
    """A copy as draft is always right: gamma + 1 tokens a pass of the target."""
    result, calls = Speculative(Identity(), gamma=gamma)(decoder()), []
    result.norm.register_forward_hook(lambda *_: calls.append(1))
    result.generate(text(4), 24, sampler=GREEDY)
    assert len(calls) == 1 + 24 // (gamma + 1), "one for the prompt"


def test_a_draft_that_was_masked_keeps_its_mask():
    """A parametrized weight is stored under another name and is not shared."""
    from effkit.pruning import Magnitude

    model = decoder()
    result = Speculative(Magnitude(0.5))(model)
    draft = result.decoding.draft
    assert (draft.blocks[0].ff.up.weight == 0).float().mean() > 0.2
    assert (result.blocks[0].ff.up.weight != 0).all()


def test_gamma_that_adapts_proposes_as_little_as_pays():
    """A copy as draft, said to be cheap, to be dear, and to be dear to verify: the same text from other passes."""
    model, ids, passes = learned(), cyclic(9)[None], {}
    for name, settings in {"cheap": dict(cost=0.05), "dear": dict(cost=0.9), "dear to verify": dict(cost=0.05, extra=0.95)}.items():
        made = Speculative(Identity(), gamma=6, **settings)(model)
        passes[name] = list(made.decoding.passes(made, ids, 60, sampler=GREEDY))
        assert torch.equal(torch.cat([step.tokens for step in passes[name]]), generate(model, ids, 60, sampler=GREEDY)[0, 9:])
    most = {name: [step.proposed for step in steps] for name, steps in passes.items()}
    assert max(most["cheap"]) == 6 and most["cheap"][0] < 6, "it begins with less, and learns"
    assert max(most["dear"]) <= 2 and sum(most["dear to verify"]) < sum(most["cheap"])
    with pytest.raises(ValueError, match="extra is for a gamma that adapts, got extra=0.1 without a cost"):
        Speculative(extra=0.1)


def test_its_claim_is_the_share_of_bytes_that_the_draft_reads():
    model = decoder()
    assert Speculative(Identity()).claim(Speculative(Identity())(model)).value == 1
    half = Speculative(EarlyExit(0.5))(model)
    assert Speculative(EarlyExit(0.5)).claim(half).value == tensor_bytes(half.decoding.draft) / tensor_bytes(model) < 1
    packed = RTN(bits=4)(model)
    assert tensor_bytes(packed) == sum(t.nbytes for t in {id(t): t for t in (*packed.parameters(), *packed.buffers())}.values())
    assert tensor_bytes(packed) > sum(p.nbytes for p in packed.parameters()), "codes are buffers"


def test_twice_replaces_the_draft():
    model = decoder()
    once = Speculative(EarlyExit(0.5))(model)
    twice = Speculative(EarlyExit(0.5), gamma=2)(once)
    assert twice.decoding.gamma == 2 and type(twice.decoding.draft.decoding).__name__ == "Autoregressive"
    assert len(twice.decoding.draft.blocks) == 1
    assert type(PromptLookup()(once).decoding).__name__ == "LookupDecoding"


def test_traits_say_what_the_draft_does_to_the_model():
    assert Speculative(RTN()).breaks == RTN().breaks and not FLOAT_WEIGHTS.holds(Speculative(RTN())(decoder()))
    assert not Speculative(EarlyExit()).breaks and RTN().needs < Speculative(RTN()).needs
    with pytest.raises(ValueError, match="RTN needs float weights, which Speculative removes; put RTN first"):
        Pipeline((Speculative(RTN()), RTN()))
    both = Pipeline((RTN(bits=4, group_size=8), Speculative(EarlyExit(0.5))))(decoder())
    assert both.generate(text(3), 5).shape == (1, 8)


@pytest.mark.parametrize("gamma", [0, -2, 1.5])
def test_gamma_that_proposes_nothing_is_refused(gamma):
    for kind in (Speculative, PromptLookup):
        with pytest.raises(ValueError, match="gamma must be a whole number, at least 1"):
            kind(gamma=gamma)


def test_drafts_that_are_none_are_refused(small_zoo):
    with pytest.raises(ValueError, match="draft must be a technique that makes it from the target"):
        Speculative(draft="gpt-small")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="gives a MLP, which generates nothing: take one that gives a decoder"):
        Speculative(Use("mlp"))(decoder())
    with pytest.raises(ValueError, match="needs a decoder"):
        Speculative()(torch.nn.Linear(2, 2))


def test_a_named_draft(small_zoo):
    model, ids = decoder(dtype=torch.float32), text(5)
    result = Speculative(Use("gpt-small"))(model)
    assert torch.equal(result.generate(ids, 12, sampler=GREEDY), model.generate(ids, 12, sampler=GREEDY))
    assert result.decoding.draft.embedding.weight.dtype == torch.float32


def test_a_named_draft_of_another_vocabulary_is_refused(small_zoo):
    with pytest.raises(ValueError, match="the draft has a vocabulary of 64 tokens and the target one of 32"):
        Speculative(Use("smollm2"))(decoder())


def test_a_named_model_must_fit_the_task(small_zoo):
    task = Task(example=(text(4),))
    assert Use("gpt-small")(decoder(), task).config == decoder(5).config
    with pytest.raises(
        ValueError, match=r"Use needs a model for the same inputs and outputs: smollm2 gives \(1, 4, 64\)"
    ):
        Use("smollm2")(decoder(), task)


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match="name must be one of .*'smollm2'.*, got 'gpt-5'"):
        Use("gpt-5")
    with pytest.raises(ValueError, match="name must be one of"):
        from_json({"schema": 1, "technique": "Use", "name": "gpt-5"}, effkit.techniques())


# early exit


@pytest.mark.parametrize("depth, blocks", [(0.01, 1), (0.3, 2), (0.5, 3), (1.0, 6)])
def test_early_exit_keeps_the_first_blocks(depth, blocks):
    model, ids = decoder(layers=6), text(5)
    result = EarlyExit(depth)(model)
    assert (
        len(result.blocks) == result.config.layers == EarlyExit(depth).claim(result).value == blocks
        and len(model.blocks) == 6
    )
    with torch.no_grad():
        x, cache = model.embedding(ids), model.new_cache(capacity=5)
        cache.advance(5, dtype=x.dtype)
        for layer, block in enumerate(model.blocks[:blocks]):
            x = block(x, cache, layer)
        assert torch.allclose(result(ids), model.logits(model.norm(x)))


@pytest.mark.parametrize("depth", [0, -1, 1.5])
def test_a_depth_that_keeps_nothing_is_refused(depth):
    with pytest.raises(ValueError, match="depth must be a number in"):
        EarlyExit(depth)


def test_a_decoder_without_blocks_is_refused():
    model = decoder()
    model.blocks = torch.nn.Sequential(*model.blocks)
    with pytest.raises(ValueError, match="EarlyExit needs a decoder with `blocks`"):
        EarlyExit()(model)


# prompt lookup


@pytest.mark.parametrize(
    "words, most, proposed",
    [
        ("the cat sat on the", 2, "cat sat"),
        ("a b c d a b c", 3, "d a b"),
        ("x a b y z a b q a b", 2, "q a"),  # the latest of two places
        ("a b a b a b", 3, "a b"),  # there is no more behind it
        ("a b a b a b a b", 3, "a b a"),  # the latest with three tokens behind it
        ("c c", 3, "c"),
        ("a a a a a", 5, "a a"),  # of places with too few behind them, the first has most
        ("a b c", 3, ""),
        ("a", 3, ""),
        ("p q r s q r t p q r", 2, "s q"),  # three tokens beat two
        ("a b a", 0, ""),
        ("a b c a d a", 2, "d a"),  # exactly two behind it are enough
    ],
)
def test_lookup_by_hand(words, most, proposed):
    names = sorted(set(words.split()))
    ids = torch.tensor([[names.index(w) for w in words.split()]])
    assert " ".join(names[i] for i in looked_up(ids, most, 3)) == proposed


def looked_up(ids, most, ngram, shortest=1):
    return lookup.Lookup(ngram, shortest)(ids, most, GREEDY, None).tokens.tolist()


@given(st.lists(st.integers(0, 3), min_size=1, max_size=30), st.integers(1, 6), st.integers(1, 4))
def test_lookup_proposes_what_followed_before(tokens, most, ngram):
    made = looked_up(torch.tensor([tokens]), most, ngram)
    assert len(made) <= most
    if made:
        last = tokens[-1]
        assert any(tokens[i] == last and tokens[i + 1 : i + 1 + len(made)] == made for i in range(len(tokens) - 1))
    else:
        assert tokens[-1] not in tokens[:-1]


def test_lookup_is_exact():
    """Proposals that are certain: q is 1 at one token. By enumeration, on a text that repeats itself."""
    target, ids = (
        decoder(0, vocab_size=3, layers=1, heads=2, kv_heads=1, d_model=8, d_ff=8),
        torch.tensor([[0, 1, 2, 0, 1]]),
    )
    model = PromptLookup(gamma=2, ngram=2)(target)
    outcome = enumerated(lambda: tuple(model.generate(ids, 3)[0, 5:].tolist()))
    assert sum(outcome.values()) == pytest.approx(1, abs=1e-9)
    assert largest_gap(outcome, joint(target, ids, 3, Sampler())) < 1e-9


def test_lookup_needs_fewer_passes_where_a_text_repeats():
    """A decoder that writes 0 1 2 ... 7 0 1 2 ...: after one round, whole blocks are accepted."""
    circle = Table(20 * torch.eye(8, dtype=torch.float64).roll(1, dims=1))
    ids = generate(circle, torch.tensor([[0]]), 12, sampler=GREEDY)
    made = statistics(speculate(circle, lookup.Lookup(3), ids, 27, gamma=8, sampler=GREEDY))
    assert made.passes == 3 and made.acceptance == 1 and made.tokens_per_pass == 9


@given(st.lists(st.integers(0, 2), min_size=1, max_size=30), st.integers(1, 6), st.lists(st.integers(1, 5), max_size=8))
def test_lookup_of_a_text_that_grows_is_that_of_the_whole_text(tokens, most, steps):
    ids, growing, n = torch.tensor([tokens]), lookup.Lookup(3), 1
    for step in [*steps, len(tokens)]:
        assert growing(ids[:, :n], most, GREEDY, None).tokens.tolist() == looked_up(ids[:, :n], most, 3)
        n = min(n + step, len(tokens))


def test_lookup_and_another_draft_take_turns():
    """Matches of two tokens or more are looked up, four at a time; elsewhere a copy proposes two, which are always right."""
    model, ids = decoder(0, sharpness=4.0), text(6)
    made = PromptLookup(gamma=4, shortest=2, otherwise=Speculative(Identity(), gamma=2))(model)
    own, asked = generate(model, ids, 40, sampler=GREEDY)[0], []
    steps = list(made.decoding.passes(made, ids, 40, sampler=GREEDY))
    assert torch.equal(torch.cat([ids[0], *(step.tokens for step in steps)]), own)
    n = 6
    for step in steps:
        found = looked_up(own[None, :n], min(4, 46 - n - 1), 3, shortest=2)
        asked.append(bool(found))
        assert step.proposed == (len(found) or min(2, 46 - n - 1)) and (found or step.accepted == step.proposed)
        n += len(step.tokens)
    assert {True, False} == set(asked)
    assert PromptLookup().claim(made).value == 5 and PromptLookup().claim(PromptLookup(otherwise=Speculative(gamma=6))(model)).value == 7


def test_who_sits_out_a_pass_keeps_nothing_that_was_rejected(monkeypatch):
    """Each proposal of a draft that is often wrong is what it writes after the very text, however passes went before."""
    model, ids, calls = decoder(2, sharpness=20.0), text(6), []
    made = PromptLookup(gamma=4, shortest=2, otherwise=Speculative(EarlyExit(0.5), gamma=3))(model)
    draft, right = EarlyExit(0.5)(model), DraftModel.__call__

    def checked(self, ids, most, sampler, rng):
        proposal = right(self, ids, most, sampler, rng)
        assert torch.equal(proposal.tokens, generate(draft, ids, most, sampler=GREEDY)[0, ids.shape[1] :])
        calls.append(most)
        return proposal

    monkeypatch.setattr(DraftModel, "__call__", checked)
    found = statistics(made.decoding.passes(made, ids, 60, sampler=GREEDY))
    assert found.acceptance < 0.9 and 3 < len(calls) < found.passes - 3
    nested = PromptLookup(gamma=2, otherwise=PromptLookup(gamma=1, shortest=2, otherwise=Speculative(gamma=6)))(model)
    assert nested.decoding.most == 6 and PromptLookup().claim(nested).value == 7


@pytest.mark.parametrize("other", [Speculative(EarlyExit(0.5), gamma=2), SpeculativeTree(EarlyExit(0.5), (2, 1)), Eagle(steps=0, gamma=2), Medusa(steps=0)])
def test_who_takes_turns_with_lookup_changes_no_text(other, tmp_path):
    model, ids = decoder(0, torch.float32, sharpness=4.0), text(6)
    technique = PromptLookup(gamma=3, shortest=2, otherwise=other)
    made = technique(model, Task())
    wanted = generate(model, ids, 30, sampler=GREEDY)
    assert torch.equal(made.generate(ids, 30, sampler=GREEDY), wanted)
    effkit.save(made, tmp_path / "model.safetensors")
    opened = effkit.load(tmp_path / "model.safetensors")
    seen, first = (statistics(m.decoding.passes(m, ids, 30, sampler=GREEDY)) for m in (opened, made))
    assert seen == first and from_json(to_json(technique), effkit.techniques()) == technique
    alone = PromptLookup(gamma=3, shortest=2)(model)
    assert first.proposed > statistics(alone.decoding.passes(alone, ids, 30, sampler=GREEDY)).proposed, "the other one is told what passes saw"


def test_lookup_in_turns_is_exact():
    target, ids = (
        decoder(0, vocab_size=3, layers=2, heads=2, kv_heads=1, d_model=8, d_ff=8),
        torch.tensor([[0, 1, 2, 0, 1]]),
    )
    model = PromptLookup(gamma=2, ngram=2, shortest=2, otherwise=Speculative(EarlyExit(0.5), gamma=1))(target)
    outcome = enumerated(lambda: tuple(model.generate(ids, 3)[0, 5:].tolist()))
    assert sum(outcome.values()) == pytest.approx(1, abs=1e-9)
    assert largest_gap(outcome, joint(target, ids, 3, Sampler())) < 1e-9


@pytest.mark.parametrize("other", [Jacobi(), Lookahead(), Preallocated(), Speculative(EarlyExit(0.5), cost=0.2)])
def test_who_cannot_take_turns_is_refused(other):
    with pytest.raises(ValueError, match="cannot take turns with lookup: take one that proposes a fixed number"):
        PromptLookup(otherwise=other)(decoder())
    with pytest.raises(ValueError, match="cannot take turns with lookup"):
        PromptLookup(otherwise=Preallocated())(PromptLookup()(decoder()))
    for bad, message in ((dict(otherwise="gpt-draft"), "otherwise must be a technique"), (dict(shortest=4), "shortest must be .* from 1 to 3, got 4")):
        with pytest.raises(ValueError, match=message):
            PromptLookup(**bad)


def test_lookup_that_reads_ahead_of_the_match_is_noticed(monkeypatch):
    monkeypatch.setattr(lookup.Lookup, "start", lambda self, most: 0)
    with pytest.raises(AssertionError):
        test_lookup_by_hand("the cat sat on the", 2, "cat sat")


def test_a_technique_that_shares_nothing_is_noticed(monkeypatch, tmp_path):
    monkeypatch.setattr("effkit.speculative.speculate.share", lambda draft, target: None)
    with pytest.raises(AssertionError):
        test_what_the_draft_left_unchanged_is_held_and_written_once(tmp_path)


def test_a_draft_that_writes_into_the_target_is_noticed(monkeypatch):
    def greedy_share(draft, target):
        draft.embedding.weight = target.embedding.weight
        with torch.no_grad():
            draft.embedding.weight.mul_(1.01)

    monkeypatch.setattr("effkit.speculative.speculate.share", greedy_share)
    with pytest.raises(AssertionError):
        test_greedy_text_stays_and_so_do_the_weights(TECHNIQUES["early exit"])


def test_the_showcase_can_be_built():
    assert SHOWCASE.paradigm == "speculative"
    for exhibit in SHOWCASE.exhibits:
        assert exhibit.technique()(decoder(), Task()).generate(text(3), 2).shape == (1, 5)
