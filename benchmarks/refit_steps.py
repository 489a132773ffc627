"""Steps and sequences of a layer's regression: processor seconds, and the error on held-back sequences.

python -m benchmarks.refit_steps MODEL --groups 2
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from unittest.mock import patch

import torch

from headwise.convert.calibration.calibrate import iter_layer_stats, plan_calibration
from headwise.convert.choose import choose_target
from headwise.convert.refit import regression
from headwise.convert.refit.output_projection import solve_output_projection
from headwise.convert.settings import ConvertSettings
from headwise.io.reader import open_checkpoint
from headwise.models.architecture import find_architecture
from headwise.models.stock_match import match_source
from headwise.progress import SILENT

LAYERS, SEQUENCES = (0, 3), 192
VARIANTS = ((100, 2), (100, 12), (300, 2), (300, 4), (300, 12))


def main() -> None:
    """Print a line for each layer and variant."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--groups", type=int, default=2)
    given = parser.parse_args()
    settings = ConvertSettings(to="gqa", groups=given.groups, calibrate="mixture", refit=300)
    checkpoint, device = match_source(open_checkpoint(given.model)), torch.device("cpu")
    arch = find_architecture(checkpoint.config, checkpoint.tensors)
    target = choose_target(checkpoint, arch, settings)
    calibration = plan_calibration(checkpoint, arch, target, settings, device)
    assert calibration is not None
    calibration = replace(calibration, sequences=SEQUENCES)
    for record, layer in iter_layer_stats(checkpoint, target, calibration, LAYERS, device, SILENT):
        assert record is not None and record.inputs is not None
        source = {name: checkpoint.read(name) for name in arch.tensor_names(checkpoint.config, layer)}
        converted, _ = target.convert_layer(layer, arch.read_layer(checkpoint.config, layer, source), record)
        for steps, sequences in VARIANTS:
            module = target.trainable_layer(layer, converted, device, record.inputs.shape[1])
            solve_output_projection(module.attention, module.projection, record, spare=True)
            start = time.process_time()
            with patch.object(regression, "sequences_per_step", lambda *_, count=sequences: count):
                report = regression.refit(module.attention, module.parameters, record, steps=steps)
            seconds = time.process_time() - start
            print(
                f"layer {layer}, {steps} steps of {sequences}: {seconds:.1f} s, error {report.after:.4f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
