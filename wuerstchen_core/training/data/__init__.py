"""Pictures with captions to train on, from folders, local shards or streams of shards.

`opening` makes what a `[data]` table describes of a `Source` (`folder`, `shards`), its `filters`, `buckets` and the
`order` of its batches, read by `loading`; `streams` does the same for shards that can only be read front to back.
"""
