"""`python train.py model=vit_b32 optim=gsam data.root=/data/imagenet`; `--help` lists the choices."""

from sam_repro.cli.train import cli

if __name__ == "__main__":
    cli()
