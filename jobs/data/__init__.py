"""Datasets that ready-made descriptions name, and the way from one to micro-batches on the device."""

from jobs.data.datasets import IMAGE_SUFFIXES, LabelledImages, digits, image_folder, read_image, synthetic_images

__all__ = ["IMAGE_SUFFIXES", "LabelledImages", "digits", "image_folder", "read_image", "synthetic_images"]
