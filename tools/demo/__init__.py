"""Trains, evaluates and illustrates the shipped model."""
