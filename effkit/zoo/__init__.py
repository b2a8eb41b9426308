"""Models, data and tasks that come with effkit: `zoo.load(name) -> (model, task)`."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from effkit.core.checkpoint import load as load_file
from effkit.core.paths import data_dir
from effkit.core.task import Task
from effkit.zoo.data import english_text, mnist, numpy_text, stdlib_text
from effkit.zoo.diffusion import UNet, denoising
from effkit.zoo.fetch import where
from effkit.zoo.gguf import read_gguf, read_tokenizer
from effkit.zoo.gpt import GPT, GPTConfig
from effkit.zoo.tasks import classification, language
from effkit.zoo.tokens import encode_once, shipped_tokenizer
from effkit.zoo.use import Use
from effkit.zoo.vision import MLP, ResNet

__all__ = ["GPT", "MLP", "GPTConfig", "ResNet", "UNet", "Use", "load", "names", "numpy_task", "tokenizer"]


def names() -> list[str]:
    """What `load` knows."""
    return [*_TASKS, "smollm2"]


def load(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Task]:
    """A trained model in eval mode and what it is for. Raises ValueError for an unknown name, FileNotFoundError for
    a model that has to be fetched or made first."""
    if name == "smollm2":
        return read_smollm2(dtype)
    if name not in _TASKS:
        raise ValueError(f"no model {name!r}; there are {', '.join(names())}")
    path = data_dir() / f"{name}.safetensors"
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: run from a checkout of effkit, set EFFKIT_DATA to its data folder, or make it: effkit train {name}")
    return load_file(path).to(dtype), _TASKS[name]()


def tokenizer(name: str):
    """The tokenizer of a language model."""
    return read_tokenizer(smollm2_path()) if name == "smollm2" else shipped_tokenizer()


def smollm2_path() -> Path:
    path = where("smollm2")
    if path is None:
        raise FileNotFoundError("smollm2 has not been fetched: run `effkit fetch smollm2` (98 MB) where there is a network")
    return path


def read_smollm2(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Task]:
    """SmolLM2-135M-Instruct and its task: English prose that no model here was trained on, windows of 511 tokens.

    Its linear weights were already rounded to 4 bits in blocks of 32 before they were shipped; rounding them again on
    that grid flatters every method."""
    model, coder = read_gguf(smollm2_path(), dtype)
    ids = torch.tensor(coder.encode(english_text()).ids)
    third = len(ids) // 3
    streams = {"test": ids[: 24 * 511 + 1], "val": ids[third : third + 8 * 511 + 1], "calib": ids[2 * third :]}
    return model, language("english", coder, streams, length=511, size=1)


def numpy_task() -> Task:
    """NumPy's source: the other domain, which fine-tuning adapts to."""
    return _source_task("numpy", numpy_text)


def _source_task(name: str, text: Callable[[str], tuple[str, ...]]) -> Task:
    coder = shipped_tokenizer()
    streams = {split: encode_once(coder, text(split)) for split in ("train", "val", "test")}
    return language(name, coder, {**streams, "calib": streams["train"]})


_TASKS: dict[str, Callable[[], Task]] = {
    **dict.fromkeys(("mlp", "lenet-300-100", "resnet"), lambda: classification("mnist", mnist())),
    "unet": lambda: denoising("mnist", mnist()),
    **dict.fromkeys(("gpt-small", "gpt-target", "gpt-draft", "gpt-draft-distilled"), lambda: _source_task("stdlib", stdlib_text)),
}
