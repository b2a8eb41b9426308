"""Matrices of few bits in the fused kernels: what the packed layers compute, whatever bits and groups, or in order as before."""

import gc

import pytest
import torch

from effkit.caching import Fused, Preallocated, fused
from effkit.core import native
from effkit.quantization import NF4, RTN, W8A8
from effkit.quantization.packed import PackedWeight
from tests.caching.decoders import chunked, decoder, text
from tests.caching.test_fused import NARROWER, close

WIDE = dict(d_model=64, heads=32, kv_heads=1, head_dim=2, d_ff=128, tied=False)  # two rows of keys: not four at a time
needs_compiler = pytest.mark.skipif(native.compiler() is None, reason="no C compiler: blocks run in order")


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("group, symmetric", [(32, False), (32, True), (64, False), (-1, True)])
def test_they_hold_the_stored_matrix_exactly(bits, group, symmetric):
    store = PackedWeight.from_float(torch.randn(5, 128), bits=bits, group_size=group, symmetric=symmetric, search="min-max")
    assert store.has_lines
    laid = store.lines().reshape(5, 4, 24)
    scale, offset = laid[..., :8].contiguous().view(torch.float32).unbind(-1)
    codes = torch.stack((laid[..., 8:] & 15, laid[..., 8:] >> 4), dim=-1).flatten(-2).float()
    assert torch.equal((codes * scale[..., None] + offset[..., None]).reshape(5, 128), store())


@torch.no_grad()
def computes_what_packed_layers_compute(technique, sizes=(4, 1, 3), length=20, dtype=torch.float32, seen=True):
    packed = technique(decoder(dtype=dtype, sharpness=4.0, **WIDE))
    quick, plain, ids = Fused()(packed), Preallocated()(packed), text(length)
    assert seen == (fused.Plan.of(quick, dtype, 64, 2) is not None)
    assert close(*(chunked(m, m.new_cache(capacity=length), ids, sizes) for m in (quick, plain)))
    one, several = (chunked(quick, quick.new_cache(capacity=length), ids, s) for s in ([1] * length, sizes))
    assert torch.equal(one, several) or not seen


FEW_BITS = [RTN(bits=4), RTN(bits=3, group_size=64), RTN(bits=2, group_size=32, symmetric=True), RTN(bits=4, group_size=-1), RTN(bits=4, group_size=256)]


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("technique", FEW_BITS, ids=repr)
def test_computes_what_packed_layers_compute(technique, dtype, monkeypatch):
    computes_what_packed_layers_compute(technique, dtype=dtype)
    monkeypatch.setattr(fused, "_SOURCE", NARROWER + fused._SOURCE.read_text())
    computes_what_packed_layers_compute(technique, (5, 6, 9), dtype=dtype)


@needs_compiler
@pytest.mark.parametrize("technique", [
    RTN(bits=8), RTN(bits=4, group_size=16), RTN(search="hqq"), NF4(), W8A8(), *(RTN(layers=some) for some in ("*.q", "blocks.0.*", "blocks.1.*")),
], ids=repr)  # fmt: skip
def test_what_they_cannot_read_runs_in_order(technique):
    computes_what_packed_layers_compute(technique, seen=False)


@needs_compiler
@torch.no_grad()
def test_codes_that_were_written_to_are_read_anew():
    model, ids = Fused()(RTN(bits=4)(decoder(dtype=torch.float32, **WIDE))), text(9)
    cache, store = model.new_cache(capacity=9), model.blocks[0].attention.q.weight_store
    before = model(ids, cache)
    others = RTN(bits=4)(decoder(1, dtype=torch.float32, **WIDE)).state_dict()
    for change in (lambda: store.codes.random_(0, 256), lambda: model.load_state_dict(others), lambda: store.scale.mul_(2)):
        change()
        cache.truncate(0)  # the same text, and a new one
        plain = Preallocated()(model)
        plain.running = type(decoder().running)()
        wanted = plain(ids, plain.new_cache(capacity=9))
        assert not close(before, wanted) and close(model(ids, cache), wanted) and close(model(ids, model.new_cache(capacity=9)), wanted)
        before = wanted


def test_lines_of_other_codes_are_others_and_go_with_their_store():
    from effkit.quantization import lines

    store = PackedWeight.from_float(torch.randn(4, 64), bits=4, group_size=32, symmetric=False, search="min-max")
    first, known = store.lines(), len(lines._known)
    assert store.lines() is first
    for _ in range(3):  # each may lie where one lay before
        store.codes = torch.randint(0, 256, store.codes.shape, dtype=torch.uint8)
        assert torch.equal(store.lines(), lines.laid_out(store))
    del store
    gc.collect()
    assert len(lines._known) == known - 1


BUGS = {
    "offsets forgotten": ("(Vector){0} + offset", "(Vector){0}"),
    "codes of the group's begin": ("group + 8 + c / 2", "group + 8"),
    "the next group's scale": ("memcpy(&scale, group, 4)", "memcpy(&scale, group + BLOCK, 4)"),
    "codes in the other order": (">> (Bits){0, 4, 8, 12", ">> (Bits){4, 0, 8, 12"),
}


@needs_compiler
@pytest.mark.parametrize("name", BUGS)
def test_a_bug_is_noticed(name, monkeypatch):
    old, new = BUGS[name]
    source = NARROWER + fused._SOURCE.read_text()
    assert old in source
    monkeypatch.setattr(fused, "_SOURCE", source.replace(old, new))
    with pytest.raises(AssertionError):
        computes_what_packed_layers_compute(RTN(bits=4))
