"""What the processes of a pool do, and the same in one process."""

from __future__ import annotations

import copy
import functools
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import distributed, nn
from torch.amp import GradScaler
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from hyperadam import VariationalHyperAdam
from hyperadam.errors import ConfigError, RunError
from hyperadam.metatrain import MetaTrainer
from hyperadam.optim.sharding import local
from hyperadam.ranks import ALONE, GroupRanks

BATCH = 24
LR = 1e-3
SWINGING = {"lr": 3e-3, "calibrate": True}
"""Where steps are so long that gradients swing, and the learning rate is lowered for it."""


def make_model(dtype=torch.float64):
    """Rows that neither 2 nor 4 divides, a layer of which some ranks have none, and one with a name
    that attention's projections have."""
    generator = torch.Generator().manual_seed(0)
    layers = {
        "first": nn.Linear(6, 13),
        "tanh": nn.Tanh(),
        "c_attn": nn.Linear(13, 9),
        "tanh_again": nn.Tanh(),
        "last": nn.Linear(9, 3),
    }
    model = nn.Sequential(OrderedDict(layers))
    with torch.no_grad():
        for param in model.parameters():
            param.copy_(torch.randn(param.shape, generator=generator) / 3)
    return model.to(dtype)


class Triples(nn.Module):
    """Means of the first three times three outputs."""

    def forward(self, x):
        return x[:, :9].unflatten(1, (3, 3)).mean(2)


def make_small_model():
    """Two parameters, so that of four processes two have none."""
    return nn.Sequential(make_model()[0], Triples())


def batch(step, dtype, rank=0, size=1):
    """A rank's share of a step's batch."""
    generator = torch.Generator().manual_seed(1000 + step)
    x = torch.randn(BATCH, 6, generator=generator)
    y = x[:, :3].sin() + x[:, 3:].roll(1, 1)
    share = slice(rank * BATCH // size, (rank + 1) * BATCH // size)
    return x[share].to(dtype), y[share].to(dtype)


def train(model, optimizer, steps, rank=0, size=1, dtype=torch.float64):
    for step in steps:
        x, y = batch(step, dtype, rank, size)
        optimizer.zero_grad()
        F.mse_loss(model(x), y).backward()
        optimizer.step()


def whole(tensor):
    """A tensor's numbers over all processes."""
    full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full.detach().clone()


def params_of(model):
    return [whole(param) for param in model.parameters()]


def alone(steps, dtype=torch.float64, make=make_model, **settings):
    """The parameters after so many steps in one process."""
    model = make().to(dtype)
    optimizer = VariationalHyperAdam(model.named_parameters(), **{"lr": LR, **settings})
    train(model, optimizer, range(steps), dtype=dtype)
    return params_of(model)


def mesh_of(size, replicas=1):
    if replicas == 1:
        return init_device_mesh("cpu", (size,))
    return init_device_mesh("cpu", (replicas, size // replicas), mesh_dim_names=("r", "s"))


def make_sharded(size, replicas=1, dtype=torch.float64, layers=True, device="cpu", **settings):
    """The model under fully_shard, and its optimizer."""
    model, mesh = make_model(dtype).to(device), mesh_of(size, replicas)
    if layers:
        for layer in model:
            if isinstance(layer, nn.Linear):
                fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model, VariationalHyperAdam(model.named_parameters(), **{"lr": LR, **settings})


class CountedReductions:
    """Counts calls of all_reduce."""

    def __enter__(self):
        self.calls, self.real = 0, distributed.all_reduce
        distributed.all_reduce = self
        return self

    def __call__(self, *arguments, **settings):
        self.calls += 1
        return self.real(*arguments, **settings)

    def __exit__(self, *_):
        distributed.all_reduce = self.real


def ddp(rank, size, steps):
    model = DistributedDataParallel(make_model(torch.float32))
    optimizer = VariationalHyperAdam(model.named_parameters(), lr=LR)
    train(model, optimizer, range(steps), rank, size, torch.float32)
    return params_of(model), optimizer.state_dict()["state"]


def fsdp(rank, size, steps, replicas, dtype, settings):
    model, optimizer = make_sharded(size, replicas, dtype, **settings)
    train(model, optimizer, range(steps), rank, size, dtype)
    params, weight = params_of(model), model[4].weight
    with CountedReductions() as counted:
        optimizer.step()
    state = {
        name: (tuple(value.shape), len(value.to_local()), value.placements)
        for name, value in optimizer.state_dict()["state"][4].items()
        if value.dim() > 0
    }
    return {
        "params": params,
        "rows": len(weight.to_local()),
        "reductions": counted.calls,
        "state": state,
        "placements": weight.placements,
    }


def one_bad_gradient(rank, size):
    model, optimizer = make_sharded(size)
    train(model, optimizer, range(2), rank, size)
    before = params_of(model)
    x, y = batch(2, torch.float64, rank, size)
    optimizer.zero_grad()
    F.mse_loss(model(x), y).backward()
    if rank == size - 1:
        model[0].weight.grad.to_local()[0, 0] = torch.nan
    optimizer.step()
    same = all(torch.equal(a, b) for a, b in zip(before, params_of(model), strict=True))
    return same, optimizer.skipped_steps


def scaled(rank, size, steps, bad_step):
    """Under a GradScaler, with an infinity in one process's gradient of one step, taken again."""
    model, optimizer = make_sharded(size)
    scaler = GradScaler("cpu", init_scale=2.0**10)
    for step in [*range(bad_step + 1), *range(bad_step, steps)]:
        x, y = batch(step, torch.float64, rank, size)
        optimizer.zero_grad()
        scaler.scale(F.mse_loss(model(x), y)).backward()
        if step == bad_step and scaler.get_scale() == 2.0**10 and rank == size - 1:
            local(model[0].weight.grad)[0, 0] = torch.inf
        scaler.step(optimizer)
        scaler.update()
    return params_of(model), scaler.get_scale(), optimizer.skipped_steps


def make_zero(model, lr=LR, **settings):
    from torch.distributed.optim import ZeroRedundancyOptimizer  # it warns of itself

    optimizer_class = functools.partial(
        VariationalHyperAdam, shard_of=list(model.named_parameters()), **settings
    )
    return ZeroRedundancyOptimizer(model.parameters(), optimizer_class=optimizer_class, lr=lr)


def zero(rank, size, steps, settings, make=make_model):
    model = DistributedDataParallel(make())
    optimizer = make_zero(model, **settings)
    train(model, optimizer, range(steps), rank, size)
    own = sum(param.numel() for group in optimizer.optim.param_groups for param in group["params"])
    return params_of(model), own


def zero_resumed(rank, size, first, steps, make=make_model):
    model = DistributedDataParallel(make())
    optimizer = make_zero(model)
    train(model, optimizer, range(first), rank, size)
    optimizer.consolidate_state_dict(to=0)
    saved = [optimizer.state_dict() if rank == 0 else None]
    distributed.broadcast_object_list(saved, src=0)
    names = sorted(saved[0]["state"][0])
    resumed = make_zero(model)
    resumed.load_state_dict(saved[0])
    train(model, resumed, range(first, steps), rank, size)
    return params_of(model), names


def save(rank, size, folder, first, **settings):
    """Some steps, and a checkpoint of model and optimizer."""
    model, optimizer = make_sharded(size, **settings)
    train(model, optimizer, range(first), rank, size)
    state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    checkpoint.save(state, checkpoint_id=folder)


def save_swinging(rank, size, folder, first):
    save(rank, size, folder, first, **SWINGING)


def resume_swinging(rank, size, folder, first, steps):
    return resume(rank, size, folder, first, steps, **SWINGING)


def resume(rank, size, folder, first, steps, device="cpu", **settings):
    """From a checkpoint on; whatever the optimizer held before is gone."""
    if size > 1:
        model, optimizer = make_sharded(size, device=device, **settings)
    else:
        model = make_model()
        optimizer = VariationalHyperAdam(model.named_parameters(), **{"lr": LR, **settings})
    if device == "meta":
        model.to_empty(device="cpu")
        with torch.no_grad():
            for param in model.parameters():
                param.fill_(0.1)
    fresh = params_of(model)
    state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    untouched = all(torch.equal(a, b) for a, b in zip(fresh, params_of(model), strict=True))
    counts = [int(entry["step"]) for entry in optimizer.state_dict()["state"].values()]
    checkpoint.load(state, checkpoint_id=folder, no_dist=size == 1)
    set_state_dict(
        model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
    )
    train(model, optimizer, range(first, steps), rank, size)
    return params_of(model), untouched and set(counts) == {0}


def resume_whole(rank, size, first, steps, options, device="cpu", early=False):
    """By state dicts of whole tensors, or of flattened names; the optimizer's may be set before its
    parameters have memory."""
    model, optimizer = make_sharded(size)
    train(model, optimizer, range(first), rank, size)
    options = StateDictOptions(**options)
    weights, state = get_state_dict(model, optimizer, options=options)
    new, resumed = make_sharded(size, device=device)
    if early:
        set_optimizer_state_dict(new, resumed, state, options=options)
    if device == "meta":
        new.to_empty(device="cpu")
    set_model_state_dict(new, weights, options=options)
    if not early:
        set_optimizer_state_dict(new, resumed, state, options=options)
    train(new, resumed, range(first, steps), rank, size)
    return params_of(new)


def refusals(rank, size):
    """The messages for parameters that can't be served."""
    found = []
    mesh = mesh_of(size)
    columns = distribute_tensor(torch.ones(4, 4), mesh, [Shard(1)])
    rows = distribute_tensor(torch.ones(4, 4), mesh, [Shard(0)])
    for params in (
        [columns],
        [rows, torch.ones(3)],
        [rows, distribute_tensor(torch.ones(3), mesh)],
    ):
        try:
            VariationalHyperAdam([nn.Parameter(param) for param in params])
        except ConfigError as error:
            found.append(str(error))
        else:
            found.append("")
    return found


def replicated(rank, size):
    """Tensors that lie whole in every process need no sums."""
    param = nn.Parameter(distribute_tensor(torch.ones(5), mesh_of(size)))
    optimizer = VariationalHyperAdam([param])
    param.grad = torch.ones_like(param)
    with CountedReductions() as counted:
        optimizer.step()
    plain = torch.ones(5, requires_grad=True)
    plain.grad = torch.ones(5)
    VariationalHyperAdam([plain]).step()
    return counted.calls, torch.equal(whole(param), plain.detach())


def meta_train(rank, size, config, meta_steps, saved=None):
    """Meta-steps from the start or from a state; the state after them."""
    trainer = MetaTrainer(config, None, GroupRanks() if size > 1 else ALONE)
    if saved is not None:
        trainer.load_state(saved)
    for _ in range(meta_steps):
        trainer.meta_step()
    return {name: value.clone() for name, value in trainer.state().items()}


def decide(rank, size):
    """What ranks tell each other."""
    ranks = GroupRanks()

    def fail():
        raise RunError("no such run")

    try:
        ranks.agree(fail)
    except RunError as error:
        message = str(error)
    return ranks.agree(lambda: rank), ranks.any(rank == 1, False), message


class Blocks(nn.Module):
    """What the page's examples are about."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
        self.output = nn.Linear(4, 3)

    def forward(self, x):
        return self.output(self.blocks(x).tanh())


def run_examples(rank, size, examples, folder):
    """The page's blocks, in their order, with a step after each."""
    names = {"folder": folder, "mesh": mesh_of(size)}
    taken = []
    for example in examples:
        if "checkpoint" not in example:
            torch.manual_seed(0)
            names["model"] = Blocks()
        exec(compile(example, "example", "exec"), names)
        model, optimizer = names["model"], names["optimizer"]
        train(model, optimizer, range(1), rank, size, torch.float32)
        inner = getattr(optimizer, "optim", optimizer)
        taken.append({int(entry["step"]) for entry in inner.state_dict()["state"].values()})
    return taken


def saved_state(rank, size, folder):
    """Ways to keep a state dict of shards; whether a later step leaves them as they were."""
    model, optimizer = make_sharded(size)
    train(model, optimizer, range(2), rank, size)
    state = optimizer.state_dict()
    path = folder / f"{rank}.pt"
    torch.save(state, path)
    kept = copy.deepcopy(state["state"])
    train(model, optimizer, range(2, 3), rank, size)
    loaded = torch.load(path, weights_only=False)["state"]
    for number, fields in state["state"].items():
        for name, value in fields.items():
            for other in (kept, loaded):
                assert torch.equal(own_numbers(value), own_numbers(other[number][name])), name
    size_of = sum(own_numbers(v).nbytes for f in state["state"].values() for v in f.values())
    return path.stat().st_size < 2 * size_of + 60_000


def own_numbers(value):
    return value.to_local() if isinstance(value, DTensor) else value


def explain(rank, size):
    """What each process sees of a step, where two have no parameter."""
    model = DistributedDataParallel(make_small_model())
    optimizer = make_zero(model)
    x, y = batch(0, torch.float64, rank, size)
    F.mse_loss(model(x), y).backward()
    found = optimizer.optim.explain()
    return sorted(tuple(each.mean_N.shape) for each in found.values())


def frozen(rank, size):
    """Nothing is trained: nothing happens, and nothing fails."""
    model = make_model().requires_grad_(False)
    fully_shard(model, mesh=mesh_of(size))
    optimizer = VariationalHyperAdam(model.named_parameters())
    optimizer.step()
    return optimizer.state_dict()["state"]


def fsdp1(rank, size, use_orig_params):
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = FullyShardedDataParallel(
        make_model(), device_id=torch.device("cpu"), use_orig_params=use_orig_params
    )
    try:
        VariationalHyperAdam(model.named_parameters())
    except ConfigError as error:
        return str(error)
    return ""
