"""Push a converted folder to the Hub: check it, upload file by file, publish by one commit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headwise.environment import HEADWISE_VERSION
from headwise.errors import HeadwiseError
from headwise.io import hub
from headwise.io.fs import check_name, require_folder
from headwise.io.reader import open_checkpoint
from headwise.io.source import path_inside, read_json
from headwise.progress import SILENT, Progress
from headwise.records.manifest import RECORD, accepted_checks, changed_files, changed_tensors, read_record

if TYPE_CHECKING:
    from huggingface_hub import HfApi

# Files of the repository that the commit deletes where the folder has none of that name. transformers would load
# them in place of the new weights or beside them; with peft it follows an adapter's config to another base model.
REPLACED = (
    *("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "adapter_config.json"),
    *("chat_template.jinja", "chat_template.json", "additional_chat_templates/*", "generation_config.json"),
    *("tokenizer*", "added_tokens.json", "special_tokens_map.json", "vocab.*", "merges.txt", "*.model"),
)
# Files that a repository without a model may hold.
EMPTY = {".gitattributes", ".gitignore", "README.md", "LICENSE"}
EVAL_RESULTS = ".eval_results"


@dataclass(frozen=True)
class PushResult:
    """A finished push, or after a dry run a planned one.

    Attributes:
        folder: the folder that was pushed.
        repo: the repository, `org/name`.
        revision: the branch; None: the main branch.
        files: bytes of every file of the commit, by name.
        deleted: files of the repository that the commit deletes: weights, adapters, tokenizer files, templates.
        left: other files of the repository that the folder does not have; the commit leaves them.
        verified: whether the folder passed its verification and has not changed since.
        accepted: failed checks that the user accepted when the folder was written.
        creates_repository: whether the repository is new; None after a dry run that could not reach the Hub.
        private: whether the repository is private; a dry run that could not reach the Hub takes the given value.
        unreachable: why a dry run could not compare the folder with the repository; None: it was compared.
        commit: hash of the commit; None after a dry run.
        url: address of the commit; None after a dry run.
        pull_request: address of the pull request; None without one.
        changed: whether the commit changed anything. False: the repository held exactly these files, so that there
            is no new commit and no pull request. None after a dry run.
    """

    folder: Path
    repo: str
    revision: str | None
    files: dict[str, int]
    deleted: tuple[str, ...]
    left: tuple[str, ...]
    verified: bool
    accepted: tuple[str, ...]
    creates_repository: bool | None
    private: bool
    unreachable: str | None = None
    commit: str | None = None
    url: str | None = None
    pull_request: str | None = None
    changed: bool | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the push as plain data."""
        lists = {name: list(getattr(self, name)) for name in ("deleted", "left", "accepted")}
        return asdict(self) | {"folder": str(self.folder)} | lists


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
) -> PushResult:
    """Upload a folder that headwise wrote.

    One commit adds all files, and deletes the weight files of the repository that the folder does not have. After
    an interruption the same call continues: files that have arrived are not sent again.

    Args:
        folder: the folder that `convert_model` or `uptrain_model` wrote.
        repo: `org/name[@revision]`; it is made if it does not exist.
        revision: the branch; it is made from the main branch if it does not exist.
        private: make a new repository private; an existing public one is refused.
        create_pr: open a pull request instead of committing.
        dry_run: check the folder, and the repository if the Hub can be reached, and change nothing.
        unverified: push a folder that was not verified, or has changed since.
        force: replace another model.
        token: of the Hub; None: HF_TOKEN, or that of `hf auth login`.
        progress: gets the stages.

    Returns:
        The push, or its plan under `dry_run`.

    Raises:
        HeadwiseError: the folder cannot be pushed, or the Hub refuses.
    """
    for name in (folder, repo):
        check_name(name)
    path = Path(folder).expanduser()
    record = _read_source_record(path)
    files = files_to_push(path)
    problem = _verification_problem(path, record, progress)
    if problem and not unverified:
        raise HeadwiseError(f"{path} {problem}.", "Convert it again, or give `unverified` to push it unchanged.")
    options: dict[str, Any] = {"revision": revision, "private": private, "create_pr": create_pr, "token": token}
    unreachable = None
    try:
        target = check_repository(
            repo, record["source"], hashes=record["sha256"], force=force, need_token=not dry_run, **options
        )
    except hub.HubUnreachable as error:
        if not dry_run:
            raise
        unreachable = error.message
        target = HubRepository(*_check_name(repo, revision, create_pr), False, private, bool(revision), ())
    others = [name for name in target.files if name not in files and name not in EMPTY]
    deleted = tuple(name for name in others if any(fnmatch(name, pattern) for pattern in REPLACED))
    planned = PushResult(
        folder=path,
        repo=target.repo,
        revision=target.revision,
        files=files,
        deleted=deleted,
        left=tuple(name for name in others if name not in deleted),
        accepted=tuple(accepted_checks(record)),
        verified=not problem,
        creates_repository=None if unreachable else not target.exists,
        private=target.private,
        unreachable=unreachable,
    )
    return planned if dry_run else _upload(planned, target, create_pr, problem, token, progress)


def push_converted(folder: Path, repo: str, private: bool, token: str | None, progress: Progress) -> PushResult:
    """Push at the end of a conversion.

    Args:
        folder: the converted folder.
        repo: `org/name[@revision]`.
        private: make a new repository private.
        token: of the Hub.
        progress: gets the stages.

    Raises:
        HeadwiseError: as `push_model`; the hint is that the folder is complete.
    """
    try:
        return push_model(folder, repo, private=private, token=token, progress=progress)
    except HeadwiseError as error:
        hint = f"{folder} is complete: `headwise push {folder} {repo}` uploads it."
        raise HeadwiseError(error.message, hint) from error


@dataclass(frozen=True)
class HubRepository:
    """A repository before the push.

    Attributes:
        repo: `org/name`.
        revision: the branch; None: the main branch.
        exists: whether the repository exists.
        private: whether it is private, or will be.
        new_branch: whether `revision` does not exist yet.
        files: names of the files of the branch.
        head: the last commit of the branch.
    """

    repo: str
    revision: str | None
    exists: bool
    private: bool
    new_branch: bool
    files: tuple[str, ...]
    head: str | None = None


def check_repository(
    repo: str,
    source: Mapping[str, Any],
    *,
    hashes: Mapping[str, str] | None = None,
    revision: str | None = None,
    private: bool = False,
    create_pr: bool = False,
    force: bool = False,
    token: str | None = None,
    need_token: bool = True,
) -> HubRepository:
    """Check that a push to a repository is possible, without changing it.

    Args:
        repo: `org/name[@revision]`.
        source: the source of the folder, as headwise.json records it; a repository with a model must have the same.
        hashes: of the folder's tensors; None before they exist.
        revision: the branch.
        private: whether a new repository is to be private.
        create_pr: whether the push opens a pull request.
        force: whether the push may replace another model.
        token: of the Hub.
        need_token: whether a missing token is an error.

    Returns:
        The state of the repository.

    Raises:
        HeadwiseError: the name or the token is wrong, the Hub refuses, or the push would replace another model.
    """
    repo, revision = _check_name(repo, revision, create_pr)
    from huggingface_hub import errors, get_token

    if need_token and not (token or get_token()):
        raise HeadwiseError(
            "There is no Hub token to push with.", "Log in with `hf auth login`, set HF_TOKEN or give `token`."
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
            raise HeadwiseError(f"{repo} exists and is public.", "Name a new repository, or leave out `private`.")
        new_branch, head = False, info.sha
        if revision:
            try:
                head = api.repo_info(repo, revision=revision).sha
            except errors.RevisionNotFoundError:
                new_branch = True
            else:
                _refuse_tag(api, repo, revision)
        at = None if new_branch else revision
        files = tuple(api.list_repo_files(repo, revision=at))
        if not (force or create_pr or new_branch) and _is_other(repo, at, token, files, source, hashes):
            model = source["model"]
            held = f"another model than one made from {model}" if repo != model else "the source of this model"
            raise HeadwiseError(
                f"{repo}{f'@{at}' if at else ''} holds {held}.",
                "Name another repository or `revision`, open a pull request with `create_pr`, or replace it with "
                "`force`.",
            )
        return HubRepository(repo, revision, True, bool(info.private), new_branch, files, head)


def _check_name(repo: str, revision: str | None, create_pr: bool) -> tuple[str, str | None]:
    """Return repository and branch, after what can be checked without the Hub."""
    repo, revision = hub.resolve_revision(repo, revision)
    if not hub.NAME.fullmatch(repo):
        raise HeadwiseError(f"{repo!r} is not a repository name.", "Write it as org/name.")
    if create_pr and revision:
        raise HeadwiseError(
            f"A pull request goes to the main branch, not to {revision}.", "Leave out `create_pr` or `revision`."
        )
    return repo, revision


def _refuse_tag(api: HfApi, repo: str, revision: str) -> None:
    """Refuse a revision that no commit can be added to; a pull request is a branch of its own."""
    branches = {branch.name for branch in api.list_repo_refs(repo).branches}
    if revision not in branches and not revision.startswith("refs/pr/"):
        raise HeadwiseError(
            f"{repo}@{revision} is a tag or a commit, and a push needs a branch.",
            "Name a branch, and tag its commit afterwards.",
        )


def files_to_push(folder: Path) -> dict[str, int]:
    """Return the bytes of the files to push, by name.

    Hidden files are not pushed, except those of the Hub's own `.eval_results`.

    Args:
        folder: the converted folder.
    """
    paths = {path.relative_to(folder): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {
        name.as_posix(): path_inside(folder, name.as_posix()).stat().st_size
        for name in paths
        if name.parts[0] == EVAL_RESULTS or not any(part.startswith(".") for part in name.parts)
    }


def _read_source_record(folder: Path) -> dict[str, Any]:
    require_folder(folder, "Name the folder that `headwise convert` or `headwise uptrain` wrote.")
    record = read_record(folder)
    source = record.get("source") if record else None
    if record is None or not (isinstance(source, dict) and isinstance(source.get("model"), str)):
        raise HeadwiseError(
            f"{folder} was not made by headwise: {RECORD} is missing or names no source.",
            "Name the folder that `headwise convert` wrote.",
        )
    return record


def _verification_problem(folder: Path, record: Mapping[str, Any], progress: Progress) -> str:
    """Return why the folder is not verified, as the predicate of a sentence; "" if it is."""
    verification = record.get("verification")
    if not isinstance(verification, dict):
        return "was not verified"
    failed = [check.get("name") for check in verification.get("checks") or () if check.get("passed") is not True]
    accepted = bool(failed) and set(failed) <= set(accepted_checks(record))
    if verification.get("passed") is not True and not accepted:
        return "failed its verification"
    changed = changed_files(folder, record) + changed_tensors(open_checkpoint(folder), record, progress)
    more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
    return f"has changed since it was verified ({', '.join(changed[:3])}{more})" if changed else ""


def _is_other(
    repo: str,
    revision: str | None,
    token: str | None,
    files: Sequence[str],
    source: Mapping[str, Any],
    hashes: Mapping[str, str] | None,
) -> bool:
    """Return whether a branch holds a model that was not converted from the same source.

    A repository of the Hub identifies a source. The name of a local folder does not: the headers of its
    weight files must be the same, and most tensors that both conversions hold must be equal.
    """
    if set(files) <= EMPTY:
        return False
    if RECORD not in files:
        return True
    record = read_json(hub.download_files(repo, revision, token, [RECORD]), RECORD)
    present, tensors = record.get("source"), record.get("sha256")
    if not isinstance(present, dict) or present.get("model") != source["model"]:
        return True
    if bool(present.get("revision")) != bool(source.get("revision")):
        return True
    if source.get("revision"):
        return False
    if present.get("files") != source.get("files"):
        return True
    if hashes is None:
        return False
    if not isinstance(tensors, dict):
        return True
    shared = hashes.keys() & tensors.keys()
    equal = sum(hashes[name] == str(tensors[name]) for name in shared)
    return 2 * equal <= len(shared)


def _upload(
    planned: PushResult, target: HubRepository, create_pr: bool, problem: str, token: str | None, progress: Progress
) -> PushResult:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    repo, revision = target.repo, target.revision
    with hub.hub_errors(repo, revision, token):
        api = _api(token)
        if not target.exists:
            api.create_repo(repo, private=target.private, exist_ok=True)
        if target.new_branch and revision:
            api.create_branch(repo, branch=revision, exist_ok=True)
        # The client sends only what the repository does not hold.
        progress.stage("Comparing and uploading", total=sum(planned.files.values()), unit="bytes")
        added = []
        # One file at a time, for the progress; the client sends the parts of a file in parallel.
        for name, size in planned.files.items():
            added.append(CommitOperationAdd(path_in_repo=name, path_or_fileobj=str(planned.folder / name)))
            api.preupload_lfs_files(repo, added[-1:], revision=revision, create_pr=create_pr)
            progress.advance(size, file=name)
        commit = api.create_commit(
            repo,
            [*added, *(CommitOperationDelete(path_in_repo=name) for name in planned.deleted)],
            commit_message="Upload a model converted by headwise",
            commit_description=_describe(problem, planned.accepted),
            revision=revision,
            create_pr=create_pr,
        )
    progress.finish()
    # The client makes no empty commit: it returns the last one.
    changed = commit.oid != target.head
    return replace(planned, commit=commit.oid, url=commit.commit_url, pull_request=commit.pr_url, changed=changed)


def _describe(problem: str, accepted: Sequence[str]) -> str | None:
    """Return the description of a commit: what is wrong with the folder, if anything is."""
    lines = [f"Pushed unverified: the folder {problem}."] if problem else []
    lines += [f"The folder failed the check {name}, and the failure was accepted." for name in accepted]
    return "\n".join(lines) or None


def _api(token: str | None) -> HfApi:
    from huggingface_hub import HfApi

    return HfApi(token=token, library_name="headwise", library_version=HEADWISE_VERSION)
