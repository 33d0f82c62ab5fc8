"""How many images a pass takes: planned from measurements on the device, within the memory that the run may use."""

from __future__ import annotations

import contextlib
import hashlib
import json
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from sam_repro import __version__
from sam_repro.config.compose import to_dict
from sam_repro.config.memory import GB, MARGIN, Needs, batch_bytes, choices, memory_bytes
from sam_repro.config.schema import Config, OptimConfig
from sam_repro.distributed.ranks import Ranks
from sam_repro.errors import OutOfMemory, UserError, plural
from sam_repro.optim import GradientStep
from sam_repro.optim.memory import halving, no_memory
from sam_repro.records.files import write_atomic

TRIAL = {"cuda": 8, "cpu": 2}  # images of the first trial pass; the second has three times as many
ON_CPU = 1.5  # what a pass on a CPU takes over what autograd keeps, which alone can be measured there


@dataclass(frozen=True)
class Plan:
    """How many images a pass takes, and why."""

    images: int
    m: int
    budget: float  # bytes that this run may use
    needs: Needs | None  # None where train.chunk decides
    key: str  # of the file in which measurements are remembered
    peaks: dict[str, float]  # measured in earlier runs, by images per pass
    before: float = 0.0  # bytes that the process had when it planned: part of its peak on a CPU, and not of the budget

    @property
    def expected(self) -> float:
        """Bytes at the peak: measured in an earlier run, else planned; 0 where nothing is known."""
        return self.peaks.get(str(self.images), self.needs.at(self.images) + self.before if self.needs else 0.0)


def plan_passes(
    cfg: Config,
    objective: Callable[..., Tensor],
    params: dict[str, nn.Parameter],
    buffers: dict[str, Tensor],
    ranks: Ranks,
    *,
    batch: int,
    m: int,
    at_once: bool,
    itemsize: int,
) -> Plan:
    """Choose the images per pass: the most that fit, and no more than make a GPU faster. A collective.

    Activations are measured by two small passes without torch.compile, which needs about as much. Measurements are
    remembered next to the compiler's cache. All ranks take the smallest choice of any.

    Args:
        objective: (params | buffers, images, labels) -> mean loss, not compiled.
        batch, m: images of this rank, and of a group; m divides the batch.
        at_once: whether several groups can share a pass.
        itemsize: bytes of a number in gradients and perturbed weights of a pass.

    Raises:
        UserError: where train.chunk would cut a group that BatchNorm has to see whole.
    """
    device, budget = ranks.device, budget_of(cfg, ranks)
    before = 0.0 if device.type == "cuda" else float(psutil.Process().memory_info().rss)
    key = key_of(cfg, device, m)
    measured = recall(key)
    wanted = cfg.train.chunk or {"loop": m, "batched": batch}.get(cfg.optim.groups, 0)
    if wanted:
        if buffers and wanted < m:
            raise UserError(f"train.chunk={wanted} is less than optim.m={m}, whose images BatchNorm sees in one pass")
        return Plan(min(wanted, batch), m, budget, None, key, measured.get("peaks", {}), before)
    if "per_image" not in measured:
        fixed, per_image = measure(cfg, objective, params, buffers, device)
        measured |= {"transient": fixed, "per_image": per_image}
        remember(key, measured)
    size = 4.0 * sum(p.numel() for p in params.values())  # one fp32 copy of the weights
    now = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0.0
    images = batch_bytes(cfg.recipe.batch_size / ranks.world, cfg.data.image_size)
    needs = Needs(
        fixed=now + images + measured["transient"] + size * copies(cfg.optim),
        per_image=measured["per_image"],
        per_group=3 * size * itemsize / 4 if cfg.optim.perturb != "none" else size * itemsize / 4,
        sums=size * (1 if cfg.optim.perturb == "none" else 2),
        m=m,
    )
    peaks = measured.get("peaks", {})
    sizes = list(choices(batch, m, at_once=at_once, divisible=not buffers))
    fits = [n for n in needs.fitting(sizes, budget) if peaks.get(str(n), 0.0) < budget]
    chosen = -int(ranks.max(-(fits or sizes[-1:])[0]))
    return Plan(chosen, m, budget, needs, key, peaks, before)


def copies(o: OptimConfig) -> int:
    """Copies of the weights that a method keeps: reduced gradient, AdamW's two means, its own memory."""
    if o.kind == "entropy_sgd":
        return 3 + 7
    memory = {"none": 0, "sam": 0, "eigen": 2}.get(o.perturb, 4)  # others make eps in some passes of their own
    return 4 + memory + 2 * (o.every > 1) + 2 * (o.scope == "global") + o.decoupled


# ---- what a run may use ----------------------------------------------------------------------------------------------


CAPPED: set[torch.device] = set()  # by train.memory of this or an earlier run of this process


def budget_of(cfg: Config, ranks: Ranks) -> float:
    """Bytes that this process may use of its device: train.memory, and no more than is free."""
    device, wanted = ranks.device, cfg.train.memory
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        if wanted is not None or device in CAPPED:
            most = total if wanted is None else memory_bytes(wanted, "train.memory", total=total)
            torch.cuda.set_per_process_memory_fraction(min(most / total, 1.0), device)
            CAPPED.add(device)
        fraction = getattr(torch.cuda, "get_per_process_memory_fraction", lambda device: 1.0)  # not in torch 2.6
        return min(total * fraction(device), free + torch.cuda.memory_reserved(device))
    free, total = cpu_memory()
    budget = free / ranks.local_world
    if wanted is not None:
        own = psutil.Process().memory_info().rss
        budget = min(budget, memory_bytes(wanted, "train.memory", total=total) - own)
    return max(budget, 1.0)


def cpu_memory() -> tuple[float, float]:
    """(bytes free, bytes in all) for this process: the machine's, within control groups and `ulimit -v`."""
    machine = psutil.virtual_memory()
    free, total = float(machine.available), float(machine.total)
    for limit, used in cgroup_limits():
        free, total = min(free, limit - used), min(total, limit)
    address_space = resource.getrlimit(resource.RLIMIT_AS)[0]
    if address_space != resource.RLIM_INFINITY:
        free = min(free, address_space - psutil.Process().memory_info().vms)
    return max(free, 0.0), total


# Of either version of control groups: the controller's folder, and the files of the limit and of what is in use.
CGROUPS = {"": ("", "memory.max", "memory.current")}
CGROUPS |= {"memory": ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes")}


def cgroup_limits(
    root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")
) -> list[tuple[float, float]]:
    """(limit, bytes in use that cannot be given back) of this process's control groups and of those above them."""
    limits = []
    with contextlib.suppress(OSError):
        for line in own.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers not in CGROUPS:
                continue
            top, limit, used = CGROUPS[controllers]
            place = Path(path.strip("/"))
            for folder in dict.fromkeys((place, *place.parents)):
                with contextlib.suppress(OSError, ValueError):  # of a group that is not there; "max" is no number
                    group = root / top / folder
                    most, now = (float((group / name).read_text()) for name in (limit, used))
                    stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
                    limits.append((most, now - float(stat.get("inactive_file", 0))))
    return [(most, now) for most, now in limits if most < 2**60]


# ---- what passes need ------------------------------------------------------------------------------------------------


def measure(
    cfg: Config,
    objective: Callable[..., Tensor],
    params: dict[str, nn.Parameter],
    buffers: dict[str, Tensor],
    device: torch.device,
) -> tuple[float, float]:
    """(fixed bytes, bytes per image) of a forward and backward pass, from two passes."""
    side, tuned = cfg.data.image_size, torch.backends.cudnn.benchmark

    def peak(n: int) -> float:
        images = torch.randint(0, 256, (n, 3, side, side), dtype=torch.uint8, device=device)
        labels = torch.zeros(n, dtype=torch.int64, device=device)
        leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
        copied = {name: b.clone() for name, b in buffers.items()}
        if device.type != "cuda":
            return ON_CPU * kept_by_autograd(lambda: objective(leaves | copied, images, labels), leaves)
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        loss = objective(leaves | copied, images, labels)
        torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before

    def both(n: int) -> tuple[float, float]:
        if device.type != "cuda":
            return peak(n), peak(3 * n)
        peaks = [(peak(n), peak(3 * n)) for _ in range(3)]  # the first has what libraries allocate once
        few, many = zip(*peaks[1:], strict=True)
        return min(few), min(many)

    torch.backends.cudnn.benchmark = False  # which would try algorithms with large workspaces
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            (few, many), n = halving(both, TRIAL[device.type], least=2, doing="a trial pass")
    finally:
        torch.backends.cudnn.benchmark = tuned
        torch.cuda.empty_cache()  # or what stays for the whole run would break up the memory of these passes
    per_image = max((many - few) / (2 * n), 1.0)
    return max(few - n * per_image, 0.0), per_image


def kept_by_autograd(forward: Callable[[], Tensor], leaves: dict[str, Tensor]) -> float:
    """Bytes of the tensors that a forward pass keeps for its backward pass, without the weights."""
    known = {leaf.untyped_storage().data_ptr() for leaf in leaves.values()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # the tensor itself would keep its own graph alive, in a cycle that nothing frees

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = forward()
    del loss  # only now: the storages of a living graph have addresses of their own
    return float(sum(kept.values()))


# ---- what is remembered ----------------------------------------------------------------------------------------------


def key_of(cfg: Config, device: torch.device, m: int) -> str:
    """The name of a measurement: model, method, m, image size, precision, device and versions, in words and a hash."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    parts = [to_dict(cfg)["model"], cfg.optim.name, m, cfg.data.image_size, cfg.data.num_classes, cfg.recipe.loss]
    parts += [cfg.train.dtype, cfg.train.compile, name, torch.__version__, __version__]
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:8]
    return f"{cfg.model.name} {cfg.optim.name} m={m} {cfg.data.image_size} px {name} {digest}"


def memory_file() -> Path:
    """The file next to the compiler's cache, which TORCHINDUCTOR_CACHE_DIR moves."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return Path(cache_dir()) / "sam_repro_memory.json"


def recall(key: str) -> dict[str, Any]:
    """The measurements under this key; empty if no file can be read."""
    with contextlib.suppress(OSError, ValueError, TypeError, AttributeError):
        measured = json.loads(memory_file().read_text()).get(key, {})
        numbers = [
            *measured.get("peaks", {}).values(),
            *(measured[k] for k in ("transient", "per_image") if k in measured),
        ]
        if all(isinstance(x, int | float) and x >= 0 for x in numbers):
            return measured
    return {}


def remember(key: str, measured: dict[str, Any]) -> None:
    """Keep measurements for the next start, if the file can be written."""
    with contextlib.suppress(OSError):
        path = memory_file()
        try:
            everything = json.loads(path.read_text())
        except (OSError, ValueError):
            everything = {}
        write_atomic(
            path, json.dumps({**(everything if isinstance(everything, dict) else {}), key: measured}, indent=1)
        )


# ---- what is said ----------------------------------------------------------------------------------------------------


def peak_bytes(device: torch.device) -> float:
    """The most memory that this process had: on a GPU reserved by torch, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def memory_sentence(step: GradientStep, device: torch.device) -> str:
    """Images per pass, the memory that was expected and measured, for the log; to be said after the first step."""
    plan: Plan = step.plan
    images, m = step.chunk or plan.images, plan.m
    how = f"{plural(images // m, 'group')} of {m} at once" if images >= 2 * m else f"a group of {m}"
    how = how if images >= m else f"a part of a group of {m}"
    peak = peak_bytes(device)
    if device.type == "cuda":
        measured = recall(plan.key)
        peaks = measured.get("peaks", {}) | {str(images): peak}
        if images < plan.images:
            peaks[str(plan.images)] = plan.budget  # which was too little
        remember(plan.key, measured | {"peaks": peaks})
    expected = f", expected about {plan.expected / GB:.1f}" if plan.expected else ""
    return (
        f"passes of {plural(images, 'image')} ({how}); memory at its peak {peak / GB:.1f} GB{expected}, "
        f"of {(plan.budget + plan.before) / GB:.1f} GB that this run may use"
    )


@contextmanager
def whole_groups(step: GradientStep) -> Iterator[None]:
    """Name the largest group that fits, if BatchNorm needs more images in one pass than memory can hold.

    Raises:
        OutOfMemory: in place of torch's error.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        plan: Plan | None = step.plan
        if plan is None or plan.needs is None or not step.buffers or not no_memory(error):
            raise
        fits = plan.needs.largest_group(MARGIN * plan.budget)
        largest = max((d for d in range(1, plan.m) if plan.m % d == 0 and d <= fits), default=1)
        raise OutOfMemory(
            f"there is no memory for optim.m={plan.m} images in one pass, which BatchNorm sees together; the largest "
            f"optim.m that fits is about {largest}"
        ) from error
