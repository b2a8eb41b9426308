"""Tensors of a GGUF file: every type that is read gives the numbers that the gguf package, asked for all at once, gives."""

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize, quantize

from effkit.zoo.gguf import ROWS, floats

COLUMNS = 512  # two blocks of the largest kind


def written(kind: Kind, rows: int) -> np.ndarray:
    """Rows of this kind: normal numbers where the package can store them so, else bytes whose meaning only it knows."""
    rng = np.random.default_rng(int(kind))
    try:
        return quantize(rng.standard_normal((rows, COLUMNS)).astype(np.float32), kind)
    except NotImplementedError:
        per_block, size = gguf.GGML_QUANT_SIZES[kind]
        return rng.integers(0, 256, (rows, COLUMNS // per_block * size), dtype=np.uint8)


def readable(kind: Kind) -> bool:
    try:
        dequantize(written(kind, 1), kind)
    except NotImplementedError:
        return False
    return True


def read_back(data: np.ndarray, kind: Kind, path) -> gguf.ReaderTensor:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("w", data, raw_dtype=None if kind in (Kind.F32, Kind.F16) else kind)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    (found,) = gguf.GGUFReader(path).tensors
    assert found.tensor_type == kind
    return found


with np.errstate(all="ignore"):  # some bytes mean NaN or infinity
    KINDS = [kind for kind in Kind if readable(kind)]


@pytest.mark.filterwarnings("ignore:(overflow|invalid value):RuntimeWarning")
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("rows", [1, ROWS, 2 * ROWS + 3])
def test_every_kind_of_tensor_is_read_as_the_package_reads_it(kind, rows, tmp_path):
    data = written(kind, rows)
    seen, wanted = floats(read_back(data, kind, tmp_path / "m.gguf"), torch.float32), dequantize(data, kind)
    assert seen.dtype == torch.float32 and seen.shape == (rows, COLUMNS)
    assert np.array_equal(seen.numpy(), wanted, equal_nan=True)
    half = floats(read_back(data, kind, tmp_path / "m.gguf"), torch.bfloat16)
    assert torch.equal(half.view(torch.int16), seen.bfloat16().view(torch.int16))


@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16], ids=lambda kind: kind.name)
def test_a_norm_is_one_row(kind, tmp_path):
    data = quantize(np.linspace(-1, 1, COLUMNS, dtype=np.float32), kind)
    seen = floats(read_back(data, kind, tmp_path / "m.gguf"), torch.float32)
    assert seen.shape == (COLUMNS,) and np.array_equal(seen.numpy(), data.astype(np.float32))


def test_the_kinds_are_those_that_models_are_shipped_in():
    named = {kind.name for kind in KINDS}
    assert named >= {"F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "MXFP4"}


def test_stored_numbers_are_near_what_was_stored(tmp_path):
    """Not only what the package says: Q8_0 is off by half a step of each block of 32, its largest number over 127,
    and by what float16 rounds off that step: 127 / 2048 of it."""
    numbers = np.random.default_rng(0).standard_normal((5, COLUMNS)).astype(np.float32)
    seen = floats(read_back(quantize(numbers, Kind.Q8_0), Kind.Q8_0, tmp_path / "m.gguf"), torch.float32).numpy()
    step = np.abs(numbers.reshape(5, -1, 32)).max(-1, keepdims=True) / 127
    assert (np.abs(seen - numbers).reshape(5, -1, 32) <= step * (0.5 + 127 / 2048)).all() and np.abs(seen - numbers).max() > 0
