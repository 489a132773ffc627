"""Fewer KV heads in a vision-language model: calibrated on text, on images, and on images with balanced tokens.

    python benchmarks/image_calibration.py --out /tmp/images --seconds 480 > image-calibration.jsonl
    python benchmarks/image_calibration.py --out /tmp/tiny --tiny      a model of a minute

Trains a model of the stock LLaVA class from nothing on drawings with captions. Every drawing has two figures of a
colour each in two of nine places, and the caption names them. Then converts the text model to a half, a quarter and
one KV head, calibrated on captions alone, on drawings with captions, and on the same with visual and text tokens
balanced. Each line of the output is a JSON object. Losses are in nats per token of caption, on held-out drawings.
Needs no network.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers
from PIL import Image, ImageDraw

from headwise.convert.calibration import image_stream
from headwise.convert.pipeline import ConvertResult, convert_model
from headwise.eval.stats import paired_ratio
from headwise.io.source import EMBEDDED_MODEL
from headwise.measure.image_prompts import ImagePrompt, ImagePrompts, open_prompts
from headwise.measure.loss import prompt_nats

COLOURS = ("red", "green", "blue", "yellow", "white", "purple")
FIGURES = ("circle", "square", "triangle", "bar")
PLACES = tuple(f"{row} {column}" for row in ("top", "middle", "bottom") for column in ("left", "centre", "right"))
SIDE, PATCH, BATCH = 48, 4, 16
FULL = {"width": 192, "layers": 4, "inner": 512, "sight": 96, "sight_layers": 3, "train": 8192, "held": 512}
TINY = {"width": 64, "layers": 2, "inner": 96, "sight": 32, "sight_layers": 1, "train": 256, "held": 32}
HEADS, CALIBRATION = 8, 256
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def show(**fields: Any) -> None:
    """Print one JSON line."""
    print(json.dumps(fields), flush=True)


def draw(rng: random.Random) -> tuple[Image.Image, str]:
    """Return a drawing and its caption."""
    image = Image.new("RGB", (SIDE, SIDE), "black")
    pen, names = ImageDraw.Draw(image), []
    for place in sorted(rng.sample(range(9), 2)):
        colour, figure = rng.choice(COLOURS), rng.choice(FIGURES)
        x, y = 16 * (place % 3) + rng.randint(1, 3), 16 * (place // 3) + rng.randint(1, 3)
        box = (x, y, x + 11, y + 11)
        if figure == "circle":
            pen.ellipse(box, colour)
        elif figure == "square":
            pen.rectangle(box, colour)
        elif figure == "triangle":
            pen.polygon([(x, y + 11), (x + 11, y + 11), (x + 5, y)], colour)
        else:
            pen.rectangle((x, y + 4, x + 11, y + 7), colour)
        names.append(f"a {colour} {figure} at the {PLACES[place]}")
    return image, " and ".join(names) + "."


def write_pairs(folder: Path, count: int, seed: int) -> Path:
    """Write drawings and a file of pairs; a text file of the captions lies beside it."""
    folder.mkdir(parents=True)
    rng, rows = random.Random(seed), []
    for number in range(count):
        image, text = draw(rng)
        image.save(folder / f"{number}.png")
        rows.append({"image": f"{number}.png", "text": text})
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "captions.txt").write_text("\n\n\n".join(row["text"] for row in rows))
    return folder / "pairs.jsonl"


def make_model(shape: dict[str, int], folder: Path) -> Any:
    """Return a new model, whose processor is written."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(EMBEDDED_MODEL)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    size = {"height": SIDE, "width": SIDE}
    images = transformers.CLIPImageProcessorPil(size=size, crop_size=size)
    strategy = {"vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    transformers.LlavaProcessor(images, tokenizer, patch_size=PATCH, **strategy).save_pretrained(folder)
    config = transformers.LlavaConfig(
        text_config={
            "model_type": "llama",
            "vocab_size": len(tokenizer),
            "hidden_size": shape["width"],
            "intermediate_size": shape["inner"],
            "num_hidden_layers": shape["layers"],
            "num_attention_heads": HEADS,
            "num_key_value_heads": HEADS,
            "max_position_embeddings": 256,
            "tie_word_embeddings": True,
        },
        vision_config={
            "model_type": "clip_vision_model",
            "hidden_size": shape["sight"],
            "intermediate_size": 4 * shape["sight"],
            "num_hidden_layers": shape["sight_layers"],
            "num_attention_heads": 4,
            "image_size": SIDE,
            "patch_size": PATCH,
        },
        image_token_index=len(tokenizer) - 1,
        vision_feature_layer=-1,
    )
    torch.manual_seed(0)
    return transformers.LlavaForConditionalGeneration(config)


def batch_of(prompts: list[ImagePrompt]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Return the arguments of a model, padded on the right, and the labels of the text."""
    longest = max(prompt.tokens.shape[1] for prompt in prompts)
    ids, labels = torch.zeros(len(prompts), longest, dtype=torch.long), torch.full((len(prompts), longest), -100)
    for row, prompt in enumerate(prompts):
        count = prompt.tokens.shape[1]
        ids[row, :count] = prompt.tokens[0]
        labels[row, :count] = prompt.tokens[0].masked_fill(~prompt.text, -100)
    return {"input_ids": ids, "pixel_values": torch.cat([p.inputs["pixel_values"] for p in prompts])}, labels


def train(model: Any, prompts: list[ImagePrompt], seconds: float) -> int:
    """Train for some seconds, with a rate that falls to zero; return the steps."""
    rng, start, steps = random.Random(1), time.perf_counter(), 0
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.01)
    while (spent := (time.perf_counter() - start) / seconds) < 1:
        for group in optimizer.param_groups:
            group["lr"] = 1.5e-3 * min(1.0, (steps + 1) / 50) * (1 - spent)
        given, labels = batch_of(rng.sample(prompts, BATCH))
        given, labels = {name: value.to(DEVICE) for name, value in given.items()}, labels.to(DEVICE)
        logits = model(**given).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if steps % 100 == 0:
            show(step=steps, loss=round(float(loss.detach()), 4), seconds=round(spent * seconds))
        steps += 1
    return steps


def losses(folder: Path, prompts: ImagePrompts) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the nats of every held-out caption and its tokens."""
    model: Any = transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    model = model.to(DEVICE).eval()
    nats = [prompt_nats(model, prompt) for prompt in prompts]
    return torch.stack([each.double().sum() for each in nats]), torch.tensor([len(each) for each in nats])


def opened(path: Path, folder: Path) -> ImagePrompts:
    """Return the prompts of a file."""
    config = json.loads((folder / "config.json").read_text())
    return open_prompts(path, "AutoModelForImageTextToText", folder, "parent", config)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    parser.add_argument("--seconds", type=float, default=480.0, help="of training")
    parser.add_argument("--tiny", action="store_true", help="a model of a minute")
    options = parser.parse_args()
    shape, seconds = (TINY, 20.0) if options.tiny else (FULL, options.seconds)
    transformers.utils.logging.disable_progress_bar()
    parent = options.out / "parent"
    model = make_model(shape, parent)
    model.save_pretrained(parent)
    every = write_pairs(options.out / "train", shape["train"], seed=0)
    steps = train(model.to(DEVICE), list(opened(every, parent)), seconds)
    model.save_pretrained(parent)
    chosen = write_pairs(options.out / "calibration", CALIBRATION, seed=1)
    held = opened(write_pairs(options.out / "held", shape["held"], seed=2), parent)
    before, tokens = losses(parent, held)
    first = held[0]
    show(
        parent=round(float(before.sum() / tokens.sum()), 4),
        steps=steps,
        tokens=int(tokens.sum()),
        visual=int(first.visual.sum()),
        text=int(first.text.sum()),
        versions={"torch": torch.__version__, "transformers": transformers.__version__},
    )
    for groups in (4, 2, 1):
        after = {}
        for name in ("captions", "images", "balanced"):
            source: dict[str, Any] = {"images": chosen}
            if name == "captions":
                source = {"calibrate": str(chosen.parent / "captions.txt"), "calibration_tokens": 4096}
            out = options.out / f"{groups}-{name}"
            equal = lambda visual, text: [torch.ones(len(each)) for each in visual]  # noqa: E731
            weights = image_stream.balanced_weights if name == "balanced" else equal
            with mock.patch.object(image_stream, "balanced_weights", weights):
                result = convert_model(parent, out, to="gqa", groups=groups, refit="off", verify=False, **source)
            assert isinstance(result, ConvertResult)
            after[name], _ = losses(out, held)
            show(
                groups=groups, calibration=name, damage=round(float((after[name] - before).sum() / tokens.sum()), 4)
            )
        gain = paired_ratio(after["balanced"], after["images"], tokens)
        show(
            groups=groups,
            balanced_minus_images=round(gain.estimate, 4),
            standard_error=round(gain.standard_error, 4),
        )
        assert math.isfinite(gain.estimate)


if __name__ == "__main__":
    main()
