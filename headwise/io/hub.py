"""Download files from the Hub with its own client, and turn the client's errors into sentences.

The client reads HF_ENDPOINT, HF_HOME, HF_TOKEN and HF_HUB_OFFLINE; nothing here overrides them.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from headwise.errors import HeadwiseError
from headwise.io.fs import REASONS
from headwise.progress import Progress

NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")
_UNREACHABLE = "cannot be reached"


class HubUnreachable(HeadwiseError):
    """The Hub cannot be reached, or HF_HUB_OFFLINE is set."""


def split_revision(model: str) -> tuple[str, str | None]:
    """Split `org/name@revision` into repository and revision; without "@", the revision is None.

    Args:
        model: as the user named it.
    """
    repo, _, revision = model.partition("@")
    return repo, revision or None


def resolve_revision(repo: str, revision: str | None) -> tuple[str, str | None]:
    """Return the repository and the revision that `org/name[@revision]` and `revision` name together.

    Args:
        repo: as the user named it.
        revision: branch, tag or commit, or None.

    Raises:
        HeadwiseError: they name two revisions.
    """
    name, at = split_revision(repo)
    if at and revision and at != revision:
        raise HeadwiseError(f"{repo} and `revision` {revision} name two revisions.")
    return name, at or revision


def download_files(
    repo: str,
    revision: str | None,
    token: str | None,
    patterns: Sequence[str],
    progress: Progress | None = None,
) -> Path:
    """Download files of a repository into the Hub's cache.

    Args:
        repo: `org/name`.
        revision: branch, tag or commit; None: the main branch.
        token: of the Hub.
        patterns: the files, with `*`; folders are not searched.
        progress: gets the bytes, if any are not in the cache.

    Returns:
        The folder of the snapshot; its name is the commit.

    Raises:
        HeadwiseError: the Hub refuses it or cannot be reached.
    """
    from huggingface_hub import snapshot_download

    # The star of a pattern matches a slash too; folders contain other formats (onnx, original).
    nested = [f"*/{pattern}" for pattern in patterns if "/" not in pattern and pattern != "*.jinja"]
    wanted: dict[str, Any] = {
        "revision": revision,
        "token": token,
        "allow_patterns": list(patterns),
        "ignore_patterns": nested,
    }
    with hub_errors(repo, revision, token):
        if progress is not None and (size := _missing_bytes(repo, wanted)):
            progress.stage("Downloading", total=size, unit="bytes")
            wanted["tqdm_class"] = _progress_bars(progress, size)
        return Path(snapshot_download(repo, **wanted))


def _missing_bytes(repo: str, wanted: dict[str, Any]) -> int:
    """Return the bytes that are not in the cache; 0 if the Hub cannot be reached: the download then reports it."""
    from huggingface_hub import snapshot_download

    try:
        files: Any = snapshot_download(repo, dry_run=True, tqdm_class=_progress_bars(Progress(), 0), **wanted)
    except Exception:
        return 0
    return sum(file.file_size or 0 for file in files if file.will_download)


def _progress_bars(progress: Progress, total: int) -> Any:
    """Return a class for the client to use in place of its progress bars, which draws nothing.

    The client opens a bar that counts files, and one or two that count bytes: on the disk, and over the network,
    which are fewer where storage is deduplicated. The largest count is reported.

    Args:
        progress: gets the bytes.
        total: bytes to download.
    """
    from huggingface_hub.utils import tqdm  # type: ignore[attr-defined]

    lock = threading.RLock()
    byte_bars: list[Any] = []
    reported = 0

    class Bar(tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **{**options, "disable": True})  # type: ignore[no-untyped-call]
            if options.get("unit") == "B":
                byte_bars.append(self)

        def update(self, n: float | None = 1) -> None:
            nonlocal reported
            with lock:
                self.n += int(n or 0)
                done = min(total, max((bar.n for bar in byte_bars), default=0))
                if done > reported:
                    progress.advance(done - reported)
                    reported = done

    return Bar


def has_file(repo: str, name: str, commit: str, token: str | None) -> bool:
    """Return whether a repository has a file.

    Args:
        repo: `org/name`.
        name: of the file.
        commit: of the repository.
        token: of the Hub.

    Raises:
        HeadwiseError: the Hub refuses it or cannot be reached.
    """
    from huggingface_hub import file_exists

    with hub_errors(repo, commit, token):
        return file_exists(repo, name, revision=commit, token=token)


def count_parameters(repo: str, commit: str, token: str | None) -> int | None:
    """Count the parameters of a repository in the headers of its files.

    Args:
        repo: `org/name`.
        commit: of the repository.
        token: of the Hub.

    Returns:
        The number; None if the headers cannot be downloaded, so that a cached model is inspected offline too.

    Raises:
        HeadwiseError: a header is not valid.
    """
    from huggingface_hub import get_safetensors_metadata
    from huggingface_hub.errors import SafetensorsParsingError

    try:
        counts = get_safetensors_metadata(repo, revision=commit, token=token).parameter_count
    except SafetensorsParsingError as error:
        raise HeadwiseError(
            f"The Hub repository {repo} has weights that are not valid: {_first_line(error, token)}"
        ) from None
    except Exception:
        return None
    return sum(counts.values())


@contextmanager
def hub_errors(repo: str, revision: str | None = None, token: str | None = None) -> Iterator[None]:
    """Turn every error of the client into a sentence about the repository, without any token.

    Args:
        repo: `org/name`.
        revision: the requested revision.
        token: in use.

    Raises:
        HubUnreachable: the Hub cannot be reached.
        HeadwiseError: in place of every other error of the client.
    """
    if token is not None and not re.fullmatch(r"[!-~]+", token):
        raise HeadwiseError("The token contains a character that no token has, such as a space or a line break.")
    try:
        yield
    except HeadwiseError:
        raise
    except Exception as error:
        reason, hint = _explain(error, repo, revision, token)
        kind = HubUnreachable if _UNREACHABLE in reason else HeadwiseError
        raise kind(f"The Hub repository {repo} {reason}.", hint) from error


def _explain(error: Exception, repo: str, revision: str | None, token: str | None) -> tuple[str, str]:
    from huggingface_hub import constants
    from huggingface_hub import errors as hub

    # The client wraps the response of the Hub, or the error of this machine, which is the reason.
    cause = error.__cause__
    answer = cause if _is_local(cause) or isinstance(cause, hub.HfHubHTTPError) else error
    match answer:
        case hub.GatedRepoError():
            return "requires that its users accept its terms", f"Accept them at {constants.ENDPOINT}/{repo}."
        case hub.RepositoryNotFoundError():
            return "does not exist or is private", "Check its name, or log in with `hf auth login`."
        case hub.RevisionNotFoundError():
            return f"has no revision {revision}", "Leave the revision out to take the main branch."
        case hub.HfHubHTTPError():
            return _refused(answer, token)
        case hub.OfflineModeIsEnabled():
            return f"{_UNREACHABLE}: HF_HUB_OFFLINE is set", "Unset it and try again."
        case hub.LocalEntryNotFoundError():
            return (
                f"is not in the cache and the Hub {_UNREACHABLE}",
                "Check HF_HUB_OFFLINE and the network.",
            )
        case hub.HFValidationError():
            return f"is not a repository name: {answer}", "Write it as org/name."
        case OSError() if _is_local(answer):
            reason = REASONS.get(answer.errno or 0, (answer.strerror or _first_line(answer, token), None))[0]
            place = remove_tokens(str(answer.filename or "a file of this machine"), token)
            in_cache = place.startswith(str(constants.HF_HUB_CACHE))
            remedy = "Set HF_HOME to a folder that can be written" if in_cache else "Mend it"
            return f"is not the cause: {reason} at {place}", f"{remedy}, then run the same command again."
    if "xet-write-token" in str(error):
        return "has no Xet storage", "Set HF_HUB_DISABLE_XET=1 to upload without it."
    # The transport library of the client, and its exceptions, depend on the client's version.
    return f"{_UNREACHABLE}: {_first_line(error, token)}", "Try again."


def _is_local(error: BaseException | None) -> bool:
    """Return whether a file of this machine is the cause: the error names one, or only files have such errors."""
    return isinstance(error, OSError) and (error.filename is not None or error.errno in REASONS)


def _refused(error: Any, token: str | None) -> tuple[str, str]:
    status = error.response.status_code
    if status == 401:
        return "refuses the token", "Log in again with `hf auth login`, or give a valid HF_TOKEN or `token`."
    if status == 403:
        return (
            "does not permit this token to do that",
            "Use a token with write access, of a member of its organization.",
        )
    message = error.server_message or _first_line(error, token)
    again = "Run the same command again: files that have arrived are not sent twice."
    return f"responds with {status}: {remove_tokens(message, token)}", again if status >= 500 else "Try again."


def _first_line(error: BaseException, token: str | None) -> str:
    line = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return remove_tokens(line, token).rstrip(".")


def remove_tokens(text: str, token: str | None = None) -> str:
    """Replace the tokens in a text, so that no error writes them to a log.

    Args:
        text: the message.
        token: in use; the stored token, and what looks like a token, are replaced as well.
    """
    from huggingface_hub import get_token

    for secret in (token, get_token()):
        text = text.replace(secret, "***") if secret else text
    return re.sub(r"\bhf_[A-Za-z0-9]{20,}", "***", text)
