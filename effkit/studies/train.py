"""Making the shipped checkpoints: `effkit train NAME` makes one again, and goes on after an interruption.

State is kept under results/train/NAME.safetensors until the run is complete, whatever ends it: Ctrl-C, a lost machine,
kill -9 in the middle of a write. The checkpoint is then written, in bfloat16, to data/NAME.safetensors, and the state
removed.
"""

import ctypes
import platform
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from effkit import zoo
from effkit.core.checkpoint import fingerprint, load, read_tensors, save
from effkit.core.paths import data_dir
from effkit.core.task import Batch, Task
from effkit.core.technique import kept_random_state
from effkit.core.training import Loss, Schedule, fit
from effkit.distillation.losses import DIVERGENCES
from effkit.zoo.tasks import language_loss


@dataclass(frozen=True)
class Recipe:
    """How one checkpoint is made: the model, what it is for, how long, and with which seed."""

    build: Callable[[], nn.Module]
    task: Callable[[], Task]
    schedule: Schedule
    loss: Callable[[nn.Module], Loss] | None = None  # made once the model stands: compilation, augmentation
    seed: int = 0
    save_every: int = 200  # steps that an interruption may cost
    first: "Recipe | None" = None  # the run whose checkpoint, in bfloat16, this one goes on from
    teacher: str = ""  # a checkpoint whose distributions are learned instead of the text (chapter 03)
    kept: float = 0.0  # of the weights it begins with, in the mean with those it ends with (Wortsman et al. 2021, arXiv:2109.01903)

    def settings(self) -> dict:
        """What of it can be compared, as JSON: the schedule, the seed, and the weights that training begins with."""
        with kept_random_state():
            torch.manual_seed(self.seed)
            made = {"schedule": asdict(self.schedule), "seed": self.seed, "begun": fingerprint([self.build()])}
            return made | {name: value for name, value in {"teacher": self.teacher, "kept": self.kept}.items() if value}


@dataclass(frozen=True)
class Trained:
    """Where the checkpoint is, the loss of every step from the first on, and the seconds of this run."""

    path: Path
    curve: list[float]
    seconds: float

    def __str__(self) -> str:
        last = self.curve[-50:]
        return f"{self.path}: {len(self.curve)} steps, mean loss of the last {len(last)} {sum(last) / len(last):.4f}; {self.seconds:.0f} s in this run"


def train(name: str, recipe: Recipe, *, out: Path | None = None, state: Path | None = None) -> Trained:
    """Trains, or goes on training, and writes the checkpoint."""
    keep_memory()
    begun = time.time()
    path, state = out or data_dir() / f"{name}.safetensors", state or Path("results") / "train" / f"{name}.safetensors"
    before = state.with_name(f"{name}-first.safetensors")
    if recipe.first:
        if not before.exists():
            train(f"{name}-first", recipe.first, out=before, state=state.with_name(f"{name}-first-state.safetensors"))
        header, _ = read_tensors(before, "delete it to start over")
        if header.get("made") != recipe.first.settings():
            raise ValueError(f"{before} was left behind by a run of another recipe, {header.get('made')}; delete it to start over")
    with kept_random_state():
        torch.manual_seed(recipe.seed)
        model, task = load(before).float() if recipe.first else recipe.build(), recipe.task()
        untrained = [p.detach().clone() for p in model.parameters()]
        maker = taught_by(recipe.teacher) if recipe.teacher else recipe.loss
        curve = fit(model, task, recipe.schedule, loss=maker and maker(model), resume=state, save_every=recipe.save_every, label=name)
        for p, start in zip(model.parameters(), untrained, strict=True):
            p.data.lerp_(start, recipe.kept)
    save(model.to(torch.bfloat16).eval(), path, recipe.settings())
    for done in (state, before):
        done.unlink(missing_ok=True)
    return Trained(path, curve, time.time() - begun)


def compiled_language_loss(model: nn.Module) -> Loss:
    """Cross-entropy over a compiled forward pass."""
    forward = compiled(model)
    return lambda _, batch: language_loss(forward(batch[0]), batch)


def taught_by(teacher: str, divergence: str = "forward") -> Callable[[nn.Module], Loss]:
    """Instead of the text's own next token, all that the teacher, a checkpoint of that name, thinks of it: the
    divergence of the distributions at every place, in nats (Hinton et al. 2015, arXiv:1503.02531, eq. 4 with T = 1)."""

    def loss_of(model: nn.Module) -> Loss:
        knows, learns = compiled(zoo.load(teacher)[0].requires_grad_(False)), compiled(model)

        def loss(_: nn.Module, batch: Batch) -> torch.Tensor:
            with torch.no_grad():
                wanted = knows(batch[0])
            return DIVERGENCES[divergence](learns(batch[0]).float(), wanted.float()).mean()

        return loss

    return loss_of


def compiled(model: nn.Module) -> Callable:
    """The model's forward pass over ids, compiled; eager where no C++ compiler is at hand."""
    try:
        forward = torch.compile(model)
        forward(torch.zeros(1, 8, dtype=torch.long))
    except Exception as error:  # noqa: BLE001  (torch.compile raises many kinds; eager training is merely slower)
        warnings.warn(f"torch.compile is not usable here ({type(error).__name__}); training eagerly", stacklevel=2)
        forward = model
    return forward


def keep_memory() -> None:
    """Tells glibc to keep large buffers instead of handing them back after each step; page faults otherwise dominate
    eager training (6,100 -> 9,500 tokens/s for a GPT of 3.7 M, 2 cores, torch 2.13)."""
    if platform.libc_ver()[0] == "glibc":
        for option, value in {-3: 1 << 30, -1: 2**31 - 1}.items():  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
            ctypes.CDLL(None).mallopt(option, value)
