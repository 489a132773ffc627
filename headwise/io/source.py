"""Find the files of a checkpoint: a local folder, or a Hub repository, downloaded to the Hub's own cache.

Only configuration, weights, tokenizer and licence files are read or downloaded; never code.
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
from headwise.io.fs import check_name, os_errors
from headwise.io.header import refuse_dense_json
from headwise.progress import SILENT, Progress

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
GGUF = ".gguf"
ADAPTER_CONFIG = "adapter_config.json"
PICKLE_SINGLE, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"

# The small model that ships with the package: `headwise demo` converts it.
EMBEDDED_MODEL = Path(__file__).parents[1] / "demo" / "model"
# Files beside the weights that a conversion copies unchanged.
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
# Files that a conversion writes itself, or that describe weights of another model.
NOT_SIDECARS = ("config.json", "headwise.json", "params.json", "*.index.json", "*.py", "adapter_*")
MAX_JSON, MAX_CONFIG = 50_000_000, 5_000_000
# transformers copies and prints it whole whenever a model is loaded: deep nesting costs the square of its size.
MAX_GENERATION_CONFIG = 100_000
# Config keys that make transformers choose code.
IMPLEMENTATIONS = ("attn_implementation", "experts_implementation")


@dataclass(frozen=True)
class Source:
    """A checkpoint's files in a local folder.

    Attributes:
        name: the user's name of the folder, or the repository.
        folder: the folder, or the repository's snapshot in the cache.
        revision: the commit of a repository, else None.
        config: config.json.
        weights: names of the weight files in the order of reading.
        weight_map: tensor name to file name by the index; empty without an index.
        sidecars: the files that a conversion copies.
        left_out: names of the files that it does not copy.
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
    """Find the files of a local folder, or download those of `org/name[@revision]`.

    Args:
        model: the folder or repository.
        revision: branch, tag or commit of a repository.
        token: of the Hub.
        allow_pickle: accept pickled weights (.bin).
        progress: gets the bytes of a download.

    Raises:
        HeadwiseError: there is no such model, it has no weights that may be read, or its index is not valid.
    """
    folder, commit = find_folder(model, revision=revision, token=token)
    if commit is None:
        return source_in_folder(str(model), folder, allow_pickle=allow_pickle)
    repo = hub.split_revision(str(model))[0]
    read_config(folder)
    download_weights(repo, commit, folder, token, allow_pickle, progress)
    return source_in_folder(repo, folder, commit, allow_pickle=allow_pickle)


def source_in_folder(name: str, folder: Path, revision: str | None = None, *, allow_pickle: bool = False) -> Source:
    """Return the `Source` of a folder that is complete.

    Args:
        name: the user's name of it.
        folder: the folder.
        revision: its commit on the Hub, or None.
        allow_pickle: accept pickled weights (.bin).

    Raises:
        HeadwiseError: config.json, weights or index are missing or not valid.
    """
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
        HeadwiseError: `revision` is given for a file, or `model` is no name.
    """
    check_name(model)
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
    """Return the local folder of a model, and the commit if it is a Hub repository.

    Args:
        model: a folder or `org/name[@revision]`.
        revision: branch, tag or commit of a repository.
        token: of the Hub.
        patterns: the files of a repository to download; by default all but its weights.

    Raises:
        HeadwiseError: there is no such model, its name is not UTF-8, or the Hub refuses it.
    """
    check_name(model)
    path = Path(model).expanduser()
    if path.is_dir():
        if revision:
            raise HeadwiseError(f"`revision` {revision} is for Hub repositories, and {path} is a folder.")
        return path, None
    if path.is_file() and path.suffix == GGUF:
        raise HeadwiseError(
            f"{path} is a GGUF file, and a folder with safetensors weights is needed here.",
            f"`headwise convert {path} FOLDER` with `dtype` bfloat16 writes one.",
        )
    if path.exists():
        raise HeadwiseError(
            f"{path} is a file.", "Name the folder with config.json and the weights, or a .gguf file."
        )
    if path.suffix == GGUF:
        raise HeadwiseError(f"There is no file {path}.", "Name a GGUF file, a folder, or a Hub repository.")
    if not hub.NAME.fullmatch(hub.split_revision(str(model))[0]):
        raise HeadwiseError(f"There is no folder {model}.", "Name a folder, or a Hub repository as org/name.")
    folder = hub.download_files(*hub.resolve_revision(str(model), revision), token, patterns)
    return folder, folder.name


def read_config(folder: Path) -> dict[str, Any]:
    """Read the config.json of a folder.

    Args:
        folder: of the model.

    Raises:
        HeadwiseError: it is missing, no JSON object, or names code of a repository.
    """
    if not (folder / "config.json").exists():
        if any(folder.glob("*.gguf")):
            raise HeadwiseError(
                f"{folder} has GGUF files and no config.json.",
                "Name one of the .gguf files.",
            )
        if (folder / ADAPTER_CONFIG).is_file():
            raise adapter_error(folder, "has a LoRA adapter and no model")
        raise HeadwiseError(f"{folder} has no config.json.", "Name the folder that save_pretrained wrote.")
    config = read_json(folder, "config.json", MAX_CONFIG)
    generation = folder / "generation_config.json"
    if generation.is_file() and generation.stat().st_size > MAX_GENERATION_CONFIG:
        raise HeadwiseError(
            f"{generation} is larger than {MAX_GENERATION_CONFIG:,} bytes.", "Shorten or delete the file."
        )
    for key, value in _implementations(config):
        raise HeadwiseError(
            f"{folder / 'config.json'} has {key}: {value!r}, which names code on the Hub.",
            "headwise runs no code that comes with a checkpoint: remove the field.",
        )
    return config


def _implementations(value: Any) -> Iterator[tuple[str, str]]:
    """Yield the keys and values that name code of a repository, which transformers would download and run."""
    for key, item in value.items() if isinstance(value, dict) else ():
        if key.strip("_").removesuffix("_internal") in IMPLEMENTATIONS:
            named = item.values() if isinstance(item, dict) else [item]
            yield from ((key, name) for name in named if isinstance(name, str) and "/" in name)
        yield from _implementations(item)


def find_weights(folder: Path, allow_pickle: bool = False) -> tuple[list[str], dict[str, str]]:
    """Find the weight files of a folder, in the order of preference of transformers.

    Args:
        folder: of the model.
        allow_pickle: accept pickled weights (.bin).

    Returns:
        The names of the files, and the index's `weight_map`, empty without an index.

    Raises:
        HeadwiseError: there are no weights that may be read, or the index is not valid.
    """
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
    if (folder / ADAPTER_CONFIG).is_file():
        raise adapter_error(folder, "has a LoRA adapter and no weights of a model")
    raise HeadwiseError(f"{folder} has no weights.", f"A checkpoint has {SINGLE} or {INDEX}.")


def adapter_error(source: str | Path, problem: str) -> HeadwiseError:
    """Return the error for a LoRA adapter that is not merged into the weights.

    Args:
        source: the user's name of the model, or its folder.
        problem: what it has, as the rest of a sentence.
    """
    return HeadwiseError(
        f"{source} {problem}.",
        f"Merge the adapter into its base model first, with `merge_and_unload` of peft, and leave {ADAPTER_CONFIG} "
        "out of the merged folder.",
    )


def read_weight_map(folder: Path, index: str) -> dict[str, str]:
    """Read the `weight_map` of an index, tensor name to file name.

    Args:
        folder: of the model.
        index: name of the index.

    Raises:
        HeadwiseError: there is none, the index has no metadata, or a file name leads out of the folder.
    """
    content = read_json(folder, index)
    weight_map = content.get("weight_map")
    suffix = ".bin" if index == PICKLE_INDEX else ".safetensors"
    if not isinstance(weight_map, dict) or not weight_map:
        raise HeadwiseError(f"{folder / index} has no weight_map.", "Download the checkpoint again.")
    if not isinstance(content.get("metadata"), dict):
        raise HeadwiseError(
            f"{folder / index} has no metadata, without which stock transformers does not load the model.",
            'Add `"metadata": {}` to it.',
        )
    for name, shard in weight_map.items():
        if not (isinstance(shard, str) and _is_plain(shard) and shard.endswith(suffix)):
            raise HeadwiseError(
                f"{folder / index} places tensor {name!r} in {shard!r}, which is not a file of its folder.",
                "Do not use a checkpoint that refers to files outside its folder.",
            )
    return weight_map


def _is_plain(name: str) -> bool:
    """Return whether a name is that of a file in the same folder, and legal on every file system."""
    return Path(name).name == name and name.isprintable() and len(name) <= 200


def path_inside(folder: Path, name: str) -> Path:
    """Return the path of a file in a folder.

    In the Hub's cache the files of a snapshot are links to the repository's `blobs`, which are allowed.

    Args:
        folder: the folder.
        name: of the file.

    Raises:
        HeadwiseError: the file is a link that leads out of the folder.
    """
    if not name.isprintable():
        raise HeadwiseError(f"{name!r} is not the name of a file in {folder}.", "Download the folder again.")
    path, real_folder = folder / name, folder.resolve()
    # Unlike Path.resolve, this does not raise for a link to itself.
    real = Path(os.path.realpath(path))
    snapshots = real_folder.parent
    blobs = snapshots.parent / "blobs" if snapshots.name == "snapshots" else real_folder
    if not (real.is_relative_to(real_folder) or real.is_relative_to(blobs)):
        raise HeadwiseError(f"{path} is a link to {real}, outside of its folder.", "Replace the link by the file.")
    return path


def find_sidecars(folder: Path, weights: list[str]) -> tuple[list[Path], list[str]]:
    """Find the files beside the weights.

    Args:
        folder: of the model.
        weights: names of its weight files.

    Returns:
        The files that a conversion copies byte for byte, and the names of those that it does not copy.

    Raises:
        HeadwiseError: one is a link that leads out of the folder.
    """
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
    """Read a JSON object from a file of a folder.

    Args:
        folder: the folder.
        name: of the file.
        limit: largest size in bytes.

    Raises:
        HeadwiseError: the file cannot be read, is larger, or holds anything but an object.
    """
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
        raise HeadwiseError(f"{path} is not valid JSON: {error}.", "Correct it, or download it again.") from None
    if not isinstance(content, dict):
        raise HeadwiseError(f"{path} contains a {type(content).__name__}, and a JSON object is expected.")
    return content


def download_weights(
    repo: str, commit: str, folder: Path, token: str | None, allow_pickle: bool, progress: Progress = SILENT
) -> None:
    """Download the weight files of a repository, by its index, beside its configuration.

    Args:
        repo: `org/name`.
        commit: of the repository.
        folder: its snapshot in the cache, where the index is already.
        token: of the Hub.
        allow_pickle: accept pickled weights (.bin).
        progress: gets the bytes.

    Raises:
        HeadwiseError: the Hub refuses it, or the weights are pickled.
    """
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
        f"{model} has its weights as pickle (.bin), which can contain code.",
        "Convert it to safetensors, or pass `allow_pickle` to read its tensors only.",
    )


def _is_sidecar(name: str) -> bool:
    depth = name.count("/")
    return any(fnmatch(name, p) and p.count("/") == depth for p in SIDECARS) and not any(
        fnmatch(name, p) for p in NOT_SIDECARS
    )
