"""Schedules, samplers and sizes."""
