"""Weights files on the Hugging Face Hub, through ``huggingface_hub`` and its cache.

Addresses are the hub's own: ``hf://org/name[@revision][/file]``. A commit, all 40 digits of it,
pins the numbers: such a file is looked for in the cache first. Any other revision can move, so the
hub is asked each time, and what it stands for is told.
"""

from __future__ import annotations

import dataclasses
import importlib
import re
import warnings
from pathlib import Path
from types import ModuleType

from hyperadam.errors import WeightsError, missing_extra

PREFIX = "hf://"
SUFFIX = ".safetensors"
DEFAULT_FILE = f"weights{SUFFIX}"
DEFAULT_REVISION = "main"
TIMEOUT_SECONDS = 10.0

_ADDRESS = re.compile(
    r"hf://(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>refs/pr/\d+|[\w.-]+))?(?:/(?P<file>[^@]+))?",
    re.ASCII,
)
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclasses.dataclass(frozen=True)
class HubAddress:
    """A weights file on the hub.

    Attributes:
        repo: ``org/name``.
        revision: a branch, a tag or a commit.
        file: its path in the repository.
    """

    repo: str
    revision: str = DEFAULT_REVISION
    file: str = DEFAULT_FILE

    @classmethod
    def parse(cls, text: str) -> HubAddress:
        """The address that a text gives.

        Raises:
            WeightsError: not of the form ``hf://org/name[@revision][/file.safetensors]``.
        """
        found = _ADDRESS.fullmatch(text)
        file = (found and found["file"]) or DEFAULT_FILE
        odd = not {"", ".", ".."}.isdisjoint(file.split("/"))
        if found is None or odd or not file.endswith(SUFFIX):
            raise WeightsError(
                f"{text} is no address of weights; they are of the form "
                f"{PREFIX}org/name[@revision][/file{SUFFIX}]"
            )
        return cls(found["repo"], found["revision"] or DEFAULT_REVISION, file)

    def __str__(self) -> str:
        revision = "" if self.revision == DEFAULT_REVISION else f"@{self.revision}"
        file = "" if self.file == DEFAULT_FILE else f"/{self.file}"
        return f"{PREFIX}{self.repo}{revision}{file}"

    @property
    def pinned(self) -> bool:
        """Whether the revision is a commit."""
        return _COMMIT.fullmatch(self.revision) is not None

    def short(self) -> str:
        """The same in few words, with a commit's first 8 digits."""
        revision = self.revision[:8] if self.pinned else self.revision
        shorter = dataclasses.replace(self, revision=revision)
        return str(shorter).removeprefix(PREFIX).removesuffix(SUFFIX)


@dataclasses.dataclass(frozen=True)
class HubFile:
    """A weights file of the hub, in the cache.

    Attributes:
        path: where it is.
        address: where it comes from, with the commit.
    """

    path: Path
    address: HubAddress


def fetch(text: str) -> HubFile:
    """Have a weights file of the hub in the cache.

    A revision that is no commit brings a warning with the commit that it stands for. Where the hub
    can't be asked, the commit that it stood for last is taken, if that is in the cache.

    Args:
        text: its address.

    Raises:
        WeightsError: not an address; no such repository, revision or file, or no right to read it;
            not in the cache while the hub can't be asked.
        MissingDependencyError: ``huggingface_hub`` is not installed.
    """
    address = HubAddress.parse(text)
    hub = library()
    try:
        cached = _cached(hub, address)
    except hub.errors.HFValidationError as error:
        raise WeightsError(f"{text}: {plain(error)}") from None
    if address.pinned and cached is not None:
        return cached
    try:
        # Asked by itself: the download would take what is in the cache without a word.
        hub.HfApi().model_info(address.repo, revision=address.revision, timeout=TIMEOUT_SECONDS)
        path = hub.hf_hub_download(address.repo, address.file, revision=address.revision)
        found, problem = _at(address, path), None
    except hub.errors.RepositoryNotFoundError:
        raise WeightsError(
            f"{hub.constants.ENDPOINT} has no repository {address.repo}, or does not show it: for "
            f"a private or gated one, log in (`hf auth login`) or set HF_TOKEN"
        ) from None
    except hub.errors.RevisionNotFoundError:
        raise WeightsError(
            f"{address.repo} has no branch, tag or commit {address.revision}"
        ) from None
    except hub.errors.RemoteEntryNotFoundError:
        raise WeightsError(
            f"{address.repo} has no file {address.file} at {address.revision}"
        ) from None
    except Exception as error:  # what the network raises depends on the library's version
        problem = plain(error)
        if cached is None:
            raise WeightsError(
                f"{address} is not in the cache ({hub.constants.HF_HUB_CACHE}), and the hub can't "
                f"be asked: {problem}"
            ) from None
        found = cached
    if not address.pinned:
        commit = found.address.revision
        known = f"its {address.revision} is commit {commit} now"
        if problem is not None:
            known = f"the hub can't be asked, the cache has commit {commit} ({problem})"
        warnings.warn(
            f"{address} can change: {known}. To keep these weights: {found.address}",
            stacklevel=1,  # this line, so that Python shows each such warning once
        )
    return found


def pin(name: str) -> str:
    """A name of weights that stays theirs: a hub's address with its commit, others as they are.

    Raises:
        WeightsError, MissingDependencyError: see :func:`fetch`.
    """
    return str(fetch(name).address) if name.startswith(PREFIX) else name


def library() -> ModuleType:
    """``huggingface_hub``, which is imported when it is first needed.

    Raises:
        MissingDependencyError: it is not installed.
    """
    try:
        library = importlib.import_module("huggingface_hub")
        for part in ("constants", "errors"):
            importlib.import_module(f"huggingface_hub.{part}")
    except ImportError:
        raise missing_extra(f"{PREFIX} addresses need the library huggingface_hub", "hub") from None
    return library


def plain(error: Exception) -> str:
    """An error of the library in one line."""
    text = str(error) or type(error).__name__
    if isinstance(error, RuntimeError) and error.__cause__ is not None:  # a failing upload's
        text = f"{text} {error.__cause__}"
    return " ".join(text.split())


def _cached(hub: ModuleType, address: HubAddress) -> HubFile | None:
    path = hub.try_to_load_from_cache(address.repo, address.file, revision=address.revision)
    return _at(address, path) if isinstance(path, str) else None


def _at(address: HubAddress, path: str) -> HubFile:
    """The file at a path of the cache, whose folders are called ``snapshots/COMMIT/FILE``."""
    commit = Path(path).parents[address.file.count("/")].name
    return HubFile(Path(path), dataclasses.replace(address, revision=commit))
