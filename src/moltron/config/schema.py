"""Every key that a user can set, with its default, in plain dataclasses.

defaults here < preset < command line. `PATH` marks keys whose values are taken literally (brackets, `=`, commas,
spaces and `~` need no quotes). Knows nothing of Hydra (compose.py does) and of what the keys set in motion.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

PATH = {"path": True}


def literal(default: str | None = "???") -> Any:
    return field(default=default, metadata=PATH)


# ---------------------------------------------------------------------------------------------------- moltron train


@dataclass
class DataConfig:
    path: str = literal()  # a folder that `moltron prepare` wrote
    cache_dir: str | None = literal(None)  # where index files go if `path` is read-only
    max_length: int = 1024  # tokens a sequence, specials included; longer ones are cropped at random
    decoder_max_length: int | None = None  # tokens of a decoder's sequence; None: max_length
    window: int = 65536  # records packed together; the order of records is exact across windows
    clusters: bool = True  # draw a cluster, then a member, where the store has clusters

    def limits(self, streams: int) -> tuple[int, ...]:
        """Tokens of a sequence at most, of each stream."""
        return (self.max_length, self.decoder_max_length or self.max_length)[:streams]


@dataclass
class BatchConfig:
    tokens: int = 16384  # T, the fixed length of one pack, specials included; of an encoder, where there is a decoder
    decoder_tokens: int | None = None  # U, that of the decoder's stream; None: tokens
    packs: int = 8  # P, packs in one optimizer step over all ranks

    def streams(self, streams: int) -> tuple[int, ...]:
        """Tokens of a pack, of each stream."""
        return (self.tokens, self.decoder_tokens or self.tokens)[:streams]


@dataclass
class ObjectiveConfig:
    name: str = "masked_lm"  # masked_lm | span_corruption | denoising
    select: float = 0.15  # masked_lm: share of residues with a loss
    mask: float = 0.8  # masked_lm: of the selected: become <mask>
    random: float = 0.1  # masked_lm: of the selected: become another residue; the rest stays
    count: str = (
        "bernoulli"  # masked_lm: bernoulli: each residue by itself; floor: exactly floor(select · L) a sequence
    )
    density: float = 0.15  # span_corruption: share of residues taken out
    mean_span: float = 3.0  # of spans, in tokens; span_corruption: 1 is BioNeMo v1's; denoising: of a Poisson
    mask_prob: float = 0.1  # denoising: probability that a span starts at a token
    encoder_smiles: str = "random"  # denoising: which SMILES of a molecule is read: random | canonical
    decoder_smiles: str = "same"  # denoising: which one is written: same | canonical | random


@dataclass
class ScheduleConfig:
    name: str = "cosine"  # cosine | linear | warmup_anneal_hold | noam | inverse_sqrt | constant
    warmup_steps: int = 2000
    decay_steps: int | None = None  # where the decay ends; None: train.max_steps
    constant_steps: int = 0  # cosine: steps at min_lr at the end
    min_lr: float = 0.0


@dataclass
class OptimConfig:
    name: str = "adamw"  # adamw | muon (2-D hidden matrices; AdamW for the rest)
    state: str = "fp32"  # AdamW's moments: fp32 | fp8 (large matrices of a width that is a multiple of 64)
    lr: float = 4e-4  # peak, after warm-up; noam: the factor
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-8
    weight_decay: float = 0.01  # not on biases and norms
    muon_lr: float = 2e-2  # peak, follows the same schedule
    muon_momentum: float = 0.95
    clip: float | None = 1.0  # largest global gradient norm
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)


@dataclass
class LoopConfig:
    max_steps: int = 1000
    precision: str = "auto"  # auto (bf16 on CUDA, fp32 on a CPU) | fp32 | bf16 | fp16 | fp8 (bf16, products in FP8)
    fp8_recipe: str = "tensorwise"  # fp8: one scale a tensor | rowwise: one a row
    seed: int = 1234
    device: str = "auto"  # auto | cpu | cuda
    compile: bool | None = None  # the blocks; None: on CUDA in half precision
    log_every: int = 10
    eval_every: int = 500
    eval_packs: int | None = None  # packs of validation data; None: all
    eval_molecules: int = 512  # molecules decoded at an evaluation, where a model reconstructs them; 0: none
    nonfinite: str = "stop"  # a loss or gradient that is not finite: stop | skip the step
    hang_minutes: float = 10.0  # under torchrun: without progress for so long, all ranks end and start again
    early_stop: int | None = None  # stop after so many evaluations without a better val_loss


@dataclass
class CheckpointConfig:
    every: int = 500
    keep_last: int = 2
    keep_best: int = 1  # by val_loss


@dataclass
class ParallelConfig:
    pp: int = 1  # pipeline parallel: ranks that share the blocks of a model; packs pass through them one after another
    # 1f1b | interleaved (pp_stages stages a rank: less waiting, more messages) | zero_bubble (as well, and weights'
    # gradients are computed where a rank would wait) | zbv (so, too; two stages a rank, there and back)
    pp_schedule: str = "1f1b"
    pp_stages: int = 2  # interleaved, zero_bubble: stages a rank
    dp_replicate: int = 1  # copies of the weights; each is sharded over dp_shard ranks
    dp_shard: int | None = None  # None: all ranks that the others leave
    cp: int = 1  # context parallel: ranks that share the tokens of each pack
    tp: int = 1  # tensor parallel: ranks that share each block's heads and feed-forward, and one pack
    reshard_after_forward: bool = False  # frees the gathered weights between forward and backward: memory for speed
    reduce_dtype: str = "fp32"  # in which gradients are added up over ranks: fp32 | bf16 (half the traffic)
    cpu_offload: bool = False  # weights, gradients and optimizer on the host, blocks fetched as needed: a last resort
    recompute: str = "none"  # blocks' activations in the backward: none | selective (not matrix products) | full
    recompute_every: int = 1  # of so many blocks in a row, one is recomputed


@dataclass
class LoggingConfig:
    tensorboard: bool = True
    wandb: str = "disabled"  # disabled | offline | online
    wandb_project: str = "moltron"


@dataclass
class TrainConfig:
    """moltron train"""

    run_dir: str = literal()
    init: str | None = literal(None)  # start from these weights, at step 0
    model: dict[str, Any] = field(default_factory=dict)  # family and its architecture, see configs/model
    data: DataConfig = field(default_factory=DataConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: LoopConfig = field(default_factory=LoopConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)


# -------------------------------------------------------------------------------------------------- the other commands


@dataclass
class PlanConfig(TrainConfig):
    """moltron plan: keys of `moltron train` that are given stay as they are, and these"""

    run_dir: str = literal("run")
    data: DataConfig = field(default_factory=lambda: DataConfig(path="store"))
    gpus: int = 1  # how many there are, of all nodes
    memory: float = 80  # of one GPU, as its name says, in GB
    node: int = 8  # GPUs of one node, which talk to each other faster than to those of others


@dataclass
class PrepareConfig:
    """moltron prepare"""

    input: str = literal()  # FASTA, CSV, .smi; .gz .xz .zst; a folder; a range x[000..049]; - for standard input
    output: str = literal()
    kind: str | None = None  # protein | molecule; None: by the input
    id_column: str | None = None
    sequence_column: str | None = None
    val_input: str | None = literal(None)
    test_input: str | None = literal(None)
    val_size: float = 0  # an integer counts, a fraction is a share
    test_size: float = 0
    seed: int = 0
    clusters: str | None = literal(None)  # MMseqs2's two columns, or a table with a header
    cluster_column: str | None = None
    members: str | None = literal(None)  # UniRef90 FASTA, with `mapping`
    mapping: str | None = literal(None)  # UniRef50 id <TAB> UniRef90 ids
    min_length: int = 1
    max_length: int | None = None  # residues or tokens; longer go to the rejects. None: no limit; molecules: 127
    illegal: str = "x"  # unknown letters: x (become X, counted) | reject
    duplicates: str = "drop"  # equal sequences: drop (first one stays) | keep
    variants: int = 8  # molecules: randomised SMILES beside the canonical one, drawn from in training; 0: none
    salts: str = "keep"  # molecules of several parts: keep | strip (only the largest part stays)
    max_weight: float | None = None  # molecules: g/mol; heavier ones go to the rejects
    max_logp: float | None = None  # molecules: Crippen's logP; those above go to the rejects
    workers: int | None = None  # molecules: processes; None: one a core. The result does not depend on it
    overwrite: bool = False


@dataclass
class EmbedConfig:
    """moltron embed"""

    model: str = literal()
    input: str = literal()
    output: str = literal()  # .pkl .npz .h5 .parquet .safetensors
    outputs: list[str] = field(default_factory=lambda: ["embeddings"])  # embeddings, hiddens, logits
    pooling: str = "mean"  # mean (over residues, without specials) | cls | max
    layers: list[int] = field(default_factory=lambda: [-1])  # 0 = embeddings, last = after the final norm
    long: str = "error"  # longer than the model: error (to the rejects, exit code 3) | truncate | window
    max_length: int | None = None  # tokens; None: the model's
    overlap: int | None = None  # residues shared by neighbouring windows; None: 128, at most half a window
    dtype: str = "float32"  # float32 | float16
    id_column: str | None = None
    sequence_column: str | None = None
    tokens: int | None = None  # tokens a batch; None: by device
    shard_size: int = 20_000  # records a Parquet shard
    precision: str = "auto"  # auto (bf16 on CUDA, fp32 on a CPU) | fp32 | bf16 | fp16
    device: str = "auto"  # auto | cpu | cuda
    overwrite: bool = False


@dataclass
class EvaluateConfig:
    """moltron evaluate"""

    model: str = literal()
    input: str = literal()  # FASTA, CSV, .smi, or one split of a prepared folder: DIR/val.arrow
    objective: ObjectiveConfig = field(default_factory=lambda: ObjectiveConfig(name="auto"))  # auto: the family's
    molecules: int = 1000  # that are decoded and compared, of those in the file; 0: none
    tokens: int | None = None  # tokens a pack; None: by device
    max_length: int | None = None  # tokens a sequence; longer ones are cropped (molecules: an error); None: the model's
    cache_dir: str | None = literal(None)  # where index files go if a prepared folder is read-only
    id_column: str | None = None
    sequence_column: str | None = None
    precision: str = "auto"  # auto (bf16 on CUDA, fp32 on a CPU) | fp32 | bf16 | fp16
    device: str = "auto"  # auto | cpu | cuda


@dataclass
class GenerateConfig:
    """moltron generate"""

    model: str = literal()
    input: str = literal()  # molecules to start from: CSV, .smi
    output: str = literal()  # .csv; a picture of the molecules and a report get its name
    method: str = "greedy-perturbate"  # or topkp-perturbate, beam-search-…, interpolate: docs/generation.md
    num_samples: int = 10  # molecules a given one; interpolate: points between two neighbours of the input
    scaled_radius: float | None = None  # standard deviation of the noise on hidden states; None: 1, interpolate: 0
    top_k: int = 0  # topkp-perturbate: of so many tokens; 0: of all
    top_p: float = 0.9  # topkp-perturbate: of the likeliest tokens with so much probability
    temperature: float = 1.0
    beam_size: int = 5  # beam-search-perturbate and -perturbate-sample
    length_penalty: float = 0.0  # beam searches: larger favours longer molecules
    max_tokens: int | None = None  # of a generated molecule; None: the model's
    reference: str | None = literal(None)  # known molecules, for novelty: a file, DIR/train.arrow; None: input
    seed: int = 0
    id_column: str | None = None
    sequence_column: str | None = None
    precision: str = "auto"  # auto (bf16 on CUDA, fp32 on a CPU) | fp32 | bf16 | fp16
    device: str = "auto"  # auto | cpu | cuda
    overwrite: bool = False


@dataclass
class ConvertConfig:
    """moltron convert"""

    input: str = literal()
    output: str = literal()
    format: str = "huggingface"  # huggingface | moltron
    dtype: str = "float32"  # float32 | bfloat16 | float16
    overwrite: bool = False


@dataclass
class DownloadConfig:
    """moltron download"""

    name: str = ""  # e.g. esm2_650M; without it the command lists them
    urls: str | None = literal(None)  # instead: a text file, a URL a line, with its SHA-256 or MD5 if you have it
    output: str | None = literal(None)  # with urls: the folder
    cache_dir: str | None = literal(None)
    offline: bool = False
    endpoint: str | None = None  # another hub, e.g. a mirror
