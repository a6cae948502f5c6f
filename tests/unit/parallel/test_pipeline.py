"""How a model is shared out to pipeline stages. What they compute together: test_layouts.py."""

from contextlib import nullcontext

import pytest
import torch
from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight

from moltron.config.schema import ParallelConfig
from moltron.models.registry import FAMILIES, build_model, get_spec
from moltron.parallel.pipeline import keep, num_stages, rank_of, share_out, shares_of

SIZES = dict(hidden_size=32, num_layers=4, num_heads=4, ffn_size=64)
TWO = SIZES | dict(num_decoder_layers=4)
ARCHITECTURES = {
    "esm1": SIZES | dict(embed_norm=True, contact_head=True),
    "esm2": SIZES,
    "prott5": TWO,
    "megamolbart": TWO,
}


def test_blocks_are_shared_equally_and_the_rest_stays_beside_them():
    names = ["embed", "a.0", "a.1", "a.2", "norm", "b.0", "b.1", "end"]
    assert share_out(names, ["a.*", "b.*"], {}, 2) == [names[:5], names[5:]]
    assert share_out(names, ["a.*", "b.*"], {"embed": "end", "table": "a.*"}, 5) == [
        ["embed", "a.0", "table"],
        ["a.1", "table"],
        ["a.2", "norm", "table"],
        ["b.0"],
        ["b.1", "end", "embed"],
    ]
    assert [len(share) for share in share_out(names[1:4], ["a.*"], {}, 2)] == [2, 1]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("stages", [2, 3, 4])
def test_every_parameter_has_its_place_under_its_own_name(family, stages):
    whole = build_model(family, ARCHITECTURES[family])
    shares, seen = shares_of(whole, get_spec(family).plan, stages), []
    for share in shares:
        stage = keep(build_model(family, ARCHITECTURES[family]), shares, share)
        seen += [name for name, _ in stage.named_parameters()]
    assert set(seen) == {name for name, _ in whole.named_parameters()}
    twice = {name for name in seen if seen.count(name) > 1}
    assert twice == (set() if family == "megamolbart" else {"embed.weight"})


def test_each_stage_has_the_relative_positions_that_its_blocks_read():
    sizes = TWO | dict(architecture="t5", tokenizer="prott5")
    shares = shares_of(build_model("prott5", sizes), get_spec("prott5").plan, 4)
    tables = [[name for name in share if name.endswith("relative_bias")] for share in shares]
    assert tables == [["encoder.relative_bias"]] * 2 + [["decoder.relative_bias"]] * 2


def test_stages_of_all_ranks():
    assert num_stages(ParallelConfig(pp=4)) == 4
    assert num_stages(ParallelConfig(pp=4, pp_schedule="interleaved", pp_stages=3)) == 12
    assert num_stages(ParallelConfig(pp=4, pp_schedule="zbv", pp_stages=3)) == 8


@pytest.mark.parametrize(("schedule", "ranks"), [("zero_bubble", [0, 1, 2, 0, 1, 2]), ("zbv", [0, 1, 2, 2, 1, 0])])
def test_stages_go_round_or_there_and_back(schedule, ranks):
    config = ParallelConfig(pp=3, pp_schedule=schedule)
    assert [rank_of(stage, config) for stage in range(num_stages(config))] == ranks


def test_torch_cannot_split_the_backward_of_shared_weights():
    """If this fails, torch is mended: let T5 have zero bubbles (train/setup.py:_split_problems)."""
    x, one, shared, two = (torch.randn(3, 3, requires_grad=True) for _ in range(4))
    for weights, breaks in (((one, two), False), ((one, shared, two), True)):
        factor = shared.sin() if breaks else 1.0
        y = torch.tanh(torch.tanh(x @ one) * factor @ two) * factor
        _, groups = stage_backward_input([y.sum()], None, [x], iter(weights))
        with pytest.raises(RuntimeError, match="second time") if breaks else nullcontext():
            stage_backward_weight(iter(weights), groups)
