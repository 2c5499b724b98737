"""The engine: requests, scheduling, KV pages, the step loop. Knows torch; knows no HTTP."""
