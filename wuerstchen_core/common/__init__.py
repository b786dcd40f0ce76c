"""Helpers for all folders: atomic files, texts, devices, dataclasses from tables, picture sizes."""
