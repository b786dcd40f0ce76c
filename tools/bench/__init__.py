"""Time and memory of networks with random weights, compared with diffusers: docs/speed.md.

`cases` lists the benchmarks, `weights` makes their random weights, and `wuerstchen`, `diffusers_baseline` and
`train_step` are the two sides. `run` times both sides in turn in one process, `subprocess_worker` measures memory in a
process each, and `report` prints the table.
"""
