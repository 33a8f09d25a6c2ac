"""Prediction of many images, on one machine or as the work of one process of a cluster."""

from .bulk_prediction import predict_images
from .image_sources import ImageItem, list_images
from .output_folder import FORMATS, BulkOutput

__all__ = ["FORMATS", "BulkOutput", "ImageItem", "list_images", "predict_images"]
