"""Compatibility, files, images, environment, logging and the names of evaluation protocols."""
