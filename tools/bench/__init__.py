"""Time and memory of full-size networks with random weights, compared with diffusers: docs/speed.md.

`cases` lists the benchmarks, `weights` writes their networks to a temporary folder, and `wuerstchen`,
`diffusers_baseline` and `train_step` are the two sides that load them. `run` times both sides in turn in one process,
`subprocess_worker` measures memory and loading in a process each, and `report` prints the table.
"""
