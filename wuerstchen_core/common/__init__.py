"""Helpers of every folder: atomic files, text, devices, dataclasses out of tables, picture geometry."""
