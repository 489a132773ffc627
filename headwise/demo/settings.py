"""Settings of the demo, and of the pretraining that made the embedded model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any

from headwise import fields, schema
from headwise.fields import Setting, check_fields, declare
from headwise.text.sources import Data
from headwise.train.settings import Training

DEMO_SETTINGS = Path(__file__).parent / "pretrain-demo.yaml"


@dataclass(frozen=True)
class DemoSettings:
    """The settings of a demo.

    Raises:
        SettingError: a value is not legal.
    """

    out: Path | None = fields.folder("Folder for models, table and picture [headwise-demo].", metavar="DIR")
    quick: bool = fields.flag("Fewer targets and tokens.")
    model: str | Path | None = fields.model("A model in place of the embedded one.")
    seed: int = fields.number("Random seed [0].", minimum=0, default=0)
    device: str | None = fields.device()

    def __post_init__(self) -> None:
        check_fields(self)


def _check_config(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping) or not isinstance(value.get("model_type"), str):
        raise ValueError
    return value


@dataclass(frozen=True)
class Init:
    """A new model: a byte-level BPE and a random stock model.

    Raises:
        SettingError: a value is not legal.
    """

    vocab_size: int = fields.number("Tokens of the vocabulary.", minimum=257, default=MISSING)  # type: ignore[arg-type]
    config: Mapping[str, Any] = declare(
        MISSING,
        Setting(
            "`model_type` and the fields of its stock configuration class, without the vocabulary.",
            wanted="a mapping with a model_type",
            check=_check_config,
        ),
    )

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True)
class PretrainSettings:
    """A pretraining from random weights, by next-token cross-entropy."""

    about: str
    init: Init
    data: Data
    train: Training


def load_settings(path: str | Path = DEMO_SETTINGS, assignments: Sequence[str] = ()) -> PretrainSettings:
    """Read the settings of a pretraining and lay `a.b=c` assignments over them.

    Args:
        path: a YAML file.
        assignments: dotted keys with YAML values; later ones win.

    Raises:
        HeadwiseError: there is no such file, or it is not a YAML mapping.
        SettingError: a key is unknown or missing, or a value is not legal.
    """
    return schema.load_file(PretrainSettings, schema.find_file(path, DEMO_SETTINGS.parent), assignments)
