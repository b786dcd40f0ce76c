"""Schedules, samplers, interpolation and masks."""
