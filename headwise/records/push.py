"""Push a converted folder to the Hub: checked first, uploaded file by file, published by one commit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headwise import __version__
from headwise.errors import HeadwiseError
from headwise.io import hub
from headwise.io.reader import open_checkpoint
from headwise.io.source import path_inside, read_json
from headwise.progress import SILENT, Progress
from headwise.records.manifest import RECORD, changed_files, changed_tensors, read_record

if TYPE_CHECKING:
    from huggingface_hub import HfApi

# Of what a repository held before, these must not outlive the push: transformers would load them in place of ours.
WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json")
# What a repository may hold before it holds a model.
EMPTY = {".gitattributes", ".gitignore", "README.md", "LICENSE"}
EVAL_RESULTS = ".eval_results"


@dataclass(frozen=True)
class Push:
    """A folder on the Hub.

    Attributes:
        repo, revision: where; None is the main branch.
        files: names and bytes of what the commit holds.
        deleted: weight files of the repository that the commit removes.
        verified: the folder's own record says so and its hashes are still right.
        commit, url: None after a dry run.
        pull_request: its address, where one was opened.
        changed: whether the commit changed anything; False where the repository held just this already, which makes
            no new commit and no pull request. None after a dry run.
    """

    folder: Path
    repo: str
    revision: str | None
    files: dict[str, int]
    deleted: tuple[str, ...]
    verified: bool
    creates_repository: bool
    private: bool
    commit: str | None = None
    url: str | None = None
    pull_request: str | None = None
    changed: bool | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"folder": str(self.folder), "deleted": list(self.deleted)}


def push_model(
    folder: str | Path,
    repo: str,
    *,
    revision: str | None = None,
    private: bool = False,
    create_pr: bool = False,
    dry_run: bool = False,
    unverified: bool = False,
    force: bool = False,
    token: str | None = None,
    progress: Progress = SILENT,
) -> Push:
    """Upload a folder that headwise made. Repeat it after an interruption: what has arrived is not sent again.

    All files appear in the repository together, by one commit; weight files that the repository held before and the
    folder does not are removed by the same commit.

    Args:
        folder: what `convert` or `uptrain` wrote.
        repo: `org/name[@revision]`; it is made if it does not exist.
        revision: the branch; it is made from the main branch if it does not exist.
        private: make a new repository private; an existing public one is refused.
        create_pr: open a pull request instead of committing.
        dry_run: look at folder and repository and change nothing.
        unverified: push a folder that was not verified, or has changed since.
        force: replace another model.
        token: of the Hub; None: HF_TOKEN, or that of `hf auth login`.

    Raises:
        HeadwiseError: the folder is not fit to be pushed, or the Hub refuses.
    """
    home = Path(folder).expanduser()
    record = _record(home)
    files = files_to_push(home)
    doubt = _doubt(home, record, progress)
    if doubt and not unverified:
        raise HeadwiseError(f"{home} {doubt}.", "Convert it again, or pass --unverified to push it as it is.")
    target = check_repository(
        repo,
        str(record["source"]["model"]),
        revision=revision,
        private=private,
        create_pr=create_pr,
        force=force,
        token=token,
        need_token=not dry_run,
    )
    planned = Push(
        folder=home,
        repo=target.repo,
        revision=target.revision,
        files=files,
        deleted=tuple(n for n in target.files if n not in files and any(fnmatch(n, p) for p in WEIGHTS)),
        verified=not doubt,
        creates_repository=not target.exists,
        private=target.private,
    )
    return planned if dry_run else _upload(planned, target, create_pr, doubt, token, progress)


def push_converted(folder: Path, repo: str, private: bool, token: str | None, progress: Progress) -> Push:
    """`push` at the end of a conversion; a failure says that the folder itself is complete."""
    try:
        return push_model(folder, repo, private=private, token=token, progress=progress)
    except HeadwiseError as error:
        again = f"{folder} is complete: `headwise push {folder} {repo}` sends it."
        raise HeadwiseError(error.message, again) from error


@dataclass(frozen=True)
class HubRepository:
    """A repository before the push. `private`: what it is or will be; `new_branch`: `revision` is not there yet;
    `head`: the commit that the new one will follow."""

    repo: str
    revision: str | None
    exists: bool
    private: bool
    new_branch: bool
    files: tuple[str, ...]
    head: str | None = None


def check_repository(
    repo: str,
    model: str,
    *,
    revision: str | None = None,
    private: bool = False,
    create_pr: bool = False,
    force: bool = False,
    token: str | None = None,
    need_token: bool = True,
) -> HubRepository:
    """Look at a repository without changing it, and make sure that a push may go there.

    Args:
        model: what the folder was made from, which a repository that holds a model must have been made from too.

    Raises:
        HeadwiseError: the name or the token is wrong, the Hub refuses, or the push would replace something else.
    """
    repo, revision = hub.resolve_revision(repo, revision)
    if not hub.NAME.fullmatch(repo):
        raise HeadwiseError(f"{repo!r} is not a repository name.", "Write it as org/name.")
    if create_pr and revision:
        raise HeadwiseError(
            f"A pull request goes to the main branch, not to {revision}.", "Leave out --create-pr or --revision."
        )
    from huggingface_hub import errors, get_token

    if need_token and not (token or get_token()):
        raise HeadwiseError(
            "There is no Hub token to push with.", "Log in with `hf auth login`, set HF_TOKEN or pass --token."
        )
    with hub.hub_errors(repo, revision, token):
        api = _api(token)
        try:
            info = api.repo_info(repo)
        except errors.GatedRepoError:
            raise
        except errors.RepositoryNotFoundError:
            return HubRepository(repo, revision, exists=False, private=private, new_branch=bool(revision), files=())
        if private and not info.private:
            raise HeadwiseError(f"{repo} exists and is public.", "Name a new repository, or leave out --private.")
        new_branch, head = False, info.sha
        if revision:
            try:
                head = api.repo_info(repo, revision=revision).sha
            except errors.RevisionNotFoundError:
                new_branch = True
        at = None if new_branch else revision
        files = tuple(api.list_repo_files(repo, revision=at))
        if not (force or create_pr or new_branch) and _is_other(repo, at, token, files, model):
            what = f"another model than one made from {model}" if repo != model else "the model this was made from"
            raise HeadwiseError(
                f"{repo}{f'@{at}' if at else ''} holds {what}.",
                "Name another repository or --revision, propose it with --create-pr, or replace it with --force.",
            )
        return HubRepository(repo, revision, True, bool(info.private), new_branch, files, head)


def files_to_push(folder: Path) -> dict[str, int]:
    """Names and bytes of a folder's files; hidden ones stay here, but for the Hub's own `.eval_results`."""
    paths = {path.relative_to(folder): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {
        name.as_posix(): path_inside(folder, name.as_posix()).stat().st_size
        for name in paths
        if name.parts[0] == EVAL_RESULTS or not any(part.startswith(".") for part in name.parts)
    }


def _record(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise HeadwiseError(f"There is no folder {folder}.", "Name the folder that `headwise convert` wrote.")
    record = read_record(folder)
    source = record.get("source") if record else None
    if record is None or not (isinstance(source, dict) and isinstance(source.get("model"), str)):
        raise HeadwiseError(
            f"{folder} was not made by headwise: {RECORD} is missing or names no source.",
            "Name the folder that `headwise convert` wrote.",
        )
    return record


def _doubt(folder: Path, record: Mapping[str, Any], progress: Progress) -> str:
    """Why the folder cannot be called verified, as the rest of a sentence about it; empty if it can."""
    verification = record.get("verification")
    if not isinstance(verification, dict):
        return "was not verified"
    if verification.get("passed") is not True:
        return "failed its verification"
    changed = changed_files(folder, record) + changed_tensors(open_checkpoint(folder), record, progress)
    more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
    return f"has changed since it was verified ({', '.join(changed[:3])}{more})" if changed else ""


def _is_other(repo: str, revision: str | None, token: str | None, files: Sequence[str], model: str) -> bool:
    """Whether a branch holds something that a conversion of `model` must not replace unasked."""
    if set(files) <= EMPTY:
        return False
    if RECORD not in files:
        return True
    source = read_json(hub.download_files(repo, revision, token, [RECORD]), RECORD).get("source")
    return not isinstance(source, dict) or source.get("model") != model


def _upload(
    planned: Push, target: HubRepository, create_pr: bool, doubt: str, token: str | None, progress: Progress
) -> Push:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    repo, revision = target.repo, target.revision
    with hub.hub_errors(repo, revision, token):
        api = _api(token)
        if not target.exists:
            api.create_repo(repo, private=target.private, exist_ok=True)
        if target.new_branch and revision:
            api.create_branch(repo, branch=revision, exist_ok=True)
        progress.stage("Uploading", total=sum(planned.files.values()), unit="bytes")
        added = []
        # One at a time, so that there is progress to show; the client sends the parts of each in parallel.
        for name, size in planned.files.items():
            added.append(CommitOperationAdd(path_in_repo=name, path_or_fileobj=str(planned.folder / name)))
            api.preupload_lfs_files(repo, added[-1:], revision=revision, create_pr=create_pr)
            progress.advance(size, file=name)
        commit = api.create_commit(
            repo,
            [*added, *(CommitOperationDelete(path_in_repo=name) for name in planned.deleted)],
            commit_message="Upload a model converted by headwise",
            commit_description=f"Pushed unverified: the folder {doubt}." if doubt else None,
            revision=revision,
            create_pr=create_pr,
        )
    progress.finish()
    # The client makes no empty commit: it answers with the last one.
    changed = commit.oid != target.head
    return replace(planned, commit=commit.oid, url=commit.commit_url, pull_request=commit.pr_url, changed=changed)


def _api(token: str | None) -> HfApi:
    from huggingface_hub import HfApi

    return HfApi(token=token, library_name="headwise", library_version=__version__)
