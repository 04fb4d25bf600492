"""Rows of JSON lines, Parquet, other tables and datasets of Hugging Face."""
