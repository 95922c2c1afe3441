"""Rows with labels: tables of paths to images, and Parquet files with the bytes of images."""
