"""How the command line speaks: the flags of ``mdc train``, its lines as a file, and what is said when it ends early."""

from __future__ import annotations

import difflib
import errno
import logging
import re
import shlex
import shutil
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import SIGTERMException
from omegaconf import OmegaConf

from lightning_mdc.app.settings import flat, may_be
from lightning_mdc.distributed import is_first
from lightning_mdc.errors import MdcError, error_chain
from lightning_mdc.progress import Screen

log = logging.getLogger(__name__)

LOG_FILE = "log.txt"
# Exit codes by the shell's convention: 128 + SIGINT, and + SIGTERM, which is how a cluster takes a machine back.
INTERRUPTED, TERMINATED = STOPPED = (130, 143)

_FLAGS = {
    "-q": "hydra/job_logging=quiet",
    "--quiet": "hydra/job_logging=quiet",
    # Not true: Hydra would begin with pages about its plugins and its search path.
    "-v": "hydra.verbose=[lightning_mdc]",
    "--verbose": "hydra.verbose=[lightning_mdc]",
}
# Rust and C++ know the number of an error, too, but keep it to themselves.
_DISK_FULL = ("No space left on device", "Disk quota exceeded")
_TORCH_CANNOT_WRITE = "PytorchStreamWriter failed writing"
_NO_ROOM = 2**20
_WORKER_KILLED = re.compile(r"DataLoader worker \(pid\(?s?\)? [\d, ]+\) (is killed|exited unexpectedly)")


def overrides(arguments: Sequence[str]) -> list[str]:
    """The command line with our flags as Hydra's overrides, so that processes it is started with again have them."""
    return [_FLAGS.get(argument, argument) for argument in arguments]


class FirstRank(logging.Filter):
    """Of several processes the first one speaks; the others have warnings only."""

    def filter(self, record: logging.LogRecord) -> bool:
        return rank_zero_only.rank == 0 or record.levelno >= logging.WARNING  # type: ignore[attr-defined]


@contextmanager
def on_screen() -> Iterator[None]:
    """Inside, our lines and other people's warnings are shown as ``conf/hydra/job_logging`` has it for a run."""
    screen, root, ours = Screen(), logging.getLogger(), logging.getLogger("lightning_mdc")
    before = ours.level
    root.addHandler(screen)
    ours.setLevel(logging.INFO)
    try:
        yield
    finally:
        root.removeHandler(screen)
        ours.setLevel(before)


class LogFile(logging.FileHandler):
    """The lines of a run with their times, to be read afterwards."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, encoding="utf-8")
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(message)s", "%Y-%m-%d %H:%M:%S"))

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 (logging's name)
        """What cannot be written is not worth a run, nor a message per line."""
        logging.getLogger().removeHandler(self)
        print(f"{self.baseFilename} cannot be written, so it ends here: {sys.exc_info()[1]}", file=sys.stderr)


@contextmanager
def log_file(path: Path) -> Iterator[None]:
    """Inside, what is logged is also added to the file at `path`, and so is what it ends with if it ends early."""
    file = LogFile(path)
    root = logging.getLogger()
    root.addHandler(file)
    try:
        yield
    except BaseException as error:
        explained = explain(error)
        text = explained[0] if explained and explained[1] in STOPPED else "".join(traceback.format_exception(error))
        if file in root.handlers:
            file.handle(log.makeRecord(log.name, logging.ERROR, __file__, 0, text, (), None))
        raise
    finally:
        root.removeHandler(file)
        with suppress(OSError):  # said already, by handleError
            file.close()


def hint(arguments: Sequence[str], conf: Path) -> str | None:
    """What to type instead of a setting that does not exist, after Hydra has refused it; None if all of them do.

    Args:
        arguments: the command line.
        conf: folder of the configuration.
    """
    words = [word for word in arguments if not word.startswith("-")]
    names = {word: word.lstrip("+~").partition("=")[0] for word in words}
    if null := next((word for word in words if re.search(r"\b[a-z]+\(.*\bnull\b", word.partition("=")[2])), None):
        return f"{null!r}: Hydra's functions take no null; list the values without one, as in {names[null]}=null,1"
    if sampler := next((word for word in words if word.lstrip("+").startswith("hydra/sweeper/sampler")), None):
        return f"{sampler!r} is of Optuna's sweeper; leave it out; hydra.sweeper.seed, .xi, .n_initial_points are ours"
    if missing := [word for word in words if "=" not in word and not word.startswith("~")]:
        return f"{missing[0]!r} gives no value; write {missing[0]}=VALUE"
    groups = {
        path.name: sorted(option.stem for option in path.glob("*.yaml")) for path in conf.iterdir() if path.is_dir()
    }
    chosen = [word.lstrip("+") for word, name in names.items() if name in groups and not word.startswith("~")]
    for word in chosen:
        group, _, options = word.partition("=")
        for option in options.strip("[]").split(","):
            if option not in groups[group]:
                return f"{group}={option!r} is none of {', '.join(groups[group])}"
    with initialize_config_dir(str(conf), version_base="1.3"):
        settings: Any = OmegaConf.to_container(compose("train", chosen), resolve=False)
    # Groups of settings are keys, too.
    keys = (prefix for key, _ in flat(settings) for prefix in accumulate(key.split("."), "{}.{}".format))
    known = [*dict.fromkeys(keys), *groups]
    unknown = [
        word
        for word, name in names.items()
        if name not in known and not name.startswith("hydra") and not (word.startswith("+") and may_be(name))
    ]
    if not unknown:
        return None
    word, name = unknown[0], names[unknown[0]]
    close = difflib.get_close_matches(name, known, n=1)
    also = [key for key in known if key.rpartition(".")[2] == name][:3]
    meant = f"did you mean {' or '.join(dict.fromkeys([*also, *close]))}? " if also or close else ""
    handed_on = f"+{word} hands it on as it is; " if may_be(name) and not word.startswith("~") else ""
    return f"there is no setting {name!r}; {meant}{handed_on}{shlex.join(program())} --cfg job shows all of them"


# --- what to type next ------------------------------------------------------------------------------------------------


def program() -> list[str]:
    """What a command line begins with: ``python .../train.py`` where the user has typed that, else ``mdc train``."""
    return ["python", sys.argv[0]] if Path(sys.argv[0]).name == "train.py" else ["mdc", "train"]


def in_sweep() -> bool:
    """Whether this is one of several runs that Hydra starts (``-m``)."""
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def started() -> str:
    """The command line that is running, for a shell."""
    if not HydraConfig.initialized():
        return shlex.join(["python", *sys.argv])
    seen: Any = HydraConfig.get().overrides
    # The mode is Hydra's own addition.
    given = [*seen.task, *(text for text in seen.hydra if not text.startswith("hydra.mode="))]
    flags = {override: flag for flag, override in _FLAGS.items() if not flag.startswith("--")}
    return shlex.join([*program(), *(flags.get(text, text) for text in given)])


def again(command: str, folder: Path, *overrides: str, without: Sequence[str] = ()) -> str:
    """What to type to go on in the run at `folder`, which `command` has worked on.

    Args:
        overrides: to add, or to replace what `command` says of the same settings.
        without: settings to leave out, such as ``stage``.
    """
    overrides = (f"resume={_hydra_value(folder)}", *overrides)
    dropped = {*without, *(override.partition("=")[0] for override in overrides)}
    kept = [word for word in shlex.split(command) if word.lstrip("+~").partition("=")[0] not in dropped]
    return shlex.join([*kept, *overrides])


def _hydra_value(path: Path) -> str:
    text = str(path)
    if re.fullmatch(r"[\w./:@%+-]+", text, re.ASCII):
        return text
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def note_where(error: BaseException, folder: Path, step: str) -> None:
    """Tell whoever reads the error where it happened and how to go on."""
    if is_first():
        error.add_note(f"in step {step!r} of {folder}")
        error.add_note(f"go on from there with\n  {again(started(), folder)}")


# --- ending early -----------------------------------------------------------------------------------------------------


def explain(error: BaseException) -> tuple[str, int] | None:
    """(message in place of a traceback, exit code); None if the error is one that only its traceback explains."""
    chain = list(error_chain(error))
    notes = next((cause.__notes__ for cause in chain if hasattr(cause, "__notes__")), [])
    where = "".join(f"\n{note}" for note in notes)
    terminated = isinstance(error, SIGTERMException)
    if terminated or any(isinstance(cause, KeyboardInterrupt) for cause in chain[:2]):  # Lightning makes an exit of it
        word, code = stopped_by(error)
        return " ".join([word, *notes[:1]]) + "".join(f"; {note}" for note in notes[1:]), code
    if (full := _disk_full(chain)) is not None:
        return f"{full}{where}", 1
    if isinstance(error, MdcError):
        return f"{type(error).__name__}: {error}{where}", 1
    if isinstance(error, torch.OutOfMemoryError):
        smaller = "data.batch_size, calibration.batch_size, search.batch_size or latency.batch_sizes"
        return f"{error}\ntake fewer images at a time: {smaller}{where}", 1
    if _WORKER_KILLED.search(str(error)):
        killed = f"a process that reads images was killed, most likely for lack of memory: {error}"
        return f"{killed}\nuse fewer of them (data.num_workers) or a smaller data.batch_size{where}", 1
    return None


def stopped_by(error: BaseException) -> tuple[str, int]:
    """(word for it, exit code) of Ctrl-C or SIGTERM; Lightning's exit for the latter would be a success."""
    return ("stopped", TERMINATED) if isinstance(error, SIGTERMException) else ("interrupted", INTERRUPTED)


def _disk_full(chain: Sequence[BaseException]) -> str | None:
    for cause in chain:
        file = getattr(cause, "filename", None) or ""
        number = getattr(cause, "errno", None)
        text = str(cause)
        by_torch = _TORCH_CANNOT_WRITE in text and shutil.disk_usage(".").free < _NO_ROOM
        if number in (errno.ENOSPC, errno.EDQUOT) or any(words in text for words in _DISK_FULL) or by_torch:
            named = f" {file}" if file else ""
            return f"the disk is full: cannot write{named} ({text}); what is finished is safe. Make room"
    return None
