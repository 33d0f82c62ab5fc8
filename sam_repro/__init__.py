"""Reproduce sharpness-aware training on ImageNet: SAM, GSAM and Eigen-SAM with timm models and FFCV data."""

__version__ = "0.1.0"
