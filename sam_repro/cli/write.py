"""Write a data set as train.beton and val.beton, each with a manifest.

  sam-repro write imagenet --src /data/ILSVRC2012 --dst /data/imagenet     # folders, or the original tar files
  sam-repro write pets --src /data/torchvision --dst /data/pets --download
  sam-repro write arrays --src images.npz --dst /data/mine

A JPEG that is small enough and that FFCV can decode keeps its coefficients, so no pixel changes. It gets restart
markers, so that training can decode a crop without reading the rest. It loses its metadata. --segment 0 keeps its
bytes. Larger images, other formats and CMYK are encoded again. Arrays keep their pixels. EXIF orientation is not
applied, as in TensorFlow's pipelines. The same command again writes only what changed. A file without restart markers
is recoded.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

from sam_repro.data.write.dataset import LAYOUTS, write_dataset
from sam_repro.errors import plural


def add_arguments(parser: ArgumentParser) -> None:
    """The options of `sam-repro write`."""
    parser.add_argument("name", choices=sorted(LAYOUTS), help="the data set, or the layout it comes in")
    parser.add_argument("--src", type=Path, required=True, help="folder (arrays: .npz file) to read")
    parser.add_argument("--dst", type=Path, required=True, help="folder to write; data.root of a run")
    parser.add_argument("--download", action="store_true", help="let torchvision fetch the data into --src first")
    parser.add_argument("--max-side", type=int, default=500, help="pixels; larger images are shrunk (default: 500)")
    parser.add_argument("--quality", type=int, default=90, help="JPEG quality of re-encoded images (default: 90)")
    parser.add_argument(
        "--segment", type=int, default=64, help="pixels between restart markers; 0 keeps JPEGs' bytes (default: 64)"
    )
    parser.add_argument("--skip-bad", action="store_true", help="leave unreadable images out and list them")
    parser.add_argument("--num-classes", type=int, help="how many classes there must be")
    parser.add_argument("--workers", type=int, default=0, help="decoding threads (default: the cores, at most 16)")


def run(args: Namespace) -> int:
    """Write, and say what was written; returns the exit code."""
    manifests = write_dataset(
        args.src,
        args.dst,
        layout=args.name,
        download=args.download,
        max_side=args.max_side,
        quality=args.quality,
        segment=args.segment,
        skip_bad=args.skip_bad,
        num_classes=args.num_classes,
        workers=args.workers,
    )
    for split, content in manifests.items():
        print(
            f"{split}: {plural(content['samples'], 'image', ',')} in {plural(len(content['classes']), 'class')}, "
            f"{content['bytes'] / 1e6:,.1f} MB, {content['reencoded']:,} re-encoded, {len(content['skipped'])} left out"
        )
    return 0
