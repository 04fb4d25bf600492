"""Samples that can only be read forwards."""
