"""Training images with captions, from folders, local shards, streams of shards, caches of latents, or the demo.

`files.open_dataset` returns the dataset that a `[data]` table describes. `filters` defines the table of image files,
which selects images and assigns them to `buckets`. `open` opens a source (`folder`, `shards`, `latent_cache`) or
a stream (`streams`), `epoch_order` shuffles images and `loading` reads them in batches.
"""
