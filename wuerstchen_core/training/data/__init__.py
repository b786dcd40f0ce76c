"""Training images with captions: folders, shards, Hugging Face datasets, streams, caches of latents, or the demo.

`files.open_dataset` returns the dataset that a `[data]` table describes. `filters` defines the table of image files,
which selects images and assigns them to `buckets`. `open` opens a stream (`streams`) or, by `open_source`, other
`sources` (`folder`, `shards`, `hf_datasets`, `latent_cache`), `epoch_order` shuffles images and `loading` reads them in
batches.
"""
