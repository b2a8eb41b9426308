"""fit(): whatever ends a run, a crash in the middle of a write included, it goes on with the very same curve."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
from dataclasses import replace

import pytest
import torch
from torch import nn

from effkit.core import paths, training
from effkit.core.checkpoint import load, save
from effkit.core.task import Batches, Task
from effkit.core.training import Schedule, fit
from effkit.studies import train as studies
from effkit.studies.recipes import RECIPES
from effkit.zoo.tasks import classification_loss

SCHEDULE = Schedule(steps=12, lr=1e-2, warmup=3, weight_decay=0.1)


def toy_task(dtype=torch.float32) -> Task:
    rng = torch.Generator().manual_seed(3)
    x, y = torch.randn(40, 6, generator=rng).to(dtype), torch.randint(3, (40,), generator=rng)
    return Task("toy", train=Batches(x, y, size=8, shuffle=True), loss=classification_loss)


def toy_model(dtype=torch.float32, dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(1)
    layers = [nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(dropout), nn.Linear(8, 3)]
    return nn.Sequential(*layers).to(dtype)


def weights(model: nn.Module) -> list[torch.Tensor]:
    return [t.clone() for t in model.state_dict().values()]


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(weights(a), weights(b), strict=True))


class Stop(Exception):
    pass


def stop_after(n: int, error: type[BaseException] = Stop):
    def after_step(done: int) -> None:
        if done == n:
            raise error

    return after_step


# what a step does


def test_equals_adamw_written_out():
    """Clipping, the schedule, decay of matrices only, all as torch's own loop has them."""
    ours, theirs, task = toy_model(), toy_model(), toy_task()
    curve = fit(ours, task, SCHEDULE)
    matrices = [p for p in theirs.parameters() if p.dim() >= 2]
    vectors = [p for p in theirs.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    for step in range(SCHEDULE.steps):
        x, y = task.train.at(step)
        loss = nn.functional.cross_entropy(theirs(x), y)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = SCHEDULE.rate(step)
        optimizer.step()
        assert curve[step] == pytest.approx(loss.item(), rel=1e-6)
    for a, b in zip(weights(ours), weights(theirs), strict=True):
        torch.testing.assert_close(a, b)


def test_the_rate_warms_up_and_ends_at_its_final_share():
    schedule = Schedule(steps=100, lr=2.0, warmup=10, final=0.1)
    rates = [schedule.rate(step) for step in range(101)]
    assert rates[0] == pytest.approx(0.2) and rates[9] == max(rates) == pytest.approx(2.0)
    assert rates[10:] == sorted(rates[10:], reverse=True) and rates[100] == pytest.approx(0.2)


def test_trains_for_a_caller_without_gradients():
    inside, outside = toy_model(), toy_model()
    with torch.no_grad():
        curve = fit(inside, toy_task(), SCHEDULE)
        assert not torch.is_grad_enabled()
    assert curve == fit(outside, toy_task(), SCHEDULE) and same(inside, outside)


def test_modes_and_frozen_parameters_stay():
    model = toy_model().eval()
    model[0].requires_grad_(False)
    before = weights(model[0])
    fit(model, toy_task(), SCHEDULE)
    assert not any(m.training for m in model.modules())
    assert all(torch.equal(a, b) for a, b in zip(before, weights(model[0]), strict=True))


# half precision


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_learns_what_float32_learns(dtype):
    half, full, schedule = toy_model(dtype), toy_model(), Schedule(steps=60, lr=1e-2)
    wanted = fit(full, toy_task(), schedule)
    curve = fit(half, toy_task(dtype), schedule)
    assert all(p.dtype == dtype for p in half.parameters())
    assert all(torch.isfinite(p).all() for p in half.parameters())
    assert curve[-1] == pytest.approx(wanted[-1], abs=0.05) and wanted[-1] < wanted[0] - 0.2


def drift(dtype) -> float:
    """A weight of 1 pushed down for 100 steps of 1e-4; half a step of bfloat16 there is 2e-3."""
    model = nn.Linear(1, 1, bias=False).to(dtype)
    nn.init.ones_(model.weight)
    data = Batches(torch.ones(8, 1, dtype=dtype), torch.zeros(8), size=8)
    task = Task("drift", train=data, loss=lambda y, batch: y.float().mean())
    fit(model, task, Schedule(steps=100, lr=1e-4, final=1.0))
    return model.weight.item()


def test_small_steps_add_up_in_bfloat16():
    assert drift(torch.float32) == pytest.approx(0.99, abs=1e-3)
    assert drift(torch.bfloat16) == pytest.approx(0.99, abs=3e-3)


def test_without_masters_small_steps_would_be_lost(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "element_size", lambda self: 4)
    assert drift(torch.bfloat16) == 1.0


@pytest.mark.parametrize("told", [{"avx512_bf16": True}, {"amx_bf16": True}, {"bf16": True}, {"bf16": False}, {}])
def test_products_are_of_bfloat16_only_where_there_are_instructions_for_them(told, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: told)
    has = any(told.values())
    seen = []

    def loss(model, batch):
        seen.append((out := model(batch[0])).dtype)
        return out.float().square().mean()

    fit(toy_model(), toy_task(), Schedule(steps=1, autocast=True), loss=loss)
    assert seen == [torch.bfloat16 if has else torch.float32]


def test_an_unused_parameter_stays_as_it_is_in_half_precision():
    model = toy_model(torch.bfloat16)
    model.register_parameter("unused", nn.Parameter(torch.ones(3, dtype=torch.bfloat16)))
    fit(model, toy_task(torch.bfloat16), Schedule(steps=2))
    assert model.unused.eq(1).all()


def test_what_a_callback_writes_into_half_precision_counts():
    model = toy_model(torch.bfloat16)

    def zero_a_row(done: int) -> None:
        if done == 6:
            with torch.no_grad():
                model[4].weight[1] = 7.0

    fit(model, toy_task(torch.bfloat16), SCHEDULE, after_step=zero_a_row)
    assert (model[4].weight[1] > 6).all()


# going on


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("steps", [1, 5, 8])
def test_a_run_goes_on_with_the_same_curve(tmp_path, dtype, steps):
    """Dropout draws from the global generator, BatchNorm keeps statistics: both are part of the state."""
    whole, parts, fresh = (toy_model(dtype, dropout=0.3) for _ in range(3))
    torch.manual_seed(9)
    wanted = fit(whole, toy_task(dtype), SCHEDULE)
    torch.manual_seed(9)
    with pytest.raises(Stop):
        fit(parts, toy_task(dtype), SCHEDULE, resume=tmp_path / "state", save_every=2, after_step=stop_after(steps))
    torch.manual_seed(9 if steps < 2 else 10)  # before the first save there is no state to go on from
    assert fit(fresh, toy_task(dtype), SCHEDULE, resume=tmp_path / "state") == wanted
    assert same(fresh, whole)


def test_without_the_moments_the_curve_would_differ(tmp_path, monkeypatch):
    wanted = fit(toy_model(), toy_task(), SCHEDULE)
    with pytest.raises(Stop):
        fit(toy_model(), toy_task(), SCHEDULE, resume=tmp_path / "state", save_every=2, after_step=stop_after(5))
    forget = training._restore

    def forgetful(path, run):
        forget(path, run)
        run.optimizer.state.clear()

    monkeypatch.setattr(training, "_restore", forgetful)
    assert fit(toy_model(), toy_task(), SCHEDULE, resume=tmp_path / "state") != wanted


def interrupt_in_step(n: int):
    """A loss during which Ctrl-C arrives at step n."""
    calls = iter(range(100))

    def loss(model, batch):
        if next(calls) == n:
            signal.raise_signal(signal.SIGINT)
        return classification_loss(model(batch[0]), batch)

    return loss


def test_ctrl_c_waits_for_the_step_saves_and_says_how_to_go_on(tmp_path, capsys):
    wanted = fit(toy_model(), toy_task(), SCHEDULE)
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        fit(toy_model(), toy_task(), SCHEDULE, resume=tmp_path / "state", loss=interrupt_in_step(6))
    said = "".join(capsys.readouterr())
    assert "stopped after 7 of 12 steps" in said and "goes on from there" in said
    assert signal.getsignal(signal.SIGINT) is handler
    assert fit(toy_model(), toy_task(), SCHEDULE, resume=tmp_path / "state") == wanted


def test_without_a_file_ctrl_c_stops_at_once():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    try:
        with pytest.raises(KeyboardInterrupt):
            fit(toy_model(), toy_task(), SCHEDULE, loss=interrupt_in_step(6))
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_thread_may_train_too(tmp_path):
    """Python sets signal handlers in the main thread alone."""
    curves = []
    thread = threading.Thread(
        target=lambda: curves.append(fit(toy_model(), toy_task(), SCHEDULE, resume=tmp_path / "state"))
    )
    thread.start()
    thread.join()
    assert len(curves[0]) == 12


@pytest.mark.parametrize("how", ["cut", "bit", "name"])
def test_a_damaged_state_is_refused(tmp_path, how):
    path = tmp_path / "state"
    with pytest.raises(Stop):
        fit(toy_model(), toy_task(), SCHEDULE, resume=path, save_every=2, after_step=stop_after(5))
    data = path.read_bytes()
    flipped = data[:-3] + bytes([data[-3] ^ 1]) + data[-2:]
    path.write_bytes({"cut": data[:200], "bit": flipped, "name": data.replace(b"exp_avg_sq.", b"exp_avg_sr.")}[how])
    with pytest.raises(ValueError, match="damaged.*delete it to start over"):
        fit(toy_model(), toy_task(), SCHEDULE, resume=path)


@pytest.mark.parametrize("what", ["schedule", "model"])
def test_a_state_of_another_run_is_refused(tmp_path, what):
    path = tmp_path / "state"
    with pytest.raises(Stop):
        fit(toy_model(), toy_task(), SCHEDULE, resume=path, save_every=2, after_step=stop_after(5))
    model = nn.Sequential(nn.Linear(6, 3)) if what == "model" else toy_model()
    schedule = Schedule(steps=13) if what == "schedule" else SCHEDULE
    with pytest.raises(ValueError, match=f"another {what}"):
        fit(model, toy_task(), schedule, resume=path)


# the studies: kill -9, in real processes

CHILD = """
    import os, sys, signal
    from pathlib import Path
    import effkit.core.paths, effkit.core.training
    from effkit.studies.train import Recipe, train
    from tests.core.test_training import SCHEDULE, deadly, toy_model, toy_task
    deadline, where, folder = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    recipe = Recipe(toy_model, toy_task, SCHEDULE, loss=lambda model: deadly(deadline, where), save_every=3)
    train("toy", recipe, out=folder / "toy.safetensors", state=folder / "state")
"""


def deadly(deadline: int, where: str):
    """A loss that kills its own process at its `deadline`th step, or in the middle of the next write of a file."""
    steps = iter(range(100))

    def loss(model, batch):
        if next(steps) == deadline:
            if where == "in a step":
                os.kill(os.getpid(), signal.SIGKILL)
            paths.os.fsync = lambda file: os.kill(os.getpid(), signal.SIGKILL)
        return classification_loss(model(batch[0]), batch)

    return loss


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL is a matter of POSIX")
def test_a_checkpoint_is_made_through_kill_9_with_the_same_curve(tmp_path):
    wanted = studies.train("toy", recipe(), out=tmp_path / "wanted.safetensors", state=tmp_path / "undisturbed")
    for deadline, where in ((4, "in a step"), (4, "in a write"), (2, "in a step")):
        command = [sys.executable, "-c", textwrap.dedent(CHILD), str(deadline), where, str(tmp_path)]
        # sums are added up in another order on another number of threads
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        run = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert run.returncode == -signal.SIGKILL, run.stderr
        assert not (tmp_path / "toy.safetensors").exists()
    assert (tmp_path / "state").exists()
    made = studies.train("toy", recipe(), out=tmp_path / "toy.safetensors", state=tmp_path / "state")
    assert made.curve == wanted.curve
    assert made.path.read_bytes() == wanted.path.read_bytes()
    assert not (tmp_path / "state").exists(), "a finished run leaves no state behind"


def recipe() -> studies.Recipe:
    return studies.Recipe(toy_model, toy_task, SCHEDULE, save_every=3)


def test_a_run_goes_on_from_the_checkpoint_of_an_earlier_one_through_ctrl_c(tmp_path):
    earlier = studies.train("toy", recipe(), out=tmp_path / "earlier.safetensors", state=tmp_path / "state")
    model = load(earlier.path).float()
    wanted = fit(model, toy_task(), SCHEDULE)
    steps = iter(range(100))

    def impatient(model, batch):
        if next(steps) == 4:
            raise KeyboardInterrupt
        return classification_loss(model(batch[0]), batch)

    files = dict(out=tmp_path / "toy.safetensors", state=tmp_path / "run" / "state")
    longer = replace(recipe(), first=recipe())
    with pytest.raises(KeyboardInterrupt):
        studies.train("toy", replace(longer, loss=lambda model: impatient), **files)
    unwanted = replace(longer, first=replace(recipe(), loss=lambda model: pytest.fail("the first run is done")))
    made = studies.train("toy", unwanted, **files)
    assert made.curve == wanted
    assert all(torch.equal(a, b.bfloat16()) for a, b in zip(load(made.path).parameters(), model.parameters(), strict=True))
    assert not list((tmp_path / "run").iterdir())


OTHERS = {
    "schedule": replace(recipe(), schedule=replace(SCHEDULE, lr=3e-3)), "seed": replace(recipe(), seed=1),
    "model": replace(recipe(), build=lambda: nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))),
}  # fmt: skip


@pytest.mark.parametrize("what", [*OTHERS, "no recipe", "damaged"])
def test_a_first_checkpoint_of_another_recipe_is_refused(tmp_path, what):
    """Left behind by a run that was stopped before its recipe was changed."""
    files = dict(out=tmp_path / "toy.safetensors", state=tmp_path / "state")
    left = tmp_path / "toy-first.safetensors"
    studies.train("toy-first", OTHERS.get(what, recipe()), out=left, state=tmp_path / "first-state")
    if what == "no recipe":
        save(load(left), left)
    if what == "damaged":
        left.write_bytes(left.read_bytes()[:-3] + b"abc")
    with pytest.raises(ValueError, match=r"toy-first.safetensors.*delete it to start over"):
        studies.train("toy", replace(recipe(), first=recipe()), **files)
    assert not files["out"].exists() and left.exists()


def test_training_a_checkpoint_keeps_the_random_state(tmp_path):
    before = torch.get_rng_state()
    made = studies.train("toy", recipe(), out=tmp_path / "toy.safetensors", state=tmp_path / "state")
    assert torch.equal(before, torch.get_rng_state())
    assert "12 steps" in str(made) and str(made.path) in str(made)


def test_where_nothing_compiles_training_goes_on_eagerly(monkeypatch):
    def broken(model):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", broken)
    model = nn.Embedding(5, 5)
    with pytest.warns(UserWarning, match="training eagerly"):
        loss = studies.compiled_language_loss(model)
    ids = torch.tensor([[0, 1, 2]])
    wanted = nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten())
    assert loss(model, (ids, ids)).item() == pytest.approx(wanted.item())


def test_a_taught_student_learns_all_that_its_teacher_thinks(monkeypatch):
    from effkit import zoo

    torch.manual_seed(0)
    teacher, student = nn.Sequential(nn.Embedding(5, 5)), nn.Sequential(nn.Embedding(5, 5))
    monkeypatch.setattr(zoo, "load", lambda name: (teacher, None))
    monkeypatch.setattr(studies, "compiled", lambda model: model)
    ids = torch.tensor([[0, 1, 2]])
    loss = studies.taught_by("teacher")(student)
    p, q = (m(ids).detach().log_softmax(-1) for m in (teacher, student))
    value = loss(student, (ids, ids))
    assert value.item() == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), abs=1e-6)
    value.backward()
    assert student[0].weight.grad is not None and teacher[0].weight.grad is None
    student.load_state_dict(teacher.state_dict())
    assert studies.taught_by("teacher")(student)(student, (ids, ids)).item() == pytest.approx(0, abs=1e-6)


def test_a_checkpoint_may_keep_some_of_the_weights_it_began_with(tmp_path):
    made = {kept: studies.train("toy", replace(recipe(), kept=kept), out=tmp_path / f"{kept}", state=tmp_path / "state") for kept in (0.0, 0.25, 1.0)}
    whole, some, none = ([*load(one.path).parameters()] for one in made.values())
    torch.manual_seed(recipe().seed)
    for end, mean, start, fresh in zip(whole, some, none, toy_model().parameters(), strict=True):
        assert torch.equal(start, fresh.bfloat16()) and not torch.equal(end, start)
        wanted = 0.75 * end.float() + 0.25 * start.float()
        assert torch.allclose(mean.float(), wanted, atol=0.01 * end.abs().max().item())
    assert replace(recipe(), kept=0.25).settings() == recipe().settings() | {"kept": 0.25}


def test_a_taught_checkpoint_says_by_whom():
    """And with which weights it began: the shipped draft's."""
    from effkit import zoo
    from effkit.core.checkpoint import fingerprint

    told = RECIPES["gpt-draft-distilled"].settings()
    assert told["teacher"] == "gpt-target" and told["begun"] == fingerprint([zoo.load("gpt-draft")[0]])


def test_every_shipped_checkpoint_has_its_recipe():
    from effkit import zoo

    assert set(RECIPES) == set(zoo.names()) - {"smollm2"}


@pytest.mark.slow
def test_a_grown_decoder_says_what_it_said_and_learns_in_its_new_layers():
    from effkit import zoo
    from effkit.studies.recipes import grown

    small, task = zoo.load("gpt-small")
    model, ids = grown("gpt-small", layers=14), torch.randint(1024, (1, 20))
    assert len(model.blocks) == 14 and torch.equal(model(ids), small(ids))
    task.loss(model(ids), (ids, ids)).backward()
    assert all(block.ff.down.weight.grad.abs().sum() > 0 for block in model.blocks)
    assert sum(not block.ff.down.weight.any() for block in model.blocks) == 14 - len(small.blocks)
