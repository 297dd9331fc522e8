"""FSDP2 around the functions and the orthogonal gradient: one rank; run by test_torch_memory.py."""

import copy
import sys

import torch
from torch.distributed import destroy_process_group, init_device_mesh, init_process_group
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import softmaxlib.torch as st


class Scores(torch.nn.Module):
    """Reads memory that FSDP frees, and allocates anew, around every call."""

    def __init__(self):
        super().__init__()
        self.table = torch.nn.Parameter(torch.randn(5, 6))

    def forward(self, target):
        losses = st.cross_entropy(self.table, target) + st.logsumexp(self.table).mean()
        scores = st.take_log_softmax(self.table, target)
        return (
            losses
            - scores.mean()
            + sum(
                getattr(st, name)(self.table).square().mean()
                for name in ("softmax", "log_softmax", "stablemax", "log_stablemax")
            )
        )


def train_functions(mesh):
    plain, target = Scores(), torch.tensor([0, 1, 2, 3, 4])
    sharded = copy.deepcopy(plain)
    fully_shard(sharded, mesh=mesh)
    for model in (plain, sharded):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            model(target).backward()
            optimizer.step()
    torch.testing.assert_close(sharded.table.full_tensor(), plain.table)


def train_orthogonally(mesh):
    """The bits of one process: the sums are over all shards."""
    plain = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Linear(5, 3))
    sharded = copy.deepcopy(plain)
    for layer in sharded:
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    x, target = torch.randn(6, 4), torch.randint(3, (6,))
    for model in (plain, sharded):
        optimizer = st.OrthogonalGradient(torch.optim.AdamW(model.parameters(), lr=0.1))
        for _ in range(3):
            optimizer.zero_grad()
            st.cross_entropy(model(x), target).backward()
            optimizer.step()
        if model is sharded:
            assert get_optimizer_state_dict(model, optimizer)["state"]
    for p, q in zip(sharded.parameters(), plain.parameters(), strict=True):
        assert p.grad.placements == p.placements
        assert torch.equal(p.grad.full_tensor(), q.grad)
        assert torch.equal(p.full_tensor(), q)


def project_placements(mesh):
    """A gradient that is still to be summed is, then it is laid out as its parameter is."""
    weights, grad = torch.randn(5, 3), torch.randn(5, 3)
    plain = torch.nn.Parameter(weights.clone())
    plain.grad = mesh.size() * grad
    st.OrthogonalGradient(torch.optim.SGD([plain], lr=0.1)).step()
    for placement in (Shard(1), Replicate()):
        p = torch.nn.Parameter(distribute_tensor(weights, mesh, [placement]))
        p.grad = DTensor.from_local(grad.clone(), mesh, [Partial()])
        st.OrthogonalGradient(torch.optim.SGD([p], lr=0.1)).step()
        assert p.grad.placements == p.placements
        assert torch.equal(p.full_tensor(), plain)


def main(rank, world, file):
    init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world)
    mesh = init_device_mesh("cpu", (world,))
    torch.manual_seed(0)
    for check in (train_functions, train_orthogonally, project_placements):
        check(mesh)
    destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
