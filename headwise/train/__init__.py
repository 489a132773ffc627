"""Train a converted model: loop, losses, callbacks, checkpoints, teacher, memory forecast, launch."""
