"""The Hub, through its own client: bring files here, and say in a sentence what went wrong there.

HF_ENDPOINT, HF_HOME, HF_TOKEN and HF_HUB_OFFLINE are the client's to read; nothing here overrides them.
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


def split_revision(model: str) -> tuple[str, str | None]:
    """`org/name@revision` -> (`org/name`, `revision`)."""
    repo, _, revision = model.partition("@")
    return repo, revision or None


def resolve_revision(repo: str, revision: str | None) -> tuple[str, str | None]:
    """The repository and the one revision that `org/name[@revision]` and `--revision` name together."""
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
    """The folder in the Hub's cache with the files of a repository that match `patterns`; its name is the commit.

    Args:
        progress: what is told of the bytes, if any have to come over the network.
    """
    from huggingface_hub import snapshot_download

    # A pattern's star matches a slash too; folders hold other formats (onnx, original) that nobody asked for.
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
            wanted["tqdm_class"] = _bars(progress, size)
        return Path(snapshot_download(repo, **wanted))


def _missing_bytes(repo: str, wanted: dict[str, Any]) -> int:
    """How much is not in the cache yet; 0 also where the Hub cannot be asked, as the download itself will say."""
    from huggingface_hub import snapshot_download

    try:
        files: Any = snapshot_download(repo, dry_run=True, tqdm_class=_bars(Progress(), 0), **wanted)
    except Exception:
        return 0
    return sum(file.file_size or 0 for file in files if file.will_download)


def _bars(progress: Progress, total: int) -> Any:
    """A class for the client to use in place of its progress bars.

    The client opens one that counts files and one or two that count bytes: those on the disk, and those of the
    network, which are fewer where storage is deduplicated. The furthest tells how far the download is.
    """
    lock = threading.RLock()
    bars: list[Any] = []
    told = 0

    class Bar:
        def __init__(self, iterable: Any = None, *_: Any, total: float | None = None, unit: str = "", **__: Any):
            self.iterable, self.total, self.n = iterable, total, 0
            self.format_dict: dict[str, Any] = {}
            if unit == "B":
                bars.append(self)

        def update(self, amount: float | None = 1) -> None:
            nonlocal told
            with lock:
                self.n += int(amount or 0)
                done = min(total, max((bar.n for bar in bars), default=0))
                if done > told:
                    progress.advance(done - told)
                    told = done

        def __iter__(self) -> Iterator[Any]:
            return iter(self.iterable)

        def __enter__(self) -> Bar:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def nothing(self, *_: Any, **__: Any) -> None:
            pass

        close = refresh = set_description = set_description_str = set_postfix_str = nothing

        @classmethod
        def get_lock(cls) -> Any:
            return lock

        @classmethod
        def set_lock(cls, _: Any) -> None:
            pass

    return Bar


def has_file(repo: str, name: str, commit: str, token: str | None) -> bool:
    """Whether a repository holds this file."""
    from huggingface_hub import file_exists

    with hub_errors(repo, commit, token):
        return file_exists(repo, name, revision=commit, token=token)


def count_parameters(repo: str, commit: str, token: str | None) -> int | None:
    """Parameters of a repository, counted in its files' headers; None if they cannot be had.

    A cached model is inspected offline too, then without this count.
    """
    from huggingface_hub import get_safetensors_metadata
    from huggingface_hub.utils import SafetensorsParsingError  # type: ignore[attr-defined]

    try:
        counts = get_safetensors_metadata(repo, revision=commit, token=token).parameter_count
    except SafetensorsParsingError as error:
        raise HeadwiseError(f"The Hub repository {repo} has unsound weights: {_first_line(error, token)}") from None
    except Exception:
        return None
    return sum(counts.values())


@contextmanager
def hub_errors(repo: str, revision: str | None = None, token: str | None = None) -> Iterator[None]:
    """Whatever the client raises in the block becomes one sentence about the repository, without any token."""
    if token is not None and not re.fullmatch(r"[!-~]+", token):
        raise HeadwiseError("The token holds a character that no token has, such as a space or a line break.")
    try:
        yield
    except HeadwiseError:
        raise
    except Exception as error:
        reason, hint = _explain(error, repo, revision, token)
        raise HeadwiseError(f"The Hub repository {repo} {reason}.", hint) from error


def _explain(error: Exception, repo: str, revision: str | None, token: str | None) -> tuple[str, str]:
    from huggingface_hub import constants
    from huggingface_hub import errors as hub

    # The client wraps the Hub's answer, or this machine's, in what it failed to do: the answer is the reason.
    cause = error.__cause__
    answer = cause if _is_local(cause) or isinstance(cause, hub.HfHubHTTPError) else error
    match answer:
        case hub.GatedRepoError():
            return "asks its users to accept its terms first", f"Accept them at {constants.ENDPOINT}/{repo}."
        case hub.RepositoryNotFoundError():
            return "does not exist or is private", "Check its name, or log in with `hf auth login`."
        case hub.RevisionNotFoundError():
            return f"has no revision {revision}", "Leave the revision out to take the main branch."
        case hub.HfHubHTTPError():
            return _refused(answer, token)
        case hub.OfflineModeIsEnabled():
            return "cannot be reached: HF_HUB_OFFLINE is set", "Unset it and try again."
        case hub.LocalEntryNotFoundError():
            return (
                "is not in the cache and the Hub cannot be reached",
                "Check HF_HUB_OFFLINE and the network.",
            )
        case hub.HFValidationError():
            return f"is not a repository name: {answer}", "Write it as org/name."
        case OSError() if _is_local(answer):
            line = _first_line(answer, token)
            return f"is not at fault, a file of this machine is: {line}", "Then run the same command again."
    if "xet-write-token" in str(error):
        return "has no Xet storage", "Set HF_HUB_DISABLE_XET=1 to upload without it."
    # The client lets through whatever its transport raises; which library that is depends on its version.
    return f"cannot be reached: {_first_line(error, token)}", "Try again."


def _is_local(error: BaseException | None) -> bool:
    """Whether a file is at fault: an error that names one, or that only files have."""
    return isinstance(error, OSError) and (error.filename is not None or error.errno in REASONS)


def _refused(error: Any, token: str | None) -> tuple[str, str]:
    status = error.response.status_code
    if status == 401:
        return "refuses the token", "Log in again with `hf auth login`, or give a valid HF_TOKEN or `token`."
    if status == 403:
        return "does not let this token do that", "Use a token with write access, of a member of its organization."
    said = error.server_message or _first_line(error, token)
    again = "Run the same command again: what has arrived is not sent twice."
    return f"answers {status}: {remove_tokens(said, token)}", again if status >= 500 else "Try again."


def _first_line(error: BaseException, token: str | None) -> str:
    line = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return remove_tokens(line, token).rstrip(".")


def remove_tokens(text: str, token: str | None = None) -> str:
    """`text` without the token in use or anything that looks like one: no error may carry it into a log."""
    from huggingface_hub import get_token

    for secret in (token, get_token()):
        text = text.replace(secret, "***") if secret else text
    return re.sub(r"\bhf_[A-Za-z0-9]{20,}", "***", text)
