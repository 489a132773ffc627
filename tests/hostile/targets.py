"""What is attacked: for each kind of file, a checkpoint with a hostile one, and the call that a user would make."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig
from transformers.utils import logging

from headwise._cli import console, render
from headwise.convert.calibration.calibration_plan import CalibrationPlan
from headwise.convert.calibration.corpus import read_corpus
from headwise.convert.inspect import inspect_model
from headwise.convert.pipeline import convert_model
from headwise.convert.verify.check import verify_model
from headwise.io.reader import make_buffers, open_checkpoint
from headwise.recipes.settings import LIBRARY, load_uptrain_recipe
from tests.convert.speaking import TEXT, save_speaking
from tests.hostile import written
from tests.hostile.guard import Guard, Outcome
from tests.hostile.mutations import ESCAPES, VALUES, WORDS, dumps, flip, garble, nested, tree
from tests.tiny_models import _COMMON, CONFIGS

SHAPE: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 4,
}
KEYS = [
    "auto_map",
    "quantization_config",
    "text_config",
    "rope_scaling",
    "rope_parameters",
    "layer_types",
    "dtype",
    "torch_dtype",
    "sliding_window",
    "per_layer_config",
    "no_rope_layers",
    "partial_rotary_factor",
    "architectures",
    "attn_logit_softcapping",
    "kv_lora_rank",
    "q_lora_rank",
    "qk_rope_head_dim",
    "num_local_experts",
    "max_position_embeddings",
    "tie_word_embeddings",
    "attention_bias",
    "num_hidden_layers",
    "vision_config",
    "pad_token_id",
    "attn_implementation",
    "experts_implementation",
    "_name_or_path",
]
EVIL = "import os; open(os.environ['HEADWISE_CANARY'], 'w').write('owned')\nraise SystemExit\n"


class Prey:
    """A sound checkpoint, one folder that is made hostile again and again, and the guard over it."""

    def __init__(self, home: Path) -> None:
        self.home = home
        logging.disable_progress_bar()  # as the command does
        self.canary, self.out = home / "canary", home / "work" / "out"
        os.environ["HEADWISE_CANARY"] = str(self.canary)
        self.out.parent.mkdir()
        sound = save_speaking(home / "sound", **SHAPE)
        self.files = {path.name: path.read_bytes() for path in sorted(sound.iterdir())}
        self.tensors = load_file(sound / "model.safetensors")
        self.config = json.loads(self.files["config.json"])
        self.model = home / "model"
        self.guard = Guard(home / "model", home / "work")
        # One layer: every input that is converted or verified takes a tenth of a second.
        save_speaking(home / "micro", **SHAPE, num_hidden_layers=1)
        convert_model(home / "micro", home / "converted", to="gqa", groups=2, calibrate="none")
        self.converted = {path.name: path.read_bytes() for path in sorted((home / "converted").iterdir())}
        convert_model(sound, home / "mla", to="mla", exact=True)
        self.latent = json.loads((home / "mla" / "config.json").read_text())
        cut = {f"model-0000{i + 1}-of-00002.safetensors": dict(list(self.tensors.items())[i::2]) for i in range(2)}
        self.weight_map = {name: file for file, part in cut.items() for name in part}
        self.shards = {}
        for file, part in cut.items():
            save_file(part, home / file, metadata={"format": "pt"})
            self.shards[file] = (home / file).read_bytes()
        buffer = io.BytesIO()
        torch.save(self.tensors, buffer)
        self.pickled = buffer.getvalue()
        self.recipes = [path.read_text() for path in sorted(LIBRARY.glob("*.yaml"))]

    def lay(self, *names: str, **more: bytes) -> Path:
        """A fresh folder with some of the sound files (all if none is named), and others."""
        shutil.rmtree(self.model, ignore_errors=True)
        self.model.mkdir()
        for name in names or self.files:
            (self.model / name).write_bytes(self.files[name])
        for name, content in more.items():
            (self.model / name).write_bytes(content)
        return self.model

    def judge(self, call: Callable[[], Any], shown: Callable[[Any], None] = lambda value: None) -> Outcome:
        """Watch a call; afterwards nothing may have been run or left behind."""
        outcome = self.guard.watch(call, shown)
        escapes = [*outcome.escapes]
        if self.canary.exists():
            escapes.append("code from the checkpoint ran")
            self.canary.unlink()
        # A result that fails its last check is kept, in the folder that the message names.
        left = [
            path.name for path in self.out.parent.iterdir() if path != self.out and str(path) not in outcome.message
        ]
        if left and "overtime" not in escapes:
            escapes.append(f"left behind: {left}")
        if self.out.exists() and outcome.kind != "done":
            escapes.append("OUT is there after a failure")
        for path in list(self.out.parent.iterdir()):
            shutil.rmtree(path, ignore_errors=True)
        return Outcome(outcome.kind, outcome.message, outcome.value, tuple(escapes))


def _read_all(model: Path, **options: Any) -> Any:
    checkpoint = open_checkpoint(model, **options)
    buffers = make_buffers(2)
    for name in checkpoint.tensors:
        checkpoint.read(name)
        for _ in checkpoint.chunks(name, buffers):
            pass
    checkpoint.check_unchanged()
    return checkpoint


def _names(checkpoint: Any) -> None:
    console.print_table(("tensor",), [(name,) for name in checkpoint.tensors])


def header(prey: Prey, random: Random) -> Outcome:
    """The length, the JSON and the offsets of a safetensors file."""
    content = prey.files["model.safetensors"]
    length = int.from_bytes(content[:8], "little")
    text, data = content[8 : 8 + length], content[8 + length :]
    claimed: int | None = None
    what = random.randrange(8)
    if what == 0:
        model = prey.lay("config.json", **{"model.safetensors": flip(random, content)})
        return prey.judge(lambda: _read_all(model), _names)
    if what == 1:
        claimed = random.choice([0, 1, length - 1, length + 1, len(content), 2**31, 2**63, 2**64 - 1, 100_000_001])
    elif what == 2:
        text = garble(random, text.decode()).encode(errors="surrogatepass")
    elif what == 3:
        data = data[: random.randrange(len(data))] if random.random() < 0.5 else data + random.randbytes(9)
    else:
        table = json.loads(text)
        name, other = random.sample([n for n in table if n != "__metadata__"], 2)
        row = table[name]
        if what == 4:
            row["data_offsets"] = random.choice(
                [
                    table[other]["data_offsets"],
                    row["data_offsets"][::-1],
                    [o + random.choice([-8, -1, 1, 8, 2**40]) for o in row["data_offsets"]],
                    [0, len(data)],
                    [random.choice(VALUES)(random) for _ in range(random.randrange(4))],
                ]
            )
        elif what == 5:
            row["shape"] = random.choice(
                [[2**62] * 2, [2**31] * 8, [0], [], [-1, -1], [1.0], [True], [1] * 9, row["shape"] * 3, [10**30]]
            )
        elif what == 6:
            row["dtype"] = random.choice(["F8_E4M3", "F4", "U64", "C64", "bf16", "", None, [], 7, "BF16", "I8"])
        if what == 7 or random.random() < 0.2:
            table[random.choice([*WORDS, other, "__metadata__"])] = table.pop(name)
        if random.random() < 0.3:
            table = tree(random, table)
        text = dumps(table).encode()
        if random.random() < 0.2:
            text = text[:-1] + b"," + text[1:]  # every name twice
    start = len(text) if claimed is None else claimed
    model = prey.lay("config.json", **{"model.safetensors": start.to_bytes(8, "little") + text + data})
    return prey.judge(lambda: _read_all(model), _names)


def index(prey: Prey, random: Random) -> Outcome:
    """model.safetensors.index.json and the files that it names."""
    whole: Any = {"metadata": {"total_size": 1}, "weight_map": dict(prey.weight_map)}
    names = list(prey.shards)
    shards = dict(prey.shards)
    places = [
        *("../sound/model.safetensors", "/etc/x.safetensors", "a/../" + names[0], "./" + names[0], ".safetensors"),
        *("", ".", "..", "\0.safetensors", "x" * 300 + ".safetensors", "link.safetensors", "loop.safetensors"),
        *(
            "folder.safetensors",
            "pipe.safetensors",
            "model.safetensors.index.json",
            "modeling_evil.py",
            names[0],
            names[1],
        ),
        *(word + ".safetensors" for word in ESCAPES),
    ]
    what = random.randrange(6)
    if what < 3:
        for name in random.sample(list(prey.weight_map), random.choice([1, 1, 2, len(prey.weight_map)])):
            whole["weight_map"][name] = random.choice(places)
    elif what == 3:
        whole = tree(random, whole, ["weight_map", "metadata"])
    elif what == 4:
        shards[names[0]] = shards[names[1]] if random.random() < 0.5 else flip(random, shards[names[0]])
    text = dumps(whole)
    if what == 5:
        text = garble(random, text)

    model = prey.lay("config.json", **shards)
    (model / "model.safetensors.index.json").write_bytes(text.encode(errors="surrogatepass"))
    if "link.safe" in text:
        target = random.choice([prey.home / "sound" / "model.safetensors", Path("/dev/zero")])
        (model / "link.safetensors").symlink_to(target)
    if "loop.safe" in text:
        (model / "loop.safetensors").symlink_to("loop.safetensors")
    if "folder.safe" in text:
        (model / "folder.safetensors").mkdir()
    if "pipe.safe" in text:
        os.mkfifo(model / "pipe.safetensors")
    return prey.judge(lambda: inspect_model(model) if what < 2 else _read_all(model))


@cache
def _configs() -> list[dict[str, Any]]:
    """The config.json of every row of the table, as save_pretrained would write it."""
    found = []
    for model_type, fields in CONFIGS.items():
        whole = fields if "text_config" in fields else _COMMON | fields
        found.append(json.loads(AutoConfig.for_model(model_type, **whole).to_json_string(use_diff=False)))
    return found


def _inspected(found: Any) -> None:
    render.render_inspection(found)
    console.print_json(found)


def config(prey: Prey, random: Random) -> Outcome:
    """config.json of any model type, read by `inspect`."""
    whole = random.choice([*_configs(), prey.latent])
    model_type = whole["model_type"]
    what = random.randrange(10)
    text = dumps(whole if what == 0 else tree(random, whole, KEYS))
    if what == 0:
        text = garble(random, text)
    elif what < 7 and isinstance(whole, dict):
        # Most changes should get past the first check.
        whole = json.loads(text)
        whole["model_type"] = model_type
        text = dumps(whole)
    context = 1024 if random.random() < 0.05 else None

    model = prey.lay("tokenizer_config.json", **{"config.json": text.encode(errors="surrogatepass")})
    return prey.judge(lambda: inspect_model(model, context=context), _inspected)


def plan(prey: Prey, random: Random) -> Outcome:
    """config.json beside weights that it does not describe, planned with --dry-run."""
    whole = tree(random, prey.config, KEYS)
    if random.random() < 0.5:
        whole["model_type"] = random.choice(_configs())["model_type"] if random.random() < 0.3 else "llama"
    options: dict[str, Any] = random.choice(
        [
            {"to": "gqa", "groups": 2},
            {"to": "mqa", "method": "mean"},
            {"to": "mla", "cache": 0.5},
            {"to": "mla", "exact": True},
            {"context": 256, "rope": "auto"},
            {"sliding_window": 4},
            {"dtype": "bfloat16"},
        ]
    )

    model = prey.lay(**{"config.json": dumps(whole).encode()})

    def shown(planned: Any) -> None:
        render.render_plan(planned)
        console.print_json(planned)

    return prey.judge(lambda: convert_model(model, prey.out, **options, calibrate="none", dry_run=True), shown)


def whole(prey: Prey, random: Random) -> Outcome:
    """Any file of a checkpoint changed, and a real conversion with its verification."""

    model = prey.lay()
    _with_evil(model)
    for _ in range(random.choice([1, 2])):
        name = random.choice([*prey.files, "config.json", "README.md", "LICENSE\x1b[2J", "chat_template.jinja"])
        content = prey.files.get(name, b"---\nlicense: mit\n---\n{{ 1 }}")
        if name.endswith(".json") and random.random() < 0.7:
            (model / name).write_text(dumps(tree(random, json.loads(content), KEYS)))
        else:
            (model / name).write_bytes(flip(random, content))
    method = random.choice(["mean", "optimal"])
    return prey.judge(
        lambda: convert_model(model, prey.out, to="gqa", groups=2, method=method, calibrate="none"),
        render.render_conversion,
    )


def tokenizer(prey: Prey, random: Random) -> Outcome:
    """The tokenizer's files, which calibration reads text with."""
    name = random.choice([n for n in prey.files if "token" in n])
    content = prey.files[name]
    keys = [
        "auto_map",
        "tokenizer_class",
        "chat_template",
        "added_tokens_decoder",
        "model_max_length",
        "normalizer",
    ]
    changed = json.loads(content)
    big = changed.get("model", {}).get("vocab")
    if big and random.random() < 0.9:
        changed["model"]["vocab"] = dict(list(big.items())[:40])
    changed = tree(random, changed, keys)
    if random.random() < 0.3 and isinstance(changed, dict):
        changed["auto_map"] = {"AutoTokenizer": ["modeling_evil.Evil", "modeling_evil.Evil"]}
        changed["tokenizer_class"] = random.choice(["Evil", "LlamaTokenizer", "PreTrainedTokenizerFast", 7, None])
    text = dumps(changed) if random.random() < 0.9 else garble(random, content.decode())
    lure = {"auto_map": {auto: "modeling_evil.Evil" for auto in ("AutoTokenizer", "AutoConfig")}}
    told: dict[str, Any] = random.choice([{}, lure])
    model = prey.lay(
        **{name: text.encode(errors="surrogatepass"), "config.json": dumps(prey.config | told).encode()}
    )
    _with_evil(model)

    def call() -> Any:
        checkpoint = open_checkpoint(model)
        return read_corpus(checkpoint, CalibrationPlan(str(TEXT["calibrate"]), 2, 32, 0, 0))

    return prey.judge(call)


def _with_evil(model: Path) -> None:
    for name in ("modeling_evil.py", "tokenization_evil.py", "configuration_evil.py"):
        (model / name).write_text(EVIL)


class _Bomb:
    def __init__(self, function: Any, *arguments: Any) -> None:
        self.reduced = (function, arguments)

    def __reduce__(self) -> Any:
        return self.reduced


def _bombs(prey: Prey, random: Random) -> Any:
    """An object whose pickle does something when it is read."""
    command = f"touch {prey.canary}"
    tensor = prey.tensors["model.norm.weight"]
    storage = tensor.untyped_storage()
    typed = torch.storage.TypedStorage(wrap_storage=storage, dtype=torch.float32, _internal=True)
    rebuild = torch._utils._rebuild_tensor_v2
    return random.choice(
        [
            _Bomb(os.system, command),
            _Bomb(eval, f"__import__('os').system({command!r})"),
            _Bomb(getattr, dict, "fromkeys"),
            _Bomb(torch.load, "/etc/passwd"),
            _Bomb(torch.hub.load, "a/b", "c"),
            _Bomb(bytearray, 2**40),
            _Bomb(rebuild, typed, 0, (2**40,), (0,), False, {}),
            _Bomb(rebuild, typed, 2**50, (4,), (1,), False, {}),
            _Bomb(rebuild, typed, -8, (4,), (1,), False, {}),
            _Bomb(rebuild, typed, 0, (4, 4), (0, 2**60), False, {}),
            _Bomb(torch._utils._rebuild_meta_tensor_no_storage, torch.float32, (2**40,), (1,), False),
            torch.eye(4).to_sparse(),
            torch.eye(4, dtype=torch.complex64),
            torch.eye(4).to("meta"),
            torch.nn.Parameter(torch.eye(4)),
            torch.empty(2, 0, 3),
            torch.eye(5)[::2, ::3],
            nested(300),
            {"a": tensor},
            "text",
            None,
        ]
    )


def pickled(prey: Prey, random: Random) -> Outcome:
    """pytorch_model.bin, asked for with --allow-pickle."""
    what = random.randrange(5)
    name = random.choice(list(prey.tensors))
    if what == 0:
        content = flip(random, prey.pickled)
    elif what == 1:
        content = _repacked(prey.pickled, lambda inner: flip(random, inner))
    elif what == 2:
        content = pickle.dumps(_harmless(_bombs(prey, random)), protocol=random.choice([0, 2, 4]))
    elif what == 3:
        content = _repacked(prey.pickled, lambda inner: _laughs(random.choice([20, 60])))
    else:
        buffer = io.BytesIO()
        extra = random.choice([name, "extra", *WORDS[:8], 7])
        state: Any = {**prey.tensors, extra: _bombs(prey, random)}
        old = random.random() < 0.3
        torch.save(
            random.choice([state, [state], {"state_dict": state}, state]),
            buffer,
            _use_new_zipfile_serialization=not old,
        )
        content = buffer.getvalue()
    model = prey.lay("config.json", **{"pytorch_model.bin": content})
    return prey.judge(lambda: _read_all(model, allow_pickle=True), _names)


def _harmless(bomb: Any) -> Any:
    """Plain pickle cannot hold a tensor's storage; take something that it can."""
    try:
        pickle.dumps(bomb)
    except Exception:
        return _Bomb(os.system, "true")
    return bomb


def _repacked(content: bytes, change: Callable[[bytes], bytes]) -> bytes:
    """The archive of torch.save with another data.pkl."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(buffer, "w") as new:
        for item in old.infolist():
            inner = old.read(item)
            new.writestr(item.filename, change(inner) if item.filename.endswith("data.pkl") else inner)
    return buffer.getvalue()


def _laughs(depth: int) -> bytes:
    """Lists that hold the one before twice: 2^depth items behind a few hundred bytes."""
    body = b"\x80\x02]q\x00"
    for level in range(depth):
        before = b"h" + bytes([level])
        body += b"]q" + bytes([level + 1]) + b"(" + before + before + b"e"
    return body + b"."


def recipe(prey: Prey, random: Random) -> Outcome:
    """A recipe's YAML."""
    import yaml

    text = random.choice(prey.recipes)
    what = random.randrange(5)
    settings: list[str] = []
    if what < 2:
        text = garble(random, text)
    elif what == 2:
        text = dumps(tree(random, yaml.safe_load(text), ["init", "data", "train"]))
    elif what == 3:
        depth = random.choice([4, 9, 30])
        laughs = ["a0: &a0 [x, x]"] + [f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}, *a{i - 1}]" for i in range(1, depth)]
        use = random.choice(["about: *a", "data: *a", "train: {tokens: *a", "init: {vocab_size: 1, config: {x: *a"])
        text = "\n".join(["about: x", *laughs, f"{use}{depth - 1}" + "}" * use.count("{")])
    else:
        odd = ["1e999", ".nan", ".inf", "!!python/name:os.system", "&a [*a]", "9" * 5000, "!!int ''", "!!bool x"]
        key = random.choice(["train.tokens", "train.betas", "data.text", "about", "a.b", ".", ""])
        settings = [f"{key}={random.choice([*WORDS, *odd])}"]
    model = prey.lay("config.json", **{"recipe.yaml": text.encode(errors="surrogatepass")})
    return prey.judge(lambda: load_uptrain_recipe(model / "recipe.yaml", settings), console.print_json)


def converted(prey: Prey, random: Random) -> Outcome:
    """A folder that claims to be converted, with its record, given to `verify`."""

    model = prey.lay("config.json", **prey.converted)
    _with_evil(model)
    name = random.choice(["headwise.json", "config.json", "generation_config.json", "model.safetensors"])
    if name.endswith(".json"):
        changed = tree(random, json.loads(prey.converted[name]), [*KEYS, "arguments", "sha256", "temperature"])
        if random.random() < 0.3 and isinstance(changed, dict):
            changed["auto_map"] = {"AutoModelForCausalLM": "modeling_evil.Evil", "AutoConfig": "modeling_evil.Evil"}
        (model / name).write_text(dumps(changed))
    else:
        (model / name).write_bytes(flip(random, prey.converted[name]))
    return prey.judge(lambda: verify_model(model), render.render_verification)


# How often each is chosen in the long run: the cheap parsers most.
TARGETS: dict[str, tuple[Callable[[Prey, Random], Outcome], int]] = {
    "safetensors header": (header, 300),
    "index": (index, 200),
    "config.json, inspected": (config, 220),
    "config.json, planned": (plan, 20),
    "tokenizer files": (tokenizer, 30),
    ".bin pickle": (pickled, 100),
    "recipe YAML": (recipe, 100),
    "whole conversion": (whole, 6),
    "converted folder, verified": (converted, 6),
    "record": (written.record, 10),
    "record, its hashes": (written.record_read, 30),
    "generation config": (written.generation, 10),
    "report": (written.report, 30),
    "model card": (written.card, 30),
    "work folder": (written.work_folder, 10),
}
