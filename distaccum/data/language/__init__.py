"""Texts, and the tokens that are made of them."""
