"""What the processes of tests/parallel/pool.py do with Accelerate."""

from __future__ import annotations

import os
from collections import OrderedDict

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin, PartialState
from accelerate.utils import DistributedType
from torch.nn import Linear, Sequential, Tanh

from hyperadam import VariationalHyperAdam
from integration.examples import are_equal

BATCH = 8


def make_model(seed=0):
    """Rows that two processes can't share evenly."""
    torch.manual_seed(seed)
    layers = {
        "c_attn": Linear(6, 13),
        "tanh": Tanh(),
        "last": Linear(13, 3),
    }  # a name of attention's
    return Sequential(OrderedDict(layers)).double()


def train(model, optimizer, steps, rank=0, size=1):
    """Each process has its share of a batch."""
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        inputs = torch.randn(BATCH, 6, generator=generator, dtype=torch.float64)
        optimizer.zero_grad()
        model(inputs.chunk(size)[rank]).square().mean().backward()
        optimizer.step()


def whole(model):
    return [param.detach().full_tensor() for param in model.parameters()]


def sharded_by_accelerate(rank, size, folder, steps, saved_at):
    """A run under FSDP2 that is saved on the way, and one that goes on from there: the parameters
    at the end of the first, whether the second has the same, and whether they are sharded.

    Accelerate offers FSDP2 on GPUs only: that it is meant here is said in its state. The code that
    prepares, saves and loads is the same.
    """
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")  # asked for, not used
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, cpu_ram_efficient_loading=False, state_dict_type="SHARDED_STATE_DICT"
    )

    def prepare(seed):
        accelerator = Accelerator(cpu=True)
        accelerator.state.fsdp_plugin = plugin
        PartialState().distributed_type = DistributedType.FSDP
        accelerator.state.distributed_type = DistributedType.FSDP
        model = make_model(seed)
        return accelerator, *accelerator.prepare(
            model, VariationalHyperAdam(model.named_parameters())
        )

    accelerator, model, optimizer = prepare(0)
    train(model, optimizer, range(saved_at), rank, size)
    accelerator.save_state(folder)
    train(model, optimizer, range(saved_at, steps), rank, size)
    end = whole(model)
    accelerator, resumed, optimizer = prepare(1)
    accelerator.load_state(folder)
    train(resumed, optimizer, range(saved_at, steps), rank, size)
    sharded = all(type(param.data).__name__ == "DTensor" for param in resumed.parameters())
    return end, are_equal(whole(resumed), end), sharded
