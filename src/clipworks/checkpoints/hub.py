"""Files from the Hugging Face hub, through `huggingface_hub`: cached, resumed, pinned to a revision.

Offline (`HF_HUB_OFFLINE=1`, or without a connection) the cache answers. What goes wrong is one line.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from clipworks.errors import CheckpointError, ModelNotFound, nearest

T = TypeVar("T")


def download(repository: str, names: Iterable[str], revision: str | None = None) -> Path:
    """The first of these files that a repository has, on disk.

    Args:
        repository: `owner/name`.
        revision: a branch, a tag or a commit; the main branch if left out.

    Raises:
        ModelNotFound: if there is no such repository or revision.
        CheckpointError: if it has none of the files, or they cannot be had.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    names = list(names)
    for name in names:
        try:
            return Path(
                _ask(repository, revision, partial(hf_hub_download, repository, name, revision=revision))
            )
        except (LocalEntryNotFoundError, _Unanswered) as error:
            if name == names[-1]:
                raise _unreachable(repository, name, error) from error
        except EntryNotFoundError:
            continue
    raise CheckpointError(f"{_label(repository, revision)}: has none of {', '.join(names)}")


def listing(repository: str, revision: str | None = None) -> list[str]:
    """The names of a repository's files; without a connection, of those in the cache.

    Raises:
        ModelNotFound: if there is no such repository or revision.
        CheckpointError: if it cannot be reached and is not in the cache.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        found = _ask(repository, revision, partial(HfApi().model_info, repository, revision=revision))
        return sorted(one.rfilename for one in found.siblings or [])
    except _Unanswered as error:
        try:
            folder = Path(snapshot_download(repository, revision=revision, local_files_only=True))
        except (LocalEntryNotFoundError, ValueError) as missing:
            raise _unreachable(repository, "", error) from missing
        return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


class _Unanswered(Exception):
    """The hub did not answer."""


def _ask(repository: str, revision: str | None, question: Callable[[], T]) -> T:
    """The hub's answer, its errors as ours.

    Raises:
        ModelNotFound: if there is no such repository or revision.
        CheckpointError: if it is not open to this user, or the hub refuses.
    """
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    # The base of all errors of whichever HTTP client the hub's library was built on.
    client_error: Any = HfHubHTTPError.__bases__[0]
    try:
        return question()
    except EntryNotFoundError:
        raise
    except GatedRepoError as error:
        raise CheckpointError(
            f"{repository}: its owner asks to be agreed with first, on its page at the hub"
        ) from error
    except RevisionNotFoundError as error:
        raise ModelNotFound(f"{repository} has no revision {revision!r}") from error
    except RepositoryNotFoundError as error:
        raise _unknown(repository) from error
    except HFValidationError as error:
        raise _unknown(repository) from error
    except HfHubHTTPError as error:
        raise CheckpointError(
            f"{_label(repository, revision)}: {' '.join(str(error).split())[:160]}"
        ) from error
    except (OSError, client_error) as error:
        raise _Unanswered(f"{type(error).__name__}: {error}") from error


def _unknown(repository: str) -> ModelNotFound:
    from clipworks.checkpoints.known import MODELS

    return ModelNotFound(
        f"no model {repository!r}: neither a known name, nor a file or folder here, nor a repository of the "
        f"hub that can be read{nearest(repository, MODELS)}"
    )


def _unreachable(repository: str, name: str, error: BaseException) -> CheckpointError:
    from huggingface_hub import constants

    what = f"{repository}: {name or 'its files'} cannot be downloaded and is not in the cache"
    if constants.HF_HUB_OFFLINE:
        return CheckpointError(f"{what} (HF_HUB_OFFLINE is set)")
    return CheckpointError(f"{what} ({' '.join(str(error).split())[:120]})")


def _label(repository: str, revision: str | None) -> str:
    return f"{repository}@{revision}" if revision else repository
