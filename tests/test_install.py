"""What pip installs: the command ``mdc`` and its configuration, from a wheel in any folder, or editable.

The environments made here see the packages of the one that runs the tests by a ``.pth`` file, so nothing is downloaded;
of this package they have what was installed into them, and no checkout.
"""

import shlex
import shutil
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

import lightning_mdc as mdc
from tests.kinds import images, make
from tests.test_plugin_discovery import ENV, ROOT, pip, run, wheel  # noqa: F401 (a fixture)
from tests.test_train import TINY

CONF = {path.relative_to(ROOT / "conf").as_posix() for path in (ROOT / "conf").glob("**/*.yaml")}
ON_TWO = [*(override for override in TINY if override != "trainer=cpu"), "trainer=ddp_cpu", "threads=1"]


def environment(folder: Path, *what: object) -> Path:
    """The programs' folder of a virtual environment into which `what` is installed."""
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    programs = folder / "bin"
    where = run(programs / "python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder)
    (Path(where.strip()) / "packages_of_the_tests.pth").write_text(sysconfig.get_path("purelib") + "\n")
    # What is among those packages is not to be touched.
    pip(programs / "python", "--ignore-installed", "--no-build-isolation", "--no-index", *what)
    return programs


@pytest.fixture(scope="module")
def installed(tmp_path_factory, wheel) -> Path:  # noqa: F811
    return environment(tmp_path_factory.mktemp("installed") / "venv", wheel)


def newest(runs: Path) -> Path:
    return max((runs / "tiny").iterdir())


# --- a wheel ----------------------------------------------------------------------------------------------------------


def test_a_wheel_has_the_configuration_and_the_command(wheel):  # noqa: F811
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (entry_points,) = (name for name in names if name.endswith("entry_points.txt"))
        assert "[console_scripts]\nmdc = lightning_mdc.__main__:main\n" in archive.read(entry_points).decode()
    assert {name.removeprefix("lightning_mdc/app/conf/") for name in names if "/app/conf/" in name} == CONF
    assert sum(name.endswith("/train.yaml") for name in names) == 1
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"lightning_mdc", "hydra_plugins"}


@pytest.mark.slow
def test_mdc_of_a_wheel_runs_in_any_folder(tmp_path, installed):
    said = run(installed / "mdc", "-h", cwd=tmp_path)
    assert said == run(installed / "python", "-m", "lightning_mdc", "-h", cwd=tmp_path)
    said = run(installed / "mdc", "train", "--help", cwd=tmp_path)
    assert said.count("  mdc train") >= 5
    assert str(installed.parent) in said  # where the settings are explained
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_slim_model_loads_where_nothing_is_known_but_the_wheel(tmp_path, installed):
    """No training code, no tests, and no more of ours than it takes: neither Lightning nor Hydra."""
    model = make()
    slim = mdc.slim(model, mdc.make_plan(model, mdc.score(model, [images(8)]), mdc.uniform_policy(model, 0.6)))
    mdc.save(slim, tmp_path / "m")
    torch.save(images(), tmp_path / "x.pt")
    program = (
        "import sys, torch, lightning_mdc as mdc\n"
        "with torch.no_grad(): torch.save(mdc.load('m')(torch.load('x.pt')), 'y.pt')\n"
        "assert not {'tests', 'lightning', 'hydra'} & set(sys.modules)\n"
        "print(mdc.__file__)\n"
    )
    where = run(installed / "python", "-c", program, cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(installed.parent)
    with torch.no_grad():
        torch.testing.assert_close(torch.load(tmp_path / "y.pt"), slim(images()))


def test_releases_of_lightning_that_were_malicious_are_no_dependency():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (lightning,) = (r for r in map(Requirement, project["dependencies"]) if r.name == "lightning")
    taken = [version for version in ("2.6.1", "2.6.2", "2.6.3", "2.6.4", "3.0") if version in lightning.specifier]
    assert taken == ["2.6.1", "2.6.4"]


def test_mdc_says_what_it_can_without_loading_anything():
    script = "import sys; from lightning_mdc.__main__ import main; sys.argv = ['mdc', '-h']; main()"
    loaded = f"try: {script}\nexcept SystemExit: print(sorted({{'torch', 'hydra', 'numpy'}} & set(sys.modules)))"
    *lines, modules = run(sys.executable, "-c", loaded, cwd=ROOT).splitlines()
    assert modules == "[]"
    assert [line.split()[0] for line in lines if line.startswith("    ")] == ["train", "report", "compress", "export"]


@pytest.mark.slow
def test_a_run_goes_from_start_to_report_by_what_it_says(tmp_path, installed):
    printed = run(installed / "mdc", "train", *TINY, "stage=[dense,score,search]", cwd=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
    folder = newest(tmp_path / "runs")
    program, *arguments = shlex.split(printed.splitlines()[-1])
    assert (program, arguments[0], arguments[-1]) == ("mdc", "train", f"resume={folder.relative_to(tmp_path)}")
    printed = run(installed / "mdc", *arguments, cwd=tmp_path)
    assert "search:  picked up" in printed
    for page in ("report.html", "report.md"):
        assert "mdc train" in (folder / page).read_text()
        (folder / page).unlink()
    run(installed / "mdc", "report", folder, cwd=tmp_path)
    assert "python train.py" not in (folder / "report.html").read_text()


@pytest.mark.slow
def test_several_processes(tmp_path, installed):
    """Lightning starts the second one by the first one's command line, which has a word that Hydra must not see."""
    run(installed / "mdc", "train", "-q", *ON_TWO, "stage=dense", cwd=tmp_path)
    assert (newest(tmp_path / "runs") / "log.txt").read_text().count("dense:   done in") == 1
    module = (installed / "python", "-m", "lightning_mdc")
    printed = run(*module, "train", *ON_TWO, "stage=[dense,score]", "resume=true", cwd=tmp_path)
    assert "dense:   picked up" in printed
    assert "score:   done in" in printed


@pytest.mark.slow
def test_a_sweep(tmp_path, installed):
    keep = ("policy.keep.heads=0.5,1", "policy.keep.neurons=0.5", "stage=trial")
    run(installed / "mdc", "train", "-m", *keep, *TINY, cwd=tmp_path)
    assert len(list(tmp_path.glob("runs/sweeps/*/*/policy.json"))) == 2
    sweeper = ("hydra/sweeper=mdc_gp_ei", "hydra.sweeper.n_trials=2", "hydra.sweeper.n_initial_points=1")
    printed = run(installed / "mdc", "train", "-m", *sweeper, "budget=0.5", *TINY, cwd=tmp_path)
    (best,) = tmp_path.glob("runs/sweeps/*/best_policy.json")
    assert printed.splitlines()[-1].startswith(f"  mdc train policy.file={best} ")


# --- a checkout -------------------------------------------------------------------------------------------------------


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A copy of what the repository needs to be installed."""
    folder = tmp_path / "checkout"
    left_out = shutil.ignore_patterns("__pycache__")
    for name in ("lightning_mdc", "hydra_plugins", "conf"):
        shutil.copytree(ROOT / name, folder / name, ignore=left_out)
    for name in ("pyproject.toml", "README.md", "LICENSE", "train.py"):
        shutil.copy(ROOT / name, folder)
    return folder


@pytest.mark.slow
def test_an_editable_install_reads_the_configuration_of_the_checkout(tmp_path, checkout):
    programs = environment(tmp_path / "venv", "--editable", checkout)
    assert not list(programs.parent.glob("lib/**/conf/train.yaml"))
    settings = checkout / "conf" / "train.yaml"
    for budget in ("0.6", "0.123"):
        settings.write_text(settings.read_text().replace("\nbudget: 0.6\n", f"\nbudget: {budget}\n"))
        assert f"\nbudget: {budget}\n" in run(programs / "mdc", "train", "--cfg", "job", cwd=tmp_path)
    assert not list(checkout.glob("lightning_mdc/**/conf"))


def test_a_wheel_of_the_source_distribution_has_the_configuration(tmp_path):
    import tarfile

    from hatchling.builders.sdist import SdistBuilder

    (built,) = SdistBuilder(str(ROOT)).build(directory=str(tmp_path))
    with tarfile.open(built) as archive:
        archive.extractall(tmp_path, filter="data")
    (source,) = (path for path in tmp_path.iterdir() if path.is_dir())
    quietly = ("--quiet", "--disable-pip-version-check", "--no-deps", "--no-build-isolation")
    run(sys.executable, "-m", "pip", "wheel", *quietly, "-w", tmp_path, source, cwd=tmp_path)
    (built,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(built) as archive:
        assert {name for name in CONF if f"lightning_mdc/app/conf/{name}" in archive.namelist()} == CONF
