"""Many requests as a job: files of requests in, files of results out, each exactly once."""
