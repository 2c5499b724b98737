"""The shapes of the OpenAI API, and an engine that speaks them; no HTTP, no Ray."""
