"""GPT against transformers' Llama, in both directions: the same numbers, the same text."""

import pytest
import torch

from effkit.core.generation import Sampler
from effkit.zoo.gpt import GPT
from tests.caching.decoders import chunked, decoder, text

GREEDY = Sampler(temperature=0.0)
WITHIN = 1e-4

#: what may differ from one Llama to the next, a few at a time
BUILDS = {
    "one key head for all": dict(kv_heads=1),
    "two queries a key head": dict(kv_heads=2),
    "as many key heads as queries": dict(kv_heads=4),
    "untied": dict(tied=False),
    "untied, one key head": dict(tied=False, kv_heads=1),
    "theta 500": dict(rope_theta=500.0),
    "theta 100,000": dict(rope_theta=100_000.0),
    "theta 500,000": dict(rope_theta=500_000.0, tied=False),
    "eps 1e-6": dict(norm_eps=1e-6),
    "eps 0.1": dict(norm_eps=0.1),
    "wide feed-forward": dict(d_ff=72),
    "narrow feed-forward": dict(d_ff=10),
    "heads wider than d / heads": dict(head_dim=16),
    "heads narrower than d / heads": dict(head_dim=2, kv_heads=1),
    "three heads of an odd width": dict(d_model=18, heads=3, kv_heads=3, head_dim=10),
    "one layer": dict(layers=1),
    "five layers": dict(layers=5),
}
builds = pytest.mark.parametrize("numbers", BUILDS.values(), ids=BUILDS.keys())


def build(numbers: dict) -> GPT:
    return decoder(dtype=torch.float32, sharpness=6.0, **numbers)


def assert_same(ours: GPT, theirs) -> None:
    """Logits of a whole text and of one that comes in pieces, each with its own cache."""
    ids = text(20, rows=2)
    with torch.no_grad():
        wanted = theirs(ids).logits
        assert wanted.abs().max() > 0.5, "logits near zero would agree whatever happened"
        assert (ours(ids) - wanted).abs().max() < WITHIN
        past, cache = None, ours.new_cache(capacity=20)
        for start, end in ((0, 7), (7, 8), (8, 20)):
            answer = theirs(ids[:, start:end], past_key_values=past, use_cache=True)
            past = answer.past_key_values
            seen = ours(ids[:, start:end], cache)
            assert (seen - answer.logits).abs().max() < WITHIN and (seen - wanted[:, start:end]).abs().max() < WITHIN


@pytest.mark.slow
@pytest.mark.peers("transformers")
@builds
def test_to_hf(numbers):
    model = build(numbers)
    assert_same(model, model.to_hf())


@pytest.mark.peers("transformers")
@builds
def test_from_hf(numbers):
    from transformers import LlamaConfig, LlamaForCausalLM

    c = build(numbers).config
    torch.manual_seed(1)
    theirs = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=c.vocab_size,
            hidden_size=c.d_model,
            num_hidden_layers=c.layers,
            num_attention_heads=c.heads,
            num_key_value_heads=c.kv_heads,
            head_dim=c.head_dim,
            intermediate_size=c.d_ff,
            rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
            rms_norm_eps=c.norm_eps,
            tie_word_embeddings=c.tied,
            max_position_embeddings=c.context,
        )
    ).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.mul_(8.0) if p.dim() == 2 else p.uniform_(0.5, 1.5)
    model = GPT.from_hf(theirs)
    assert model.config == c
    assert_same(model, theirs)
    assert {p.data_ptr() for p in model.parameters()}.isdisjoint(p.data_ptr() for p in theirs.parameters())


@pytest.mark.peers("transformers")
@pytest.mark.parametrize("tied", [True, False])
def test_there_and_back_is_the_same_model(tied):
    model = build(dict(tied=tied))
    back = GPT.from_hf(model.to_hf())
    assert back.config == model.config and not back.training
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), back.state_dict().values(), strict=True))


@pytest.mark.slow
@pytest.mark.peers("transformers")
@pytest.mark.parametrize("numbers", [dict(kv_heads=1), dict(kv_heads=2), dict(tied=False, kv_heads=4)])
def test_greedy_text_is_transformers_own(numbers):
    model = build(numbers)
    theirs = model.to_hf()
    for seed in range(3):
        ids = text(6, seed=seed)
        settings = dict(do_sample=False, eos_token_id=None, pad_token_id=0, attention_mask=torch.ones_like(ids))
        wanted = theirs.generate(ids, max_new_tokens=24, **settings)
        assert torch.equal(model.generate(ids, 24, sampler=GREEDY), wanted)


@pytest.mark.peers("transformers")
@pytest.mark.parametrize(
    "change, said",
    [
        (dict(hidden_act="gelu"), "hidden_act is 'gelu', and GPT computes only 'silu'"),
        (dict(attention_bias=True), "attention_bias is True"),
        (dict(mlp_bias=True), "mlp_bias is True"),
        (dict(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}), "rope_type is 'linear'"),
    ],
)
def test_what_gpt_does_not_compute_is_refused(change, said):
    from transformers import LlamaConfig, LlamaForCausalLM

    small = dict(vocab_size=16, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    with pytest.raises(ValueError, match=said):
        GPT.from_hf(LlamaForCausalLM(LlamaConfig(**small, **change)))


@pytest.mark.parametrize(
    "bad, said",
    [
        (dict(heads=4, kv_heads=3), r"heads \(4\) must be a multiple of kv_heads \(3\)"),
        (dict(d_model=18, heads=4), r"d_model \(18\) is no multiple of heads \(4\); pass head_dim"),
    ],
)
def test_impossible_builds_are_refused(bad, said):
    with pytest.raises(ValueError, match=said):
        GPT(**bad)


def test_a_text_is_read_from_left_to_right():
    model, ids = build({}), text(12)
    changed = ids.clone()
    changed[0, 8] = (changed[0, 8] + 1) % 32
    with torch.no_grad():
        before, after = model(ids), model(changed)
    assert torch.allclose(before[:, :8], after[:, :8]) and not torch.allclose(before[:, 8:], after[:, 8:], atol=1e-3)


def test_rows_do_not_see_each_other():
    model, ids = build({}), text(10, rows=3)
    with torch.no_grad():
        assert torch.allclose(model(ids)[1:2], model(ids[1:2]), atol=1e-5)


def test_numbers_alone_rebuild_it():
    model = build(dict(head_dim=16, tied=False))
    assert GPT(**model.numbers()).config == model.config


@pytest.mark.peers("transformers")
def test_swapped_weights_are_noticed():
    model = build({})
    theirs = model.to_hf()
    for block in model.blocks:
        block.ff.gate, block.ff.up = block.ff.up, block.ff.gate
    with pytest.raises(AssertionError):
        assert_same(model, theirs)


@pytest.mark.peers("transformers")
def test_a_lost_head_is_noticed():
    model = build(dict(tied=False))
    theirs = model.to_hf()
    model.head = None
    with pytest.raises(AssertionError):
        assert_same(model, theirs)


def test_chunks_of_one_token_equal_the_whole():
    model, ids = build({}), text(8)
    with torch.no_grad():
        assert torch.allclose(chunked(model, model.new_cache(capacity=8), ids, [1] * 8), model(ids), atol=1e-5)
