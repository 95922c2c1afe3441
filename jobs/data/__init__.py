"""Datasets that shipped descriptions name, and the loader that turns a dataset into micro-batches on the device."""

from jobs.data.class_folders import IMAGE_SUFFIXES
from jobs.data.datasets import digits, synthetic_images
from jobs.data.image_folders import image_folder
from jobs.data.labelled_images import LabelledImages, read_image

__all__ = ["IMAGE_SUFFIXES", "LabelledImages", "digits", "image_folder", "read_image", "synthetic_images"]
