"""Which parameter is trained by what: AdamW, or Muon for the hidden matrices and AdamW for the rest.

    model ──split──> hidden matrices | other matrices | biases, norms ──Optimizer──> step(lr), state_tensors()

Hidden matrices are the 2-D parameters inside the model's parallel units (its blocks). Weight decay is on matrices only;
frozen parameters are left out. AdamW's moments are fp32, or of large matrices FP8. Knows nothing of schedules (it is
told a rate) and of files (it hands out a flat dict of tensors, which a checkpoint restores in place).

N blocks of B = 64 columns of a row
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from moltron.config.schema import OptimConfig
from moltron.layers.compiled import compile_by_row
from moltron.models.spec import ParallelPlan
from moltron.parallel.apply import gather_stack, units
from moltron.parallel.precision import BLOCK, fits_fp8
from moltron.parallel.tensor import local, own_part, zeros_beside

NAMES = ("adamw", "muon")
STACK = 2**26  # elements orthogonalised at once: bounds Muon's extra memory to a few times 128 MB
BLOCKS = 2**17  # of FP8 moments updated at once: where nothing is compiled, they are a few times 32 MB in fp32


class Muon(torch.optim.Muon):
    """torch's Muon, for sharded matrices too, and with one batched iteration for all matrices of one shape.

    An update needs whole matrices: the momentum stays sharded, its look-ahead is gathered, one stack at a time, every
    rank orthogonalises it and keeps its own part. What each rank does to its own part goes past DTensor, whose
    dispatch would cost more than the arithmetic.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameters in _stacks(group["params"]):
                ahead = self._look_ahead(parameters, group["momentum"])
                updates = gather_stack(torch.stack(ahead), parameters[0])
                updates = newton_schulz(updates, group["ns_coefficients"], group["ns_steps"], group["eps"])
                rows, columns = parameters[0].shape
                lr = group["lr"] * max(1.0, rows / columns) ** 0.5
                own = [own_part(update, parameters[0]).to(parameters[0].dtype) for update in updates]
                values = [local(p.data) for p in parameters]
                torch._foreach_mul_(values, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(values, own, alpha=-lr)

    def _look_ahead(self, parameters: list[Tensor], momentum: float) -> list[Tensor]:
        """Nesterov momentum of this rank's parts, in bf16 (on a CPU, whose batched bf16 products crawl, in fp32)."""
        gradients = [local(p.grad) for p in parameters if p.grad is not None]
        buffers = [local(self.state[p]["momentum_buffer"]) for p in parameters]
        torch._foreach_lerp_(buffers, gradients, 1 - momentum)
        ahead = torch._foreach_lerp(gradients, buffers, momentum)
        return [x.float() if x.device.type == "cpu" else x.bfloat16() for x in ahead]


def newton_schulz(x_KMN: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """(K, M, N) → nearest semi-orthogonal matrices, roughly: singular values land in 0.7 … 1.2 (Jordan 2024)."""
    a, b, c = coefficients
    tall = x_KMN.shape[-2] > x_KMN.shape[-1]
    x = x_KMN.mT if tall else x_KMN
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def _stacks(parameters: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Parameters of one shape, laid out alike, together, at most STACK elements a time."""
    alike: dict[Any, list[Tensor]] = {}
    for parameter in parameters:
        alike.setdefault((parameter.shape, getattr(parameter, "placements", None)), []).append(parameter)
    for (shape, _), same in alike.items():
        count = max(1, STACK // shape.numel())
        yield from (same[i : i + count] for i in range(0, len(same), count))


class AdamWFp8(torch.optim.Optimizer):
    """torch's AdamW for matrices that `fits_fp8`, with moments of 2.1 bytes a parameter, where fp32 takes 8.

    The update is of fp32 moments, which are rounded after it. A moment is codes in e4m3 (Peng et al. 2023,
    arXiv:2310.18313; Xi et al. 2024, arXiv:2410.19313) and a scale a block (Dettmers et al. 2022, arXiv:2110.02861),
    tensors sharded as the parameter, and each rank updates its own part, past DTensor. Of the second moment the root is
    kept, which has half the orders of magnitude. (torchao's AdamW8bit and AdamWFp8 have blocks of a rank's own part,
    flattened: another layout of ranks could not read them.)
    """

    KINDS = ("exp_avg", "exp_avg_scale", "exp_avg_sq_root", "exp_avg_sq_root_scale")

    def __init__(self, parameters: Iterable[Tensor], compile: bool = True, **settings: Any):
        """compile: where it can be. settings: lr, betas, eps, weight_decay."""
        super().__init__(parameters, settings)
        self.updates, self.device = torch.zeros(()), local(self.param_groups[0]["params"][0]).device
        for p in self.param_groups[0]["params"]:
            shape, part = (p.shape[0], p.shape[1] // BLOCK), local(p.data)[:, ::BLOCK]
            assert local(p.data).shape[1] % BLOCK == 0, "the configuration is checked: no axis cuts a block"
            codes = (torch.zeros_like(p.data, dtype=torch.float8_e4m3fn) for _ in range(2))
            tensors = [x for c in codes for x in (c, zeros_beside(p, shape, part))]
            self.state[p] = dict(zip(self.KINDS, tensors, strict=True)) | {"step": self.updates}
        # fused; but Triton has no e4m3 for older GPUs
        compile &= self.device.type == "cuda" and torch.cuda.get_device_capability(self.device) >= (8, 9)
        self.update: Any = compile_by_row(update_fp8, rows=6) if compile else update_fp8

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.updates += 1  # on the host; every state has it, as torch's have theirs
        group, count = self.param_groups[0], self.updates.item()
        lr, (beta1, beta2) = group["lr"], group["betas"]
        numbers = (1 - lr * group["weight_decay"], lr / (1 - beta1**count), (1 - beta2**count) ** 0.5)
        changing = [torch.full((), x, device=self.device) for x in numbers]  # filled: a copy waits for the device
        for p in (p for p in group["params"] if p.grad is not None and local(p.data).numel()):
            tensors = [local(x) for x in (p.data, p.grad, *(self.state[p][kind] for kind in self.KINDS))]
            for some in zip(*(x.view(tensors[0].numel() // BLOCK, -1).split(BLOCKS) for x in tensors), strict=True):
                self.update(*some, *changing, beta1, beta2, group["eps"])


def update_fp8(
    value_NB: Tensor,
    grad_NB: Tensor,
    avg_NB: Tensor,
    avg_scale_N1: Tensor,
    root_NB: Tensor,
    root_scale_N1: Tensor,
    decay: Tensor,
    size: Tensor,
    correction: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
) -> None:
    """AdamW's, of N blocks in place. size: lr by the first bias correction; correction: the root of the second."""
    avg = (avg_NB.to(value_NB.dtype) * avg_scale_N1).lerp(grad_NB, 1 - beta1)
    root = (beta2 * (root_NB.to(value_NB.dtype) * root_scale_N1) ** 2 + (1 - beta2) * grad_NB**2).sqrt()
    value_NB.copy_(value_NB * decay - size * avg / (root / correction + eps))
    quantize(avg, avg_NB, avg_scale_N1)
    quantize(root, root_NB, root_scale_N1, least=2.0**-9)


def quantize(x_NB: Tensor, codes_NB: Tensor, scale_N1: Tensor, least: float = 0.0) -> None:
    """Write x / scale, rounded to e4m3 (3 bits; multiples of 2⁻⁹ below 2⁻⁶), and the scale: each largest is 448.

    least: what numbers above 0 become at least, so that they are not lost where they divide.
    """
    scale_N1.copy_((x_NB.abs().amax(-1, keepdim=True) / 448).clamp(min=2.0**-126))
    scaled = x_NB / scale_N1
    codes_NB.copy_(torch.maximum(scaled, (x_NB > 0) * least) if least else scaled)


class Optimizer:
    """All optimizers of a run behind one `step`. Memory for the state is taken at once, so that it can be restored."""

    def __init__(self, model: nn.Module, plan: ParallelPlan, config: OptimConfig, peak: float, compile: bool = True):
        """peak: the schedule's highest rate; Muon's own rate follows in proportion. compile: what can be."""
        self.names = {p: name for name, p in model.named_parameters() if p.requires_grad}
        self.updates = 0  # AdamW's bias correction counts these; skipped steps are not among them
        hidden, matrices, vectors = split(model, plan)
        if config.name != "muon":
            matrices, hidden = hidden + matrices, []
        in_fp8 = {p: None for p in matrices if config.state == "fp8" and fits_fp8(p.shape)}
        matrices = [p for p in matrices if p not in in_fp8]
        fused = all(p.device.type in ("cpu", "cuda") for p in self.names)
        groups = [(matrices, config.weight_decay), (vectors, 0.0)]
        settings: Any = dict(lr=config.lr, betas=(config.betas[0], config.betas[1]), eps=config.eps)
        adamw = torch.optim.AdamW([dict(params=p, weight_decay=d) for p, d in groups if p], fused=fused, **settings)
        self.optimizers: list[tuple[torch.optim.Optimizer, float]] = [(adamw, 1.0)]
        for group in adamw.param_groups:
            for p in group["params"]:
                step = torch.zeros((), dtype=torch.float32, device=p.device if fused else "cpu")
                adamw.state[p] = {"step": step, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        if in_fp8:
            self.optimizers.append((AdamWFp8(in_fp8, compile, weight_decay=config.weight_decay, **settings), 1.0))
        if hidden:
            muon = Muon(hidden, lr=config.muon_lr, weight_decay=config.weight_decay, momentum=config.muon_momentum)
            muon.state.update({p: {"momentum_buffer": torch.zeros_like(p)} for p in hidden})
            self.optimizers.append((muon, config.muon_lr / peak))

    def step(self, lr: float) -> None:
        for optimizer, scale in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr * scale
            optimizer.step()
        self.updates += 1

    def zero_grad(self, keep: bool = False) -> None:
        """keep: gradients stay where they are, zeroed, for whoever writes there again (CUDA graphs)."""
        if keep:
            torch._foreach_zero_([local(p.grad) for p in self.names if p.grad is not None])
            return
        for parameter in self.names:
            parameter.grad = None

    def state_tensors(self) -> dict[str, Tensor]:
        """`optim.<kind>.<parameter name>` → tensor, sharded like its parameter; the live ones, not copies."""
        return {
            f"optim.{kind}.{self.names[parameter]}": tensor  # type: ignore[index]
            for optimizer, _ in self.optimizers
            for parameter, state in optimizer.state.items()
            for kind, tensor in state.items()
            if kind != "step"
        }

    def set_updates(self, updates: int) -> None:
        """Restore the count of updates, which AdamW keeps a copy of for every parameter."""
        self.updates = updates
        for optimizer, _ in self.optimizers:
            for state in optimizer.state.values():
                if "step" in state:
                    state["step"].fill_(updates)


def split(model: nn.Module, plan: ParallelPlan) -> tuple[list[nn.Parameter], list[nn.Parameter], list[nn.Parameter]]:
    """Trainable parameters: (2-D inside the plan's units, other matrices, biases and norms)."""
    inside = {p for unit in units(model, plan) for p in unit.parameters()}
    trained = [p for p in model.parameters() if p.requires_grad]
    hidden = [p for p in trained if p.ndim == 2 and p in inside]
    matrices = [p for p in trained if p.ndim >= 2 and not (p.ndim == 2 and p in inside)]
    return hidden, matrices, [p for p in trained if p.ndim < 2]
