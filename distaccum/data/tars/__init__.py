"""Samples in tar files."""
