"""`headwise._cli.worker` under FSDP2 without accelerators: accelerate shards over gloo where it thinks of GPUs.

accelerate launch --config_file headwise/recipes/accelerate/fsdp2.yaml tests/train/fsdp2_on_cpu.py ...
"""

import sys
from typing import Any

import accelerate.state
from accelerate.utils import DistributedType
from torch.distributed.fsdp import FSDPModule

from headwise._cli.worker import run_worker
from headwise.train import trainer

begin = accelerate.state.PartialState.__init__
train = trainer.Trainer.train


def as_accelerators(self: Any, *arguments: Any, **options: Any) -> None:
    begin(self, *arguments, **options)
    if self._shared_state.get("distributed_type") == DistributedType.MULTI_CPU:
        self._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def train_and_look(self: Any, *arguments: Any, **options: Any) -> Any:
    done = train(self, *arguments, **options)
    for network in (self.model, self.task.teacher.network):
        layers = network.model.layers
        assert isinstance(network, FSDPModule) and all(isinstance(layer, FSDPModule) for layer in layers)
        assert all(hasattr(parameter, "full_tensor") for parameter in layers.parameters())
    return done


if __name__ == "__main__":
    accelerate.state.PartialState.__init__ = as_accelerators
    trainer.Trainer.train = train_and_look  # type: ignore[method-assign]
    sys.exit(run_worker(sys.argv[1]))
