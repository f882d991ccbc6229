"""Multi-head latent attention and its paged cache."""
