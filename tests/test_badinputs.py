"""What people really feed such a library, over every technique: handled, or refused in one sentence before anything was
changed. A technique is tried on the small model that it accepts; an input that is to be handled must give what its plain twin gives."""

import dataclasses
import threading

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from effkit import catalog, load, log, save
from effkit.core import recipe
from effkit.core.task import Batches, Task
from effkit.core.technique import Technique
from effkit.core.training import Schedule, fit
from effkit.zoo.tasks import classification_loss, correct
from tests.subjects import SUBJECTS, outputs
from tests.test_contract import subject_for

TECHNIQUES = catalog.techniques()
every = pytest.mark.parametrize("name", sorted(TECHNIQUES))
NOT_APPLICABLE = ("matches no layer", "needs ", "must be left alone", "of a decoder", "no convolution")


def technique_of(name: str, **settings) -> Technique:
    technique = catalog.example(TECHNIQUES[name])
    known = {f.name for f in dataclasses.fields(technique)}
    return dataclasses.replace(technique, **settings) if settings.keys() <= known else technique


def refused_or_finite(technique, model, task) -> None:
    """One sentence, or a model that works."""
    try:
        result = technique(model, task)
    except ValueError as error:
        assert len(str(error)) > 25
    else:
        assert torch.isfinite(outputs(result, task)).all()


def refusal(technique: Technique, model: nn.Module, task: Task) -> str:
    """The sentence with which the technique refuses; the model must be as it was."""
    before = {k: v.clone() for k, v in model.state_dict().items() if not v.is_meta}
    with pytest.raises(ValueError) as caught:
        technique(model, task)
    after = model.state_dict()
    assert all(torch.equal(v.nan_to_num(), after[k].nan_to_num()) for k, v in before.items())
    assert len(str(caught.value)) > 25
    return str(caught.value)


def handled(technique: Technique, model: nn.Module, task: Task) -> nn.Module | None:
    """The result, or None where the technique says that such a model is none of its business."""
    try:
        return technique(model, task)
    except ValueError as error:
        assert len(str(error)) > 25, error
        if any(word in str(error) for word in NOT_APPLICABLE):
            return None
        raise


def toy_task(inputs: int = 12) -> Task:
    rng = torch.Generator().manual_seed(5)
    data = Batches(torch.randn(32, inputs, generator=rng), torch.randint(4, (32,), generator=rng), size=8)
    return Task("toy", (data.inputs[:4],), data, data, data, data, classification_loss, correct)


def same(result: nn.Module, twin: nn.Module, task: Task, tolerance: float = 1e-5) -> bool:
    a, b = outputs(result, task), outputs(twin, task)
    return bool((a - b).abs().max() <= tolerance * (1 + b.abs().max()))


# 1, 2: layouts


@pytest.mark.slow
@every
def test_01_non_contiguous_weights_give_equal_results(name):
    technique = technique_of(name)
    subject, model, task = subject_for(technique)
    twisted = SUBJECTS[subject][0]()
    for p in twisted.parameters():
        if p.dim() == 2:
            p.data = p.data.t().contiguous().t()
        elif p.dim() == 4:
            p.data = p.data.contiguous(memory_format=torch.channels_last)
    assert same(technique(twisted, task), technique(model, task), task, 1e-4)


@every
def test_02_expanded_weight_is_handled_by_a_copy(name):
    technique, task = technique_of(name), toy_task()
    models = [nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 4)).eval() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    row = torch.linspace(-1, 1, 12)
    models[0][0].weight = nn.Parameter(row.expand(16, 12))
    models[1][0].weight = nn.Parameter(row.expand(16, 12).contiguous())
    results = [handled(technique, model, task) for model in models]
    assert (results[0] is None) == (results[1] is None)
    assert results[0] is None or same(results[0], results[1], task, 1e-4)


# 3, 4, 14: structure


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.middle, self.head = nn.Embedding(10, 8), nn.Linear(8, 8), nn.Linear(8, 10, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids):
        return self.head(torch.relu(self.middle(self.embedding(ids))))


def tied_task() -> Task:
    ids = torch.arange(64).reshape(16, 4) % 10
    data = Batches(ids, (ids + 1) % 10, size=8)
    return Task(
        "tied",
        (ids[:2],),
        data,
        data,
        data,
        data,
        lambda y, b: nn.functional.cross_entropy(y.flatten(0, 1), b[1].flatten()),
        correct,
    )


@every
def test_03_tied_weights_stay_tied_and_are_stored_once(name, tmp_path):
    result = handled(technique_of(name), Tied().eval(), tied_task())
    if result is None or not isinstance(result, Tied):
        return
    assert result.head.weight is result.embedding.weight, "one tensor became two"
    save(result, tmp_path / "tied.safetensors")
    opened = load(tmp_path / "tied.safetensors", base=Tied())
    assert opened.head.weight is opened.embedding.weight and same(opened, result, tied_task())


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        shared = nn.Linear(12, 12)
        self.first, self.second = nn.Sequential(shared, nn.ReLU()), nn.Sequential(shared, nn.ReLU())
        self.last = nn.Linear(12, 4)

    def forward(self, x):
        return self.last(self.second(self.first(x)))


@every
def test_04_a_module_used_twice_is_replaced_once(name):
    result = handled(technique_of(name), Twice().eval(), toy_task())
    if result is not None and isinstance(result, Twice):
        assert result.first[0] is result.second[0]
    assert result is None or torch.isfinite(outputs(result, toy_task())).all()


@every
def test_14_the_model_may_itself_be_the_layer(name):
    result = handled(technique_of(name), nn.Linear(12, 4).eval(), toy_task())
    assert result is None or outputs(result, toy_task()).shape == (4, 4)


# 5 to 8: values


@every
@pytest.mark.parametrize("kind", ["zeros", "constant"])
def test_05_rows_of_zeros_and_constants_give_finite_results(name, kind):
    technique = technique_of(name)
    _, model, task = subject_for(technique)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() >= 2:
                p[0] = 0.0 if kind == "zeros" else 0.5
    assert torch.isfinite(outputs(technique(model, task), task)).all()


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_06_tiny_weights_in_half_precision_do_not_vanish(name, dtype):
    task = toy_task()
    model = nn.Sequential(nn.Linear(12, 16, bias=False), nn.Linear(16, 4, bias=False)).eval()
    with torch.no_grad():
        model[0].weight.mul_(1e-5)
    model = model.to(dtype)
    data = dataclasses.replace(task.train, inputs=task.train.inputs.to(dtype) * 1e3)
    task = dataclasses.replace(task, example=(data.inputs[:4],), train=data, calib=data, val=data, test=data)
    result = handled(technique_of(name), model, task)
    if result is not None:
        y = outputs(result, task)
        assert torch.isfinite(y).all() and y.dtype == dtype
        assert y.abs().max() > 0, "a scale underflowed to zero"


@every
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_07_nan_and_infinity_are_refused_by_name(name, value):
    technique = technique_of(name)
    _, model, task = subject_for(technique)
    parameter, tensor = next((n, p) for n, p in model.named_parameters() if p.dim() == 2)
    with torch.no_grad():
        tensor[0, 0] = value
    assert parameter in refusal(technique, model, task)


@every
def test_08_extreme_activations_are_handled_or_named(name):
    task = toy_task()
    data = dataclasses.replace(task.train, inputs=task.train.inputs * 1e18)
    task = dataclasses.replace(task, train=data, calib=data)
    model = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    refused_or_finite(technique_of(name), model, task)


# 9, 10: empty things


@every
def test_09_a_task_without_its_fields_is_refused_by_name_or_not_needed(name):
    technique = technique_of(name)
    _, model, task = subject_for(technique)
    for empty in (
        Task(),
        dataclasses.replace(
            task, train=Batches(torch.zeros(0, 1), torch.zeros(0)), calib=Batches(torch.zeros(0, 1), torch.zeros(0))
        ),
    ):
        try:
            result = technique(model, empty)
        except ValueError as error:
            assert type(technique).__name__ in str(error) or "task." in str(error), error
        else:
            assert torch.isfinite(outputs(result, task)).all()


@every
def test_10_zero_width_layers_are_left_alone(name):
    model = nn.Sequential(nn.Linear(12, 16), nn.Linear(16, 0), nn.Linear(0, 4)).eval()
    result = handled(technique_of(name), model, toy_task())
    assert result is None or torch.isfinite(outputs(result, toy_task())).all()


@every
def test_10_an_empty_batch_passes_through_the_result(name):
    technique = technique_of(name)
    subject, model, task = subject_for(technique)
    empty = task.example[0][:0]
    with torch.no_grad():
        assert technique(model, task)(empty).shape == model(empty).shape


# 11, 12: settings at their limits


@pytest.mark.parametrize("group_size", [1, -1, 0, 5, 7, 10_000])
@pytest.mark.parametrize(
    "name", sorted(n for n, k in TECHNIQUES.items() if "group_size" in {f.name for f in dataclasses.fields(k)})
)
def test_11_every_group_size_quantizes_every_weight(name, group_size):
    technique = technique_of(name, group_size=group_size)
    _, model, task = subject_for(technique)
    result = technique(model, task)
    assert not any(type(m) is nn.Linear for m in result.modules()), "a layer was skipped in silence"
    assert torch.isfinite(outputs(result, task)).all()


@pytest.mark.parametrize(
    "name", sorted(n for n, k in TECHNIQUES.items() if "sparsity" in {f.name for f in dataclasses.fields(k)})
)
def test_12_at_least_one_of_everything_stays(name):
    technique = technique_of(name, sparsity=0.999)
    _, model, task = subject_for(technique)
    result = technique(model, task)
    assert torch.isfinite(outputs(result, task)).all()
    assert all(0 not in p.shape for p in result.parameters())


class Grouped(nn.Module):
    """A depthwise convolution, a grouped one, a sum and a concatenation."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.classifier = nn.Linear(16, 10)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        y = x + self.depthwise(x)
        return self.classifier(torch.cat((y, torch.relu(self.grouped(y))), 1).mean((2, 3)))


@every
def test_12_grouped_convolutions_sums_and_concatenations(name):
    task = SUBJECTS["resnet"][1]()
    try:
        result = technique_of(name)(Grouped().eval(), task)
    except ValueError as error:
        assert len(str(error)) > 25
    else:
        assert outputs(result, task).shape == (4, 10)


# 13, 16 to 20: state


class Bare(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last, self.scale = nn.Linear(12, 16), nn.Linear(16, 4), nn.Parameter(torch.ones(16))

    def forward(self, x):
        return self.last(torch.relu(self.first(x)) * self.scale)


@every
def test_13_frozen_and_bare_parameters(name):
    model = Bare().eval()
    model.first.bias.requires_grad_(False)
    result = handled(technique_of(name), model, toy_task())
    if isinstance(result, Bare):
        state = dict(result.named_parameters())
        assert "scale" in state
        assert "first.bias" not in state or not state["first.bias"].requires_grad


@every
@pytest.mark.parametrize("how", ["weight norm", "pruned by torch"])
def test_16_parametrized_weights_are_baked_composed_or_refused(name, how):
    task = toy_task()
    model = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    if how == "weight norm":
        parametrizations.weight_norm(model[0])
    else:
        prune.l1_unstructured(model[0], "weight", 0.5)
    refused_or_finite(technique_of(name), model, task)


@every
def test_17_what_cannot_be_copied_is_named(name):
    technique = technique_of(name)
    _, model, task = subject_for(technique)
    model.lock = threading.Lock()
    assert "lock" in refusal(technique, model, task)


@every
def test_18_hooks_carry_over(name):
    calls = []
    model = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    model[0].register_forward_hook(lambda *_: calls.append(1))
    result = handled(technique_of(name), model, toy_task())
    if isinstance(result, nn.Sequential) and len(result) == 3:
        calls.clear()
        outputs(result, toy_task())
        assert calls == [1]


@every
def test_19_modes_and_statistics_stay(name):
    technique = technique_of(name)
    subject, _, task = subject_for(technique)
    model = SUBJECTS[subject][0]().train()
    buffers = {k: v.clone() for k, v in model.named_buffers()}
    result = technique(model, task)
    assert all(m.training for m in model.modules())
    assert all(torch.equal(v, buffers[k]) for k, v in model.named_buffers())
    assert result.training


# 15, 21, 22: other people's models


@every
def test_15_attention_modules_that_bypass_their_children(name):
    model = nn.Sequential(
        nn.Linear(12, 16), nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), nn.Linear(16, 4)
    ).eval()
    task = toy_task()
    data = dataclasses.replace(
        task.train, inputs=task.train.inputs[:, None].repeat(1, 3, 1), targets=task.train.targets[:, None].repeat(1, 3)
    )
    loss = lambda y, b: nn.functional.cross_entropy(y.flatten(0, 1), b[1].flatten())  # noqa: E731
    task = dataclasses.replace(task, example=(data.inputs[:4],), train=data, calib=data, val=data, test=data, loss=loss)
    result = handled(technique_of(name), model, task)
    if result is not None:
        assert torch.isfinite(outputs(result, task)).all()


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_21_other_precisions_keep_their_dtype(name, dtype):
    technique = technique_of(name)
    subject, _, task = subject_for(technique)
    model = SUBJECTS[subject][0]().to(dtype)
    cast = lambda b: dataclasses.replace(b, inputs=b.inputs.to(dtype)) if isinstance(b, Batches) else b  # noqa: E731
    task = dataclasses.replace(task, **{k: cast(getattr(task, k)) for k in ("train", "calib", "val", "test")})
    task = dataclasses.replace(task, example=tuple(x.to(dtype) if x.is_floating_point() else x for x in task.example))
    y = outputs(technique(model, task), task)
    assert torch.isfinite(y).all() and y.dtype == outputs(model, task).dtype


@every
def test_22_a_compiled_model_is_unwrapped_and_the_log_says_so(name):
    technique = technique_of(name)
    _, model, task = subject_for(technique)
    compiled = torch.compile(model, backend="eager")
    result = technique(compiled, task)
    assert not any("_orig_mod" in key for key in result.state_dict())
    assert same(result, technique(model, task), task, 1e-4)


# 24 to 27: names and files


@pytest.mark.parametrize(
    "name", sorted(n for n, k in TECHNIQUES.items() if "layers" in {f.name for f in dataclasses.fields(k)})
)
def test_24_a_pattern_that_matches_nothing_lists_the_candidates(name):
    technique = technique_of(name, layers="no.such.*")
    if technique.layers != "no.such.*":
        pytest.skip("its example delegates")
    subject, model, task = subject_for(technique_of(name))
    said = refusal(technique, model, task)
    assert "no.such.*" in said and any(path in said for path, _ in model.named_modules() if path)


@pytest.mark.parametrize(
    "data, expected",
    [
        ({"technique": "RTN", "bits": 4}, "schema"),
        ({"schema": 99, "technique": "RTN"}, "99"),
        ({"schema": 1, "technique": "os.system"}, "os.system"),
        ({"schema": 1, "technique": "RTN", "bitz": 4}, "bitz"),
        ({"schema": 1, "technique": "RTN", "bits": "4"}, "bits"),
        ({"schema": 1, "technique": "RTN", "bits": 17}, "17"),
        ({"schema": 1, "technique": "Pipeline", "steps": [{"technique": "Nothing"}]}, "Nothing"),
        ([], "list"),
    ],
)
def test_25_foreign_recipes_are_refused(data, expected):
    with pytest.raises(ValueError, match=expected):
        recipe.from_json(data, TECHNIQUES)


@every
@pytest.mark.parametrize("kind", ["meta", "lazy"])
def test_26_parameters_without_numbers_are_refused(name, kind):
    model = nn.Sequential(nn.LazyLinear(16) if kind == "lazy" else nn.Linear(12, 16, device="meta"), nn.Linear(16, 4))
    with pytest.raises(ValueError, match="uninitialized|meta device"):
        technique_of(name)(model, toy_task())


def altered(data: bytes, how: str) -> bytes:
    return {
        "cut": data[: len(data) // 2],
        "bit": data[:-5] + bytes([data[-5] ^ 1]) + data[-4:],
        "empty": b"",
        "pickle": b"\x80\x04cos\nsystem\n",
        "schema": data.replace(b'\\"schema\\":1', b'\\"schema\\":7'),
        "header": data.replace(b'\\"training\\":false', b'\\"training\\":true '),
    }[how]


@pytest.mark.parametrize("how", ["cut", "bit", "empty", "pickle", "schema", "header"])
def test_27_damaged_and_hostile_files_are_refused(how, tmp_path):
    path = tmp_path / "model.safetensors"
    save(SUBJECTS["mlp"][0](), path)
    path.write_bytes(altered(path.read_bytes(), how))
    with pytest.raises(ValueError, match="damaged|altered|schema"):
        load(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load(tmp_path / "nowhere.safetensors")


def test_the_log_tells_what_was_left_alone_and_why():
    result = TECHNIQUES["RTN"]()(Tied().eval(), tied_task())
    assert any("tied" in str(entry) for entry in log(result)) and any("middle" in str(entry) for entry in log(result))


def test_training_refuses_a_loss_that_is_not_a_number():
    task = dataclasses.replace(toy_task(), loss=lambda y, b: y.sum() * float("nan"))
    with pytest.raises(ValueError, match="step 0"):
        fit(nn.Linear(12, 4), task, Schedule(steps=3))
