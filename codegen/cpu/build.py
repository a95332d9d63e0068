"""C++ sources on disk, built once and loaded: by the compiler that Inductor uses, into a folder private to the user.

The files lie in ``$FXSPARSE_CACHE_DIR/cpu``, by default ``~/.cache/fxsparse/cpu``: a source under the hash of its text,
its library under the hash of text, compiler, flags and torch, and beside it the hash of the library, by which a damaged
one is found and built anew. Deleting them is always safe.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from fxsparse import files
from fxsparse.codegen import source

FLAGS = (
    "-std=c++20",
    "-O3",
    "-fPIC",
    "-shared",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
    "-Wno-psabi",
)
PATIENCE = 300.0
"""Seconds to wait for another process that builds the same library."""


class BuildError(Exception):
    """There is no library, and why."""


def library(name: str, text: str, flags: Sequence[str] = (), *, torch_headers: bool = False) -> tuple[Path, Path]:
    """Builds a source unless that was done before.

    Args:
        name: of the files, before the hash.
        text: C++.
        flags: further ones.
        torch_headers: the source includes torch's headers and is linked with torch.

    Returns:
        source and library.

    Raises:
        BuildError: there is no compiler, it fails, or the folder cannot be trusted or written.
    """
    command = [*compiler(), *FLAGS, *flags, *(_torch_flags() if torch_headers else ())]
    key = "\n".join((text, *command, _version(command[0]), torch.__version__ if torch_headers else ""))
    try:
        folder = source.private_folder("cpu")
        file = _named(folder, name, text, ".cpp")
        target = _named(folder, name, key, ".so")
        if _is_whole(target):
            return file, target
        with source.locked(target, PATIENCE):
            if not _is_whole(target):
                print(f"fxsparse: building {name} (once, some seconds)", file=sys.stderr, flush=True)
                source.replace(file, text)
                _compile(command, file, target)
    except (OSError, TimeoutError) as error:
        raise BuildError(f"cannot build {name}: {error}") from error
    return file, target


def load(target: Path) -> ctypes.CDLL:
    """A library, loaded once a process.

    Raises:
        BuildError: it cannot be loaded.
    """
    try:
        return _loaded(target)
    except OSError as error:
        raise BuildError(f"cannot load {target}: {error}") from error


@functools.cache
def _loaded(target: Path) -> ctypes.CDLL:
    return ctypes.CDLL(str(target))


def compiler() -> list[str]:
    """The C++ compiler that Inductor uses, as the beginning of a command.

    Raises:
        BuildError: there is none, or it is not one that knows vectors.
    """
    return [_compiler(os.environ.get("CXX", ""), os.environ.get("PATH", ""))]


@functools.cache
def _compiler(cxx: str, path: str) -> str:
    from torch._inductor import cpp_builder

    if sys.platform == "win32":
        raise BuildError("kernels for a CPU need GCC or Clang, which on Windows are not looked for")
    try:
        name: str = cpp_builder.get_cpp_compiler()
    except Exception as error:
        raise BuildError("there is no C++ compiler (g++ or clang++; the variable CXX names another)") from error
    if shutil.which(name) is None:
        raise BuildError(f"there is no C++ compiler {name!r}")
    return name


@functools.cache
def _version(name: str) -> str:
    return subprocess.run([name, "--version"], capture_output=True, text=True, check=False).stdout.partition("\n")[0]


@functools.cache
def _torch_flags() -> tuple[str, ...]:
    from torch.utils import cpp_extension

    includes = [f"-I{path}" for path in cpp_extension.include_paths()]
    folders = [flag for path in cpp_extension.library_paths() for flag in (f"-L{path}", f"-Wl,-rpath,{path}")]
    # the stable interface of torch 2.11, which later versions keep
    return ("-DTORCH_TARGET_VERSION=0x020b000000000000", *includes, *folders, "-ltorch_cpu", "-lc10")


def _named(folder: Path, name: str, text: str, suffix: str) -> Path:
    return folder / f"{name}_{hashlib.sha256(text.encode()).hexdigest()[:16]}{suffix}"


def _compile(command: Sequence[str], file: Path, target: Path) -> None:
    """Compiles to a file of its own and renames it, so that no process ever loads a part of a library."""
    libraries = [flag for flag in command if flag.startswith("-l")]
    words = [flag for flag in command if not flag.startswith("-l")]
    with files.unfinished(target.parent, target.name) as part:
        made = part / target.name
        done = subprocess.run(
            [*words, str(file), "-o", str(made), *libraries], capture_output=True, text=True, check=False
        )
        if done.returncode:
            first = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip()[-200:])
            raise BuildError(f"{command[0]} cannot build {file.name}: {first.strip()}")
        source.replace(_sum(target), hashlib.sha256(made.read_bytes()).hexdigest())
        source.place(made, target)


def _sum(target: Path) -> Path:
    return target.with_suffix(".sha256")


def _is_whole(target: Path) -> bool:
    """Whether a library is there, as it was built."""
    try:
        return hashlib.sha256(target.read_bytes()).hexdigest() == _sum(target).read_text()
    except (OSError, UnicodeDecodeError):
        return False
