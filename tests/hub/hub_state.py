"""What a Hub on the loopback interface keeps: repositories, commits, files, and what shall go wrong."""

from dataclasses import dataclass, field


class HubError(Exception):
    """An answer other than 200; `code` is what clients tell errors apart by."""

    def __init__(self, status: int, message: str, code: str = "", headers: dict[str, str] | None = None):
        super().__init__(message)
        self.status, self.message, self.code, self.headers = status, message, code, headers or {}


@dataclass(frozen=True)
class File:
    """One file of a commit."""

    size: int
    git_oid: str
    sha256: str
    is_lfs: bool

    @property
    def etag(self) -> str:
        """What a client names its cached copy by."""
        return self.sha256 if self.is_lfs else self.git_oid


@dataclass(frozen=True)
class Commit:
    """A whole tree, and where it came from."""

    oid: str
    title: str
    files: dict[str, File]
    parent: str | None


@dataclass
class Repository:
    """Branches and pull requests of one repository."""

    kind: str
    name: str
    is_private: bool
    sdk: str | None = None
    refs: dict[str, list[Commit]] = field(default_factory=dict)

    def head(self, revision: str) -> Commit:
        """The commit of a branch, a pull request or an id."""
        if revision in self.refs:
            return self.refs[revision][-1]
        for commits in self.refs.values():
            for commit in commits:
                if commit.oid == revision:
                    return commit
        raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def paths(self, revision: str = "main") -> set[str]:
        """Names of the files, without the one every repository is born with."""
        return set(self.head(revision).files) - {".gitattributes"}


@dataclass
class Fault:
    """What goes wrong with the next `times` requests of a kind."""

    method: str
    pattern: str
    times: int
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    message: str = "injected"
    cut_after: int | None = None
    lose_reply: bool = False
    reply_bytes: int | None = None  # of the reply's body, then the connection ends
