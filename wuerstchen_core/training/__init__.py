"""Trainers for every stage: `python -m wuerstchen_core train STAGE --config FILE.toml`."""
