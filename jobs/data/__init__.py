"""Datasets that shipped descriptions name; the loader, which turns one into micro-batches; their copies on a GPU."""

from jobs.data.datasets import digits, synthetic_images
from jobs.images.decoding import BadSample, read_image
from jobs.images.folders.class_folders import IMAGE_SUFFIXES
from jobs.images.folders.image_folders import image_folder
from jobs.images.labelled_images import LabelledImages
from jobs.images.tables.image_tables import image_table
from jobs.images.tables.parquet_images import parquet_images
from jobs.images.tar.tar_shards import tar_shards

__all__ = [
    "IMAGE_SUFFIXES",
    "BadSample",
    "LabelledImages",
    "digits",
    "image_folder",
    "image_table",
    "parquet_images",
    "read_image",
    "synthetic_images",
    "tar_shards",
]
