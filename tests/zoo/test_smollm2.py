"""The real model, read from its file without transformers, against transformers' own reading of the same file."""

import pytest
import torch

from effkit import zoo
from effkit.caching import Preallocated
from effkit.core.generation import Sampler
from effkit.zoo.data import english_text
from effkit.zoo.fetch import where

pytestmark = [pytest.mark.real, pytest.mark.slow]
GREEDY = Sampler(temperature=0.0)
PROMPTS = ("The capital of France is", "def fibonacci(n):\n", "Once upon a time, in 1984, there were 42 ")


@pytest.fixture(scope="module")
def ours():
    return zoo.load("smollm2")[0]


@pytest.fixture(scope="module")
def theirs():
    transformers = pytest.importorskip("transformers")
    path = where("smollm2")
    read = dict(pretrained_model_name_or_path=str(path.parent), gguf_file=path.name)
    return transformers.AutoModelForCausalLM.from_pretrained(**read).eval(), transformers.AutoTokenizer.from_pretrained(
        **read
    )


def test_its_build_is_the_published_one(ours):
    c = ours.config
    assert (c.layers, c.d_model, c.heads, c.kv_heads, c.d_ff, c.vocab_size) == (30, 576, 9, 3, 1536, 49_152)
    assert (c.rope_theta, c.tied) == (100_000.0, True) and c.norm_eps == pytest.approx(1e-5)


def test_it_speaks(ours):
    coder = zoo.tokenizer("smollm2")
    ids = torch.tensor([coder.encode(PROMPTS[0]).ids])
    assert "Paris" in coder.decode(Preallocated()(ours).generate(ids, 6, sampler=GREEDY)[0].tolist())


@pytest.mark.peers("transformers")
def test_logits_equal_transformers_reading_of_the_file(ours, theirs):
    ids = torch.tensor([zoo.tokenizer("smollm2").encode(english_text()).ids[:400]])
    with torch.no_grad():
        seen, wanted = ours(ids), theirs[0](ids).logits
    assert wanted.abs().max() > 10
    assert (seen - wanted).abs().max() < 1e-3


@pytest.mark.peers("transformers")
@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_text_equals_transformers_reading_of_the_file(ours, theirs, prompt):
    ids = torch.tensor([zoo.tokenizer("smollm2").encode(prompt).ids])
    settings = dict(do_sample=False, eos_token_id=None, pad_token_id=0, attention_mask=torch.ones_like(ids))
    wanted = theirs[0].generate(ids, max_new_tokens=16, **settings)
    assert torch.equal(Preallocated()(ours).generate(ids, 16, sampler=GREEDY), wanted)


@pytest.mark.peers("transformers")
def test_the_tokenizer_is_transformers_own(theirs):
    coder, other = zoo.tokenizer("smollm2"), theirs[1]
    texts = [
        *PROMPTS,
        english_text()[:4000],
        "tabs\t and  double  spaces\n\n\n",
        "naïve café, 東京, 😀",
        "3.14159 2024-12-31 x1y2",
        "",
    ]
    texts += ["<|im_start|>user\nHello<|im_end|>\n"]
    for text in texts:
        ids = other(text, add_special_tokens=False).input_ids
        assert coder.encode(text).ids == ids, text
        assert coder.decode(ids, skip_special_tokens=False) == text
