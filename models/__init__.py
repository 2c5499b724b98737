"""Block-diffusion architectures, checkpoint loading and the bundled model."""
