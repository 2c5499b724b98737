"""Operations on ragged batches over paged KV, each with its definition in plain torch."""
