"""fit(): the one plain training loop, with a progress bar; it goes on where an interrupted run stopped.

Half precision  A step of 0.001 of a weight is lost in bfloat16, and AdamW's epsilon is zero in float16, which makes
                0 / 0. So parameters of half precision are trained through float32 copies, their masters, and rounded
                after each step (Micikevicius et al. 2017, arXiv:1710.03740, sec. 3.1). Left out: scaling the loss, so
                gradients below 6e-8 vanish in float16.
"""

import math
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from effkit.core.checkpoint import SCHEMA, read_tensors, write_tensors
from effkit.core.native import has_bfloat16
from effkit.core.task import Batch, Task
from effkit.core.technique import evaluating

Loss = Callable[[nn.Module, Batch], Tensor]


@dataclass(frozen=True)
class Schedule:
    """Learning rate and length of a run: linear warm-up, then cosine decay.

    Source: Loshchilov & Hutter 2016, arXiv:1608.03983, eq. 5."""

    steps: int
    lr: float = 1e-3
    warmup: int = 0
    weight_decay: float = 0.0
    final: float = 0.05  # of lr, at the last step
    clip: float = 1.0  # norm of the gradient
    autocast: bool = False  # bfloat16 matrix products, where there are instructions for them: without, 2.5 times slower

    def rate(self, step: int) -> float:
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.lr * (self.final + (1 - self.final) * (1 + math.cos(math.pi * done)) / 2)


@torch.enable_grad()
def fit(
    model: nn.Module, task: Task, schedule: Schedule, *, loss: Loss | None = None,
    after_step: Callable[[int], None] | None = None, resume: str | Path | None = None,
    save_every: int = 200, label: str = "training",
) -> list[float]:  # fmt: skip
    """Trains the parameters that require gradients, in place; returns the loss of each step (nats). Works under
    torch.no_grad(), too.

    loss        (model, batch) -> scalar; task.loss on the model's outputs otherwise
    after_step  called with the number of steps done: schedules of sparsity, say
    resume      a file that holds the state of an unfinished run; written every `save_every` steps and on Ctrl-C
    """
    run = _Run.of(model, task, schedule, loss)
    if resume:
        _restore(Path(resume), run)
    try:
        with evaluating(model), _interrupts_between_steps(bool(resume)) as interrupted:
            model.train()
            for step in (bar := _bar(run, label)):
                run.curve.append(_step(run, step))
                if after_step:
                    after_step(step + 1)
                if step % 20 == 0:
                    bar.set_postfix(loss=f"{run.curve[-1]:.3f}", refresh=False)  # a refresh would ignore `delay`
                if interrupted.is_set():
                    raise KeyboardInterrupt
                if resume and (step + 1) % save_every == 0:
                    _keep(Path(resume), run)
    except KeyboardInterrupt:
        if resume:
            _keep(Path(resume), run)
            done = f"stopped after {len(run.curve)} of {schedule.steps} steps"
            tqdm.write(f"{done}; saved to {resume}: the same call goes on from there")
        raise
    return run.curve


@dataclass(eq=False)
class _Run:
    """What a step reads and changes. masters: of each trained parameter its float32 copy; itself, where it is wide."""

    model: nn.Module
    task: Task
    schedule: Schedule
    loss: Loss | None
    trained: dict[str, nn.Parameter]
    masters: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    curve: list[float] = field(default_factory=list)

    @classmethod
    def of(cls, model: nn.Module, task: Task, schedule: Schedule, loss: Loss | None) -> "_Run":
        task.require("train", *(() if loss else ("loss",)), by=fit)
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not trained:
            how = "so there is nothing to train; unfreeze some with requires_grad_(True)"
            raise ValueError(f"no parameter requires gradients, {how}")
        masters = {n: p if p.element_size() > 2 else nn.Parameter(p.detach().float()) for n, p in trained.items()}
        optimizer = torch.optim.AdamW(_groups(masters, schedule.weight_decay), lr=schedule.lr, betas=(0.9, 0.95))
        return cls(model, task, schedule, loss, trained, masters, optimizer)

    def value(self, batch: Batch) -> Tensor:
        """The loss of a batch."""
        return self.loss(self.model, batch) if self.loss else self.task.loss(self.model(batch[0]), batch)  # type: ignore[misc]

    @torch.no_grad()
    def hand_over_gradients(self) -> None:
        """To the masters; where a callback wrote into a parameter since the last step, what it wrote counts."""
        for p, master in zip(self.trained.values(), self.masters.values(), strict=True):
            if master is not p:
                master.grad = None if p.grad is None else p.grad.float()
                master.copy_(torch.where(master.to(p.dtype) == p, master, p.float()))

    @torch.no_grad()
    def round_masters(self) -> None:
        """The trained parameters as their masters say, in their own precision."""
        for p, master in zip(self.trained.values(), self.masters.values(), strict=True):
            if master is not p:
                p.copy_(master)


def _bar(run: _Run, label: str) -> tqdm:
    done, steps = len(run.curve), run.schedule.steps
    return tqdm(range(done, steps), initial=done, total=steps, desc=label, leave=False, delay=2)


@contextmanager
def _interrupts_between_steps(wanted: bool) -> Iterator[threading.Event]:
    """Ctrl-C becomes an event that is looked at after each step: from half a step nothing could go on."""
    asked = threading.Event()
    if not wanted or threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = signal.signal(signal.SIGINT, lambda *_: asked.set())
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)


def _step(run: _Run, step: int) -> float:
    batch = run.task.train.at(step)  # type: ignore[union-attr]
    for group in run.optimizer.param_groups:
        group["lr"] = run.schedule.rate(step)
    has = batch[0].is_cuda or has_bfloat16()
    with torch.autocast(batch[0].device.type, torch.bfloat16, enabled=run.schedule.autocast and has):
        value = run.value(batch)
    if not torch.isfinite(value):
        how = f"lower the learning rate ({run.schedule.lr}) or look for NaN in the data"
        raise ValueError(f"the loss is {value.item()} at step {step}; {how}")
    for parameter in run.trained.values():
        parameter.grad = None
    value.backward()
    run.hand_over_gradients()
    nn.utils.clip_grad_norm_(run.masters.values(), run.schedule.clip)
    run.optimizer.step()
    run.round_masters()
    return value.item()


def _groups(trained: dict[str, nn.Parameter], weight_decay: float) -> list[dict]:
    """Weight decay for matrices only: pulling norms and biases to zero helps nobody."""
    return [
        {"params": [p for p in trained.values() if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained.values() if p.dim() < 2], "weight_decay": 0.0},
    ]


def _keep(path: Path, run: _Run) -> None:
    """Weights, buffers, masters, both moments of AdamW, and the random state that dropout draws from, in one
    safetensors file with its SHA-256."""
    tensors = {f"model.{name}": t for name, t in _owned(run.model).items()}
    for name, master in run.masters.items():
        for key, value in run.optimizer.state.get(master, {}).items():
            tensors[f"{key}.{name}"] = torch.as_tensor(value)
        if master is not run.trained[name]:
            tensors[f"master.{name}"] = master
    tensors |= {"curve": torch.tensor(run.curve, dtype=torch.float64), "random": torch.get_rng_state()}
    tensors = {name: t.detach().contiguous().clone() for name, t in tensors.items()}
    write_tensors(path, {"schema": SCHEMA, "schedule": asdict(run.schedule)}, tensors)


@torch.no_grad()
def _restore(path: Path, run: _Run) -> None:
    """Puts the run where the file says that it was; nothing to do where there is no file."""
    if not path.exists():
        return
    tensors = _read(path, run)
    for name, tensor in _owned(run.model).items():
        tensor.copy_(tensors[f"model.{name}"])
    for name, master in run.masters.items():
        master.copy_(tensors.get(f"master.{name}", master))
        kept = ("step", "exp_avg", "exp_avg_sq")
        state = {key: tensors[f"{key}.{name}"] for key in kept if f"{key}.{name}" in tensors}
        if state:
            run.optimizer.state[master] = state
    torch.set_rng_state(tensors.get("random", torch.get_rng_state()))
    run.curve.extend(tensors["curve"].tolist())


def _read(path: Path, run: _Run) -> dict[str, Tensor]:
    """The file's tensors, once it is sure that they are whole and belong to this run."""
    header, tensors = read_tensors(path, "delete it to start over")
    if header["schedule"] != asdict(run.schedule):
        raise ValueError(f"{path} belongs to a run with another schedule ({header['schedule']}); delete it to start over")
    held = {key[6:]: t.shape for key, t in tensors.items() if key.startswith("model.")}
    if held != {name: t.shape for name, t in _owned(run.model).items()}:
        raise ValueError(f"{path} belongs to a run of another model; delete it to start over")
    return tensors


def _owned(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}
