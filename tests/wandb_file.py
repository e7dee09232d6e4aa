"""What an offline run of wandb holds: ``run-*.wandb``, for which wandb ships no reader.

A header of 7 bytes, then LevelDB's log format: blocks of 32 KiB with records of (CRC32, length, type) and data; one
that does not fit is cut into FIRST, MIDDLE and LAST. Each one is a serialised ``Record`` of wandb's protocol.
"""

import json
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_BLOCK, _HEADER = 32768, 7
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


def records(path: Path) -> Iterator[bytes]:
    """The serialised records, in their order; a torn one at the end is left out."""
    data = path.read_bytes()
    assert data[:4] == b":W&B", path
    at, parts = _HEADER, b""
    while at + _HEADER <= len(data):
        if _BLOCK - at % _BLOCK < _HEADER:  # no room for a record: filled up with zeros
            at += _BLOCK - at % _BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        if kind == 0:
            return
        body = data[at + _HEADER : at + _HEADER + length]
        at += _HEADER + length
        assert kind in (_FULL, _FIRST, _MIDDLE, _LAST), kind
        parts = body if kind in (_FULL, _FIRST) else parts + body
        if kind in (_FULL, _LAST):
            yield parts


@dataclass
class OfflineRun:
    """One run as its file tells it.

    Attributes:
        folder: ``offline-run-*``.
        about: the run record: ``run_id``, ``display_name``, ``run_group``, ``job_type``, ``project``.
        config: settings by name.
        history: lines of values by key, in their order.
        summary: the last value of each key that was set or computed by the client.
        metrics: definitions by name or glob: (step metric, kinds of summary).
        artifacts: records of logged artifacts, by name.
        exit_code: None: the run was not finished.
    """

    folder: Path
    about: Any = None
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, tuple[str, set[str]]] = field(default_factory=dict)
    artifacts: dict[str, Any] = field(default_factory=dict)
    exit_code: int | None = None

    def values(self, key: str) -> list[Any]:
        """All values of one key."""
        return [line[key] for line in self.history if key in line]

    @property
    def keys(self) -> set[str]:
        return {key for line in self.history for key in line}

    def of_type(self, kind: str) -> dict[str, Any]:
        """The last value of each key whose values are of this ``_type``, such as ``image-file``."""
        found = {}
        for line in self.history:
            for key, value in line.items():
                if isinstance(value, dict) and value.get("_type") == kind:
                    found[key] = value
        return found

    def table(self, key: str) -> list[dict[str, Any]]:
        """The rows of a logged table."""
        content = json.loads((self.folder / "files" / self.of_type("table-file")[key]["path"]).read_text())
        return [dict(zip(content["columns"], row, strict=True)) for row in content["data"]]


def read(path: Path) -> OfflineRun:
    """The run in a ``run-*.wandb`` file. Imports wandb."""
    from wandb.proto import wandb_internal_pb2 as pb

    run = OfflineRun(path.parent)
    for data in records(path):
        record = pb.Record.FromString(data)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run.about = record.run
            _put(record.run.config.update, run.config)
        elif kind == "config":
            _put(record.config.update, run.config)
        elif kind == "history":
            run.history.append({})
            _put(record.history.item, run.history[-1])
        elif kind == "summary":
            _put(record.summary.update, run.summary)
        elif kind == "metric":
            metric = record.metric
            kinds = {name for name in ("min", "max", "last", "best") if getattr(metric.summary, name)}
            run.metrics[metric.name or metric.glob_name] = (metric.step_metric, kinds)
        elif kind == "artifact":
            run.artifacts[record.artifact.name] = record.artifact
        elif kind == "exit":
            run.exit_code = record.exit.exit_code
    return run


def read_finished(save_dir: Path) -> OfflineRun:
    """The one run that a `WandbLogger` saved to a folder; wandb goes on writing when ``finish`` has returned."""
    (path,) = save_dir.glob("wandb/offline-run-*/run-*.wandb")
    given_up = time.monotonic() + 60
    while (run := read(path)).exit_code is None:
        assert time.monotonic() < given_up, f"{path} has no end"
        time.sleep(0.1)
    return run


def _put(items: Any, found: dict[str, Any]) -> None:
    """Values into `found` by key; what is given leaf by leaf becomes a dict again."""
    for item in items:
        *path, last = item.nested_key or [item.key]
        place = found
        for name in path:
            place = place.setdefault(name, {})
        place[last] = json.loads(item.value_json)
