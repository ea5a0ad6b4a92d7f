"""Datasets: embedded scenes, CIFAR-100, ImageNet and folders of images, resident on the device where they fit."""

from kt.data.build import Data, DataSpec, build_data

__all__ = ["Data", "DataSpec", "build_data"]
