"""Text, pictures and latents in, pictures out."""
