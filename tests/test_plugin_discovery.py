"""Is the sweeper found, and does it run, however the package is installed; and without torch?

The environments made here link the packages they need from the one that runs the tests: nothing is downloaded, and
what is not linked, torch above all, cannot be imported. A slow test installs from the package index instead.
"""

import csv
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
SWEEP = ("-m", "hydra/sweeper=mdc_gp_ei", "x=interval(0,1)", "y=interval(0,1)", "hydra.sweep.dir=out")
SWEEP += ("hydra.sweeper.n_trials=4", "hydra.sweeper.n_initial_points=2")
ENV = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}


def run(*arguments: object, cwd: Path, **env: str) -> str:
    done = subprocess.run(
        [str(argument) for argument in arguments], cwd=cwd, env=ENV | env, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def required_by(names: list[str]) -> set[str]:
    """Distributions these need, themselves included; as they are named in this environment."""
    found: dict[str, None] = {}
    while names:
        name = re.sub(r"[-_.]+", "-", names.pop()).lower()
        if name in found:
            continue
        found[name] = None
        requirements = [Requirement(line) for line in distribution(name).requires or ()]
        names += [r.name for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})]
    return set(found)


def environment(folder: Path, *names: str) -> Path:
    """A virtual environment with these distributions, and what they need, linked into it. Returns its Python."""
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    python = folder / "bin" / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip())
    for name in required_by(list(names)):
        here = distribution(name)
        for top in {path.parts[0] for path in here.files or () if path.parts[0] not in ("..", "__pycache__")}:
            if not (site / top).exists():
                (site / top).symlink_to(Path(str(here.locate_file(""))) / top)
    assert subprocess.run([python, "-c", "import torch"], cwd=folder, env=ENV, capture_output=True).returncode == 1
    return python


def pip(python: Path, *arguments: object) -> None:
    common = ("--no-deps", "--quiet", "--disable-pip-version-check")
    run(sys.executable, "-m", "pip", "--python", python, "install", *common, *arguments, cwd=python.parent)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    quietly = ("--quiet", "--disable-pip-version-check", "--no-deps", "--no-build-isolation")
    run(sys.executable, "-m", "pip", "wheel", *quietly, "-w", folder, ROOT, cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture
def app(tmp_path) -> Path:
    """The toy app in a folder that has nothing to do with the repository."""
    shutil.copytree(ROOT / "tests" / "sweep_app", tmp_path / "elsewhere", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path / "elsewhere" / "app.py"


def assert_it_ran(printed: str, folder: Path) -> None:
    assert "4 trials; best value" in printed
    assert "UserWarning" not in printed
    with (folder / "trials.csv").open() as file:
        assert [row["status"] for row in csv.DictReader(file)] == ["done"] * 4


def test_what_hydra_imports_at_every_start_is_light():
    script = (
        "import sys; from hydra.core.plugins import Plugins; from hydra.plugins.sweeper import Sweeper\n"
        "found = [kind.__name__ for kind in Plugins.instance().discover(Sweeper)]\n"
        "assert found.count('MdcGpEiSweeper') == 1, found\n"
        "heavy = {'torch', 'skopt', 'sklearn', 'numpy', 'matplotlib', 'lightning_mdc'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "own = sorted(name for name in sys.modules if name.startswith('hydra_plugins.hydra_mdc'))\n"
        "assert own == ['hydra_plugins.hydra_mdc_sweeper', 'hydra_plugins.hydra_mdc_sweeper._conf', '"
        "hydra_plugins.hydra_mdc_sweeper.conf', '"
        "hydra_plugins.hydra_mdc_sweeper.mdc_sweeper'], own\n"
    )
    run(sys.executable, "-c", script, cwd=ROOT)


def test_all_settings_are_explained_where_they_are_defined():
    lines = (ROOT / "hydra_plugins" / "hydra_mdc_sweeper" / "_conf.py").read_text().splitlines()
    settings = [i for i, line in enumerate(lines) if re.match(r"    [a-z]\w*: ", line)]
    assert len(settings) > 15
    assert [lines[i] for i in settings if not lines[i - 1].lstrip().startswith("#")] == []


@pytest.mark.slow
def test_a_wheel_runs_without_torch(tmp_path, wheel, app):
    python = environment(tmp_path / "venv", "hydra-core", "scikit-optimize")
    pip(python, "--no-index", wheel)
    printed = run(python, app, *SWEEP, cwd=tmp_path)
    assert_it_ran(printed, tmp_path / "out")
    assert "pictures are left out" in printed  # no matplotlib either
    # Also as Hydra 1.4 finds it.
    script = (
        "from importlib.metadata import entry_points\n"
        "(point,) = entry_points(group='hydra.plugins', name='mdc_gp_ei'); print(point.load().__name__)"
    )
    assert run(python, "-c", script, cwd=tmp_path) == "MdcGpEiSweeper\n"


@pytest.mark.slow
def test_an_editable_install_is_found_from_anywhere(tmp_path, app):
    python = environment(tmp_path / "venv", "hydra-core", "scikit-optimize", "hatchling", "editables")
    pip(python, "--no-build-isolation", "--no-index", "--editable", ROOT)
    assert_it_ran(run(python, app, *SWEEP, cwd=tmp_path), tmp_path / "out")


def test_it_is_found_from_the_root_of_the_repository_when_nothing_is_installed(tmp_path):
    python = environment(tmp_path / "venv", "hydra-core", "scikit-optimize")
    given = [argument for argument in SWEEP if not argument.startswith("hydra.sweep.dir")]
    printed = run(python, "-m", "tests.sweep_app.app", *given, f"hydra.sweep.dir={tmp_path / 'out'}", cwd=ROOT)
    assert_it_ran(printed, tmp_path / "out")


def test_the_source_distribution_has_the_plugin(tmp_path):
    import tarfile

    from hatchling.builders.sdist import SdistBuilder

    (built,) = SdistBuilder(str(ROOT)).build(directory=str(tmp_path))
    with tarfile.open(built) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"hydra_plugins/hydra_mdc_sweeper/mdc_sweeper.py", "tests/sweep_app/conf/config.yaml"} <= names
    assert "hydra_plugins/__init__.py" not in names


@pytest.mark.slow
def test_a_wheel_runs_in_an_environment_from_the_package_index(tmp_path, wheel, app):
    run(sys.executable, "-m", "venv", tmp_path / "venv", cwd=tmp_path)
    python = tmp_path / "venv" / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", "hydra-core>=1.3,<1.4", "scikit-optimize>=0.10.2", cwd=tmp_path)
    pip(python, "--no-index", wheel)
    assert_it_ran(run(python, app, *SWEEP, cwd=tmp_path), tmp_path / "out")
    assert sysconfig.get_paths()["purelib"] not in run(python, "-c", "import sys; print(sys.path)", cwd=tmp_path)
