"""Training images with captions, from folders, local shards, streams of shards, caches of latents, or the demo.

`files.open_dataset` returns the dataset that a `[data]` table describes. `open` reads the table and opens an
`ImageSource` (`folder`, `shards`, `latent_cache`) or a stream (`streams`); `filters` and `buckets` select images,
`epoch_order` shuffles them and `loading` reads them in batches.
"""
