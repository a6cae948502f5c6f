"""AdamW with moments in FP8: what rounding costs, torch's own AdamW beside it, bytes, and the compiled update."""

import pytest
import torch
from torch import nn

from moltron.config.schema import OptimConfig
from moltron.models.registry import build_model, get_spec
from moltron.train.optim import AdamWFp8, Optimizer, quantize, update_fp8

PLAN = get_spec("esm2").plan
SETTINGS = dict(lr=1e-2, betas=(0.9, 0.98), eps=1e-8, weight_decay=0.1)
SHAPES = [(64, 64), (70, 192), (3, 6400)]


def quantized(x, **how):
    """x as it is read back."""
    codes, scale = torch.empty_like(x, dtype=torch.float8_e4m3fn), torch.empty(len(x), 1)
    quantize(x, codes, scale, **how)
    return codes.float() * scale


def test_rounding_is_bounded():
    generator = torch.Generator().manual_seed(0)
    sizes = 10 ** torch.empty(500, 1).uniform_(-20, 20, generator=generator)  # of blocks
    x = (
        torch.randn(500, 64, generator=generator)
        * sizes
        * 10 ** torch.empty(500, 64).uniform_(-6, 0, generator=generator)
    )
    x[:, 0], x[7] = 0, 0
    largest = x.abs().amax(1, keepdim=True)
    error, normal = (quantized(x) - x).abs(), x.abs() >= largest / 448 * 2**-6
    assert 0.3 < normal.float().mean() < 0.9
    assert (error <= x.abs() * (2**-4 + 1e-6))[normal].all()
    assert (error <= largest / 448 * (2**-10 + 1e-6))[~normal].all()
    assert error[normal].max() > 0 and not quantized(x)[x == 0].any()
    torch.testing.assert_close(quantized(x).abs().amax(1), largest[:, 0])


def test_what_divides_never_becomes_zero():
    root = 10 ** torch.empty(500, 64).uniform_(-18, 0, generator=torch.Generator().manual_seed(0))
    root[:, 5] = 0
    read = quantized(root, least=2.0**-9)
    assert ((read > 0) == (root > 0)).all()
    assert (
        (read - root <= root.amax(1, keepdim=True) / 448 * (2**-9 + 1e-6)).logical_or(read <= root * (1 + 2**-4)).all()
    )
    assert (read >= root / 1.5).all()  # smaller by rounding only, at most 1.5 · 2⁻⁹ to 2⁻⁹; or too large: a safe step
    assert (quantized(root)[root > 0] == 0).any()  # what it is for


def both(steps):
    """The parameters after AdamWFp8 and after torch's AdamW, with the same gradients."""
    found = []
    for kind in (AdamWFp8, torch.optim.AdamW):
        generator = torch.Generator().manual_seed(0)
        parameters = [nn.Parameter(torch.empty(s).normal_(generator=generator)) for s in SHAPES]
        optimizer = kind(parameters, **SETTINGS)
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = 1e-2 / (1 + step)
            for p in parameters:
                p.grad = torch.empty_like(p).normal_(generator=generator) * 1e-3
            optimizer.step()
        found.append(parameters)
    return zip(*found, strict=True)


def test_the_first_step_is_torchs():
    """Moments are rounded after they are used."""
    for ours, theirs in both(1):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=5e-7)


def test_later_steps_are_torchs_but_for_rounding():
    for ours, theirs in both(6):
        assert 1e-5 < (ours - theirs).abs().max() < 4e-3  # of steps of 2.4e-2 together
        torch.testing.assert_close(ours, theirs, rtol=0, atol=4e-3)


def test_a_small_second_moment_beside_a_large_one_does_not_explode():
    """Rounded to 0 it would divide a first moment that was not."""
    parameter = nn.Parameter(torch.zeros(64, 64))
    optimizer = AdamWFp8([parameter], **SETTINGS)
    for step in range(12):
        parameter.grad = torch.full_like(parameter, 1e-6 if step < 11 else 0.0)
        parameter.grad[:, 0] = (-1) ** step  # a small first moment, a large second one
        before = parameter.detach().clone()
        optimizer.step()
    assert 0 < (parameter.detach() - before)[:, 1:].abs().max() < 2e-2


def test_blocks_are_updated_some_at_a_time(monkeypatch):
    expected = [ours.detach() for ours, _ in both(2)]
    monkeypatch.setattr("moltron.train.optim.BLOCKS", 100)
    for (ours, _), whole in zip(both(2), expected, strict=True):
        assert torch.equal(ours, whole)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_bytes_and_kinds_of_the_state(name):
    model = build_model("esm2", dict(hidden_size=64, num_layers=1, num_heads=2, ffn_size=96), "cpu")
    state = Optimizer(model, PLAN, OptimConfig(name=name, state="fp8"), 1.0).state_tensors()
    of = {key.removeprefix("optim."): tensor for key, tensor in state.items()}

    def size(parameter):
        found = [t for key, t in of.items() if key.endswith(f".{parameter}")]
        return sum(t.numel() * t.element_size() for t in found) / model.get_parameter(parameter).numel()

    assert size("head.dense.weight") == 2 + 8 / 64
    assert of["exp_avg.head.dense.weight"].dtype == torch.float8_e4m3fn
    assert of["exp_avg_scale.head.dense.weight"].shape == (64, 1)
    assert size("head.dense.bias") == 8
    assert size("layers.0.mlp.up.weight") == (4 if name == "muon" else 2 + 8 / 64)
    assert size("layers.0.mlp.down.weight") == (4 if name == "muon" else 8)  # 96 columns


def test_training_ends_where_fp32_does():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(512, 64, generator=generator)
    y = torch.tanh(x @ torch.randn(64, 64, generator=generator)) + 0.1 * torch.randn(512, 64, generator=generator)
    losses = []
    for kind in (AdamWFp8, torch.optim.AdamW):
        generator.manual_seed(1)
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(64, 128, bias=False), nn.GELU(), nn.Linear(128, 64, bias=False))
        optimizer = kind(list(model.parameters()), **SETTINGS | dict(lr=2e-3))
        for _ in range(200):
            optimizer.zero_grad()
            some = torch.randint(512, (64,), generator=generator)
            (model(x[some]) - y[some]).square().mean().backward()
            optimizer.step()
        losses.append((model(x) - y).square().mean().item())
    assert losses[0] == pytest.approx(losses[1], rel=0.03) and losses[1] < 0.4 * y.square().mean()


@pytest.mark.gpu
def test_the_compiled_update_is_the_eager_one():
    """On CUDA, against the CPU, for all shapes by one compilation."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    found = []
    for device in ("cuda", "cpu"):
        generator = torch.Generator().manual_seed(0)
        parameters = [nn.Parameter(torch.empty(s).normal_(generator=generator).to(device)) for s in SHAPES]
        optimizer = AdamWFp8(parameters, **SETTINGS)
        assert (optimizer.update is update_fp8) == (device == "cpu")
        for step in range(3):
            optimizer.param_groups[0]["lr"] = 1e-2 / (1 + step)
            for p in parameters:
                p.grad = (torch.empty(p.shape).normal_(generator=generator) * 1e-3).to(device)
            optimizer.step()
        found.append((parameters, optimizer))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    (parameters, optimizer), (expected, eager) = found
    for p, q in zip(parameters, expected, strict=True):
        difference = (p.detach().cpu() - q.detach()).abs()  # of updates of 1e-2; a code on the edge goes the other way
        assert difference.mean() < 1e-6 and difference.max() < 2e-3
        for kind in AdamWFp8.KINDS:
            a, b = optimizer.state[p][kind].cpu().float(), eager.state[q][kind].float()
            assert ((a - b).abs() > 1e-5 * b.abs()).float().mean() < 1e-3, kind
            assert a.any()
