"""How fast and how small: Würstchen beside diffusers' copy of it, with full-size networks of seeded random weights.

`python -m tools.bench --quick`, or for one piece of work, again and again while it is made faster:

    python -m tools.bench --stages prior --sizes 512 --dtypes bf16 --repeat 5

`cases` says what can be measured. `weights` are written once, to a folder that is gone afterwards, and read by both
sides, `ours` and `peer`. `timing` takes their time in turn, `child` their memory and loading, each in a process of its
own; `limits` says what the machine could do at best, `report` makes the table. `run` does it all.
"""
