"""The dominant eigenvalue of a Hessian: our Lanczos and other people's tools, on the same net, images and device.

    python benchmarks/curvature.py --nets resnet18_cifar vit_s16 --output results/benchmarks/h100-curvature.json
    python benchmarks/curvature.py --nets vit_digits --device cpu

Weights: a few steps of Adam on generated images of ten classes, so that the Hessian is not that of an initialisation.
All parties multiply in fp32 with TF32 off and the unfused attention kernel, on the same images in the same batches, and
get one product before their clock starts. A figure is the median over `--rounds` whole computations, each of which
makes everything anew (graphs of gradients included; compilation, reported separately, excepted); on a CPU seconds are
processor time, for which one thread is best (OMP_NUM_THREADS=1). Parties:

    reverse       ours: Lanczos with full reorthogonalisation; the graph of the gradient kept between products
    forward       ours, products by forward over reverse
    reverse-compiled, forward-compiled   the same under torch.compile
    curvlinops    curvlinops.HessianLinearOperator and scipy's eigsh (ARPACK), k=1, its vectors on the host, in float32
    eigenthings   hessian-eigenthings' HessianOperator and its Lanczos, which takes a number of products and no
                  tolerance: it is told the smallest that does (found outside the clock)

`residual` is ||Hv - lambda v|| / |lambda|, measured for every party by one more product of the same operator. A peer
may reach a smaller one than it was asked for, since it looks less often. So each is compared with ours run to the
residual that the peer reached, within 1 % (`ours at its residual`): that ratio of seconds is the claim.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sam_repro.config.compose import compose_config
from sam_repro.curvature import lanczos
from sam_repro.models.build import build_model
from sam_repro.optim.hessian import Hessian
from sam_repro.records import ledger

# (sigma, unit v, products) at a relative residual of `tol`
Answer = tuple[float, Tensor, int]
Party = Callable[[float], Answer]
MOST = 400  # products


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", nargs="+", default=["resnet18_cifar", "vit_s16"], help="names of configs/model")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--batch", type=int, default=256, help="images a pass")
    parser.add_argument("--tol", type=float, default=1e-3, help="relative residual")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--parties", nargs="+", help="only these")
    parser.add_argument("--train-steps", type=int, default=30)
    parser.add_argument(
        "--budget", type=float, default=0, help="seconds a net after which no party is started; 0: none"
    )
    parser.add_argument("--resume", action="store_true", help="keep what --output has of the same commit and hardware")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--show", type=Path, metavar="JSON", help="print the table of a stored result, measure nothing")
    return parser.parse_args()


class Problem:
    """One net at weights that have seen some training, its images, and every way to its dominant eigenvalue."""

    def __init__(self, name: str, args: argparse.Namespace):
        self.device = torch.device(args.device)
        torch.manual_seed(0)
        cfg = compose_config([f"model={name}", *(["data=cifar10"] if name.endswith("cifar") else [])])
        size = 24 if name == "vit_digits" else cfg.data.image_size
        self.model = build_model(cfg.model, num_classes=10, image_size=size).to(self.device)
        patterns = F.interpolate(torch.randn(10, 3, 8, 8), size=size)
        labels = torch.randint(10, (args.images,))
        images = patterns[labels] + torch.randn(args.images, 3, size, size)
        x, y = images.to(self.device), labels.to(self.device)
        self.batches = list(zip(x.split(args.batch), y.split(args.batch), strict=True))
        base = torch.optim.Adam(self.model.parameters(), lr=1e-3)
        for i in range(args.train_steps):
            inputs, targets = self.batches[i % len(self.batches)]
            base.zero_grad()
            F.cross_entropy(self.model(inputs), targets).backward()
            base.step()
        self.model.eval()
        self.params = {n: p.detach() for n, p in self.model.named_parameters()}
        self.size = size

    def hessian(self, **options) -> Hessian:
        def objective(tensors: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
            return F.cross_entropy(torch.func.functional_call(self.model, tensors, (x,)), y)

        return Hessian(objective, self.params, self.batches, **options)

    # ---- parties -----------------------------------------------------------------------------------------------------

    def ours(self, mode: str, *, compiled: bool = False) -> Party:
        """Lanczos with this kind of product. What is compiled is compiled once, the graph of gradients made anew."""
        kept = self.hessian(mode=mode, compiled=compiled)

        def party(tol: float) -> Answer:
            kept.renew(self.params, self.batches)
            pairs = lanczos(kept, tol=tol, max_steps=MOST)
            kept.graphs = []
            return pairs.value, pairs.vectors[0], pairs.products

        return party

    def curvlinops(self, tol: float) -> Answer:
        import curvlinops
        from scipy.sparse.linalg import LinearOperator, eigsh

        params = list(self.model.parameters())
        theirs = curvlinops.HessianLinearOperator(
            self.model, nn.CrossEntropyLoss(), params, self.batches, check_deterministic=False
        ).to_scipy(dtype=np.float32)
        products = 0

        def product(v: np.ndarray) -> np.ndarray:
            nonlocal products
            products += 1
            return theirs.matvec(v)

        start = np.random.default_rng(0).standard_normal(theirs.shape[0]).astype(np.float32)
        values, vectors = eigsh(
            LinearOperator(theirs.shape, matvec=product, dtype=np.float32), k=1, which="LM", tol=tol, v0=start
        )
        return float(values[0]), torch.tensor(vectors[:, 0], device=self.device), products

    def eigenthings(self, tol: float, products: int = 0) -> Answer:
        """With `products` Lanczos steps, or the fewest that reach `tol`."""
        from hessian_eigenthings import HessianOperator, supervised_loss
        from hessian_eigenthings import lanczos as their_lanczos

        operator = HessianOperator(self.model, self.batches, supervised_loss(nn.CrossEntropyLoss()))
        steps = products or lanczos(self.hessian(), tol=tol, max_steps=MOST).products
        while True:
            found = their_lanczos(operator, k=1, max_iter=steps, tol=tol, reorthogonalize=True, seed=0)
            if products or bool(found.converged.all()) or steps >= MOST:
                return float(found.eigenvalues[0]), found.eigenvectors[0], steps
            steps += 1


def timed(party: Party, tol: float, device: torch.device) -> tuple[float, Answer]:
    """Seconds, and the answer. On a CPU it is processor time, so that other processes on the machine do not count."""
    clock, wait = time.process_time, lambda: None
    if device.type == "cuda":
        clock, wait = time.perf_counter, torch.cuda.synchronize
    wait()
    start = clock()
    answer = party(tol)
    wait()
    return clock() - start, answer


def bench_net(name: str, args: argparse.Namespace, rows: list[dict], save: Callable[[], None]) -> None:
    """Every party of one net; rows of the JSON, saved after each."""
    problem, begun = Problem(name, args), time.perf_counter()
    exact = problem.hessian(keep=False)
    ours = {mode: problem.ours(mode) for mode in ("reverse", "forward")}
    ours |= {f"{mode}-compiled": problem.ours(mode, compiled=True) for mode in ("reverse", "forward")}
    theirs: dict[str, Party] = {"curvlinops": problem.curvlinops, "eigenthings": problem.eigenthings}
    wanted = [p for p in (*ours, *theirs) if not args.parties or p in args.parties]
    known = {row["party"] for row in rows if row["net"] == name}
    print(f"{name}: {exact.size:,} parameters, {args.images} images of {problem.size} px", flush=True)
    for party in [p for p in wanted if p not in known]:
        if args.budget and time.perf_counter() - begun > args.budget:
            print(f"{name} {party}: not run, the budget is spent", flush=True)
            continue
        try:
            run, is_ours = (ours | theirs)[party], party in ours
            setup, answer = timed(run, 0.9, problem.device)  # a few products: kernels chosen, functions compiled
            if party == "eigenthings":
                _, (*_, products) = timed(run, args.tol, problem.device)
                run = lambda tol, n=products: problem.eigenthings(tol, n)  # noqa: E731
            times, answers = zip(*(timed(run, args.tol, problem.device) for _ in range(args.rounds)), strict=True)
            answer = answers[-1]
            value, v, products = answer
            residual = float((exact(v) - value * v).norm()) / abs(value)
            row = {"kind": "curvature", "net": name, "party": party, "sigma_max": value, "residual": residual}
            row |= {"products": products, "seconds": statistics.median(times), "rounds": times, "setup_seconds": setup}
            row |= {"parameters": exact.size, "image_size": problem.size}
            if not is_ours:
                row["ours"] = {}
                for mode in [m for m in ours if m in wanted]:
                    pairs = [timed(ours[mode], 1.01 * residual, problem.device) for _ in range(args.rounds)]
                    seconds = statistics.median(t for t, _ in pairs)
                    row["ours"][mode] = {"seconds": seconds, "products": pairs[-1][1][2]}
                    row["ours"][mode]["ratio"] = row["seconds"] / seconds
            rows.append(row)
            save()
            print(show_row(row), flush=True)
        except Exception as error:  # one party's failure must not cost the others their run
            print(f"{name} {party} failed: {type(error).__name__}: {str(error)[:400]}", flush=True)


def show_row(row: dict) -> str:
    cells = [row["net"], row["party"], row["products"], f"{row['seconds']:.2f}"]
    cells += [f"{1e3 * row['seconds'] / row['products']:.0f}", f"{row['sigma_max']:.5g}", f"{row['residual']:.1e}"]
    at = [f"{m} {o['products']}, {o['seconds']:.2f} s: **{o['ratio']:.2f} x**" for m, o in row.get("ours", {}).items()]
    return f"| {' | '.join(map(str, [*cells, '; '.join(at)]))} |"


def show(result: dict) -> str:
    """The Markdown table of a result."""
    lines = ["| net | party | products | s | ms per product | sigma_max | residual | ours at its residual |"]
    lines += ["|---|---|--:|--:|--:|--:|--:|---|", *map(show_row, result["entries"])]
    v = result["versions"]
    names = ("python", "torch", "timm", "curvlinops-for-pytorch", "hessian-eigenthings", "scipy")
    lines += [
        "",
        f"{result['hardware']}, {result['images']} images, {result['batch']} a pass, fp32, asked for a relative",
    ]
    lines[-1] += f" residual of {result['tol']:g}; {', '.join(f'{k} {v[k]}' for k in names if v.get(k))}; commit "
    clock = "" if "CPU" not in result["hardware"] else f", processor seconds of {result['threads']} thread(s)"
    return "\n".join(lines) + f"{result['commit'][:8]}; median of {result['rounds']} rounds{clock}."


def main() -> None:
    args = arguments()
    if args.show:
        print(show(json.loads(args.show.read_text())))
        return
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = True
    peers = ("curvlinops-for-pytorch", "hessian-eigenthings", "scipy")
    rows: list[dict] = []
    result = ledger.provenance() | {
        "hardware": torch.cuda.get_device_name() if args.device == "cuda" else f"CPU {ledger.cpu_name()}",
        "threads": torch.get_num_threads(),
        "images": args.images,
        "batch": args.batch,
        "tol": args.tol,
        "rounds": args.rounds,
        "entries": rows,
    }
    result["versions"] |= {p: ledger.version(p) for p in peers}

    def save() -> None:
        if args.output:
            args.output.parent.mkdir(parents=True, exist_ok=True)
            args.output.write_text(json.dumps(result, indent=1) + "\n")

    if args.resume and args.output and args.output.exists():
        before = json.loads(args.output.read_text())
        if all(before[key] == result[key] for key in ("hardware", "commit", "images", "batch", "tol")):
            rows += before["entries"]
    with sdpa_kernel(SDPBackend.MATH):
        for name in args.nets:
            bench_net(name, args, rows, save)
    print(show(result))


if __name__ == "__main__":
    main()
