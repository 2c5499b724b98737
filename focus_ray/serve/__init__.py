"""HTTP on Ray Serve: an OpenAI-compatible face over one engine. Knows no tensors."""
