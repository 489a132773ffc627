"""Find a checkpoint: a local folder, or a Hub repository brought into the Hub's own cache.

Only configuration, weights, tokenizer and licence files are looked at or downloaded; never code.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from headwise.errors import HeadwiseError
from headwise.io import hub
from headwise.io.fs import os_errors
from headwise.io.header import refuse_dense_json
from headwise.progress import SILENT, Progress

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
GGUF = ".gguf"
PICKLE_SINGLE, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"

# The small model that ships with the package: `headwise demo` converts it.
EMBEDDED_MODEL = Path(__file__).parents[1] / "demo" / "model"
# What travels with the weights unchanged.
SIDECARS = (
    "*.json",
    "*.txt",
    "*.model",
    "*.jinja",
    "*.tiktoken",
    "*.bpe",
    "LICEN[CS]E*",
    "NOTICE*",
    "COPYING*",
    "USE_POLICY*",
    "additional_chat_templates/*.jinja",
)
# What a conversion writes itself, or what describes weights that are not the output's.
NOT_SIDECARS = ("config.json", "headwise.json", "params.json", "*.index.json", "*.py", "adapter_*")
MAX_JSON, MAX_CONFIG = 50_000_000, 5_000_000
# Keys of a config by which transformers chooses code.
IMPLEMENTATIONS = ("attn_implementation", "experts_implementation")


@dataclass(frozen=True)
class Source:
    """A checkpoint's files in a local folder.

    `weights` are the weight files in the order to read them, `weight_map` what the index says (empty without
    an index), `sidecars` the files to copy, `left_out` the names of files that are not copied.
    """

    name: str
    folder: Path
    revision: str | None
    config: dict[str, Any]
    weights: list[str]
    weight_map: dict[str, str]
    sidecars: list[Path]
    left_out: list[str]


def find_source(
    model: str | Path,
    *,
    revision: str | None = None,
    token: str | None = None,
    allow_pickle: bool = False,
    progress: Progress = SILENT,
) -> Source:
    """Find the files of a local folder or of `org/name[@revision]`, which is downloaded.

    The one way from a MODEL to its files, for every verb. `folder` is what the stock classes load.

    Raises:
        HeadwiseError: there is no such model, it has no weights that may be read, or its index is unsound.
    """
    folder, commit = find_folder(model, revision=revision, token=token)
    if commit is None:
        return source_in_folder(str(model), folder, allow_pickle=allow_pickle)
    repo = hub.split_revision(str(model))[0]
    read_config(folder)
    download_weights(repo, commit, folder, token, allow_pickle, progress)
    return source_in_folder(repo, folder, commit, allow_pickle=allow_pickle)


def source_in_folder(name: str, folder: Path, revision: str | None = None, *, allow_pickle: bool = False) -> Source:
    """The `Source` in a folder where everything is in place."""
    config = read_config(folder)
    weights, weight_map = find_weights(folder, allow_pickle)
    sidecars, left_out = find_sidecars(folder, weights)
    return Source(name, folder, revision, config, weights, weight_map, sidecars, left_out)


def find_gguf(model: str | Path, revision: str | None = None) -> Path | None:
    """Return the path of a GGUF file; None for a model that is a folder or a Hub repository.

    Args:
        model: as the user named it.
        revision: branch, tag or commit, which a file does not have.

    Raises:
        HeadwiseError: `revision` is given for a file.
    """
    path = Path(model).expanduser()
    if path.suffix != GGUF or not path.is_file():
        return None
    if revision:
        raise HeadwiseError(f"`revision` {revision} is for Hub repositories, and {path} is a file.")
    return path


def find_folder(
    model: str | Path,
    *,
    revision: str | None = None,
    token: str | None = None,
    patterns: Sequence[str] = (*SIDECARS, "README.md"),
) -> tuple[Path, str | None]:
    """The local folder of a model, and the commit if it is a Hub repository.

    Of a repository the files that match `patterns` are downloaded, without its weights.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        if revision:
            raise HeadwiseError(f"`revision` {revision} is for Hub repositories, and {path} is a folder.")
        return path, None
    if path.is_file() and path.suffix == GGUF:
        raise HeadwiseError(
            f"{path} is a GGUF file, and a folder with safetensors weights is needed here.",
            "Write one with `headwise convert` and `dtype` bfloat16.",
        )
    if path.exists():
        raise HeadwiseError(
            f"{path} is a file.", "Name the folder that holds config.json and the weights, or a .gguf file."
        )
    if path.suffix == GGUF:
        raise HeadwiseError(f"There is no file {path}.", "Name a GGUF file, a folder, or a Hub repository.")
    if not hub.NAME.fullmatch(hub.split_revision(str(model))[0]):
        raise HeadwiseError(f"There is no folder {model}.", "Name a folder, or a Hub repository as org/name.")
    folder = hub.download_files(*hub.resolve_revision(str(model), revision), token, patterns)
    return folder, folder.name


def read_config(folder: Path) -> dict[str, Any]:
    """The model's config.json, refused unless it is an object."""
    if not (folder / "config.json").exists():
        if any(folder.glob("*.gguf")):
            raise HeadwiseError(
                f"{folder} has GGUF files and no config.json.",
                "Name one of the .gguf files.",
            )
        raise HeadwiseError(f"{folder} has no config.json.", "Name the folder that save_pretrained wrote.")
    config = read_json(folder, "config.json", MAX_CONFIG)
    for key, value in _implementations(config):
        raise HeadwiseError(
            f"{folder / 'config.json'} has {key}: {value!r}, which names code on the Hub.",
            "headwise runs no code that comes with a checkpoint: remove the field.",
        )
    return config


def _implementations(value: Any) -> Iterator[tuple[str, str]]:
    """Where a config asks for code of a repository: stock transformers would fetch it when it loads the model."""
    for key, item in value.items() if isinstance(value, dict) else ():
        if key.strip("_").removesuffix("_internal") in IMPLEMENTATIONS:
            named = item.values() if isinstance(item, dict) else [item]
            yield from ((key, name) for name in named if isinstance(name, str) and "/" in name)
        yield from _implementations(item)


def find_weights(folder: Path, allow_pickle: bool = False) -> tuple[list[str], dict[str, str]]:
    """The weight files, and the index's `weight_map` where there is one; as transformers chooses them."""
    for single, index in ((SINGLE, INDEX), (PICKLE_SINGLE, PICKLE_INDEX)):
        sharded = not (folder / single).is_file()
        if sharded and not (folder / index).is_file():
            continue
        if single == PICKLE_SINGLE and not allow_pickle:
            raise _pickled(folder)
        if not sharded:
            return [single], {}
        weight_map = read_weight_map(folder, index)
        shards = sorted(set(weight_map.values()))
        for shard in shards:
            if not path_inside(folder, shard).is_file():
                raise HeadwiseError(
                    f"{index} names {shard}, which is not in {folder}.", "Download the checkpoint again."
                )
        return shards, weight_map
    if any(folder.glob("*.gguf")):
        raise HeadwiseError(f"{folder} has GGUF files and no safetensors weights.", "Name one of the .gguf files.")
    raise HeadwiseError(f"{folder} has no weights.", f"A checkpoint has {SINGLE} or {INDEX}.")


def read_weight_map(folder: Path, index: str) -> dict[str, str]:
    """The `weight_map` of an index; every shard a plain file name of the right kind."""
    weight_map = read_json(folder, index).get("weight_map")
    suffix = ".bin" if index == PICKLE_INDEX else ".safetensors"
    if not isinstance(weight_map, dict) or not weight_map:
        raise HeadwiseError(f"{folder / index} has no weight_map.", "Download the checkpoint again.")
    for name, shard in weight_map.items():
        if not (isinstance(shard, str) and _is_plain(shard) and shard.endswith(suffix)):
            raise HeadwiseError(
                f"{folder / index} places tensor {name!r} in {shard!r}, which is not a file of its folder.",
                "Do not use a checkpoint that points outside itself.",
            )
    return weight_map


def _is_plain(name: str) -> bool:
    """Whether a name is that of a file in the same folder, and one that any system can hold."""
    return Path(name).name == name and name.isprintable() and len(name) <= 200


def path_inside(folder: Path, name: str) -> Path:
    """The path of a file in a folder, refused if a link leads out of it.

    In the Hub's cache the files of a snapshot are links into the repository's `blobs`.
    """
    path, home = folder / name, folder.resolve()
    # Unlike Path.resolve, this gives a name also for a link that leads to itself.
    real = Path(os.path.realpath(path))
    blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else home
    if not (real.is_relative_to(home) or real.is_relative_to(blobs)):
        raise HeadwiseError(
            f"{path} is a link that leaves its folder, to {real}.", "Put the file itself in its place."
        )
    return path


def find_sidecars(folder: Path, weights: list[str]) -> tuple[list[Path], list[str]]:
    """The files to copy byte for byte, and the names of those left out."""
    names = sorted(
        path.relative_to(folder).as_posix()
        for path in [*folder.iterdir(), *folder.glob("additional_chat_templates/*")]
        if path.is_file() and not path.name.startswith(".")
    )
    copied = [name for name in names if _is_sidecar(name) and name not in weights]
    written = {"config.json", "README.md", "headwise.json", INDEX, PICKLE_INDEX, *weights}
    left_out = [name for name in names if name not in written and name not in copied]
    return [path_inside(folder, name) for name in copied], left_out


def read_json(folder: Path, name: str, limit: int = MAX_JSON) -> dict[str, Any]:
    """A JSON object from a file of the folder; HeadwiseError if it is anything else."""
    path = path_inside(folder, name)
    with os_errors(path, "read"):
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise HeadwiseError(f"{path} is not a file.")
        if status.st_size > limit:
            raise HeadwiseError(f"{path} is larger than {limit:,} bytes.")
        text = path.read_bytes()
    try:
        refuse_dense_json(text)
        content = json.loads(text.decode())
    except (ValueError, RecursionError) as error:
        raise HeadwiseError(f"{path} is not valid JSON: {error}.") from None
    if not isinstance(content, dict):
        raise HeadwiseError(f"{path} holds a {type(content).__name__} where an object is expected.")
    return content


def download_weights(
    repo: str, commit: str, folder: Path, token: str | None, allow_pickle: bool, progress: Progress = SILENT
) -> None:
    """Bring the weight files of a repository beside its configuration; its index says which they are."""
    kinds = [(SINGLE, INDEX)] + ([(PICKLE_SINGLE, PICKLE_INDEX)] if allow_pickle else [])
    for single, index in kinds:
        sharded = (folder / index).exists()
        files = sorted(set(read_weight_map(folder, index).values())) if sharded else [single]
        hub.download_files(repo, commit, token, files, progress)
        if sharded or (folder / single).exists():
            return
    if not allow_pickle and hub.has_file(repo, PICKLE_SINGLE, commit, token):
        raise _pickled(repo)


def _pickled(model: str | Path) -> HeadwiseError:
    return HeadwiseError(
        f"{model} holds its weights as pickle (.bin), which can carry code.",
        "Convert it to safetensors, or pass `allow_pickle` to read its tensors and nothing else.",
    )


def _is_sidecar(name: str) -> bool:
    depth = name.count("/")
    return any(fnmatch(name, p) and p.count("/") == depth for p in SIDECARS) and not any(
        fnmatch(name, p) for p in NOT_SIDECARS
    )
