"""Puts a folder on the Hub in one commit, or not at all.

Large files are uploaded first and stay invisible until a single commit names all files, so whoever looks at the
repository sees the old state or the new one. What was uploaded stays on the server: an upload that was cut off goes on
with the same command. Files that are there already are not sent again.

The token comes from `hf auth login` or from HF_TOKEN, and is never printed.
"""

import contextlib
import hashlib
import itertools
import math
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from internvl_mpo.errors import BadInputError
from internvl_mpo.publish.faults import diagnose

KEPT_BY_THE_HUB = ".gitattributes"  # every repository is born with it


@dataclass(frozen=True)
class Change:
    """What would happen to one file: "new", "changed", "same" or "gone"."""

    kind: str
    path: str
    size: int


@dataclass(frozen=True)
class Plan:
    """A folder compared with a repository.

    Attributes:
        repository: owner/name.
        head: commit that was looked at; None if there is no repository or branch yet.
        changes: every file of either side, ordered by path.
    """

    repository: str
    head: str | None
    changes: list[Change]

    def of(self, *kinds: str) -> list[Change]:
        """The changes of some kinds."""
        return [change for change in self.changes if change.kind in kinds]

    def __str__(self) -> str:
        """Return a table, biggest questions first: what is it, how large, what happens to it."""
        if not self.head:
            state = "does not exist yet"
        elif not self.of("new", "changed", "gone"):
            state = "holds exactly this"
        else:
            state = f"is at {self.head[:8]}"
        lines = [f"{self.repository} {state}"]
        lines += [f"  {change.kind:<8}{format_size(change.size):>10}  {change.path}" for change in self.changes]
        counts = ", ".join(f"{len(self.of(kind))} {kind}" for kind in ("new", "changed", "same", "gone"))
        to_send = sum(change.size for change in self.of("new", "changed"))
        return "\n".join([*lines, f"{counts}; {format_size(to_send)} to send"])


class Pushed(NamedTuple):
    """Where a folder is now.

    Attributes:
        address: of the repository or the pull request.
        revision: branch or pull request, None for `main`.
    """

    address: str
    revision: str | None


def check_access(repository: str, *, repo_type: str, private: bool = False) -> None:
    """Find out before hours of work whether a push can succeed.

    Raises:
        BadInputError: no token, one the Hub does not accept, an impossible name, or `private` for a public repository.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise BadInputError(f"'{repository}' cannot be the name of a repository; give --push OWNER/NAME") from error
    if repository.count("/") != 1:
        raise BadInputError(f"'{repository}' names no owner; give --push OWNER/NAME")
    if not get_token():
        raise BadInputError("there is no Hub token; run `hf auth login`, or set HF_TOKEN to a token with write access")
    api = HfApi()
    with _quiet_client():
        try:
            api.whoami()
            info = api.repo_info(repository, repo_type=repo_type)
        except RepositoryNotFoundError:
            return
        except Exception as error:
            fault = diagnose(error, repository)
            if fault.wait is None:
                raise BadInputError(fault.reason) from error
            return  # the Hub stumbles; pushing tries again
    if private and not info.private:
        raise BadInputError(
            f"{repository} exists and is public; make it private in its settings, or leave --private out"
        )


def plan_push(
    folder: str | Path, repository: str, *, repo_type: str, revision: str | None = None, api: Any = None
) -> Plan:
    """Compare a folder with a repository, by size and hash.

    Args:
        folder: what is to be there.
        repository: owner/name.
        repo_type: "model", "dataset" or "space".
        revision: branch or pull request (`refs/pr/1`); None is `main`.
        api: an `HfApi`.
    """
    from huggingface_hub import HfApi, RepoFile
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    api = api or HfApi()
    local = files_of(folder)
    remote: dict[str, Any] = {}
    head = None
    with contextlib.suppress(RepositoryNotFoundError, RevisionNotFoundError):
        head = api.repo_info(repository, repo_type=repo_type, revision=revision).sha
        tree = api.list_repo_tree(repository, repo_type=repo_type, revision=head, recursive=True)
        remote = {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}
    remote.pop(KEPT_BY_THE_HUB, None)
    changes = []
    for path in sorted(local.keys() | remote.keys()):
        if path not in remote:
            kind = "new"
        elif path not in local:
            kind = "gone"
        else:
            kind = "same" if _is_same(local[path], remote[path]) else "changed"
        size = local[path].stat().st_size if path in local else remote[path].size
        changes.append(Change(kind, path, size))
    return Plan(repository, head, changes)


def preview(folder: str | Path, repository: str, *, repo_type: str, revision: str | None = None) -> Plan:
    """Return what a push would change; nothing is written, and a public repository needs no token.

    Raises:
        BadInputError: the Hub cannot be asked.
    """
    try:
        with _quiet_client():
            return plan_push(folder, repository, repo_type=repo_type, revision=revision)
    except Exception as error:
        raise BadInputError(diagnose(error, repository).reason) from error


def push_folder(
    folder: str | Path,
    repository: str,
    *,
    repo_type: str,
    private: bool = False,
    create_pr: bool = False,
    revision: str | None = None,
    overwrite: bool = False,
    attempts: int = 4,
    message: str | None = None,
) -> Pushed:
    """Make a repository hold exactly this folder, in one commit; if it does already, nothing happens.

    Args:
        folder: what was built.
        repository: owner/name, created if absent.
        repo_type: "model", "dataset" or "space".
        private: of a repository that is created.
        create_pr: propose the change instead of making it.
        revision: branch, created if absent, or an open pull request (`refs/pr/1`); None is `main`.
        overwrite: allow files of the repository to be replaced and removed.
        attempts: how often a step is tried when the network or the server fails, with growing pauses.
        message: of the commit.

    Returns:
        Where it is now.

    Raises:
        BadInputError: the push did not happen; what to do about it.
    """
    check_access(repository, repo_type=repo_type, private=private)
    if create_pr and revision:
        raise BadInputError("a pull request goes to the main branch; leave --revision or --create_pr out")
    options = {"create_pr": create_pr, "revision": revision, "overwrite": overwrite}
    for attempt in itertools.count(1):
        try:
            with _quiet_client():
                return _push_once(Path(folder), repository, repo_type, private=private, message=message, **options)
        except BadInputError:
            raise
        except Exception as error:
            fault = diagnose(error, repository)
            if fault.wait is None:
                raise BadInputError(fault.reason) from error
            if attempt == attempts:
                kept = "what was uploaded is kept, and the same command goes on from there"
                raise BadInputError(f"{fault.reason} ({attempts} attempts); {kept}") from error
            wait = fault.wait or min(60, 2**attempt) * random.uniform(0.8, 1.2)
            print(f"{fault.reason}; trying again in {wait:.0f} s ({attempt} of {attempts})", file=sys.stderr)
            time.sleep(wait)


def _push_once(
    folder: Path,
    repository: str,
    repo_type: str,
    *,
    private: bool,
    create_pr: bool,
    revision: str | None,
    overwrite: bool,
    message: str | None,
) -> Pushed:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api = HfApi()
    where: dict[str, Any] = {"repo_id": repository, "repo_type": repo_type}
    sdk = "gradio" if repo_type == "space" else None
    address = str(api.create_repo(**where, private=private or None, exist_ok=True, space_sdk=sdk))
    if revision and not revision.startswith("refs/"):
        api.create_branch(**where, branch=revision, exist_ok=True)
    plan = plan_push(folder, repository, repo_type=repo_type, revision=revision, api=api)
    if not plan.of("new", "changed", "gone"):
        print(f"{repository} holds exactly this folder already", flush=True)
        return Pushed(address, revision)
    lost = plan.of("changed", "gone")
    if lost and not overwrite and not create_pr:
        raise BadInputError(
            f"{repository} holds other content: {lost[0].path} would be "
            f"{'removed' if lost[0].kind == 'gone' else 'replaced'} ({len(lost)} files in all); allow it with "
            "--overwrite, propose it with --create_pr, or choose another --revision"
        )
    files = files_of(folder)
    additions = [CommitOperationAdd(change.path, files[change.path]) for change in plan.of("new", "changed")]
    deletions = [CommitOperationDelete(change.path) for change in plan.of("gone")]
    api.preupload_lfs_files(
        repository, additions, repo_type=repo_type, revision=revision, create_pr=create_pr, free_memory=False
    )
    try:
        commit = api.create_commit(
            **where,
            operations=additions + deletions,
            commit_message=message or f"Publish {repo_type} ({len(additions)} files)",
            revision=revision,
            parent_commit=plan.head,
            create_pr=create_pr,
        )
    except Exception as error:
        # A second pull request would follow from a second try, if only the reply was lost.
        if create_pr and diagnose(error, repository).no_answer:
            raise BadInputError(
                f"the connection ended before the Hub confirmed the pull request; look for it at {address}/discussions "
                "before running the command again"
            ) from error
        raise
    revision = commit.pr_revision or revision
    left = plan_push(folder, repository, repo_type=repo_type, revision=revision, api=api)
    if differing := left.of("new", "changed", "gone"):
        raise BadInputError(f"{repository} differs from the folder after the upload, first in {differing[0].path}")
    return Pushed(commit.pr_url or address, revision)


def files_of(folder: str | Path) -> dict[str, Path]:
    """Return the files to publish by their path in the repository; caches and git's own are none."""
    folder = Path(folder)
    skipped = {".git", "__pycache__", ".cache"}
    return {
        path.relative_to(folder).as_posix(): path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not skipped & set(path.relative_to(folder).parts)
    }


def format_size(size: int) -> str:
    """Spell a number of bytes."""
    if size < 1000:
        return f"{size} B"
    power = min(4, int(math.log10(size)) // 3)
    return f"{size / 1000**power:.1f} {('', 'kB', 'MB', 'GB', 'TB')[power]}"


def _is_same(path: Path, entry: Any) -> bool:
    if path.stat().st_size != entry.size:
        return False
    if entry.lfs is not None:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == entry.lfs.sha256
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest() == entry.blob_id


@contextlib.contextmanager
def _quiet_client() -> Iterator[None]:
    """Keep the client's own warnings away: they spell out signed addresses, and this module says what happens."""
    from huggingface_hub.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
