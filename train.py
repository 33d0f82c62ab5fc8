"""`python train.py model=vit_b32 optim=gsam data.root=/data/imagenet`; `--help` lists the choices."""

import sys

from sam_repro.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
