"""What Ray owns below serving and batches: where ranks run, what GPUs do."""
