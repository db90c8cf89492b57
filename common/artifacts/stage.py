"""The protocol of all stages: what an output was made from, whether it is current, and how it is made.

A stage's main output `X` gets `X.meta.json` (stage, parameters, fingerprints of inputs and outputs, paths of inputs,
rows, seconds) once every output is in place. No sidecar = unfinished; a different one = stale.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from common.artifacts.files import read_json, write_json
from common.artifacts.locks import Lock
from common.artifacts.versions import made_with
from common.errors import UserError


def fingerprint(path: Path) -> str:
    """Return the SHA-256 of a file's content, so that rewriting the same content changes nothing downstream."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(value: Any) -> str:
    """Return the SHA-256 of a JSON-able value, or of a table's CSV text."""
    text = value.to_csv(index=False) if isinstance(value, pd.DataFrame) else json.dumps(value, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def sidecar(path: Path) -> Path:
    return Path(path).with_name(Path(path).name + ".meta.json")


def read_sidecar(path: Path) -> dict:
    """Read an artifact's sidecar; raises UserError if it is not one that a stage wrote."""
    path = sidecar(path)
    meta = read_json(path)
    # Sidecars of earlier versions do not record where inputs are.
    meta = {"files": {}, **meta} if isinstance(meta, dict) else {}
    fine = all(isinstance(meta.get(key), dict) for key in ("parameters", "inputs", "outputs", "files"))
    if not (fine and all(map(is_plain_path, meta["outputs"])) and all(map(is_path, meta["files"].values()))):
        raise UserError(f"{path} is not a record that a stage wrote; delete it and run its stage again")
    return meta


def is_path(name: object) -> bool:
    return isinstance(name, str) and "\0" not in name


def is_plain_path(name: str) -> bool:
    return is_path(name) and not os.path.isabs(name)


NOT_MADE = "not made yet"


@dataclass
class Record:
    """What a stage records about its outputs, for the sidecar.

    rows : number of rows of the artifact
    also : files that belong to the artifact
    notes : what later stages read, by name
    """

    rows: int = 0
    also: list[Path] = field(default_factory=list)
    notes: dict = field(default_factory=dict)


class Stage:
    """An output and what it is made from: tells whether it is up to date, and seals it when it is made.

    artifact : Path of the main output, which carries the sidecar
    parameters : JSON-able dict
    inputs : dict of name -> Path (fingerprinted here) or str (a digest)
    whole : what one process at a time makes, if that is more than the artifact: the folder of a training run
    complete : function that turns the parameters of another version's sidecar into those that this version would write
    folder_flag : the flag that gives another folder, for messages
    """

    def __init__(
        self,
        name: str,
        artifact: Path,
        parameters: dict,
        inputs: dict,
        whole: Path | None = None,
        complete: Callable[[dict], dict] = dict,
        folder_flag: str = "--work",
    ) -> None:
        self.name = name
        self.complete = complete
        self.folder_flag = folder_flag
        self.artifact = Path(artifact)
        self.whole = whole or self.artifact
        self.is_locked = False
        self.sidecar = sidecar(self.artifact)
        self.parameters = json.loads(json.dumps(parameters))
        self.files = {key: value for key, value in inputs.items() if isinstance(value, Path)}
        self.inputs = {key: fingerprint(value) if isinstance(value, Path) else value for key, value in inputs.items()}
        self.started = time.time()

    def check_unchanged(self, inputs: dict) -> None:
        """Refuse inputs that have changed since this stage began; call it when they have been read."""
        now = Stage(self.name, self.artifact, self.parameters, {**self.inputs, **inputs})
        if changes := now.changes(self.made_from()):
            raise UserError(
                f"{self.name}: another process rewrote its inputs while this command ran ({changes}); run it again"
            )

    def made_from(self) -> dict:
        return {"parameters": self.parameters, "inputs": self.inputs}

    def changes(self, before: dict) -> str | None:
        """Describe how parameters and inputs differ from an earlier `made_from`; None if they do not.

        A parameter that only one of them has counts only if it is on (not false, 0 or empty): a newer version added it.
        """
        now, old = self.parameters, self.complete(before.get("parameters", {}))
        changed = [
            key
            for key in sorted({**old, **now})
            if (old[key] != now[key] if key in old and key in now else old.get(key) or now.get(key))
        ]
        if changed:
            return "; ".join(f"{key} was {old.get(key, 'absent')}, now {now.get(key, 'absent')}" for key in changed)
        now, old = self.inputs, before.get("inputs", {})
        changed = [key for key in sorted({**old, **now}) if old.get(key) != now.get(key)]
        return f"changed: {', '.join(changed)}" if changed else None

    def why_stale(self) -> str | None:
        """Return why the outputs are not up to date; None if they are."""
        if not self.sidecar.is_file():
            return NOT_MADE
        meta = read_sidecar(self.artifact)
        changes = self.changes(meta)
        if changes:
            return changes
        for name, content in meta["outputs"].items():
            path = self.sidecar.parent / name
            if not path.is_file() or fingerprint(path) != content:
                return f"{name} is not the file that {self.name} wrote"
        return None

    def is_current(self) -> bool:
        """Tell whether the outputs are up to date: what this stage would make now."""
        return self.why_stale() is None

    def say_current(self) -> None:
        """Print that there is nothing to do."""
        print(f"{self.name}: {self.artifact} is up to date")

    @contextmanager
    def lock(self, wait: bool = False) -> Iterator[None]:
        """Keep other processes from making this output; if one already does, raise a UserError, or wait for it."""
        if self.is_locked:
            yield
            return
        with Lock(self.whole, wait, self.folder_flag):
            self.is_locked = True
            try:
                yield
            finally:
                self.is_locked = False

    @contextmanager
    def making(self, wait: bool = False) -> Iterator[Record]:
        """Lock others out while the outputs are made inside; remove the sidecar first and write it at the end.

        Yields a Record to fill in. Prints why existing outputs are made again.
        """
        with self.lock(wait):
            reason = self.why_stale()
            if reason not in (None, NOT_MADE):
                print(f"{self.name}: making {self.artifact} again ({reason})")
            self.sidecar.unlink(missing_ok=True)
            record = Record()
            yield record
            self.seal(record)

    def seal(self, record: Record) -> None:
        """Write the sidecar, once the artifact and all that belongs to it are in place."""
        outputs = {
            os.path.relpath(path, self.sidecar.parent): fingerprint(path) for path in (self.artifact, *record.also)
        }
        write_json(
            self.sidecar,
            {
                "stage": self.name,
                **self.made_from(),
                "outputs": outputs,
                "files": {key: self.way_to(path) for key, path in self.files.items()},
                "rows": record.rows,
                "seconds": round(time.time() - self.started, 1),
                "made_with": made_with(),
                **record.notes,
            },
        )

    def way_to(self, path: Path) -> str:
        """Return an input's path relative to the sidecar's folder, so that it still holds when both are moved."""
        return os.path.relpath(path.parent.resolve() / path.name, self.sidecar.parent.resolve())
