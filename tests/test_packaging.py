"""The files that describe the project agree with each other, and with what a fresh machine needs."""

import json
import os
import re
import shlex
import socket
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from effkit import stages

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
FOR_CPU = "https://download.pytorch.org/whl/cpu"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
DIRECT = [Requirement(line) for group in (PROJECT["dependencies"], *EXTRAS.values()) for line in group]


def locked() -> dict[str, Version]:
    """Name to version, refusing any line that is not exactly `name==version`: no hash, no address, no local label."""
    lines = [
        line.split("#")[0].strip() for line in (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    ]
    pins = [
        re.fullmatch(r"([A-Za-z0-9._-]+)==([\w.]+)", line) or pytest.fail(f"not a pin: {line!r}")
        for line in lines
        if line
    ]
    return {canonicalize_name(pin[1]): Version(pin[2]) for pin in pins}


@pytest.mark.parametrize("requirement", DIRECT, ids=lambda requirement: requirement.name)
def test_every_direct_dependency_is_locked_inside_its_range(requirement):
    assert locked()[canonicalize_name(requirement.name)] in requirement.specifier


@pytest.mark.parametrize("requirement", DIRECT, ids=lambda requirement: requirement.name)
def test_ranges_are_loose_but_closed(requirement):
    operators = {clause.operator for clause in requirement.specifier}
    assert operators == {">=", "<"}, "a lower bound that works, and the next breaking release"


def test_torch_and_torchvision_are_of_one_release():
    torch, torchvision = locked()["torch"], locked()["torchvision"]
    assert (torch.major, torch.minor - torchvision.minor) == (2, -15), "torch 2.N goes with torchvision 0.(N + 15)"


def test_every_peer_is_asked():
    """By a test or a notebook, which import it; nothing is installed for nobody."""
    places = [*(ROOT / "tests").rglob("*.py"), *(ROOT / "notebooks").glob("*.ipynb")]
    said = "\n".join(path.read_text(encoding="utf-8") for path in places)
    for name in (Requirement(line).name.replace("-", "_") for line in EXTRAS["peers"]):
        assert re.search(rf"\b(import|from) {name}\b", said), f"nobody imports {name}"


def test_peers_are_an_extra_only():
    core = {Requirement(line).name for line in PROJECT["dependencies"]}
    assert not core & {Requirement(line).name for line in EXTRAS["peers"]}


def test_environment_agrees_with_pyproject():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    assert environment["name"] == PROJECT["name"]
    assert environment["channels"] == ["conda-forge"]
    *conda, by_pip = environment["dependencies"]
    assert [re.split("[=<>]", line)[0] for line in conda] == ["python", "pip", "c-compiler"], (
        "the project comes by pip alone"
    )
    python = next(line.removeprefix("python=") for line in conda if line.startswith("python="))
    assert Requirement(f"python{PROJECT['requires-python']}").specifier.contains(python)
    assert by_pip == {"pip": [f"--extra-index-url {FOR_CPU}", "-c requirements.lock", f"-e .[{','.join(EXTRAS)}]"]}


def test_the_way_around_cuda_is_pytorchs_own_index():
    """Of one version, pip takes the build with a local label for the newer (PEP 440), and the lock has room for it."""
    built_for_cpu = Version(f"{locked()['torch']}+cpu")
    assert built_for_cpu > locked()["torch"] and built_for_cpu in Requirement(f"torch=={locked()['torch']}").specifier
    assert f" {built_for_cpu}," in (ROOT / "environment.yml").read_text(encoding="utf-8")
    assert f"\nPIP_EXTRA_INDEX_URL={FOR_CPU} make tour\n" in README


def test_pip_takes_the_build_for_the_cpu(tmp_path):
    """As environment.yml asks for it, from two indexes that each have a torch of the locked version."""
    pytest.importorskip("pip", reason="an environment that was made without pip")
    for index, version in (("pypi", f"{locked()['torch']}"), ("cpu", f"{locked()['torch']}+cpu")):
        folder, wheel = tmp_path / index / "torch", f"torch-{version}-py3-none-any.whl"
        folder.mkdir(parents=True)
        with zipfile.ZipFile(folder / wheel, "w") as made:
            made.writestr(f"torch-{version}.dist-info/METADATA", f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n")
            made.writestr(f"torch-{version}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        (folder / "index.html").write_text(f'<!DOCTYPE html><a href="{wheel.replace("+", "%2B")}">{wheel}</a>')
    (tmp_path / "asked.txt").write_text(f"--extra-index-url {(tmp_path / 'cpu').as_uri()}\n-c {ROOT / 'requirements.lock'}\ntorch\n")
    asked = ["download", "--no-deps", "-q", "--index-url", (tmp_path / "pypi").as_uri(), "-r", tmp_path / "asked.txt", "-d", tmp_path / "got"]
    alone = {k: v for k, v in os.environ.items() if not k.startswith("PIP_")} | {"PIP_CONFIG_FILE": os.devnull}
    run = subprocess.run([sys.executable, "-m", "pip", *asked], env=alone, capture_output=True, text=True)
    assert [wheel.name for wheel in (tmp_path / "got").glob("*")] == [f"torch-{locked()['torch']}+cpu-py3-none-any.whl"], run.stderr


def test_the_readme_is_read_in_three_minutes():
    """At 250 words a minute, its tables and commands among them."""
    assert len(re.findall(r"\w\S*", README)) <= 750


def cells(number: str) -> list[str]:
    """The source of each cell of a notebook."""
    (path,) = (ROOT / "notebooks").glob(f"{number}_*.ipynb")
    return ["".join(cell["source"]) for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]]


def test_the_readmes_minutes_are_the_notebooks_own():
    for number, minutes in re.findall(r"^\| (\d\d) \|.*\| (\d+) \|$", README, re.MULTILINE):
        assert f"About {minutes} minutes" in cells(number)[0], number
    assert len(re.findall(r"^\| \d\d \|", README, re.MULTILINE)) == len([*(ROOT / "notebooks").glob("[0-9]*.ipynb")])


def test_the_workshop_has_no_gap_and_names_sections_that_are_there():
    plan = re.findall(r"^\| (\d:\d\d) - (\d:\d\d) \| (.*) \|$", README, re.MULTILINE)
    starts, ends, rows = zip(*plan, strict=True)
    assert starts[0] == "0:00" and starts[1:] == ends[:-1] and ends[-1] < "4:00"
    named = [(number, re.findall(r"\*([^*]+)\*", row)) for row in rows for number in re.findall(r"^(\d\d):", row)]
    named += [(number, ["Now on your own model"]) for row in rows if " or " in row for number in re.findall(r"\d\d", row)]
    assert len(named) == 5
    for number, sections in named:
        headings = re.findall(r"^## (.*)$", "\n".join(cells(number)), re.MULTILINE)
        assert sections == [h for h in headings if h in sections], f"{number} has {headings}"


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_commands_that_a_page_names_exist(page):
    """With their options."""
    from typer.main import get_command

    from effkit.cli import app

    text, commands = (ROOT / page).read_text(encoding="utf-8"), get_command(app).commands
    for name, rest in re.findall(r"(?:`|-m )effkit ([a-z]+)([^`\n]*)", text):
        options = {option for parameter in commands[name].params for option in parameter.opts}
        assert set(re.findall(r"--[a-z-]+", rest)) <= options, name
    rules = re.findall(r"^([a-z ]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    targets = {target for rule in rules for target in rule.split()}
    assert set(re.findall(r"(?:^|`|cpu )make ([a-z]+)", text, re.MULTILINE)) <= targets


def test_the_readmes_example_trains_for_seconds():
    """An epoch of the standard library has 748 steps."""
    import effkit

    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    (technique,) = re.findall(r"small = (.*)\(model, task\)", code)
    made = eval(technique, {"effkit": effkit})
    assert 0 < made.steps[-1].steps <= 50


def test_citation_agrees_with_pyproject():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert (citation["version"], citation["license"]) == (PROJECT["version"], PROJECT["license"])


def test_make_wraps_commands_that_exist():
    from typer.main import get_command

    from effkit.cli import app

    targets = re.findall(r"^([a-z][a-z ]*): \.venv/\.installed", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    wrapped = {target for line in targets for target in line.split()}
    assert wrapped <= set(get_command(app).commands)


@pytest.mark.parametrize("installed", [".venv/.installed", ".venv/.installed-dev"])
def test_a_second_run_installs_nothing(installed, tmp_path):
    """In a folder with a space in its name; a stamp newer than what it depends on leaves make nothing to do."""
    folder = tmp_path / "a b"
    (folder / ".venv/bin").mkdir(parents=True)
    for name in ("Makefile", "pyproject.toml", "requirements.lock"):
        (folder / name).write_bytes((ROOT / name).read_bytes())
    (folder / ".venv/bin/python").touch()
    first = make(folder, installed)
    assert "pip install" in first and "venv --clear" not in first, "a .venv made by hand is kept"
    (folder / installed).touch()
    assert "pip install" not in make(folder, installed)


def make(folder: Path, target: str) -> str:
    """What make would do."""
    return subprocess.run(["make", "-n", target], cwd=folder, capture_output=True, text=True, check=True).stdout


def test_no_test_reaches_the_network():
    """The guard of conftest.py bites, and lets this machine speak with itself, as notebooks do with their kernels."""
    with pytest.raises(pytest.fail.Exception, match="works without a network"):
        socket.create_connection(("192.0.2.1", 80), timeout=1)
    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection(server.getsockname(), timeout=1).close()


REACH = "import socket; socket.create_connection((%r, %d), timeout=1)"


def test_no_process_that_a_test_starts_reaches_it_either():
    run = subprocess.run([sys.executable, "-c", REACH % ("192.0.2.1", 80)], capture_output=True, text=True)
    assert run.returncode == 1 and "('192.0.2.1', 80): effkit works without a network" in run.stderr
    with socket.create_server(("127.0.0.1", 0)) as server:
        subprocess.run([sys.executable, "-c", REACH % server.getsockname()], check=True)


OWN = "import builtins, socket; builtins.OWN = __file__, socket.socket.connect.__qualname__"


@pytest.fixture
def started(tmp_path, monkeypatch):
    """Runs code in a process of a machine that has a sitecustomize of its own, with this source; in vain, if it is not run."""

    def run(own: str, code: str) -> subprocess.CompletedProcess:
        (tmp_path / "sitecustomize.py").write_text(own)
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join((stages.offline()["PYTHONPATH"], str(tmp_path))))
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)

    return run


def test_a_machines_own_start_is_run_guarded(started, tmp_path):
    run = started(OWN, "print(*OWN)")
    assert run.stdout.split() == [str(tmp_path / "sitecustomize.py"), "guarded.<locals>.within"], run.stderr


@pytest.mark.parametrize("own", ["1 / 0", "import no_such_module", OWN], ids=["fails", "imports what is missing", "works"])
def test_the_guard_bites_whatever_the_machines_own_does(started, own):
    run = started(own, REACH % ("192.0.2.1", 80))
    assert run.returncode == 1 and "('192.0.2.1', 80): effkit works without a network" in run.stderr
    assert ("Error in sitecustomize" in run.stderr) == (own != OWN)


def test_a_guard_that_shadows_the_machines_own_is_caught(started, tmp_path, monkeypatch):
    """Planted: the guard as it was, in a folder of its own before all others."""
    shadow = tmp_path / "shadow"
    shadow.mkdir()
    source = (ROOT / "tests/offline/sitecustomize.py").read_text(encoding="utf-8")
    (shadow / "sitecustomize.py").write_text(source.replace("run_the_machines_own(__name__)", "pass"))
    monkeypatch.setattr(stages, "offline", lambda: {"PYTHONPATH": str(shadow)})
    with pytest.raises(AssertionError):
        test_a_machines_own_start_is_run_guarded(started, tmp_path)


def test_no_stage_reaches_it(monkeypatch, capfd):
    """The notebooks' kernels are children of a stage."""
    monkeypatch.delenv("PYTHONPATH")
    monkeypatch.setitem(stages.STAGES, "probe", f"timeit -n 1 -r 1 {shlex.quote(REACH % ('192.0.2.1', 80))}")
    ((_, code, _),) = stages.run("probe")
    assert code == 1 and "effkit works without a network" in capfd.readouterr().err
