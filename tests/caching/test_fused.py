"""The fused blocks compute what the blocks compute, and the same bits however many tokens pass at once."""

import copy
import ctypes

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import effkit
from effkit.caching import Fused, Preallocated, fused
from effkit.caching.fused import FEW, MANY, FusedCache, Fusing, kernels
from effkit.caching.kv import PreallocatedCache
from effkit.core import native
from effkit.core.generation import ConcatCache, Sampler
from effkit.core.task import Task
from effkit.pruning import Magnitude
from effkit.quantization import RTN
from effkit.speculative.self_draft import keep_blocks, view
from tests.caching import laws
from tests.caching.decoders import chunked, decoder, text

needs_compiler = pytest.mark.skipif(native.compiler() is None, reason="there is no C compiler")
pytestmark = needs_compiler
NARROW = st.sampled_from([torch.float32, torch.bfloat16])
shapes = st.fixed_dictionaries(
    dict(heads=st.sampled_from([2, 4]), kv_heads=st.sampled_from([1, 2]), head_dim=st.sampled_from([2, 6, 16, 32, 40]),
         d_model=st.sampled_from([16, 33, 70]), d_ff=st.sampled_from([8, 37, 96]), tied=st.booleans())
)  # fmt: skip


def close(seen: torch.Tensor, wanted: torch.Tensor) -> bool:
    limit = {torch.float32: 1e-5, torch.bfloat16: 0.04}[wanted.dtype] * wanted.abs().max().item()
    return (seen - wanted).abs().max().item() <= limit


@pytest.fixture
def calls(monkeypatch):
    """How many passes went through the kernels."""
    made = []
    right = fused.through
    monkeypatch.setattr(fused, "through", lambda *args: made.append(1) or right(*args))
    return made


@torch.no_grad()
def computes_what_the_blocks_compute(length=20, sizes=(4, 1, 3), rows=1, dtype=torch.float32, **shape):
    model, ids = decoder(dtype=dtype, sharpness=4.0, **shape), text(length, rows=rows)
    quick, plain = Fused()(model), Preallocated()(model)
    made = [chunked(m, m.new_cache(capacity=length), ids, sizes) for m in (quick, plain)]
    assert close(*made)


@pytest.mark.slow
@settings(max_examples=40)
@given(length=st.integers(1, 30), sizes=st.lists(st.integers(1, 9), max_size=5), rows=st.integers(1, 3), dtype=NARROW, shape=shapes)
def test_computes_what_the_blocks_compute(length, sizes, rows, dtype, shape):
    computes_what_the_blocks_compute(length, sizes, rows, dtype, **shape)


@torch.no_grad()
def a_block_is_its_tokens_one_by_one(length=24, sizes=(4, 1, 3), dtype=torch.bfloat16, **shape):
    """To the last bit."""
    model, ids = Fused()(decoder(dtype=dtype, sharpness=4.0, **shape)), text(length)
    one, several = (chunked(model, model.new_cache(capacity=length), ids, s) for s in ([1] * length, sizes))
    assert torch.equal(one, several)


@pytest.mark.slow
@settings(max_examples=40)
@given(length=st.integers(1, 32), sizes=st.lists(st.integers(1, 17), max_size=5), dtype=NARROW, shape=shapes)
def test_a_block_is_its_tokens_one_by_one_to_the_last_bit(length, sizes, dtype, shape):
    a_block_is_its_tokens_one_by_one(length, sizes, dtype, **shape)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_branch_of_a_tree_is_its_line_to_the_last_bit(dtype):
    model, before, tokens, parents = Fused()(decoder(dtype=dtype)), text(5), text(6, seed=2), [-1, 0, 0, 2, -1, 4]
    cache = model.new_cache(capacity=20)
    for way in laws.branches(parents):
        cache.truncate(0)
        chunked(model, cache, before, [])
        seen = model(tokens, cache, torch.tensor(parents))[:, way]
        line = model.new_cache(capacity=20)
        wanted = chunked(model, line, torch.cat((before, tokens[:, way]), 1), [5] + [1] * len(way))[:, 5:]
        assert torch.equal(seen, wanted)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_unequal_length_are_each_alone_to_the_last_bit(dtype, calls):
    """One prompt longer than the others, blocks of tokens, a row that is taken back further, another block."""
    model, lengths = Fused()(decoder(dtype=dtype, sharpness=4.0)), [9, 2, 5]
    rows = [text(30, seed=seed) for seed in range(3)]
    cache, alone = model.new_cache(capacity=30), [model.new_cache(capacity=30) for _ in rows]
    model(torch.cat([row[:, :9] for row in rows]), cache)
    for row, line, n in zip(rows, alone, lengths, strict=True):
        model(row[:, :n], line)
    for new, taken in ((4, [0, 0, 0]), (3, [2, 0, 3]), (1, [1, 1, 1])):
        lengths = [n - back for n, back in zip(lengths, taken, strict=True)]
        cache.truncate(torch.tensor(lengths))
        seen = model(torch.cat([row[:, n : n + new] for row, n in zip(rows, lengths, strict=True)]), cache)
        for row, line, n, made in zip(rows, alone, lengths, seen, strict=True):
            line.truncate(n)
            assert torch.equal(made[None], model(row[:, n : n + new], line))
        lengths = [n + new for n in lengths]
    assert len(calls) == 1 + 3 + 3 * 4 and len(cache.buffers) == 2


@torch.no_grad()
def test_threads_change_no_bit():
    model, ids, made = Fused()(decoder(dtype=torch.float32, d_model=64, d_ff=130)), text(20), []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            made.append(chunked(model, model.new_cache(capacity=20), ids, [3, 1]))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(made[0], made[1]) and torch.equal(made[0], made[2])


@torch.no_grad()
def many_threads_change_no_bit():
    """In layers so large, and rows and hidden states so unevenly shared, that a thread that does not wait is too early."""
    model = Fused()(decoder(dtype=torch.float32, sharpness=4.0, d_model=252, heads=6, kv_heads=3, d_ff=1030, layers=4))
    before, ids = torch.get_num_threads(), text(9)
    try:
        torch.set_num_threads(1)
        wanted = chunked(model, model.new_cache(capacity=9), ids, [6, 1])
        for _ in range(8):
            for threads in (2, 3, 4):
                torch.set_num_threads(threads)
                assert torch.equal(chunked(model, model.new_cache(capacity=9), ids, [6, 1]), wanted)
    finally:
        torch.set_num_threads(before)


def test_many_threads_change_no_bit():
    many_threads_change_no_bit()


BARRIER = "#pragma omp barrier\n"


def with_late_threads(who: int, parts: list[str]) -> str:
    """The source, in which every second thread comes late behind each barrier."""
    late = f"{BARRIER}if (omp_get_thread_num() % 2 == {who}) usleep(200);\n"
    return "#include <unistd.h>\n" + late.join(parts)


@pytest.mark.slow
@pytest.mark.parametrize("which", range(6))
def test_a_lost_barrier_is_noticed(which, monkeypatch):
    """Where the threads that do not wait come too early for those that are late: the odd ones or the even ones."""
    parts = fused._SOURCE.read_text().split(BARRIER)
    assert len(parts) == 7
    without = [*parts[:which], parts[which] + parts[which + 1], *parts[which + 2 :]]
    noticed = []
    for who in range(2):
        monkeypatch.setattr(fused, "_SOURCE", with_late_threads(who, without))
        try:
            many_threads_change_no_bit()
        except AssertionError:
            noticed.append(who)
    assert noticed


@pytest.mark.slow
@pytest.mark.parametrize("who", range(2))
def test_threads_that_come_late_change_no_bit(who, monkeypatch):
    monkeypatch.setattr(fused, "_SOURCE", with_late_threads(who, fused._SOURCE.read_text().split(BARRIER)))
    many_threads_change_no_bit()


def test_the_kernels_power_is_off_by_two_units_in_the_last_place_at_most(monkeypatch):
    source = fused._SOURCE.read_text() + "void powers(float *x, long n) { for (long i = 0; i < n; i++) x[i] = power(x[i]); }"
    monkeypatch.setattr(fused, "_SOURCE", source)
    x = torch.cat((torch.linspace(-87, 88, 200_001), torch.linspace(-1, 1, 100_001), torch.tensor([0.0, -1e-30, -100.0, 100.0])))
    seen, wanted = x.clone(), x.double().clamp(-87, 88).exp()
    kernels().powers(ctypes.c_void_p(seen.data_ptr()), ctypes.c_long(len(x)))
    unit = torch.nextafter(wanted.float(), torch.tensor(torch.inf)).double() - wanted.float().double()
    assert ((seen.double() - wanted).abs() <= 2 * unit).all()
    assert seen[x == 0] == 1


def fusing(kind):
    """A maker of caches for the laws, whose model runs fused from then on."""

    def maker(model, capacity):
        model.running = Fusing()
        return kind(model, capacity)

    return maker


MAKERS = {
    "fused": fusing(lambda model, capacity: FusedCache(model.rope, capacity)),
    "preallocated": fusing(lambda model, capacity: PreallocatedCache(model.rope, capacity)),
    "concatenated": fusing(lambda model, capacity: ConcatCache(model.rope)),
}


@pytest.mark.parametrize("kind", MAKERS)
def test_over_every_cache_the_laws_hold(kind, calls):
    laws.equals_recomputed(MAKERS[kind], dtype=torch.float32)
    laws.taken_back_leaves_no_trace(MAKERS[kind], dtype=torch.float32)
    laws.a_tree_says_what_its_branches_say(MAKERS[kind], dtype=torch.float32)
    laws.a_refused_pass_has_not_happened(MAKERS[kind], dtype=torch.float32)
    if kind != "concatenated":
        laws.rows_of_unequal_length_equal_one_by_one(MAKERS[kind], dtype=torch.float32)
    assert calls


def test_greedy_text_is_the_blocks_text():
    model = decoder(dtype=torch.float32)
    wanted = model.generate(text(4), 40, temperature=0.0)
    assert torch.equal(Fused()(model).generate(text(4), 40, temperature=0.0), wanted)


@pytest.mark.slow
@torch.no_grad()
def test_a_trained_model_says_the_same(calls):
    model, ids = effkit.load(effkit.core.paths.data_dir() / "gpt-small.safetensors").float(), text(200, vocab=1000)
    quick = Fused()(model)
    seen = chunked(quick, quick.new_cache(capacity=200), ids, [170, 1, 7, 9, 1])
    assert close(seen, model(ids)) and len(calls) == 5, "all but the first chunk"


# what the kernels do not do is done in order


def hooked(model):
    model.blocks[1].ff.up.register_forward_hook(lambda module, args, out: out * 2)
    return model


def with_bias(model):
    old = model.blocks[0].attention.q
    model.blocks[0].attention.q = nn.Linear(old.in_features, old.out_features, dtype=old.weight.dtype)
    return model


IN_ORDER = {
    "a hook": hooked,
    "a bias": with_bias,
    "packed weights": lambda model: RTN(bits=4, group_size=16)(model, Task("none")),
    "a mask": lambda model: Magnitude(0.5)(model, Task("none")),
    "double precision": lambda model: model.double(),
    "another kind of norm": lambda model: setattr(model.blocks[0], "ff_norm", nn.LayerNorm(16)) or model,
    "a hook before": lambda model: model.blocks[0].register_forward_pre_hook(lambda module, args: None) and model,
    "weights in another order": lambda model: setattr(model.blocks[0].ff.up.weight, "data", model.blocks[0].ff.up.weight.data.t().contiguous().t()) or model,
}


@torch.no_grad()
@pytest.mark.parametrize("kind", IN_ORDER)
def test_anything_else_runs_in_order(kind, calls):
    model, ids = IN_ORDER[kind](decoder(dtype=torch.float32)), text(5)
    quick = Fused()(model)
    seen = chunked(quick, quick.new_cache(capacity=5), ids, [3, 1])
    assert torch.allclose(seen, chunked(model, model.new_cache(capacity=5), ids, [3, 1]), rtol=1e-5, atol=1e-5)
    assert not calls


LAST = {
    "a hook": lambda norm: norm.register_forward_hook(lambda module, args, out: out * 2),
    "no weight": lambda norm: norm.register_parameter("weight", None),
    "no epsilon": lambda norm: setattr(norm, "eps", None),
    "a hook before": lambda norm: norm.register_forward_pre_hook(lambda module, args: (args[0] + 1,)),
    "its own weight": lambda norm: nn.init.uniform_(norm.weight, 0.5, 2.0),
    "a large epsilon": lambda norm: setattr(norm, "eps", 1.0),
}


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", LAST)
def test_the_last_norm_is_the_model_s_own(kind, dtype, calls):
    """In the kernels, or called; the blocks go through the kernels either way, over their own cache and any other."""
    model, ids = decoder(dtype=dtype, sharpness=4.0), text(5)
    LAST[kind](model.norm)
    wanted = chunked(model, model.new_cache(capacity=5), ids, [3, 1])
    for cache in (FusedCache(model.rope, 5), ConcatCache(model.rope)):
        quick = Fused()(model)
        cache.rope = quick.rope
        assert close(chunked(quick, cache, ids, [3, 1]), wanted)
    assert len(calls) == 6


@torch.no_grad()
def test_a_last_norm_of_a_wrong_shape_is_an_error():
    model = decoder(dtype=torch.float32)
    model.norm.weight = nn.Parameter(model.norm.weight[:-1].clone())
    refused_as_by_the_blocks(model, text(2))


@torch.no_grad()
def test_buffers_are_found_anew_where_others_have_moved_them():
    """Texts in turns, a cache that grows, is taken back, and grows by operators in between: nothing is read where it no longer lies."""
    model, lines = Fused()(decoder(dtype=torch.float32)), [text(40, seed=seed) for seed in (1, 2)]
    wanted = [chunked(model, model.new_cache(capacity=40), ids, [1] * 40) for ids in lines]
    caches, made = [model.new_cache(capacity=3) for _ in lines], [[], []]
    for at in range(0, 40, 2):
        for ids, cache, seen in zip(lines, caches, made, strict=True):
            with torch.set_grad_enabled(at % 8 == 6):  # then they run in order
                model(text(1, seed=at), cache)
                cache.truncate(at)
                seen.append(model(ids[:, at : at + 2], cache).detach())
    assert all(close(torch.cat(seen, 1), right) for seen, right in zip(made, wanted, strict=True))


@torch.no_grad()
def test_buffers_that_operators_have_replaced_are_not_read_where_they_lay():
    """Another text, written in order, outgrows the room; of it a part stays that the old buffers would have had room for."""
    model = Fused()(decoder(dtype=torch.float32))
    cache = model.new_cache(capacity=4)
    model(text(4, seed=1), cache)
    cache.truncate(0)
    with torch.enable_grad():
        model(text(6, seed=2), cache)
    cache.truncate(2)
    wanted = chunked(model, model.new_cache(capacity=6), text(6, seed=2), [2, 1])[:, 2:3]
    assert close(model(text(6, seed=2)[:, 2:3], cache), wanted)


@torch.no_grad()
@pytest.mark.parametrize("graded", [False, True])
def test_what_a_refused_pass_has_promised_is_no_room(graded):
    """A full cache, a pass that fails after the capacity was doubled, and the text goes on: nothing is written behind the buffers."""
    model, ids = Fused()(decoder(dtype=torch.float32)), text(12)
    cache = model.new_cache(capacity=4)
    model(ids[:, :4], cache)
    with torch.set_grad_enabled(graded), pytest.raises(ValueError, match="holds 1 rows and got 2"):
        model(text(1, rows=2), cache)
    cache.truncate(4)
    behind = cache.buffers[-1]
    seen = chunked(model, cache, ids, [1] * 12)
    assert cache.buffers[-1] is not behind and close(seen, chunked(model, model.new_cache(capacity=12), ids, [4])[:, 4:])


@torch.no_grad()
@pytest.mark.parametrize("change", [
    lambda model: setattr(model, "norm", nn.RMSNorm(16, eps=1.0)),
    lambda model: setattr(model.norm, "weight", nn.Parameter(torch.rand(16))),
    lambda model: setattr(model, "norm", nn.Identity()),
])  # fmt: skip
def test_a_view_with_a_last_norm_of_its_own_uses_it_over_the_same_cache(change):
    model = Fused()(decoder(dtype=torch.float32))
    other, cache = view(model), model.new_cache(capacity=9)
    other.norm = copy.deepcopy(model.norm)
    change(other)
    for m in (model, other, model):
        cache.truncate(0)
        assert torch.equal(m(text(3), cache), m(text(3), m.new_cache(capacity=9)))


@torch.no_grad()
def test_rotary_tables_have_the_model_s_precision():
    """A cache that was emptied and goes on with the model cast: as a fresh one would."""
    model = Preallocated()(decoder(dtype=torch.float32))
    cache = model.new_cache(capacity=9)
    model(text(4), cache)
    model.double()
    cache.truncate(0)
    cache.buffers.clear()
    assert torch.equal(model(text(4), cache), model(text(4), model.new_cache(capacity=9)))


@torch.no_grad()
def test_weights_that_are_given_another_storage_in_the_middle_of_a_text_are_read():
    model, ids, made = decoder(dtype=torch.float32), text(6), []
    for m in (Preallocated()(model), Fused()(model)):
        cache = m.new_cache(capacity=6)
        m(ids[:, :4], cache)
        m.norm.weight.data = m.norm.weight.data * 3
        made.append(m(ids[:, 4:], cache))
    assert close(*made)


@pytest.fixture(params=[True, False])
def has(request, monkeypatch):
    """Whether the processor multiplies in bfloat16."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": request.param})
    return request.param


@torch.no_grad()
def test_a_long_prompt_in_bfloat16_is_its_tokens_one_by_one_where_a_library_would_be_slow(has, calls, monkeypatch):
    asked = []
    monkeypatch.setattr(fused, "kernels", lambda: asked.append(1) or kernels())
    blocks, ids = decoder(dtype=torch.bfloat16, sharpness=4.0), text(length := 2 * FEW + 5)
    wanted = chunked(model := Preallocated()(blocks), model.new_cache(capacity=length), ids, [])
    one, several = (chunked(model := Fused()(blocks), model.new_cache(capacity=length), ids, sizes) for sizes in ([1] * length, []))
    assert close(several, wanted) and close(one, wanted)
    assert len(calls) == length + (not has) and (has or torch.equal(one, several))
    assert len(asked) == 2 * len(calls)  # for the blocks and for the output layer


@torch.no_grad()
def test_a_long_prompt_in_float32_runs_in_order_wherever_and_a_very_long_one_in_bfloat16(has, calls):
    Fused()(decoder(dtype=torch.float32))(text(FEW + 1))
    Fused()(decoder(dtype=torch.bfloat16))(text(MANY // 8 + 1, rows=8))
    assert not calls


def test_gradients_and_many_tokens_run_in_order(calls):
    model = Fused()(decoder(dtype=torch.float32))
    model(text(5)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    with torch.no_grad():
        model(text(FEW + 1))
        model(text(FEW // 2 + 1, rows=2))
        with torch.autocast("cpu", torch.bfloat16):
            model(text(5))
    assert not calls
    with torch.no_grad():
        model(text(FEW // 2, rows=2))
    assert len(calls) == 1


LAYERS = ["attention_norm", "attention.q", "attention.k", "attention.v", "attention.o", "ff_norm", "ff.gate", "ff.up", "ff.down"]


def refused_as_by_the_blocks(model, ids):
    """An error, as of the operators, and nothing read that lies behind the weights; through a cache of its own."""
    for made in (Preallocated()(model), Fused()(model)):
        with pytest.raises(RuntimeError, match="shape|size|dimension|divide"):
            made(ids, made.new_cache(capacity=4))


@torch.no_grad()
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("path", LAYERS)
def test_weights_of_a_wrong_shape_are_an_error_and_no_memory_of_others(path, axis):
    model = decoder(dtype=torch.float32)
    layer = model.blocks[1].get_submodule(path)
    if axis < layer.weight.dim():
        layer.weight = nn.Parameter(layer.weight.narrow(axis, 0, layer.weight.shape[axis] - 1).contiguous())
        refused_as_by_the_blocks(model, text(2))


@torch.no_grad()
def test_a_block_of_another_width_and_heads_that_do_not_divide_are_errors_too():
    model = decoder(dtype=torch.float32)
    model.blocks[1] = decoder(dtype=torch.float32, d_model=8).blocks[0]
    refused_as_by_the_blocks(model, text(2))
    for queries, keys in ((12, 8), (18, 6), (16, 6)):  # three heads over two; no whole heads
        model = decoder(dtype=torch.float32)
        a = model.blocks[1].attention
        a.q, a.o = nn.Linear(16, queries, bias=False), nn.Linear(queries, 16, bias=False)
        a.k, a.v = nn.Linear(16, keys, bias=False), nn.Linear(16, keys, bias=False)
        refused_as_by_the_blocks(model, text(2))
    model = Fused()(decoder(dtype=torch.float32))
    model.embedding = nn.Embedding(32, 13)
    with pytest.raises(RuntimeError, match="shape|size"):
        model.running.logits(model, torch.zeros(1, 1, 16))


@torch.no_grad()
def test_norms_without_weights_run_in_order(calls):
    model = Fused()(decoder(dtype=torch.float32))
    model.blocks[0].ff_norm = nn.RMSNorm(16, eps=1e-5, elementwise_affine=False)
    assert model(text(2)).isfinite().all() and not calls


@torch.no_grad()
def test_a_model_that_shares_a_cache_s_rope_and_not_its_blocks_is_read_by_its_own():
    model = Fused()(decoder(dtype=torch.float32))
    shorter, cache = keep_blocks(view(model), [0]), model.new_cache(capacity=9)
    model(text(4), cache)
    cache.truncate(0)
    assert torch.equal(shorter(text(3), cache), shorter(text(3), shorter.new_cache(capacity=9)))


@torch.no_grad()
def test_a_kind_of_tensor_of_its_own_is_asked(calls):
    class Own(torch.Tensor):
        pass

    model = Fused()(decoder(dtype=torch.float32))
    layer = model.blocks[0].ff.up
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Own))
    assert model(text(2)).isfinite().all() and not calls


@torch.no_grad()
def test_who_listens_hears_every_operator(calls):
    model = Fused()(decoder(dtype=torch.float32))
    heard = []
    hook = nn.modules.module.register_module_forward_hook(lambda module, args, out: heard.append(module))
    try:
        model(text(2))
    finally:
        hook.remove()
    assert model.blocks[1].ff.down in heard and not calls
    model.requires_grad_(False)  # a trace takes them for constants
    layer = torch.jit.trace(lambda x: model.running.logits(model, x), torch.randn(1, 1, 16))
    x = torch.randn(1, 2, 16)
    assert close(layer(x), model.running.logits(model, x))


@torch.no_grad()
def test_a_copied_cache_goes_on_as_the_first_would():
    model = Fused()(decoder(dtype=torch.float32))
    cache = model.new_cache(capacity=9)
    model(text(4), cache)
    again, twin = copy.deepcopy((model, cache))
    for block in again.blocks:
        block.ff.up.weight.data = 2 * block.ff.up.weight.data
    seen, line = again(text(1), twin), torch.cat((text(4), text(1)), 1)
    same = model.new_cache(capacity=9)
    model(text(4), same)
    assert torch.equal(model(text(1), cache), model(text(1), same)), "the first is as it was"
    assert not close(seen, chunked(model, model.new_cache(capacity=9), line, [4])[:, 4:]), "the twin reads its own model's weights"


@pytest.mark.parametrize("hang", [
    lambda head: head.register_forward_hook(lambda module, args, out: out * 0),
    lambda head: head.register_forward_pre_hook(lambda module, args: (args[0] * 0,)),
])  # fmt: skip
def test_a_hooked_output_layer_is_called(hang):
    model = Fused()(decoder(dtype=torch.float32, tied=False))
    hang(model.head)
    with torch.no_grad():
        assert not model(text(3)).any()


@torch.no_grad()
def test_a_stream_of_another_width_in_the_middle_of_a_text_is_an_error_and_no_memory_of_others():
    for make in (Preallocated(), Fused()):
        model = make(decoder(dtype=torch.float32))
        cache = model.new_cache(capacity=9)
        model(text(4), cache)
        model.embedding = nn.Embedding(32, 8)
        with pytest.raises(RuntimeError, match="shape|size|dimension"):
            model(text(1), cache)


@torch.no_grad()
@pytest.mark.parametrize("cache", [FusedCache, PreallocatedCache])
def test_each_norm_has_its_own_epsilon(cache, calls):
    model = decoder(dtype=torch.float32, sharpness=1.0)
    for i, block in enumerate(model.blocks):
        block.attention_norm.eps, block.ff_norm.eps = 10.0 ** (-i), 10.0 ** (-2 - i)
    model.norm.eps = 3.0
    quick, ids = Fused()(model), text(5)
    wanted = chunked(model, model.new_cache(capacity=5), ids, [3])
    assert close(chunked(quick, cache(quick.rope, 5), ids, [3]), wanted) and len(calls) == 2


def test_without_a_compiler_it_says_so(monkeypatch, calls):
    monkeypatch.setenv("EFFKIT_NO_COMPILER", "1")
    model = decoder(dtype=torch.float32)
    quick = Fused()(model)
    assert "there is no C compiler" in str(effkit.log(quick))
    assert torch.equal(quick.generate(text(3), 5, temperature=0.0), model.generate(text(3), 5, temperature=0.0)) and not calls


@torch.no_grad()
def test_what_is_not_finite_stays_so():
    model = Fused()(decoder(dtype=torch.float32))
    model.embedding.weight[3] = torch.nan
    assert model(torch.tensor([[3]])).isnan().all()
    cache = model.new_cache(capacity=9)
    assert model(torch.tensor([[1, 2]]), cache).isfinite()[..., :3].all() and model(torch.tensor([[3, 1]]), cache)[:, :, 5].isnan().all()


@torch.no_grad()
def test_what_a_mask_hides_may_be_anything():
    """Of two siblings in a tree, each is hidden from the other, which only a mask can do."""
    model = Fused()(decoder(dtype=torch.float32))
    model.embedding.weight[3] = torch.inf
    cache = model.new_cache(capacity=9)
    model(torch.tensor([[1, 2]]), cache)
    seen = model(torch.tensor([[6, 3, 5]]), cache, torch.tensor([-1, -1, 0]))
    usual = [0, 1, 2, *range(4, seen.shape[-1])]  # not the infinite token's own logit
    assert seen[:, [0, 2]][..., usual].isfinite().all() and seen[:, 1].isnan().any()


@torch.no_grad()
def what_is_kept_in_bfloat16_is_rounded_to_nearest():
    """The first layer's values, against the same in float64: all but those that lie next to a tie."""
    model, ids = decoder(dtype=torch.bfloat16, head_dim=16), text(30)
    quick, exact = Fused()(model), Preallocated()(model).double()
    kept, wanted = (m.new_cache(capacity=30) for m in (quick, exact))
    chunked(quick, kept, ids, [1, 3, 9]), chunked(exact, wanted, ids, [])
    seen, right = (cache.buffers[0][1, ..., :30, :] for cache in (kept, wanted))
    assert (seen != right.bfloat16()).double().mean() < 0.005


def test_what_is_kept_in_bfloat16_is_rounded_to_nearest(monkeypatch):
    what_is_kept_in_bfloat16_is_rounded_to_nearest()
    source = fused._SOURCE.read_text()
    assert "(bits + 0x7fff + (bits >> 16 & 1)) >> 16" in source
    monkeypatch.setattr(fused, "_SOURCE", source.replace("(bits + 0x7fff + (bits >> 16 & 1)) >> 16", "bits >> 16"))
    with pytest.raises(AssertionError):
        what_is_kept_in_bfloat16_is_rounded_to_nearest()


def test_a_decoder_of_another_make_is_refused():
    class Other(nn.Module):
        new_cache = generate = kv = decoding = None

    with pytest.raises(ValueError, match="Fused needs a decoder that lets its blocks be run, as GPT does; Other does not"):
        Fused()(Other(), Task("none"))


def test_the_input_is_left_as_it_is():
    model, x = Fused()(decoder(dtype=torch.float32)), torch.randn(1, 3, 16)
    before = x.clone()
    with torch.no_grad():
        cache = model.new_cache(capacity=3)
        cache.advance(3, dtype=x.dtype)
        model.running(model, x, cache)
    assert torch.equal(x, before)


# planted bugs, in the C source


BUGS = {
    "the last of four queries do not see themselves": ("i + some)", "i + 1)"),
    "a query sees one token too many": ("j <= last", "j <= last + 1"),
    "scores not scaled": ("query[t * d + c] /= sqrtf((float)d)", "query[t * d + c] /= 1"),
    "keys not rotated": ("* d + c, turned[c], half)", "* d + c, key[c], half)"),
    "heads of another group": ("h / (heads / groups)", "h % groups"),
    "the last keys forgotten": ("rows1(keys, from / d + j, half, query, d, some, score + j, m, 0);", ";"),
    "the second query's sum is the first one's": ("chance[m + j], chance[2", "chance[j], chance[2"),
    "no residual": ("product_in(o, n, kind, a, heads, tokens, x, n, 1)", "product_in(o, n, kind, a, heads, tokens, x, n, 0)"),
    "gate for up": ("product_in(up, hidden", "product_in(gate, hidden"),
    "a tail forgotten": ("if (i < n)", "if (i > n)"),
    "a tail of another token": ("part(x, t * n + i, n - i, 0)", "part(x, i, n - i, 0)"),
    "the last row forgotten": ("rows1(w, r, kind, x, n, tokens, y + r, wide, add);", ";"),
    "the second norm with the first one's epsilon": ("w[5], eps[2 * l + 1], w[6]", "w[5], eps[2 * l], w[6]"),
    "epsilon forgotten": ("squares / n + eps", "squares / n"),
    "the norm's weight forgotten": ("scale * number(weight, i, half)", "scale"),
}


@pytest.mark.parametrize("name", BUGS)
def test_a_bug_in_the_kernels_is_noticed(name, monkeypatch):
    old, new = BUGS[name]
    source = fused._SOURCE.read_text()
    assert old in source
    monkeypatch.setattr(fused, "_SOURCE", source.replace(old, new))
    with pytest.raises(AssertionError):
        computes_what_the_blocks_compute(d_model=35, d_ff=37, head_dim=6)
        computes_what_the_blocks_compute(d_model=35, d_ff=37, head_dim=6, norm_eps=1.0)
        test_each_norm_has_its_own_epsilon.__wrapped__(FusedCache, [1, 1])


NARROWER = "#undef __AVX512F__\n"  # what most laptops compile, on every processor


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrower_registers_compute_the_same(dtype, monkeypatch):
    """Of five and six tokens two rows are summed, and then two more."""
    monkeypatch.setattr(fused, "_SOURCE", NARROWER + (source := fused._SOURCE.read_text()))
    for sizes in ((4, 1, 3), (5, 6, 9), (11, 2)):
        computes_what_the_blocks_compute(24, sizes, dtype=dtype, d_model=35, d_ff=37, head_dim=6)
        a_block_is_its_tokens_one_by_one(24, sizes, dtype, d_model=70, d_ff=37, head_dim=6)
    monkeypatch.setattr(fused, "_SOURCE", NARROWER + source.replace("at + 2 * n, kind", "at, kind"))
    with pytest.raises(AssertionError):
        computes_what_the_blocks_compute(24, (5, 6, 9), dtype=dtype, d_model=35, d_ff=37, head_dim=6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_a_processor_s_own_instructions_it_computes_the_same(dtype, monkeypatch):
    """What other makes of processor compile. That a block is its tokens is for their compilers to keep, and for the laws above to see."""
    for name in ("AVX512F", "AVX2", "FMA"):
        monkeypatch.setattr(fused, "_SOURCE", f"#undef __{name}__\n" + (fused._SOURCE if isinstance(fused._SOURCE, str) else fused._SOURCE.read_text()))
    computes_what_the_blocks_compute(24, (4, 1, 9), dtype=dtype, d_model=35, d_ff=37, head_dim=6)


def test_a_sum_that_depends_on_the_number_of_tokens_is_noticed(monkeypatch):
    other = "case 4: tile##R##4_other(w, r * n, kind, x, n, y, wide, add); break;"
    changed = fused._SOURCE.read_text().replace("SOME(R, 4) SOME", f"{other} SOME").replace("ROWS(1)", OTHER + "ROWS(1)")
    assert changed.count("_other") == 4
    monkeypatch.setattr(fused, "_SOURCE", changed)
    with pytest.raises(AssertionError):
        a_block_is_its_tokens_one_by_one(dtype=torch.float32, d_model=70, head_dim=6)


OTHER = """
static void tile14_other(const void *w, long at, int half, const float *x, long n, float *y, long wide, int add) {
    for (int t = 0; t < 4; t++) {
        float sum = 0;
        for (long i = 0; i < n; i++) sum += number(w, at + i, half) * x[t * n + i];
        y[t * wide] = add ? y[t * wide] + sum : sum;
    }
}
static void tile44_other(const void *w, long at, int half, const float *x, long n, float *y, long wide, int add) {
    for (int r = 0; r < 4; r++) tile14_other(w, at + r * n, half, x, n, y + r, wide, add);
}
"""


def test_products_are_rounded_once_wherever_the_compiler_would_not(monkeypatch):
    """As GCC does by itself for some processors: no fused multiplication and addition in a loop with a single sum."""
    monkeypatch.setattr(native, "FLAGS", (*native.FLAGS, "--param=avoid-fma-max-bits=512"))
    monkeypatch.setattr(fused, "_SOURCE", fused._SOURCE.read_text() + "/* rounded */")
    for dtype in (torch.float32, torch.bfloat16):
        a_block_is_its_tokens_one_by_one(dtype=dtype, d_model=72, d_ff=75, head_dim=18)


def test_without_openmp_one_thread_does_it_all(monkeypatch):
    monkeypatch.setattr(native, "FLAGS", native.FLAGS[:-1])
    monkeypatch.setattr(fused, "_SOURCE", fused._SOURCE.read_text() + "/* alone */")
    computes_what_the_blocks_compute(d_model=35, d_ff=37, head_dim=6)
    a_block_is_its_tokens_one_by_one()


def test_kernels_are_compiled_once():
    assert kernels() is kernels()


def test_sampling_draws_from_the_same_distribution():
    model = decoder(dtype=torch.float32)
    draws = [m.generate(text(4), 20, sampler=Sampler(0.8), rng=torch.Generator().manual_seed(3)) for m in (model, Fused()(model))]
    assert torch.equal(*draws)


@torch.no_grad()
@pytest.mark.parametrize("capacity", [4, 9])
def test_a_model_that_is_cast_in_the_middle_of_a_text_is_read_where_it_lies(capacity):
    """And keys are not, where its buffers are full and new ones would be made."""
    model = Fused()(decoder(dtype=torch.bfloat16))
    cache = model.new_cache(capacity=capacity)
    model(text(4), cache)
    model.float()
    with pytest.raises(ValueError, match="this cache holds torch.bfloat16 and the model is torch.float32 now"):
        model(text(1), cache)
    assert cache.length == 4, "a refused pass has not happened"
    model, cache = model.bfloat16(), model.new_cache(capacity=9)
    model(text(4), cache)
    model.float().bfloat16()
    assert torch.equal(model(text(1, seed=3), cache), chunked(model, model.new_cache(capacity=9), torch.cat((text(4), text(1, seed=3)), 1), [4])[:, 4:])
