"""What a run reads: documents, their tokens, and the rows and batches cut from them."""
