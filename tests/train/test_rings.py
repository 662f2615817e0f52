"""All-gather and reduce-scatter in a ring, beside gloo's, and through DeepSpeed's functions."""

import sys

import torch

import launch

SIZES = (1, 7, 100_003, 2 << 20)  # the last is received in two segments


def rank() -> None:
    import torch.distributed as dist
    from deepspeed import comm

    from fastft.zero import engine as zero
    from fastft.zero import rings

    zero.start_process_group()
    me, world = dist.get_rank(), dist.get_world_size()
    pair = [dist.new_group([0, 2]), dist.new_group([1, 3])][me % 2]
    for group in (None, pair):
        place, ranks = dist.get_rank(group), dist.get_world_size(group)
        for size in SIZES:
            for dtype in (torch.float32, torch.bfloat16):
                made = [torch.Generator().manual_seed(r) for r in range(world)]
                all_of = [torch.randint(-9, 9, (ranks * size,), generator=g).to(dtype) for g in made]
                members = dist.get_process_group_ranks(group or dist.group.WORLD)
                mine, total = all_of[me].clone(), sum(all_of[r] for r in members)
                own = mine.chunk(ranks)[place]
                comm.reduce_scatter_fn(own, mine, group=group)
                assert torch.equal(own, total.chunk(ranks)[place]), (size, dtype)
                apart = torch.empty(size, dtype=dtype)
                rings.reduce_scatter(apart, all_of[me].clone(), group=group)
                assert torch.equal(apart, own)
                whole = torch.full((ranks * size,), -1.0).to(dtype)
                comm.allgather_fn(whole, own, group=group, async_op=True).wait()
                assert torch.equal(whole, total), (size, dtype)
    most, own = torch.full((world * 3,), float(me)), torch.empty(3)
    comm.reduce_scatter_tensor(own, most, op=comm.ReduceOp.MAX)  # no sum: torch's own
    assert torch.equal(own, torch.full((3,), world - 1.0))
    zero.stop_process_group()


def test_rings_give_what_gloo_gives():
    launch.ranks(4, [__file__])


if __name__ == "__main__":
    sys.exit(rank())
