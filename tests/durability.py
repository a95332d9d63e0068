"""What kills, full disks and damage do to saved models, tried many times: ``python -m tests.durability``.

Each trial is a process of its own that is forked off this one. A killed one is killed at a random moment of the save; a
full disk is a limit on the size of files at a random size below that of the save's largest. Afterwards the file or the
folder must hold the old or the new model, whole. A damaged file must be refused by a CheckpointError within a second
and 200 MB.

    kills    100 during save, 100 during save_pretrained
    disks    10 during each
    damage   500 files: bits of header and values flipped, cut off, and records written on purpose
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import random
import resource
import signal
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import fxsparse
from fxsparse import stored
from fxsparse.errors import CheckpointError
from tests.support.families import FAMILIES
from tests.support.traced import traced

PASSES = "nm-masks,double-prune,low-rank{rank=2,start=0.0}"
SECONDS, MEGABYTES = 1.0, 200

State = dict[str, torch.Tensor]


class Saved:
    """A model in two states, of which one is saved over the other."""

    def __init__(self, folder: Path, pretrained: bool):
        family, base = traced("opt")
        tqdm.set_lock(threading.RLock())  # its own is shared with forked processes, and a killed one keeps it
        self.pretrained = pretrained
        self.model: Any = fxsparse.rewrite(base, PASSES)
        if pretrained:
            self.model = fxsparse.to_module(self.model, family.model)
        self.place = folder / ("pretrained" if pretrained else "model.safetensors")
        self.save()
        self.states = [self._copy()]
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.add_(1)
        self.states.append(self._copy())
        self.seconds = self._seconds()
        self.size = max(file.stat().st_size for file in self.files())

    def save(self) -> None:
        if self.pretrained:
            fxsparse.save_pretrained(self.model, self.place)
        else:
            fxsparse.save(self.model, self.place)

    def files(self) -> list[Path]:
        return sorted(self.place.iterdir()) if self.pretrained else [self.place]

    def load(self) -> State:
        if self.pretrained:
            return fxsparse.from_pretrained(self.place).state_dict()
        family = FAMILIES["opt"]()
        return fxsparse.load(self.place, family.model, kwargs=family.make_batch(labels=False)).state_dict()

    def quick_load(self) -> State:
        """What `load` reads and checks before it traces the model."""
        return self.load() if self.pretrained else stored.read(self.place).tensors

    def which(self, state: State) -> int:
        """Whether a state is the old (0) or the new one (1), whole."""
        for number, wanted in enumerate(self.states):
            if all(torch.equal(tensor, wanted[name]) for name, tensor in state.items() if name in wanted):
                return number
        raise AssertionError(f"{self.place} holds neither the old nor the new model")

    def back(self) -> None:
        """Saves the old state."""
        self.model.load_state_dict(self.states[0])
        self.save()
        self.model.load_state_dict(self.states[1])

    def _copy(self) -> State:
        return {name: tensor.clone() for name, tensor in self.model.state_dict().items()}

    def _seconds(self) -> float:
        start = time.perf_counter()
        self.save()
        return time.perf_counter() - start


def forked(run: Callable[[], None]) -> int:
    """Starts a process that runs a function and ends with 0, or with 1 after an error."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            run()
            code = 0
        finally:
            os._exit(code)
    return child


def kills(saved: Saved, count: int, draw: random.Random, every: int = 1) -> collections.Counter[str]:
    """Kills saves at random moments; every so many-th result is loaded in full."""
    found: collections.Counter[str] = collections.Counter()
    for trial in range(count):
        saved.back()
        child = forked(saved.save)
        time.sleep(draw.uniform(0, 1.2 * saved.seconds))
        os.kill(child, signal.SIGKILL)
        killed = os.WIFSIGNALED(os.waitpid(child, 0)[1])
        state = saved.load() if trial % every == 0 else saved.quick_load()
        found[f"{'killed' if killed else 'finished'}, {('old', 'new')[saved.which(state)]}"] += 1
    saved.back()
    parent = saved.place if saved.pretrained else saved.place.parent
    left = [path.name for path in parent.iterdir() if path.name.startswith(".")]
    assert not left, f"temporaries are left: {left}"
    return found


def full_disks(saved: Saved, count: int, draw: random.Random) -> collections.Counter[str]:
    """Saves where no file may grow beyond a random size below what is needed."""
    found: collections.Counter[str] = collections.Counter()
    for _ in range(count):
        saved.back()
        limit = draw.randrange(saved.size)

        def save(limit: int = limit) -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            try:
                saved.save()
            except CheckpointError:
                os._exit(7)

        code = os.waitstatus_to_exitcode(os.waitpid(forked(save), 0)[1])
        assert code == 7, f"a disk that is full at {limit:,} bytes: the save ended with {code}"
        found[("old", "new")[saved.which(saved.load())]] += 1
    return found


# --- damage -----------------------------------------------------------------------------------------------------------


def damages(saved: Saved, count: int, draw: random.Random) -> Iterator[tuple[str, Callable[[], None]]]:
    """Kinds of damage in turn; each is a function that damages the saved files."""
    kinds = _FOLDER if saved.pretrained else _FILE
    for number in range(count):
        name, damage = list(kinds.items())[number % len(kinds)]
        yield name, lambda damage=damage: damage(saved, draw)  # type: ignore[misc]


def _weights(saved: Saved) -> Path:
    return next(file for file in saved.files() if file.suffix == ".safetensors")


def _header(path: Path) -> int:
    return int.from_bytes(path.read_bytes()[:8], "little")


def _flip(path: Path, draw: random.Random, low: int, high: int) -> None:
    data = bytearray(path.read_bytes())
    data[draw.randrange(low, high)] ^= 1 << draw.randrange(8)
    path.write_bytes(data)


def _flip_header(saved: Saved, draw: random.Random) -> None:
    path = _weights(saved)
    _flip(path, draw, 0, 8 + _header(path))


def _flip_values(saved: Saved, draw: random.Random) -> None:
    path = _weights(saved)
    _flip(path, draw, 8 + _header(path), path.stat().st_size)


def _cut(saved: Saved, draw: random.Random) -> None:
    path = _weights(saved)
    path.write_bytes(path.read_bytes()[: draw.randrange(path.stat().st_size)])


def _longer(saved: Saved, draw: random.Random) -> None:
    path = _weights(saved)
    path.write_bytes(path.read_bytes() + draw.randbytes(draw.randrange(1, 100)))


def _flip_settings(saved: Saved, draw: random.Random) -> None:
    path = saved.place / "config.json"
    text = path.read_text()
    at = draw.randrange(len(text))
    while text[at].isspace():
        at = draw.randrange(len(text))
    path.write_text(text[:at] + chr(ord(text[at]) ^ (1 << draw.randrange(3))) + text[at + 1 :])


def _record(change: Callable[[dict[str, Any], random.Random], str | None]) -> Callable[[Saved, random.Random], None]:
    """A record that was changed on purpose, or the text in its place, with checksums that are right."""

    def damage(saved: Saved, draw: random.Random) -> None:
        file = stored.read(saved.place)
        record = json.loads(file.texts["fxsparse"])
        text = change(record, draw) or json.dumps(record)
        tensors = {name: tensor.clone() for name, tensor in file.tensors.items()}
        stored.write(saved.place, tensors, {**file.texts, "fxsparse": text})

    return damage


def _settings(change: Callable[[dict[str, Any], random.Random], str | None]) -> Callable[[Saved, random.Random], None]:
    """Settings that were changed on purpose, or the text in their place, without the checksum."""

    def damage(saved: Saved, draw: random.Random) -> None:
        path = saved.place / "config.json"
        settings = json.loads(path.read_text())
        del settings["fxsparse"]["checksum"]
        path.write_text(change(settings, draw) or json.dumps(settings))

    return damage


def _set(data: Any, item: Any, *path: Any) -> None:
    for step in path[:-1]:
        data = data[step]
    data[path[-1]] = item


def _drop(data: dict[str, Any], name: str) -> None:
    del data[name]


def _pass(record: dict[str, Any], text: str) -> None:
    record["entries"][0]["text"] = text


_FILE: dict[str, Callable[[Saved, random.Random], None]] = {
    "header flipped": _flip_header,
    "values flipped": _flip_values,
    "cut off": _cut,
    "longer": _longer,
    "an absurd rank": _record(lambda r, d: _set(r, f"low-rank{{rank={10 ** d.randint(6, 30)}}}", "entries", 2, "text")),
    "deep nesting": _record(lambda r, d: "[" * d.randint(1000, 200_000)),
    "many lists": _record(lambda r, d: "[" + "[]," * d.randint(100_000, 4_000_000) + "[]]"),
    "deep options": _record(lambda r, d: _pass(r, "nm-masks{pattern=" + "[" * d.randint(100, 9000))),
    "an unknown pass": _record(lambda r, d: _pass(r, f"no-pass-{d.randint(0, 99)}")),
    "a wrong type": _record(
        lambda r, d: _set(r, d.choice([3, "x"]), *d.choice([("entries",), ("weights", 0), ("entries", 0, "before")]))
    ),
    "a missing field": _record(lambda r, d: _drop(r["weights"][0], d.choice(["name", "storage", "pattern", "names"]))),
    "another size": _record(lambda r, d: _set(r, d.choice([-4, 0, 4, 10**12]), "weights", 0, "in_features")),
    "another pattern": _record(lambda r, d: _set(r, d.choice(["1:4", "x", f"2:{10**20}"]), "weights", 0, "pattern")),
    "a later format": _record(lambda r, d: _set(r, d.randint(3, 10**6), "format")),
}
_FOLDER: dict[str, Callable[[Saved, random.Random], None]] = {
    "header flipped": _flip_header,
    "values flipped": _flip_values,
    "cut off": _cut,
    "settings flipped": _flip_settings,
    "another class": _settings(lambda s, d: _set(s, [d.choice(["AutoModel", "Trainer", "os"])], "architectures")),
    "layers": _settings(lambda s, d: _set(s, 10 ** d.randint(4, 30), "num_hidden_layers")),
    "deep nesting": _settings(lambda s, d: "[" * d.randint(1000, 200_000)),
    "a wrong type": _settings(lambda s, d: _set(s, 3, "fxsparse", d.choice(["sizes", "heads", "modules", "record"]))),
    "a later format": _settings(lambda s, d: _set(s, d.randint(3, 10**6), "fxsparse", "format")),
}


def damaged(saved: Saved, count: int, draw: random.Random) -> dict[str, list[float]]:
    """Damages the saved model in many ways: seconds until it was refused, and megabytes, by the kind of damage."""
    saved.back()
    whole = {path: path.read_bytes() for path in saved.files()}
    found: dict[str, list[float]] = collections.defaultdict(list)
    for kind, damage in damages(saved, count, draw):
        damage()
        reading, writing = os.pipe()

        def read(writing: int = writing) -> None:
            before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
            try:
                saved.load()
                answer = "it was loaded"
            except CheckpointError as error:
                answer = "" if str(saved.place) in str(error) else f"it does not say where: {error}"
            except BaseException as error:
                answer = f"{type(error).__name__}: {error}"[:400]
            seconds = time.perf_counter() - start
            more = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
            os.write(writing, json.dumps([answer, seconds, more]).encode())

        os.waitpid(forked(read), 0)
        answer, seconds, megabytes = json.loads(os.read(reading, 1 << 16))
        os.close(reading), os.close(writing)
        assert not answer, f"{kind}: {answer}"
        assert megabytes < MEGABYTES, f"{kind}: {megabytes:.0f} MB"
        found[kind].append(seconds)
        for path, data in whole.items():
            path.write_bytes(data)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--disks", type=int, default=10)
    parser.add_argument("--damaged", type=int, default=250, help="files, and as many folders")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=("save", "save_pretrained"), help="one of the two")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        for name in (args.only,) if args.only else ("save", "save_pretrained"):
            draw, saved = random.Random(args.seed), Saved(Path(folder), name == "save_pretrained")
            print(f"{name}: {saved.seconds * 1e3:.0f} ms, {saved.size:,} bytes", flush=True)
            print(f"  kills: {dict(kills(saved, args.kills, draw))}", flush=True)
            print(f"  full disks: {dict(full_disks(saved, args.disks, draw))}", flush=True)
            times = damaged(saved, args.damaged, draw)
            print(f"  damaged: {sum(map(len, times.values()))} of {args.damaged} refused", flush=True)
            for kind, seconds in times.items():
                print(f"    {kind}: {len(seconds)}, at most {max(seconds):.2f} s", flush=True)


if __name__ == "__main__":
    main()
