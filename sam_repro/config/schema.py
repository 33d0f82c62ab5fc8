"""The typed schema of a run. Every field is documented here, once; the YAML files only cite where a number comes from.

This package imports no torch, so that plans, tables and figures work on a laptop.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from sam_repro.errors import UserError

MISSING: Any = "???"  # OmegaConf's word for a value that a file of configs/ has to give


@dataclass
class OptimConfig:
    """The gradient method: a perturbation (where to look), a combination (what to descend), a cadence (when).

    Any perturbation goes with any combination and any cadence. Fields that a method does not read change nothing.
    """

    name: str = MISSING  # of its YAML file, and of its rows in tables
    kind: str = "two_pass"  # two_pass: perturb and combine | entropy_sgd: the Langevin walk below
    perturb: str = "none"  # none | sam | asam | adaptive_official | fisher | friendly | vasso | eigen | random
    combine: str = "robust"  # robust (SAM) | ascent (GSAM) | min_f_h | weighted | wsam | cr (three passes)
    rho_max: float = 0.0  # radius of the perturbation at the peak learning rate
    rho_min: float = 0.0  # radius at the smallest learning rate
    alpha: float = 0.0  # ascent, min_f_h: alpha; weighted: lambda; wsam, cr: gamma
    beta: float = 0.0  # cr: weight of g_p - g_m
    decoupled: bool = False  # the base optimizer takes g; w -= lr (d - g) follows (WSAM's default; not clipped)
    every: int = 1  # the method's step every so many steps, clean gradients in between (LookSAM's k)
    reuse: float = 0.0  # every > 1: weight of the part that clean steps reuse (LookSAM's alpha)
    rho_schedule: str = "lr"  # lr: tied to the learning rate (Algorithm 1) | constant: rho_max throughout
    faithful_rho: bool = False  # let rho go negative in the warm-up, as the reference does (D-05)
    m: int = 64  # images that share one perturbation: the reference's batch per device (D-01)
    scope: str = "group"  # group: every m images perturb on their own | global: all images of all ranks share one eps
    groups: str = "auto"  # of older rows: loop is train.chunk=<m>, batched is all groups at once | auto: train.chunk
    eta: float = 0.0  # asam: added to |w|; fisher: weight of the squared gradient in the Fisher matrix
    weights_only: bool = False  # asam: scale by |w| only parameters called weight, as Kwon et al.; else all
    sigma: float = 1.0  # friendly: how much of the running mean is taken from g
    lam: float = 0.9  # friendly: weight of the past in the running mean
    theta: float = 0.9  # vasso: weight of the new gradient in the running mean
    k: int = 100  # eigen: steps between estimates of the eigenvector
    p: int = 5  # eigen: power iterations an estimate
    eigen_alpha: float | None = None  # eigen: weight of the eigenvector; null: alpha, which ascent may want for itself
    eigen_images: str = "group"  # eigen: estimate on m images of the step | batch (all) | fixed (the first batch)
    eigen_tf32: bool = False  # eigen: let a GPU's products use TF32, several times faster
    eigen_mode: str = "eval"  # eigen: estimate in eval mode, as the release | train
    renormalise: str = "none"  # eigen: none (as the release) | v_perp, to length 1 | sum, to length rho
    faithful_release: bool = False  # eigen: count k inside the epoch; perturb by rho g before the first estimate (D-29)
    inner_steps: int = 20  # entropy_sgd: L, steps of the walk
    inner_parts: int = 1  # entropy_sgd: parts of the batch that the walk takes in turn; 1: all of it every time
    inner_lr: float = 0.1  # entropy_sgd: eta of the walk
    inner_momentum: float = 0.9  # entropy_sgd: Nesterov's, in the walk
    inner_noise: float = 1e-4  # entropy_sgd: standard deviation of the Langevin noise
    inner_average: float = 0.75  # entropy_sgd: of mu, the mean of the walk
    gamma: float = 0.03  # entropy_sgd: pull back to w
    scoping: float = 1e-3  # entropy_sgd: growth of gamma a step


# Words that a field may be, and ranges that types cannot express.
WORDS = {
    "kind": ("two_pass", "entropy_sgd"),
    "perturb": ("none", "sam", "asam", "adaptive_official", "fisher", "friendly", "vasso", "eigen", "random"),
    "combine": ("robust", "ascent", "min_f_h", "weighted", "wsam", "cr"),
    "scope": ("group", "global"),
    "groups": ("auto", "loop", "batched"),
    "rho_schedule": ("lr", "constant"),
    "eigen_images": ("group", "batch", "fixed"),
    "eigen_mode": ("eval", "train"),
    "renormalise": ("none", "v_perp", "sum"),
}
FINITE = ("alpha", "beta", "reuse", "sigma")
NOT_NEGATIVE = ("rho_max", "rho_min", "m", "eta", "inner_noise", "gamma", "scoping")
UNIT = ("lam", "theta", "inner_average", "inner_momentum")
AT_LEAST_ONE = ("every", "k", "p", "inner_steps", "inner_parts")


def check_method(o: OptimConfig) -> None:
    """Ranges of the numbers, and methods that contradict themselves. One sentence that names the key."""
    for key in FINITE:
        if not math.isfinite(getattr(o, key)):
            raise UserError(f"optim.{key}={getattr(o, key)} must be a finite number")
    if o.eigen_alpha is not None and not math.isfinite(o.eigen_alpha):
        raise UserError(f"optim.eigen_alpha={o.eigen_alpha} must be a finite number, or null for optim.alpha")
    for key in NOT_NEGATIVE:
        if not 0 <= getattr(o, key) < math.inf:
            raise UserError(f"optim.{key}={getattr(o, key)} must be a finite number, 0 or greater")
    for key in UNIT:
        if not 0 <= getattr(o, key) <= 1:
            raise UserError(f"optim.{key}={getattr(o, key)} must lie in [0, 1]")
    for key in AT_LEAST_ONE:
        if getattr(o, key) < 1:
            raise UserError(f"optim.{key}={getattr(o, key)} must be at least 1")
    if not 0 < o.inner_lr < math.inf:
        raise UserError(f"optim.inner_lr={o.inner_lr} must be greater than 0")
    if o.perturb != "none" and o.m == 0:
        raise UserError("optim.m=0 is not a group size; give the number of images that share one perturbation")
    if o.rho_min > o.rho_max:
        raise UserError(f"optim.rho_min={o.rho_min} is greater than optim.rho_max={o.rho_max}")
    if o.combine == "wsam" and not 0 <= o.alpha < 1:
        raise UserError(f"optim.alpha={o.alpha} is gamma in optim.combine=wsam, which must lie in [0, 1)")
    if o.decoupled and o.every > 1:
        raise UserError(f"optim.decoupled=true leaves nothing to reuse between steps: it wants every=1, not {o.every}")
    if o.scope == "global" and (o.every > 1 or o.decoupled or o.combine == "cr" or o.kind == "entropy_sgd"):
        raise UserError("optim.scope=global is for two passes in every step: not entropy_sgd, every, decoupled or cr")
    if o.kind == "entropy_sgd" and o.perturb != "none":
        raise UserError(f"optim.kind=entropy_sgd does not perturb: it wants optim.perturb=none, not {o.perturb}")


@dataclass
class LogConfig:
    """Where a run leaves its files. Nothing here changes a result."""

    runs_dir: str = "runs"  # <runs_dir>/<run_id>: config, log.jsonl, checkpoints, final weights
    ledger_dir: str = "results/runs"  # one immutable JSON a finished run
    wandb: str = "auto"  # auto: online with a key, else offline | online | offline | disabled
    project: str = "sam-repro"  # of W&B
    group: str | None = None  # W&B group, such as table1/vit_b32
    progress: str = "auto"  # auto: a bar on a terminal, else lines | bar | lines


@dataclass
class SharpnessConfig:
    """Curvature of the training loss, measured at the end of a run and, if asked for, while it trains."""

    images: int = 512  # of the training split, the classes in turn, centre-cropped; 0: nothing is measured
    every: int = 0  # steps between measurements; 0: only at the end
    batch: int = 32  # images a pass of each rank: bounds memory, changes nothing


@dataclass
class ModelConfig:
    """A timm model and its row of the GSAM paper's Table 4."""

    name: str = MISSING  # the field's short name: vit_b32, mixer_s8, resnet50
    timm: str = MISSING  # timm.create_model's name
    family: str = MISSING  # vit | mixer | resnet: how weights are initialised
    params: int = 0  # number of parameters with 1,000 classes; 0 when no source states one
    kwargs: dict[str, Any] = field(default_factory=dict)  # timm.create_model's keyword arguments
    tiny_kwargs: dict[str, Any] = field(default_factory=dict)  # laid over kwargs when model.tiny is set
    tiny: bool = False  # a toy of the same family, for debug=tiny
    sam_rho: float = 0.05  # rho of plain SAM (Chen et al. 2022; D-12)
    rho_max: float = 0.05  # Table 4
    rho_min: float = 0.05  # Table 4
    alpha: float = 0.1  # Table 4


@dataclass
class RecipeConfig:
    """Schedule, base optimizer and loss: what vanilla, SAM and GSAM have in common."""

    name: str = MISSING  # of its YAML file, and of its rows in tables
    epochs: float = 300  # passes over the training split
    steps: int | None = None  # overrides epochs
    batch_size: int = 4096  # global: all ranks together
    base: str = "adamw"  # adamw | sgd | adam | adabelief | a class of torch.optim, such as NAdam
    lr: float = 3e-3  # the peak, reached at the end of the warm-up
    lr_min_ratio: float = 0.01  # the last learning rate over the peak
    warmup_steps: int = 10_000  # linear from 0
    schedule: str = "linear"  # linear | cosine | constant, after the warm-up
    weight_decay: float = 0.3  # AdamW, AdaBelief: decoupled, times lr; SGD, Adam: coupled L2
    decay: str = "kernels"  # kernels (no bias, norm, position embedding) | all
    momentum: float = 0.9  # SGD
    nesterov: bool = False  # SGD
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])  # AdamW, Adam, AdaBelief
    eps: float = 1e-8  # AdamW, Adam; AdaBelief: its authors' ImageNet value (1e-16 is their library's; D-28)
    clip: float = 1.0  # global norm of the averaged gradient, before the base optimizer; 0 is off
    loss: str = "sigmoid"  # sigmoid: sum over classes of binary cross-entropies | softmax
    label_smoothing: float = 0.0  # softmax only


@dataclass
class AugmentConfig:
    """What happens to a training image between the file and the model."""

    name: str = MISSING  # of its YAML file, and of its rows in tables
    crop: str = "inception"  # inception | pad (zeros around, random crop) | none (as in evaluation)
    pad: int = 4  # pad: pixels of zeros on each side
    scale: list[float] = field(default_factory=lambda: [0.05, 1.0])  # inception: range of the crop's area
    ratio: list[float] = field(default_factory=lambda: [0.75, 4 / 3])  # inception: range of width / height
    flip: bool = True  # left-right with probability 1/2
    randaugment: int = 0  # magnitude of RandAugment's two operations, as in TensorFlow's code (10, 15); 0 is off
    cutout: int = 0  # side in pixels of a square of the mean colour, centred anywhere in each image; 0 is off
    mixup: float = 0.0  # p of the Beta(p, p) that mixes each group's images with their neighbours; 0 is off


@dataclass
class DataConfig:
    """A data set on disk and the shape in which the model sees it."""

    name: str = MISSING  # of its YAML file, and of its rows in tables
    root: str | None = None  # folder with train.beton and val.beton, or with train/ and val/ class folders
    num_classes: int = 1000  # outputs of the head
    image_size: int = 224  # side of the square given to the model
    eval_resize: int = 256  # evaluation: short side before the centre crop; equal to image_size means no margin
    mean: list[float] = field(default_factory=lambda: [0.5, 0.5, 0.5])  # of pixels in [0, 1]; .5, .5: range [-1, 1]
    std: list[float] = field(default_factory=lambda: [0.5, 0.5, 0.5])  # likewise
    label_noise: float = 0.0  # training: the fraction of labels replaced by another class, uniformly
    train_fraction: float = 1.0  # class-stratified, seeded; the rest is the held-out minival
    backend: str = "auto"  # ffcv | torch | memory (decoded once, kept on the device) | auto
    decode: str = "auto"  # auto, cpu: the processor; gpu was retired (benchmarks/LOADER.md)
    workers: int = 0  # decoding threads of this rank; 0: all cores of the machine over its ranks, at most 16
    antialias: bool = False  # training crop: area-average instead of plain bilinear
    eval_batch_size: int = 256  # of this rank
    interpolation: str = "area"  # evaluation resize: area | bilinear, bicubic (Pillow's, for weights of others)
    crop_mode: str = "center"  # evaluation, as timm: center (short side to eval_resize) | squash (both) | border (long)
    eval_sets: list[str] = field(default_factory=lambda: ["val"])  # counted after training: data/evalsets.py
    eval_root: str | None = None  # folder of the published test sets V2, R and C; none: data.root
    finetune_steps: int = 500  # of recipe=finetune, GSAM paper B.2
    finetune_warmup: int = 100  # likewise


@dataclass
class TrainConfig:
    """How the run is executed: precision, compilation, intervals."""

    device: str = "auto"  # auto | cpu | cuda
    dtype: str = "auto"  # bf16 (autocast) | fp32 | auto: bf16 where the GPU has it, else fp32
    compile: bool | None = None  # torch.compile the forward and backward passes; null: on a GPU
    reduce: str = "fp32"  # gradients between ranks: fp32 | bf16, half the bytes, rounded once a step
    deterministic: bool = False  # torch's deterministic algorithms; bitwise only on the CPU
    threads: int = 0  # CPU threads of torch; 0 leaves torch's choice
    chunk: int | None = None  # images per pass at most; null or 0: as many as the device has memory for
    memory: str | None = None  # of the device, for this run: GB ("24GB") or a share ("0.5"); null: what is free
    log_every: int = 50  # steps between log lines; the only moments the host waits for the device
    eval_every_epochs: float = 10  # 0: only at the end
    save_every_minutes: float = 20  # besides after every evaluation
    save_every_steps: int = 0  # 0: by minutes only
    timeout_minutes: float = 10  # several processes: one without progress for this long ends, and the others with it


@dataclass
class Config:
    """Everything one run needs. `python train.py --cfg job --resolve` prints it."""

    model: ModelConfig = field(default_factory=ModelConfig)
    recipe: RecipeConfig = field(default_factory=RecipeConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    sharpness: SharpnessConfig = field(default_factory=SharpnessConfig)
    log: LogConfig = field(default_factory=LogConfig)
    init: str | None = None  # weights to start from: a run's directory or a .safetensors file under timm's names
    seed: int = 0
