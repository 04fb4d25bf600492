"""Measures a training in processes of its own, for tools that try it in several ways."""
