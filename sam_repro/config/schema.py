"""The typed schema of a run. Every field is documented here, once; the YAML files only cite where a number comes from.

A field states its limits next to itself, and under which settings it is read (`limits.limited`); `checks` has only what
stands between fields. This package imports no torch, so that plans, tables and figures work on a laptop.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from sam_repro.config.limits import (
    AT_LEAST_ONE,
    BELOW_ONE,
    FINITE,
    NAME,
    NOT_NEGATIVE,
    PART,
    POSITIVE,
    REFERENCE,
    UNIT,
    Range,
    limited,
)

MISSING: Any = "???"  # OmegaConf's word for a value that a file of configs/ has to give

# Settings under which fields below are read.
PERTURBATIONS = ("sam", "asam", "adaptive_official", "fisher", "friendly", "vasso", "eigen", "random")
PERTURBED = {"optim.perturb": PERTURBATIONS}
TIED = PERTURBED | {"optim.rho_schedule": ("lr",)}
WEIGHTED = PERTURBED | {"optim.combine": ("ascent", "min_f_h", "weighted", "wsam", "cr")}
EIGEN = {"optim.perturb": ("eigen",)}
WALK = {"optim.kind": ("entropy_sgd",)}
BETAS = {"recipe.base": ("adamw", "adam", "adabelief", "Adam", "AdamW", "Adamax", "NAdam", "RAdam")}
EPS = {"recipe.base": (*BETAS["recipe.base"], "Adadelta", "Adagrad", "Muon", "RMSprop")}
MEASURED = {"sharpness.images": AT_LEAST_ONE}


@dataclass
class OptimConfig:
    """The gradient method: a perturbation (where to look), a combination (what to descend), a cadence (when).

    Any perturbation goes with any combination and any cadence.
    """

    name: str = limited(MISSING, NAME)  # of its YAML file, and of its rows in tables
    kind: str = limited("two_pass", ("two_pass", "entropy_sgd"))  # perturb and combine, or the Langevin walk below
    perturb: str = limited("none", ("none", *PERTURBATIONS))  # where to look (optim/perturbations.py)
    # what to descend (optim/combinations.py): robust is SAM, ascent is GSAM; cr takes three passes
    combine: str = limited("robust", ("robust", "ascent", "min_f_h", "weighted", "wsam", "cr"), read_by=PERTURBED)
    rho_max: float = limited(0.0, NOT_NEGATIVE, read_by=PERTURBED)  # radius of the perturbation at the peak lr
    # radius at the smallest learning rate; for a constant radius set both
    rho_min: float = limited(0.0, NOT_NEGATIVE, read_by=PERTURBED)
    # ascent, min_f_h: alpha; weighted: lambda; wsam, cr: gamma
    alpha: float = limited(0.0, FINITE, read_by=(WEIGHTED, EIGEN | {"optim.eigen_alpha": (None,)}))
    beta: float = limited(0.0, FINITE, read_by=PERTURBED | {"optim.combine": ("cr",)})  # weight of g_p - g_m
    # the base optimizer takes g, then w -= lr (d - g), which is not clipped (WSAM's default)
    decoupled: bool = limited(False, read_by=PERTURBED)
    # the method's own step at every n-th step, clean gradients between (LookSAM's k)
    every: int = limited(1, AT_LEAST_ONE, read_by=PERTURBED)
    # weight of the part that clean steps reuse (LookSAM's alpha)
    reuse: float = limited(0.0, FINITE, read_by=PERTURBED | {"optim.every": Range(2)})
    # lr: tied to the learning rate (Algorithm 1); constant: rho_max throughout
    rho_schedule: str = limited("lr", ("lr", "constant"), read_by=PERTURBED)
    faithful_rho: bool = limited(False, read_by=TIED)  # let rho go negative in the warm-up, as the reference (D-05)
    m: int = limited(64, NOT_NEGATIVE)  # images that share one perturbation: the reference's batch per device (D-01)
    # group: every m images perturb on their own; global: all images of all ranks share one eps
    scope: str = limited("group", ("group", "global"), read_by=PERTURBED)
    # kept for older rows. loop: train.chunk=<m>; batched: all groups at once; auto: train.chunk decides
    groups: str = limited("auto", ("auto", "loop", "batched"))
    # asam: added to |w|; fisher: weight of the squared gradient in the Fisher matrix
    eta: float = limited(0.0, NOT_NEGATIVE, read_by={"optim.perturb": ("asam", "fisher")})
    # scale by |w| only parameters called weight, as Kwon et al.; else all
    weights_only: bool = limited(False, read_by={"optim.perturb": ("asam",)})
    # how much of the running mean is subtracted from g
    sigma: float = limited(1.0, FINITE, read_by={"optim.perturb": ("friendly",)})
    lam: float = limited(0.9, UNIT, read_by={"optim.perturb": ("friendly",)})  # weight of the past in the running mean
    theta: float = limited(0.9, UNIT, read_by={"optim.perturb": ("vasso",)})  # weight of the new gradient in that mean
    k: int = limited(100, AT_LEAST_ONE, read_by=EIGEN)  # steps between estimates of the eigenvector
    p: int = limited(5, AT_LEAST_ONE, read_by=EIGEN)  # power iterations per estimate
    # weight of the eigenvector; null: alpha. Set it if `combine` uses alpha for itself
    eigen_alpha: float | None = limited(None, FINITE, read_by=EIGEN)
    # estimate on m images of the step, on all (batch), or always on the first batch
    eigen_images: str = limited("group", ("group", "batch", "fixed"), read_by=EIGEN)
    eigen_tf32: bool = limited(False, read_by=EIGEN)  # let a GPU's products use TF32, several times faster
    eigen_mode: str = limited("eval", ("eval", "train"), read_by=EIGEN)  # mode of the model; eval as the release
    # none as the release; v_perp: to length 1; sum: eps to length rho
    renormalise: str = limited("none", ("none", "v_perp", "sum"), read_by=EIGEN)
    # count k inside the epoch; perturb by rho g before the first estimate (D-29)
    faithful_release: bool = limited(False, read_by=EIGEN)
    inner_steps: int = limited(20, AT_LEAST_ONE, read_by=WALK)  # L, steps of the walk
    inner_parts: int = limited(1, AT_LEAST_ONE, read_by=WALK)  # parts of the batch that the walk takes in turn
    inner_lr: float = limited(0.1, POSITIVE, read_by=WALK)  # eta of the walk
    inner_momentum: float = limited(0.9, UNIT, read_by=WALK)  # Nesterov's, in the walk
    inner_noise: float = limited(1e-4, NOT_NEGATIVE, read_by=WALK)  # standard deviation of the Langevin noise
    inner_average: float = limited(0.75, UNIT, read_by=WALK)  # of mu, the mean of the walk
    gamma: float = limited(0.03, NOT_NEGATIVE, read_by=WALK)  # pull back to w
    scoping: float = limited(1e-3, NOT_NEGATIVE, read_by=WALK)  # growth of gamma per step


@dataclass
class LogConfig:
    """Where a run leaves its files. Nothing here changes a result."""

    runs_dir: str = "runs"  # <runs_dir>/<run_id>: config, log.jsonl, checkpoints, final weights
    ledger_dir: str = "results/runs"  # one immutable JSON per finished run
    wandb: str = limited("auto", ("auto", "online", "offline", "disabled"))  # auto: online with a key, else offline
    project: str = "sam-repro"  # of W&B
    group: str | None = None  # W&B group, such as table1/vit_b32
    progress: str = limited("auto", ("auto", "bar", "lines"))  # auto: a bar on a terminal, else lines


@dataclass
class SharpnessConfig:
    """Curvature of the training loss, measured at the end of a run and, if asked for, while it trains."""

    # of the training split, classes in turn, centre-cropped; 0: no measurement
    images: int = limited(512, NOT_NEGATIVE)
    every: int = limited(0, NOT_NEGATIVE, read_by=MEASURED)  # steps between measurements; 0: only at the end
    batch: int = limited(32, POSITIVE, read_by=MEASURED)  # images per pass of each rank: changes only the memory


@dataclass
class ModelConfig:
    """A timm model and its row of the GSAM paper's Table 4."""

    name: str = limited(MISSING, NAME)  # the field's short name: vit_b32, mixer_s8, resnet50
    timm: str = MISSING  # timm.create_model's name
    family: str = limited(MISSING, ("vit", "mixer", "resnet", "other"))  # how weights start; other: as timm does it
    params: int = 0  # number of parameters with 1,000 classes; 0 when no source states one
    kwargs: dict[str, Any] = field(default_factory=dict)  # timm.create_model's keyword arguments
    tiny_kwargs: dict[str, Any] = field(default_factory=dict)  # laid over kwargs when model.tiny is set
    tiny: bool = False  # a toy of the same family, for debug=tiny
    sam_rho: float = limited(0.05, NOT_NEGATIVE)  # rho of plain SAM (Chen et al. 2022; D-12)
    rho_max: float = limited(0.05, NOT_NEGATIVE)  # Table 4
    rho_min: float = limited(0.05, NOT_NEGATIVE)  # Table 4
    alpha: float = limited(0.1, FINITE)  # Table 4


@dataclass
class RecipeConfig:
    """Schedule, base optimizer and loss: what vanilla, SAM and GSAM have in common."""

    name: str = limited(MISSING, NAME)  # of its YAML file, and of its rows in tables
    epochs: float = limited(300, POSITIVE, read_by={"recipe.steps": (None,)})  # passes over the training split
    steps: int | None = limited(None, AT_LEAST_ONE)  # instead of epochs
    batch_size: int = limited(4096, POSITIVE)  # global: all ranks together
    base: str = "adamw"  # adamw | sgd | adam | adabelief | a class of torch.optim, such as NAdam
    lr: float = limited(3e-3, POSITIVE)  # the peak, reached at the end of the warm-up
    # the last learning rate over the peak
    lr_min_ratio: float = limited(
        0.01, PART, read_by=({"recipe.schedule": ("linear",)}, TIED | {"recipe.schedule": ("constant",)})
    )
    warmup_steps: int = limited(10_000, NOT_NEGATIVE)  # linear from 0
    schedule: str = limited("linear", ("linear", "cosine", "constant"))  # after the warm-up
    weight_decay: float = limited(0.3, NOT_NEGATIVE)  # AdamW, AdaBelief: decoupled, times lr; SGD, Adam: coupled L2
    # which parameters; kernels: no bias, norm or position embedding
    decay: str = limited("kernels", ("kernels", "all"), read_by={"recipe.weight_decay": POSITIVE})
    momentum: float = limited(0.9, BELOW_ONE, read_by={"recipe.base": ("sgd", "SGD", "RMSprop", "Muon")})  # of the base
    nesterov: bool = limited(False, read_by={"recipe.base": ("sgd", "SGD", "Muon")})  # of the base
    betas: list[float] = limited([0.9, 0.999], BELOW_ONE, length=2, read_by=BETAS)  # of the base
    # of the base; AdaBelief: its authors' ImageNet value (1e-16 is their library's; D-28)
    eps: float = limited(1e-8, NOT_NEGATIVE, read_by=EPS)
    clip: float = limited(1.0, NOT_NEGATIVE)  # global norm of the averaged gradient, before the base optimizer; 0: off
    loss: str = limited("sigmoid", ("sigmoid", "softmax"))  # sigmoid: sum over classes of binary cross-entropies
    label_smoothing: float = limited(0.0, UNIT, read_by={"recipe.loss": ("softmax",)})  # weight of the uniform target


@dataclass
class AugmentConfig:
    """What happens to a training image between the file and the model."""

    name: str = limited(MISSING, NAME)  # of its YAML file, and of its rows in tables
    crop: str = limited("inception", ("inception", "pad", "none"))  # pad: zeros around, random crop; none: evaluation's
    pad: int = limited(4, NOT_NEGATIVE, read_by={"augment.crop": ("pad",)})  # pixels of zeros on each side
    # range of the crop's part of the area
    scale: list[float] = limited([0.05, 1.0], PART, length=2, ascending=True, read_by={"augment.crop": ("inception",)})
    # range of the crop's width / height
    ratio: list[float] = limited(
        [0.75, 4 / 3], POSITIVE, length=2, ascending=True, read_by={"augment.crop": ("inception",)}
    )
    flip: bool = True  # left-right with probability 1/2
    randaugment: int = limited(0, NOT_NEGATIVE)  # magnitude of two operations, as in TensorFlow (10, 15); 0: off
    cutout: int = limited(0, NOT_NEGATIVE)  # side in pixels of a square of the mean colour, anywhere; 0: off
    mixup: float = limited(0.0, NOT_NEGATIVE)  # p of the Beta(p, p) that mixes a group's images with neighbours; 0: off


@dataclass
class DataConfig:
    """A data set on disk and the shape in which the model sees it."""

    name: str = limited(MISSING, NAME)  # of its YAML file, and of its rows in tables
    root: str | None = None  # folder with train.beton and val.beton, or with train/ and val/ class folders
    num_classes: int = limited(1000, POSITIVE)  # outputs of the head
    image_size: int = limited(224, POSITIVE)  # side of the square given to the model
    eval_resize: int = limited(256, POSITIVE)  # evaluation: short side before the centre crop; image_size: no margin
    mean: list[float] = limited([0.5, 0.5, 0.5], FINITE, length=3)  # of pixels in [0, 1]; .5, .5: range [-1, 1]
    std: list[float] = limited([0.5, 0.5, 0.5], POSITIVE, length=3)  # likewise
    label_noise: float = limited(0.0, BELOW_ONE)  # training: the part of labels replaced by another class, uniformly
    train_fraction: float = limited(1.0, PART)  # class-stratified, seeded; the rest is the held-out minival
    backend: str = limited("auto", ("auto", "ffcv", "torch", "memory"))  # memory: decoded once, kept on the device
    decode: str = limited("auto", ("auto", "cpu"))  # both decode on the CPU; gpu was removed (benchmarks/LOADER.md)
    workers: int = limited(0, NOT_NEGATIVE)  # decoding threads of this rank; 0: all cores over the ranks, at most 16
    # training crop: area-average instead of plain bilinear
    antialias: bool = limited(False, read_by={"augment.crop": ("inception",)})
    eval_batch_size: int = limited(256, POSITIVE)  # of this rank
    # evaluation resize: bilinear, bicubic are Pillow's, for weights of others
    interpolation: str = limited("area", ("area", "bilinear", "bicubic"))
    # evaluation, as timm: eval_resize is the short side (center), both sides (squash) or the long one (border)
    crop_mode: str = limited("center", ("center", "squash", "border"))
    eval_sets: list[str] = field(default_factory=lambda: ["val"])  # counted after training: data/evalsets.py
    eval_root: str | None = None  # folder of the published test sets V2, R and C; none: data.root
    finetune_steps: int = limited(500, POSITIVE, read_by=REFERENCE)  # of recipe=finetune, GSAM paper B.2
    finetune_warmup: int = limited(100, NOT_NEGATIVE, read_by=REFERENCE)  # likewise


@dataclass
class TrainConfig:
    """How the run is executed: precision, compilation, intervals."""

    device: str = limited("auto", ("auto", "cpu", "cuda"))  # auto: the GPU where there is one
    dtype: str = limited("auto", ("auto", "bf16", "fp32"))  # bf16: autocast; auto: bf16 where the GPU has it, else fp32
    compile: bool | None = None  # torch.compile the forward and backward passes; null: on a GPU
    reduce: str = limited("fp32", ("fp32", "bf16"))  # gradients between ranks; bf16: half the bytes, rounded per step
    deterministic: bool = False  # torch's deterministic algorithms; bitwise only on the CPU
    threads: int = limited(0, NOT_NEGATIVE)  # CPU threads of torch; 0 leaves torch's choice
    chunk: int | None = limited(None, NOT_NEGATIVE)  # most images per pass; null or 0: as many as memory can hold
    memory: str | None = None  # of the device, for this run: GB ("24GB") or a share ("0.5"); null: what is free
    log_every: int = limited(50, POSITIVE)  # steps between log lines; only there the host waits for the device
    eval_every_epochs: float = limited(10, NOT_NEGATIVE)  # 0: only at the end
    save_every_minutes: float = limited(20, NOT_NEGATIVE)  # also after every evaluation
    save_every_steps: int = limited(0, NOT_NEGATIVE)  # 0: by minutes only
    timeout_minutes: float = limited(10, POSITIVE)  # several processes: if one makes no progress for so long, all end


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
    init: str | None = None  # weights to start from: a run's directory, or a file of weights under timm's names
    seed: int = limited(0, Range(0, 2**63, open_high=True))
