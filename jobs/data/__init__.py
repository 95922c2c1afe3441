"""Datasets that shipped descriptions name; the loader, which turns one into micro-batches; their copies on a GPU."""

from jobs.data.class_folders import IMAGE_SUFFIXES
from jobs.data.datasets import digits, synthetic_images
from jobs.data.image_folders import image_folder
from jobs.data.labelled_images import LabelledImages, read_image

__all__ = ["IMAGE_SUFFIXES", "LabelledImages", "digits", "image_folder", "read_image", "synthetic_images"]
